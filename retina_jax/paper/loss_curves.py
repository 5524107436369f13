"""The package's own classification losses as curves over x_t = y x (equation 6), without alpha.

A single class and target 1 make the logit x_t itself, and alpha = 1 its weight, so what is drawn is what is trained with.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from retina_jax.losses.classification import ClassificationLoss, cross_entropy, focal, focal_star


def ce() -> ClassificationLoss:
    """Equation 1."""
    return cross_entropy


def fl(gamma: float) -> ClassificationLoss:
    """Equation 4."""
    return partial(focal, alpha=1.0, gamma=gamma)


def fl_star(gamma: float, beta: float) -> ClassificationLoss:
    """Equation 8."""
    return partial(focal_star, alpha=1.0, gamma=gamma, beta=beta)


SELECTED = {
    "CE": ce(),
    "FL γ = 2": fl(2.0),
    "FL* γ = 2, β = 1": fl_star(2.0, 1.0),
    "FL* γ = 4, β = 0": fl_star(4.0, 0.0),
}
"""The losses of Figures 5 and 6, which are those of Table 3."""


def loss_values(loss: ClassificationLoss, x_t: Float[np.ndarray, " N"]) -> Float32[np.ndarray, " N"]:
    """Loss at each x_t, the logit on the side of the truth: x_t > 0 is classified right."""
    return np.asarray(_of_logits(loss, jnp.asarray(x_t, jnp.float32)))


def loss_slopes(loss: ClassificationLoss, x_t: Float[np.ndarray, " N"]) -> Float32[np.ndarray, " N"]:
    """Derivative of the loss by x_t at each x_t: equations 9 to 11 for y = 1."""
    return np.asarray(jax.grad(lambda x: _of_logits(loss, x).sum())(jnp.asarray(x_t, jnp.float32)))


def x_of_p(p_t: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """The x_t whose sigmoid is p_t, for 0 < p_t < 1."""
    return np.log(p_t) - np.log1p(-p_t)


def _of_logits(loss: ClassificationLoss, x_t: Float32[Array, " N"]) -> Float32[Array, " N"]:
    return loss(x_t[:, None], jnp.zeros(x_t.shape, jnp.int32))[:, 0]
