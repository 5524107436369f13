"""What a run says while it runs: one line an event, on the standard output."""

from __future__ import annotations

import sys

from retina_jax.errors import one_line


def tell(line: str, end: str = "\n") -> None:
    """Print `line` at once. A log that cannot be written (a full disk takes those too) ends nothing."""
    try:
        print(line, end=end, flush=True)
    except OSError:
        return


def warn(line: str) -> None:
    """Print a warning on a line of its own, from whatever thread, as `one_line` gives it."""
    tell(("\n" if sys.stdout is not None and sys.stdout.isatty() else "") + one_line(f"warning: {line}"))


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, 0:00:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
