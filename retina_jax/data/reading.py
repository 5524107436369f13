"""Files whose names come from a data set: read whole, but nothing that never ends, and never more than is reasonable."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from retina_jax.errors import reason

T = TypeVar("T")
log = logging.getLogger(__name__)
NEVER_WAITS = getattr(os, "O_NONBLOCK", 0)
"""Opening a pipe that nobody writes to returns at once; reading a regular file is as without it."""
PAUSES = (0.5, 2.0, 8.0)
"""Seconds before a read is tried again, and again."""
_PASSING = "EIO ESTALE ETIMEDOUT EAGAIN EINTR EBUSY ECONNRESET EREMOTEIO"
PASSING = frozenset(getattr(errno, name) for name in _PASSING.split() if hasattr(errno, name))
"""Errors of a network file system that may be gone the next time; some systems lack some of the names."""


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading, a symbolic link followed wherever it leads.

    Raises OSError, its strerror one line: for a file that cannot be read, for a folder, a pipe, a socket or a device, none
    of which is waited for, and for a name that no file can have.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | NEVER_WAITS | getattr(os, "O_BINARY", 0))
    except ValueError:  # A NUL, or what the file system's encoding lacks.
        raise OSError(errno.EINVAL, "no file can have this name", repr(path)) from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it must be a regular file", str(path))
        yield file


def read_file(path: Path, largest: int) -> bytes:
    """The content of a regular file of at most `largest` bytes.

    Raises OSError as `open_file` does, and for one of more bytes; exactly `largest` are read.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise OSError(errno.EFBIG, f"it has {size} bytes; at most {largest} are read", str(path))
        return file.read(size)  # No more, should it be growing.


def read_again(read: Callable[[], T], name: str) -> T:
    """What `read` gives, called again after each of PAUSES while it fails with an error that may pass; a line each time.

    Any other OSError is raised at once, and the last of them when the pauses are over.
    """
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING and not isinstance(error, TimeoutError):
                raise
            log.warning("%s: cannot be read: %s; tried again in %g s", name, reason(error), pause)
        time.sleep(pause)
    return read()
