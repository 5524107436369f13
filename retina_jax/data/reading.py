"""Files whose names come from a data set: read whole, but nothing that never ends, and never more than is reasonable."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

NEVER_WAITS = getattr(os, "O_NONBLOCK", 0)
"""Opening a pipe that nobody writes to returns at once; reading a regular file is as without it."""


def read_file(path: Path, largest: int) -> bytes:
    """The content of a regular file of at most `largest` bytes, a symbolic link followed wherever it leads.

    Raises OSError, its strerror one line: for a file that cannot be read, for one of more bytes (exactly `largest` are
    read), for a folder, a pipe, a socket or a device, none of which is waited for, and for a name that no file can have.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | NEVER_WAITS)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it must be a regular file", str(path))
            if status.st_size > largest:
                raise OSError(errno.EFBIG, f"it has {status.st_size} bytes; at most {largest} are read", str(path))
            return file.read(status.st_size)  # No more, should it be growing.
    except ValueError:  # A NUL, or what the file system's encoding lacks.
        raise OSError(errno.EINVAL, "no file can have this name", repr(path)) from None


def reason(error: OSError) -> str:
    """Why, on one line; also of an error that was raised with a sentence instead of a number."""
    return error.strerror or (str(error) or type(error).__name__).splitlines()[0]
