"""Files that are slow to come: waited for without end, but never in silence."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)
PATIENCE = 60.0
"""Seconds after which a batch that is still waited for is spoken of."""


class Reads:
    """The files that threads are reading; `where` says what messages call them."""

    def __init__(self, where: Callable[[int], str]) -> None:
        self._where = where
        self._since: dict[int, tuple[int, float]] = {}
        """By thread: what it reads, and since when."""

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
        timer = threading.Timer(PATIENCE, self._report, [step, PATIENCE])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _report(self, step: int, waited: float) -> None:
        now = time.monotonic()
        longest = sorted(self._since.copy().values(), key=lambda read: read[1])[:3]
        files = ", ".join(f"{self._where(index)} ({now - since:.0f} s)" for index, since in longest)
        log.warning("batch %d: waited %.0f s for its images; being read: %s", step, waited, files or "none")
