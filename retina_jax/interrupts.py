"""Ends a script with one line at a signal while its imports run. Scripts import this module before all others.

Python would end with a traceback at Ctrl-C, and without a line at SIGTERM. After the imports, `cli.one_line_errors` sets
other handlers; in train.py, which is still starting then, `distributed.Interruption` does.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Ctrl-C, what job schedulers send, and the end of the terminal."""
AGAIN_SECONDS = 0.05  # until an exception that Python has dropped is raised again


class Interrupted(KeyboardInterrupt):
    """A command was interrupted by the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def end_at_start(number: int, frame: FrameType | None) -> None:
    """Ends the process at once, with the exit status of a stopped run."""
    os.write(sys.stderr.fileno(), f"stopped by {signal.Signals(number).name} while starting\n".encode())
    os._exit(130 if number == signal.SIGINT else 0)


def restore(numbers: Iterable[int] = SIGNALS) -> None:
    """Returns the signals to Python."""
    for number in numbers:
        if signal.getsignal(number) is end_at_start:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def catch(handler: Callable[[int, FrameType | None], None] = end_at_start) -> None:
    """Makes signals call `handler`, except those that are ignored, as nohup sets them, or that have a handler of another
    module. It does nothing outside the main thread, where Python cannot handle signals."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, end_at_start):
            signal.signal(number, handler)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Makes signals raise Interrupted. During the block it is raised again if Python drops it, as in JAX's callback of the
    garbage collector, where a signal in four of four runs of predict.py was lost."""
    before = sys.unraisablehook

    def on_dropped(dropped: "sys.UnraisableHookArgs") -> None:
        if not isinstance(dropped.exc_value, Interrupted):
            return before(dropped)
        number = dropped.exc_value.number
        signal.signal(signal.SIGALRM, lambda *_: _interrupt(number))
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)

    catch(_interrupt)
    sys.unraisablehook = on_dropped
    try:
        yield
    finally:
        sys.unraisablehook = before


def _interrupt(number: int, frame: FrameType | None = None) -> None:
    raise Interrupted(number)


_main = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
if _main.parent.name == "scripts":  # not where scripts are imported
    catch()
