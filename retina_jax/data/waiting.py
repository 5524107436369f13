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
