"""Everything a step changes, and its checksum."""

from __future__ import annotations

import hashlib
from typing import Any

import flax.struct
import jax
import numpy as np
import optax
from jaxtyping import PyTree

from retina_jax.losses.detection import EMA_START


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
        """The collections `RetinaNet.apply` takes."""
        return {"params": self.params, "frozen": self.frozen, "stats": self.stats}


def new_state(variables: dict[str, PyTree], optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step; `variables` as `initialise` gives them."""
    params = variables["params"]
    return TrainState(
        step=np.zeros((), np.int32),
        params=params,
        frozen=variables.get("frozen", {}),
        stats=variables.get("stats", {}),
        opt_state=jax.tree.map(np.asarray, optimizer.init(params)),
        normaliser=np.asarray(EMA_START, np.float32),
        skipped=np.zeros((), np.int32),
    )


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
