"""Files whose names come from a data set: read whole, but nothing that never ends, and never more than is reasonable."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import threading
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


# Files that are slow to come: waited for without end, but never in silence.

PATIENCE = 60.0
"""Seconds after which a batch that is still waited for is spoken of."""
LOOKS = 5.0
"""Seconds between two looks at how long that has been."""


class Reads:
    """The files that threads are reading; `where` says what messages call them."""

    def __init__(self, where: Callable[[int], str]) -> None:
        self._where = where
        self._since: dict[int, tuple[int, float]] = {}
        """By thread: what it reads, and since when."""
        self._waits: tuple[int, float] | None = None
        """The step whose batch is waited for, and since when."""
        self._watched = False
        self._lock = threading.Lock()
        """Of `_waits` and `_watched`."""

    @contextlib.contextmanager
    def reading(self, index: int) -> Iterator[None]:
        """This thread reads `index` meanwhile."""
        thread = threading.get_ident()
        self._since[thread] = index, time.monotonic()
        try:
            yield
        finally:
            del self._since[thread]

    @contextlib.contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        """A batch is waited for meanwhile: after PATIENCE seconds one line names what has been read for longest."""
        with self._lock:
            self._waits = step, time.monotonic()
            if not self._watched:
                self._watched = True
                threading.Thread(target=self._watch, name="slow files", daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                self._waits = None

    def _watch(self) -> None:
        """Until it looks and nothing is waited for: so one thread serves many batches, and none outlives them for long.

        One for each batch would cost the loop 0.1 ms, under load 1 ms.
        """
        told = None
        while True:
            time.sleep(min(LOOKS, PATIENCE / 2))
            with self._lock:
                waits = self._waits
                if waits is None:
                    self._watched = False
                    return
            waited = time.monotonic() - waits[1]
            if waited >= PATIENCE and waits is not told:
                told = waits
                self._report(waits[0], waited)

    def _report(self, step: int, waited: float) -> None:
        now = time.monotonic()
        longest = sorted(self._since.copy().values(), key=lambda read: read[1])[:3]
        files = ", ".join(f"{self._where(index)} ({now - since:.0f} s)" for index, since in longest)
        log.warning("batch %d: waited %.0f s for its images; being read: %s", step, waited, files or "none")
