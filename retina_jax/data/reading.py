"""Reads files named by a dataset: regular files only, with a size limit, retries, and a log line for slow ones."""

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

from retina_jax.errors import one_line, reason

T = TypeVar("T")
log = logging.getLogger(__name__)
PATIENCE = 60.0  # seconds of waiting for a batch after which a line is logged
CHECKS = 5.0  # seconds between two checks of that time
PAUSES = (0.5, 2.0, 8.0)  # seconds before each retry
_TEMPORARY = "EIO ESTALE ETIMEDOUT EAGAIN EINTR EBUSY ECONNRESET EREMOTEIO"  # of network file systems, possibly
TEMPORARY = frozenset(getattr(errno, name) for name in _TEMPORARY.split() if hasattr(errno, name))


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading, through symbolic links; OSError for anything else and for an invalid name."""
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # not to wait for the writer of a pipe
    try:
        descriptor = os.open(path, os.O_RDONLY | flags)
    except ValueError:  # a NUL, or a character outside the file system's encoding
        raise OSError(errno.EINVAL, "invalid file name", repr(path)) from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield file


def without_links(path: str, flags: int) -> int:
    """Opens a file for `open(path, mode, opener=without_links)`; OSError if the path is a symbolic link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def read_file(path: Path, largest: int) -> bytes:
    """Returns the content of a regular file. Raises OSError like `open_file`, or if it has more than `largest` bytes."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise OSError(errno.EFBIG, f"it has {size} bytes; at most {largest} are read", str(path))
        return file.read(size)  # not more, if it grows


def read_again(read: Callable[[], T], name: str) -> T:
    """Returns `read()`, retried after each of PAUSES for TEMPORARY errors, with a log line; raises others at once."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in TEMPORARY and not isinstance(error, TimeoutError):
                raise
            log.warning("warning: %s: cannot be read: %s; trying again in %g s", one_line(name), reason(error), pause)
        time.sleep(pause)
    return read()


class SlowReadMonitor:
    """A monitor that logs which files are being read when a batch takes too long; `where` returns their names."""

    def __init__(self, where: Callable[[int], str]) -> None:
        self._where = where
        self._reads: dict[int, tuple[int, float]] = {}  # thread to the index that it reads and when it started
        self._waits: tuple[int, float] | None = None  # the step whose batch is waited for, and since when
        self._watched = False
        self._lock = threading.Lock()  # protects `_waits` and `_watched`

    @contextlib.contextmanager
    def reading(self, index: int) -> Iterator[None]:
        """Marks this thread as reading `index`."""
        thread = threading.get_ident()
        self._reads[thread] = index, time.monotonic()
        try:
            yield
        finally:
            del self._reads[thread]

    @contextlib.contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        """Marks a batch as waited for. After PATIENCE seconds one line names the three files being read for longest."""
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
        """Ends at the first check without a wait. One thread per batch would cost the loop 0.1 ms, under load 1 ms."""
        reported = None
        while True:
            time.sleep(min(CHECKS, PATIENCE / 2))
            with self._lock:
                waits = self._waits
                if waits is None:
                    self._watched = False
                    return
            now = time.monotonic()
            if now - waits[1] >= PATIENCE and waits is not reported:
                reported = waits
                longest = sorted(self._reads.copy().values(), key=lambda read: read[1])[:3]
                files = ", ".join(f"{one_line(self._where(index))} ({now - since:.0f} s)" for index, since in longest)
                line = "warning: batch %d: waited %.0f s for its images; reading %s"
                log.warning(line, waits[0], now - waits[1], files or "none")
