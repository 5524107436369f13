"""Everything a step changes, and its checksum."""

from __future__ import annotations

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
    """State of a run after `step` steps. The data order is a function of the step, so this is all there is to resume.

    Leaves are arrays, or whatever libraries put in their place (shardings, abstract shapes), and not typed for that.
    """

    step: Any
    """Steps taken, int32 []."""
    params: PyTree
    """Trained parameters, float32."""
    frozen: PyTree
    """Parameters never trained: frozen BatchNorm and frozen stages."""
    stats: PyTree
    """Running statistics of model.norm "batch"; empty otherwise."""
    opt_state: optax.OptState
    normaliser: Any
    """float32 []: running mean of positive anchors a device (loss.normaliser "ema")."""
    skipped: Any
    """int32 []: steps so far that changed nothing, because they were not finite (training.skip_non_finite)."""

    @property
    def variables(self) -> dict[str, PyTree]:
        """The collections `RetinaNet.apply` takes, as training has them."""
        return {"params": self.params, "frozen": self.frozen, "stats": self.stats}

    @property
    def everything(self) -> dict[str, PyTree]:
        """All that the run has learnt: what its checksum is taken of."""
        return self.variables

    def detector(self, parameters: Literal["ema", "raw"] = "ema") -> dict[str, PyTree]:
        """The collections that detection takes: with "ema" the running means, where they are kept."""
        return self.variables


@flax.struct.dataclass
class AveragedState(TrainState):
    """A state that keeps running means as well (optimizer.ema_decay). Others have no such field, so that their checkpoints
    are what they were before there was one."""

    ema: PyTree
    """Running means of `params` and `stats`, by these names."""

    @property
    def everything(self) -> dict[str, PyTree]:
        """The running means included."""
        return {**self.variables, "ema": self.ema}

    def detector(self, parameters: Literal["ema", "raw"] = "ema") -> dict[str, PyTree]:
        """The collections that detection takes."""
        return self.variables if parameters == "raw" else {**self.variables, **self.ema}


def new_state(
    variables: dict[str, PyTree], optimizer: optax.GradientTransformation, *, averaged: bool = False
) -> TrainState:
    """State before the first step; `variables` as `initialise` gives them. `averaged`: running means are kept, and start
    there."""
    params, stats = variables["params"], variables.get("stats", {})
    state = TrainState(
        step=np.zeros((), np.int32),
        params=params,
        frozen=variables.get("frozen", {}),
        stats=stats,
        opt_state=jax.tree.map(np.asarray, optimizer.init(params)),
        normaliser=np.asarray(EMA_START, np.float32),
        skipped=np.zeros((), np.int32),
    )
    if not averaged:
        return state
    # Copies: a step takes the memory of all that it is given, of each array once.
    return AveragedState(**vars(state), ema=jax.tree.map(np.array, {"params": params, "stats": stats}))


def parameters_sha256(variables: dict[str, PyTree]) -> str:
    """Checksum of all trained and frozen parameters: names, shapes and bytes, in sorted order of the names.

    Two runs with the same sum hold the same detector to the last bit. Running statistics count among the frozen.
    """
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    digest = hashlib.sha256()
    for name in sorted(named):
        array = np.ascontiguousarray(jax.device_get(named[name]))
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
