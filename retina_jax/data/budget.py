"""A bound on what threads hold at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Budget:
    """Shares out `total`: what its holders have never adds up to more, and who asks for more than is left waits."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._left = total
        self._returned = threading.Condition()

    @contextlib.contextmanager
    def share(self, size: int) -> Iterator[None]:
        """Holds `size` of the budget; of more than there is at all, the whole. Never take a second share inside one."""
        size = min(size, self.total)
        with self._returned:
            self._returned.wait_for(lambda: self._left >= size)
            self._left -= size
        try:
            yield
        finally:
            with self._returned:
                self._left += size
                self._returned.notify_all()
