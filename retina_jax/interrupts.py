"""Ends a script with one line at a signal while its imports run. Scripts import this module before all others.

Python would end with a traceback at Ctrl-C, and without a line at SIGTERM. `cli.one_line_errors` restores its handlers; in
train.py, which is still starting then, `distributed.Interruption` does.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Ctrl-C, what job schedulers send, and the end of the terminal."""


def end_at_start(number: int, frame: FrameType | None) -> None:
    """Ends the process at once, with the exit status of a stopped run."""
    os.write(sys.stderr.fileno(), f"stopped by {signal.Signals(number).name} while starting\n".encode())
    os._exit(130 if number == signal.SIGINT else 0)


def restore(numbers: Iterable[int] = SIGNALS) -> None:
    """Returns the signals to Python."""
    for number in numbers:
        if signal.getsignal(number) is end_at_start:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def catch() -> None:
    """Makes signals end the process by `end_at_start`, except those that are ignored, as nohup sets them. It does nothing
    outside the main thread, where Python cannot handle signals."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end_at_start)


_main = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
if _main.parent.name == "scripts":  # not where scripts are imported
    catch()
