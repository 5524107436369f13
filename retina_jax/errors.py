"""What ends a run in one line: the errors that a person can mend, and being asked to stop; and any error in one line."""

from __future__ import annotations

import errno
import os
import signal

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)
"""What libraries bury in a page of their own."""


LONGEST_LINE = 1000
"""Characters of a line for a person."""


class PlainError(Exception):
    """Ends a script with its message, one line that names what is wrong and what would be right, and no traceback."""


class Stopped(Exception):
    """The run was asked to stop, by the signal `number`, after `step`, which is saved."""

    def __init__(self, number: int, step: int) -> None:
        after = f"after step {step}, which is saved" if step else "before the first step"
        super().__init__(f"stopped by {signal.Signals(number).name} {after}; the same command goes on from there")
        self.number = number


def ending(error: BaseException) -> tuple[str | None, int]:
    """The last line of a script that ends by `error`, as `one_line` gives it, and its exit status; None: the traceback."""
    if isinstance(error, PlainError):
        return one_line(f"error: {error}"), 2
    if isinstance(error, Stopped):
        return str(error), 130 if error.number == signal.SIGINT else 0
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(f"error: {error.filename}: {error.strerror}"), 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was saved before is whole", 130
    if type(error).__name__ == "JaxRuntimeError":
        from retina_jax.training.compilation import out_of_memory

        if (line := out_of_memory(error)) is not None:
            return one_line(f"error: {line}"), 2
    if isinstance(error, SystemExit):
        return None, error.code if isinstance(error.code, int) else int(error.code is not None)
    return None, 1


def reason(error: BaseException) -> str:
    """What an error says, in at most 200 characters on one line."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    for name in map(os.strerror, DISK_ERRORS):
        if name in said:
            return name
    return said.splitlines()[0][:200]


def one_line(message: object) -> str:
    """A message on one line of at most LONGEST_LINE characters, all of which a terminal can show: others are escaped.

    A longer one loses its middle: it begins with where the error is, and ends with what to do.
    """
    try:
        text = " ".join(str(message).split())
    except Exception:
        return "an error that cannot be shown"
    shown = printable(text)
    if len(shown) <= LONGEST_LINE:
        return shown
    end = LONGEST_LINE * 3 // 10
    return f"{shown[: LONGEST_LINE - end - 5]} ... {shown[-end:]}"


def printable(text: str) -> str:
    """The text with control characters, which a terminal would obey, as escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# What every reader and converter of weights ends in when it cannot go on.

LONGEST_NAME = 120
"""Characters of a name in a message."""


class WeightsError(PlainError, ValueError):
    """Weights that cannot be used; the message is one line that names the file, what is wrong and what would be right."""


def shortened(name: object) -> str:
    """A name from a file, as a message shows it: without control characters, a long one without its middle."""
    text = str(name)
    if len(text) > LONGEST_NAME:
        half = LONGEST_NAME // 2 - 2
        text = f"{text[:half]}...{text[-half:]}"
    return printable(text)


def quoted(name: object) -> str:
    """`shortened`, in quotes."""
    return f"'{shortened(name)}'"
