"""Classification losses as the paper writes them: equations 1 to 8 (Section 3, Appendix A) and the hinge of Section 5.1.

Training uses a faster form, `retina_jax.losses.fused`, which the tests compare with this file. Each function returns the
loss of every logit, float32 [... K], not yet summed. `losses.total` divides by the number of positive anchors.

An anchor with label k >= 0 has y = 1 for class k and y = -1 for the other classes. BACKGROUND (-1) means y = -1 for all K
classes. IGNORED (-2) makes alpha_t = 0, so the loss and its gradient are 0.

Logarithms and powers are taken in log space: log(p_t) = log_sigmoid(x_t) and log(1 - p_t) = log_sigmoid(-x_t). Values and
gradients are then accurate and finite for every finite logit and every gamma >= 0. The naive (1 - p_t)^gamma has the
gradient inf * 0 where the sigmoid saturates and gamma < 1 (Table 1b).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from retina_jax.config import LossConfig
from retina_jax.ops.matching import IGNORED

Logits, Labels, Losses = Float[Array, "*N K"], Int[Array, "*N"], Float32[Array, "*N K"]
ClassificationLoss = Callable[[Logits, Labels], Losses]

FAR = -(2**30)  # below all differences between two classes


def classification_loss(config: LossConfig) -> ClassificationLoss:
    """Returns the loss named by `loss.kind`, with the parameters of `config`."""
    losses = {
        "cross_entropy": cross_entropy,
        "balanced_cross_entropy": partial(balanced_cross_entropy, alpha=config.alpha),
        "focal": partial(focal, alpha=config.alpha, gamma=config.gamma),
        "focal_star": partial(focal_star, alpha=config.alpha, gamma=config.gamma, beta=config.star_beta),
        "hinge": partial(hinge, alpha=config.alpha, margin=config.hinge_margin),
    }
    return losses[config.kind]


def targets(logits: Logits, labels: Labels, foreground: float = 1.0, background: float = 1.0) -> tuple[Losses, Losses]:
    """Returns (y, alpha_t) of each logit: y is 1 or -1, alpha_t is `foreground` for y = 1, `background` for y = -1."""
    # XLA fuses these comparisons, so the one-hot array [... K] is never stored. All compare the difference from the class:
    # TPUs do store the labels repeated for each class, and would store a comparison of the label alone in the same way.
    labels = jnp.where(labels == IGNORED, FAR, labels)[..., None]
    difference = labels - lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    is_class = difference == 0
    alpha_t = jnp.where(is_class, foreground, jnp.where(difference <= FAR, 0.0, background))
    return jnp.where(is_class, 1.0, -1.0), alpha_t


def cross_entropy(logits: Logits, labels: Labels) -> Losses:
    """Computes CE = -log(p_t) (equation 1), with p_t = sigmoid(y x) (equation 2)."""
    y, weight = targets(logits, labels)  # 1, and 0 for ignored anchors
    return -weight * jax.nn.log_sigmoid(y * logits.astype(jnp.float32))


def balanced_cross_entropy(logits: Logits, labels: Labels, *, alpha: float) -> Losses:
    """Computes CE = -alpha_t log(p_t) (equation 3)."""
    y, alpha_t = targets(logits, labels, alpha, 1.0 - alpha)
    return -alpha_t * jax.nn.log_sigmoid(y * logits.astype(jnp.float32))


def focal(logits: Logits, labels: Labels, *, alpha: float, gamma: float) -> Losses:
    """Computes FL = -alpha_t (1 - p_t)^gamma log(p_t) (equation 5). Without alpha_t: equation 4; gamma = 0: equation 3."""
    y, alpha_t = targets(logits, labels, alpha, 1.0 - alpha)
    x_t = y * logits.astype(jnp.float32)
    log_p_t = jax.nn.log_sigmoid(x_t)
    modulating_factor = jnp.exp(gamma * jax.nn.log_sigmoid(-x_t))  # (1 - p_t)^gamma
    return -alpha_t * modulating_factor * log_p_t


def focal_star(logits: Logits, labels: Labels, *, alpha: float, gamma: float, beta: float) -> Losses:
    """Computes FL* = -alpha_t log(p_t*) / gamma (equation 8), p_t* = sigmoid(gamma x_t + beta) (equation 7), gamma > 0.
    gamma = 1 with beta = 0 is equation 3. gamma x_t + beta must be finite."""
    y, alpha_t = targets(logits, labels, alpha, 1.0 - alpha)
    x_t = y * logits.astype(jnp.float32)  # equation 6
    return -alpha_t * jax.nn.log_sigmoid(gamma * x_t + beta) / gamma


def hinge(logits: Logits, labels: Labels, *, alpha: float, margin: float) -> Losses:
    """Computes alpha_t max(0, margin - p_t). At p_t = margin the loss and its derivative are 0.

    Section 5.1 states only that the hinge loss on p_t "sets loss to 0 above a certain value of p_t" and was unstable. The
    slope of 1, the margin and alpha_t are choices of this project. The derivative by x_t, -alpha_t p_t (1 - p_t) below the
    margin, vanishes where an example is most wrong: a positive anchor that starts at p_t = pi gets almost no gradient.
    """
    y, alpha_t = targets(logits, labels, alpha, 1.0 - alpha)
    p_t = jax.nn.sigmoid(y * logits.astype(jnp.float32))
    return alpha_t * jnp.where(p_t < margin, margin - p_t, 0.0)
