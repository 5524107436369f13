"""SIGTERM and Ctrl-C stop training between two steps, all hosts at the same one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

from jax.experimental import multihost_utils

from retina_jax import distributed
from retina_jax.errors import Stopped

T = TypeVar("T")


class Interruption:
    """In the `with` block, SIGTERM and Ctrl-C make the next `check` raise Stopped; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self._number = 0
        self._before: dict[int, object] = {}
        self._checks = 0

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only there may Python handle signals
            # On several hosts JAX handles SIGTERM: it notifies the others and agrees with them on where to stop.
            for number in (signal.SIGINT,) if distributed.is_multihost() else (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self, step: int) -> None:
        """Raises Stopped after `step` if a signal has come. All hosts call it equally often and stop at the same call."""
        self._checks += 1
        if distributed.is_multihost():
            if multihost_utils.reached_preemption_sync_point(self._checks):
                raise Stopped(self._number or signal.SIGTERM, step)
        elif self._number:
            raise Stopped(self._number, step)

    def checked(self, step: int, items: Iterable[T]) -> Iterator[T]:
        """Yields `items`, and calls `check(step)` before each."""
        for item in items:
            self.check(step)
            yield item

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._number = number
        if distributed.is_multihost():
            os.kill(os.getpid(), signal.SIGTERM)
