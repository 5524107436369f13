"""What a run says while it runs: one line an event, on the standard output."""

from __future__ import annotations

import sys


def tell(line: str, end: str = "\n") -> None:
    """Print `line` at once. A log that cannot be written (a full disk takes those too) ends nothing."""
    try:
        print(line, end=end, flush=True)
    except OSError:
        return


def warn(line: str) -> None:
    """Tell of something that a person should know, on a line of its own, from whatever thread."""
    tell(("\n" if sys.stdout is not None and sys.stdout.isatty() else "") + f"warning: {line}")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, 0:00:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
