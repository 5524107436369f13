"""How far a long pass is: one line that is rewritten in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from retina_jax.console import tell

T = TypeVar("T")
OFTEN, SELDOM = 0.2, 15.0
"""Seconds between two signs of life, in a terminal and elsewhere; what takes less than that says nothing."""


class Progress(Generic[T]):
    """Hands on `items`, of which there are `total`, and says how many have come."""

    def __init__(self, what: str, items: Iterable[T], total: int) -> None:
        self._what, self._items, self._total = what, items, total

    def __iter__(self) -> Iterator[T]:
        terminal = sys.stdout.isatty()
        told, shown = time.monotonic(), False
        for count, item in enumerate(self._items, 1):
            yield item
            now = time.monotonic()
            if now - told >= (OFTEN if terminal else SELDOM):
                line = f"{self._what}: {count} of {self._total}"
                tell(f"\r{line}" if terminal else line, end="" if terminal else "\n")
                told, shown = now, True
        if terminal and shown:
            tell("\r\x1b[K", end="")
