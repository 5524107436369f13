"""Checkpoints with orbax: asynchronous, the newest N and the best by AP, restored onto any number of devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from retina_jax.config import ConfigError

T = TypeVar("T")


class Checkpoints:
    """The folder RUN/checkpoints, one sub-folder a saved step. Leaving the `with` block waits for the last write."""

    def __init__(self, folder: Path, keep: int | None = 2, *, read_only: bool = False) -> None:
        """`read_only`: leave alone what a training run may be writing there."""
        policies = ocp.training.preservation_policies
        best = policies.BestN(get_metric_fn=lambda m: m["AP"], n=1, keep_checkpoints_without_metrics=False)
        self._checkpointer = ocp.training.Checkpointer(
            folder.resolve(),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=not read_only,
        )
        self.folder = folder

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checkpointer.close()

    def save(self, step: int, state: PyTree, ap: float | None = None) -> None:
        """Start saving `state` as `step`; returns once the arrays may change. Saving a step that is there does nothing."""
        if step not in self.steps():
            self._checkpointer.save_async(step, state, force=True, metrics=None if ap is None else {"AP": ap})

    @contextlib.contextmanager
    def saved_if_it_fails(self, step: int, state: PyTree, first: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Whatever ends what is done in between, the steps taken before it are kept, unless `first`, called first, fails."""
        try:
            yield
        except BaseException:
            first()
            if step > 0:
                self.save(step, state)
            raise

    def wait(self) -> None:
        """Until the last save is whole on disk."""
        self._checkpointer.wait()

    def steps(self) -> list[int]:
        """Saved steps, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def best(self) -> int | None:
        """The kept step with the highest AP; None while none was scored."""
        scored = [c for c in self._checkpointer.checkpoints if c.metrics and c.metrics.get("AP") is not None]
        return max(scored, key=lambda c: (c.metrics["AP"], c.step)).step if scored else None

    def restore(self, like: T, step: int | None = None) -> T:
        """The state saved at `step` (None: the newest), in the types and shardings of `like` (arrays on devices)."""
        steps = self.steps()
        if not steps:
            raise ConfigError(f"{self.folder}: holds no checkpoint")
        if step is not None and step not in steps:
            raise ConfigError(f"--step {step}: {self.folder} holds {', '.join(map(str, steps))}")
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        step = steps[-1] if step is None else step
        try:
            return self._checkpointer.load(step, abstract)
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ConfigError(
                f"{self.folder / str(step)}: this checkpoint cannot be restored ({reason}); it is damaged or of another "
                f"network; saved steps: {', '.join(map(str, steps))}"
            ) from error
