"""Checkpoints: written beside the training by the first host, whole or not at all; read by every host, never unchecked."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from retina_jax import distributed
from retina_jax.config import ConfigError
from retina_jax.console import warn
from retina_jax.errors import Stopped, reason
from retina_jax.runs.files import CHECKSUMS, DiskError, check_room, damage, put_on_disk, write_checksums
from retina_jax.training.orbax_files import load_arrays, save_arrays

T = TypeVar("T")
Step = int | Literal["best"] | None
"""A saved step as it is asked for: its number, the best by AP, or None, the newest."""

LEFTOVERS = ("saving", "deleting-*", "*.orbax-checkpoint-tmp*")
"""What a kill may leave behind: none of it has a number for a name, so none of it is taken for a checkpoint."""


class Checkpoints:
    """The folder RUN/checkpoints, one sub-folder a saved step. Leaving the `with` block waits for the last write;
    by KeyboardInterrupt it does not, and a write that the end of the process meets half-way is given up.

    The state is the same on every device, so host 0 alone writes, and no save waits for another host or is half one host's.
    A step is written under RUN/checkpoints/saving with the checksums of its files, and gets its name, the number, by a
    rename, once the disk has it: a kill or a power cut at any moment leaves it whole or absent. A disk that only said so is
    found out by the checksums.
    """

    def __init__(self, folder: Path, keep: int | None = 2, *, read_only: bool = False) -> None:
        """`keep`: newest steps that stay, besides the best by AP; None: all. `read_only`: leave alone what a training run
        may be writing there."""
        self.folder, self._keep, self._read_only = folder, keep, read_only
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None
        self._failure = ""
        self._given_up = False

    def __enter__(self) -> Checkpoints:
        if not self._read_only and distributed.first():
            self._clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given_up = isinstance(error, KeyboardInterrupt)
        try:  # waits; nothing is said to other hosts that may not have come here
            self._writer.shutdown(wait=not self._given_up, cancel_futures=self._given_up)
        except KeyboardInterrupt:
            self._given_up = True
            raise
        if error is None or isinstance(error, Stopped):
            self.wait()

    def save(self, step: int, state: PyTree, ap: float | None = None) -> None:
        """Start saving `state` as `step`; returns once the arrays may change. Saving a step that is there does nothing.

        A disk that fails is warned of, and the run goes on: the next save tries anew, `wait` tells of a failed last one.
        Waits for the save before, not for other hosts: one host may call it alone, and all but the first do nothing.
        """
        if not distributed.first():
            return
        self._join()
        own = jax.device_get(jax.tree.map(lambda array: array.addressable_data(0), state))
        if jax.default_backend() == "cpu":  # these are views of the device's memory, all others are copies already
            own = jax.tree.map(np.array, own)
        self._pending = self._writer.submit(self._write, step, own, ap)

    def score(self, step: int, ap: float | None) -> None:
        """Note the AP of a saved `step` that was evaluated only later, as after a resume; then delete as a save does.

        None, a step that is not there and one that has its score already change nothing. A disk that fails is warned of.
        Waits for the save before, not for other hosts: all but the first do nothing.
        """
        if ap is None or not distributed.first():
            return
        self._join()
        if step not in self._saved() or self._ap(step) is not None:
            return
        scratch, place = self.folder / "saving" / "metrics", self.folder / str(step) / "metrics"
        try:
            scratch.parent.mkdir(exist_ok=True)
            scratch.write_text(json.dumps({"AP": ap}))
            put_on_disk(scratch)
            place.mkdir(exist_ok=True)
            scratch.replace(place / "metrics")
        except OSError as error:
            self._clear()
            warn(f"{self.folder}: the AP of step {step} could not be saved: {reason(error)}")
        else:
            self._delete_old()

    @contextlib.contextmanager
    def saved_if_it_fails(self, step: int, state: PyTree, first: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Whatever ends what is done in between, the steps taken before it are kept, unless `first`, called first, fails.

        Only KeyboardInterrupt, by which somebody wants the end at once, calls and saves nothing.
        """
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            with self._told_of(step, DiskError):
                first()
                # Any error, such as of a device that is gone: the one that led here is the one to tell.
                with self._told_of(step, Exception):
                    if step > 0:
                        self.save(step, state)
            raise

    @contextlib.contextmanager
    def _told_of(self, step: int, errors: type[Exception]) -> Iterator[None]:
        try:
            yield
        except errors as error:
            self._join()
            self._failure = f"{self.folder}: step {step} could not be saved: {reason(error)}"
            warn(self._failure)

    def wait(self) -> None:
        """Until the last save is whole on disk. Called by all hosts together; raises DiskError on all where it failed."""
        self._join()
        if failure := _anywhere(self._failure):
            raise DiskError(failure)

    def steps(self) -> list[int]:
        """Saved steps, oldest first, as host 0 sees them, the last save included. Called by all hosts together."""
        self._join()
        return json.loads(distributed.exchange(json.dumps(self._saved()))[0])

    def best(self) -> int | None:
        """The kept step with the highest AP, the newest of equal ones; None while none was scored."""
        scored = [(ap, step) for step in self._saved() if (ap := self._ap(step)) is not None]
        return max(scored)[1] if scored else None

    def restore(self, like: T, step: Step = None) -> T:
        """The state saved at `step`, in the types and shardings of `like` (arrays on devices). Called by all hosts together.

        `step` None: the newest that is whole. Damaged ones before it are warned of and, unless read_only, moved to
        `damaged-STEP`, out of the way of later saves. "best": the kept one with the highest AP, as host 0 sees it.

        Raises ConfigError where there is no such step, where none can be restored, and where one is whole but of another
        network.
        """
        if step == "best":
            step = json.loads(distributed.exchange(json.dumps(self.best()))[0])
            if step is None:
                raise ConfigError(f"--step best: no step in {self.folder} was scored; saved steps: {self.steps()}")
        passed: dict[int, str] = {}
        while left := [s for s in self.steps() if s not in passed and step in (None, s)]:
            state, passed[left[-1]] = self._read(left[-1], like)
            if state is not None:
                self._pass_over(passed, left[-1])
                return state
        if passed:
            told = "; ".join(f"{step}: {wrong}" for step, wrong in passed.items())
            raise ConfigError(
                f"{self.folder}: no checkpoint that can be restored ({told}); saved steps: {self.steps()}"
            )
        if step is None or not self.steps():
            raise ConfigError(f"{self.folder}: holds no checkpoint")
        raise ConfigError(f"--step {step}: {self.folder} holds {', '.join(map(str, self.steps()))}")

    def _read(self, step: int, like: T) -> tuple[T | None, str]:
        """The state, or what is wrong with it; every host comes to the same."""
        folder = self.folder / str(step)
        if wrong := _anywhere(damage(folder) if distributed.first() else ""):
            return None, wrong
        state = None
        try:
            state = load_arrays(folder, like)
        except ValueError as error:
            wrong = str(error)
        if not (wrong := _anywhere(wrong)):
            return state, ""
        if distributed.exchange(CHECKSUMS if (folder / CHECKSUMS).exists() else "")[
            0
        ]:  # else its run deleted it meanwhile
            raise ConfigError(
                f"{folder}: its files are whole, but are of another network or cannot be reached: {wrong}"
            )
        return None, wrong

    def _pass_over(self, passed: dict[int, str], taken: int) -> None:
        for step, wrong in passed.items():
            folder, aside = self.folder / str(step), self.folder / f"damaged-{step}"
            if not wrong or not distributed.first() or not folder.exists():
                continue
            moved = ""
            if not self._read_only:
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                moved = f"; it is moved to {aside.name}"
            warn(f"{folder}: is damaged ({wrong}), step {taken} is taken instead{moved}")

    def _write(self, step: int, state: PyTree, ap: float | None) -> None:
        saved: list[int] = []
        scratch = self.folder / "saving" / str(step)
        try:
            saved = self._saved()
            if step not in saved:
                self._clear()
                scratch.parent.mkdir(parents=True, exist_ok=True)
                check_room(scratch.parent, sum(a.nbytes + 4096 for a in jax.tree.leaves(state)))
                save_arrays(scratch, state)
                if ap is not None:
                    (scratch / "metrics").mkdir()
                    (scratch / "metrics" / "metrics").write_text(json.dumps({"AP": ap}))
                write_checksums(scratch)
                scratch.rename(self.folder / str(step))
                put_on_disk(self.folder)  # before older steps are deleted
        except Exception as error:  # libraries tell of a full disk in various ways; whatever it is, training goes on
            self._clear()
            newest = f"the newest whole checkpoint is step {saved[-1]}" if saved else "there is no whole checkpoint yet"
            self._failure = f"{self.folder}: step {step} could not be saved: {reason(error)}; {newest}"
            if not self._given_up:  # else the process ends under it, as somebody wanted
                warn(self._failure)
        else:
            self._failure = ""
            self._delete_old()

    def _delete_old(self) -> None:
        with contextlib.suppress(OSError):  # costs space only, and is tried again after the next save
            steps = self._saved()
            for step in {*steps} - {*steps[-(self._keep or len(steps)) :], self.best()}:
                (self.folder / str(step)).rename(self.folder / f"deleting-{step}")
        self._clear()

    def _clear(self) -> None:
        with contextlib.suppress(OSError):  # as above
            for path in [path for pattern in LEFTOVERS for path in self.folder.glob(pattern)]:
                shutil.rmtree(path, ignore_errors=True)

    def _join(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _saved(self) -> list[int]:
        try:
            return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())
        except FileNotFoundError:
            return []

    def _ap(self, step: int) -> float | None:
        try:
            return float(json.loads((self.folder / str(step) / "metrics" / "metrics").read_bytes())["AP"])
        except (OSError, ValueError, TypeError, LookupError):  # not scored, or not to be relied on
            return None


def _anywhere(wrong: str) -> str:
    """What is wrong on some host, the first of them, on every host; "" where nothing is wrong on any."""
    return next(filter(None, distributed.exchange(wrong)), "")
