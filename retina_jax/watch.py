"""Names the hosts for which the others wait: stopped, or stuck in reading a file.

Each host counts the points that all hosts reach equally often: steps, batches of an evaluation, exchanges. A thread shares
the counts through JAX's coordinator. A host that stays behind, or silent, is named by the others. The watch ends nothing: a
slow disk may answer again, and JAX's heartbeat ends the others if a host is stopped or lost.
"""

import math
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from jax.errors import JaxRuntimeError

LATE_SECONDS = 8  # after which a host is named: JAX's heartbeat may end the others 15 s after a host is stopped
LOOK_SECONDS, ANSWER_SECONDS = 2.0, 1.0  # between two looks at the counts, and for host 0 to answer
SILENT_SECONDS = 3.0  # without a look of its own, after which a host counts as behind all others
KEYS = "retina_jax/points/"  # in JAX's coordinator, each with the number of a host behind it


class Watch:
    """The points that this host has reached, and a thread that compares them with those of the others."""

    def __init__(self) -> None:
        self._count, self._where = 0, "the start"
        # when a host at a count was first seen behind others; inf: named
        self._since: dict[tuple[int, int], float] = {}
        self._looks = 0
        self._heard: dict[int, tuple[str, float]] = {}  # the number of a host's last look, and when it was first seen
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def reached(self, where: str = "") -> None:
        """Counts a point that all hosts reach equally often. `where` is its name, by default that of the one before."""
        self._count, self._where = self._count + 1, where or self._where

    def late(self, counts: Mapping[int, int], now: float) -> list[int]:
        """Returns the hosts that have stayed at a count for LATE_SECONDS with others ahead of them, each once."""
        behind = [(host, count) for host, count in counts.items() if count < max(counts.values())]
        self._since = {key: self._since.get(key, now) for key in behind}
        found = [key for key in behind if now - self._since[key] >= LATE_SECONDS]
        self._since |= dict.fromkeys(found, math.inf)
        return [host for host, _ in found]

    def start(self, client: Any, own: int) -> None:
        """Starts the thread on the host number `own`, with JAX's client of the coordinator, which runs on host 0."""
        self._thread = threading.Thread(target=self._run, args=(client, own), name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, which must not use the client after its end."""
        self._end.set()
        self._thread.join()

    def _run(self, client: Any, own: int) -> None:
        points = {0: (0, self._where)}
        while not self._end.wait(LOOK_SECONDS):
            try:
                points = self._shared(client, own)
            except JaxRuntimeError:  # host 0 does not answer
                points = {0: (-1, points[0][1]), own: (self._count, self._where)}
            for host in self.late({host: count for host, (count, _) in points.items()}, time.monotonic()):
                if host != own:
                    line = f"no progress of host {host} for {LATE_SECONDS} s, last seen at {points[host][1]}"
                    what = "others wait for it; look at its log, processes and disks"
                    print(f"warning: {line}; {what}", file=sys.stderr, flush=True)

    def _shared(self, client: Any, own: int) -> dict[int, tuple[int, str]]:
        """Shares this host's count; returns the count and the place of every host."""
        if own:  # of these calls, only this one has a time limit
            client.blocking_key_value_get(f"{KEYS}0", int(1000 * ANSWER_SECONDS))
        self._looks += 1
        client.key_value_set(f"{KEYS}{own}", f"{self._count} {self._looks} {self._where}", allow_overwrite=True)
        shared = {int(key.rpartition("/")[2]): value.split(" ", 2) for key, value in client.key_value_dir_get(KEYS)}
        now = time.monotonic()
        for host, (_, look, _) in shared.items():
            if look != self._heard.get(host, ("", now))[0]:
                self._heard[host] = look, now
        silent = {host for host, (_, since) in self._heard.items() if now - since > SILENT_SECONDS}
        return {host: (-1 if host in silent else int(count), where) for host, (count, _, where) in shared.items()}
