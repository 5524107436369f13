"""Running mean of the parameters (EMA): what a run is judged by once its own parameters still jump about."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, PyTree


def averaging_decay(updates: Int[Array, ""], decay: float) -> Float32[Array, ""]:
    """min(decay, (1 + t) / (10 + t)) after t `updates`: .1 at the first, so that the random start is soon forgotten.

    The warm-up is that of TensorFlow's ExponentialMovingAverage. It meets .999 after 8990 updates, .9999 after 89990.
    """
    t = updates.astype(jnp.float32)  # exact up to 2^24
    return jnp.minimum(jnp.float32(decay), (1 + t) / (10 + t))


def average(mean: PyTree, new: PyTree, updates: Int[Array, ""], decay: float) -> PyTree:
    """The mean after one more update: d mean + (1 - d) new, d as `averaging_decay` of the updates before gives it."""
    d = averaging_decay(updates, decay)
    return jax.tree.map(lambda m, x: d * m + (1 - d) * x, mean, new)
