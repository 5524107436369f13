"""Asked to stop (SIGTERM, Ctrl-C): noticed between steps, by all hosts at the same one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import TypeVar

from jax.experimental import multihost_utils

from retina_jax import distributed
from retina_jax.errors import Stopped

T = TypeVar("T")


class Interruption:
    """While the `with` block runs, SIGTERM and Ctrl-C only make `check` raise Stopped. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self._number = 0
        self._before: dict[int, object] = {}
        self._checks = 0

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only there may Python take signals
            # On several hosts SIGTERM belongs to JAX, which tells the others and agrees with them on where to stop.
            for number in (signal.SIGINT,) if distributed.several() else (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # else whoever started this process wants it to go on
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self, step: int) -> None:
        """Raise Stopped where the run is to stop here, after `step`. All hosts check equally often, and stop at the same
        check."""
        self._checks += 1
        if distributed.several():
            if multihost_utils.reached_preemption_sync_point(self._checks):
                raise Stopped(self._number or signal.SIGTERM, step)
        elif self._number:
            raise Stopped(self._number, step)

    def checked(self, step: int, items: Iterable[T]) -> Iterator[T]:
        """`items`, with a `check(step)` before each."""
        for item in items:
            self.check(step)
            yield item

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._number = number
        if distributed.several():
            os.kill(os.getpid(), signal.SIGTERM)
