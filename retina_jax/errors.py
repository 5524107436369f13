"""What ends a run in one line: the errors that a person can mend, and being asked to stop."""

from __future__ import annotations

import signal


class PlainError(Exception):
    """Ends a script with its message, one line that names what is wrong and what would be right, and no traceback."""


class Stopped(Exception):
    """The run was asked to stop, by the signal `number`, after `step`, which is saved."""

    def __init__(self, number: int, step: int) -> None:
        after = f"after step {step}, which is saved" if step else "before the first step"
        super().__init__(f"stopped by {signal.Signals(number).name} {after}; the same command goes on from there")
        self.number = number
