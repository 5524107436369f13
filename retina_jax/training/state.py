"""What a training step changes, and its checksum."""

import hashlib
from typing import Any, Literal

import flax.struct
import jax
import numpy as np
import optax
from jaxtyping import PyTree

from retina_jax.losses.total import EMA_START


@flax.struct.dataclass
class TrainState:
    """State of a run after `step` steps. The data order is a function of the step, so nothing else is needed to resume."""

    step: Any  # steps taken, int32 []
    params: PyTree  # trained parameters, float32
    frozen: PyTree  # parameters never trained: frozen BatchNorm and frozen stages
    stats: PyTree  # running statistics of BatchNorm ("batch"); empty otherwise
    opt_state: optax.OptState
    normaliser: Any  # float32 []: running mean of positive anchors per micro-batch (loss.normaliser "ema")
    skipped: Any  # int32 []: steps skipped so far because they were not finite (training.skip_non_finite)

    @property
    def variables(self) -> dict[str, PyTree]:
        """The collections that training passes to `RetinaNet.apply`."""
        return {"params": self.params, "frozen": self.frozen, "stats": self.stats}

    @property
    def all_parameters(self) -> dict[str, PyTree]:
        """All that the run has learned, with the averages; its checksum is taken of this."""
        return {**self.variables, "ema": self.ema} if isinstance(self, AveragedState) else self.variables

    def detector(self, parameters: Literal["ema", "raw"] = "ema") -> dict[str, PyTree]:
        """Returns the collections for detection: with "ema" the averaged ones, if the run keeps them."""
        averaged = parameters == "ema" and isinstance(self, AveragedState)
        return {**self.variables, **self.ema} if averaged else self.variables


@flax.struct.dataclass
class AveragedState(TrainState):
    """A state that also averages parameters and statistics (optimizer.ema_decay). Other checkpoints lack the field."""

    ema: PyTree  # exponential moving averages of `params` and `stats`, by these names


def state_from(
    variables: dict[str, PyTree], optimizer: optax.GradientTransformation, *, averaged: bool = False
) -> TrainState:
    """Returns the state before the first step, from the `variables` of `initialise` or imported ones."""
    params, stats = variables["params"], variables.get("stats", {})
    fields = {
        "step": np.zeros((), np.int32),
        "params": params,
        "frozen": variables.get("frozen", {}),
        "stats": stats,
        "opt_state": jax.tree.map(np.asarray, optimizer.init(params)),
        "normaliser": np.asarray(EMA_START, np.float32),
        "skipped": np.zeros((), np.int32),
    }
    if not averaged:
        return TrainState(**fields)
    # Copies, because a step takes over (donates) the buffer of each array once.
    return AveragedState(**fields, ema=jax.tree.map(np.array, {"params": params, "stats": stats}))


def parameters_sha256(variables: dict[str, PyTree]) -> str:
    """Returns the checksum of all arrays of `variables`: names, shapes and bytes, in sorted order of the names."""
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(variables)}
    digest = hashlib.sha256()
    for name in sorted(named):
        array = np.ascontiguousarray(jax.device_get(named[name]))
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
