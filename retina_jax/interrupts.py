"""Ends a script with one line at a signal while its imports run. Scripts import this module before all others.

Imports take seconds. Python would end with a traceback at Ctrl-C, and without a line at SIGTERM. In
`cli.one_line_errors` the signals are Python's again.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Ctrl-C, what job schedulers send, and the end of the terminal."""


def end_at_start(number: int, frame: FrameType | None) -> None:
    """Ends the process at once, with the exit status of a stopped run."""
    os.write(sys.stderr.fileno(), f"stopped by {signal.Signals(number).name} while starting\n".encode())
    os._exit(130 if number == signal.SIGINT else 0)


def restore() -> None:
    """Returns the signals to Python."""
    for number in SIGNALS:
        if signal.getsignal(number) is end_at_start:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def catch() -> None:
    """Makes signals end the process by `end_at_start`, except those that are ignored, as nohup sets them."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end_at_start)


# Not where the scripts are imported.
if Path(getattr(sys.modules["__main__"], "__file__", None) or "").parent.name == "scripts":
    catch()
