"""Classification losses on logits: cross entropy (equation 1), balanced (3) and focal (5), one sigmoid a class.

Each takes logits [... K] and labels [...] and gives the loss of every logit, float32 [... K], not yet summed:
label k >= 0 makes target k 1 and the others 0, BACKGROUND (-1) makes all K targets 0, and IGNORED (-2) gives loss 0
and gradient 0 on all K. The paper divides the sum over anchors and classes by the number of positive anchors; that is
done in `retina_jax.losses.detection`.

All three are one function of x_t = y x (equation 6, y = ±1), for p_t = sigmoid(x_t):

    FL = alpha_t (1 - p_t)^gamma * softplus(-x_t),       softplus(-x_t) = -log(p_t)

Powers of 1 - p_t are taken of sigmoid(-x_t), never of a difference from 1, so value and gradient are accurate and
finite for every finite logit and every gamma >= 0, in particular the fractional ones of Table 1b, whose naive gradient
is inf * 0 where the sigmoid saturates.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from retina_jax.config import ConfigError, LossConfig
from retina_jax.matching import IGNORED

ClassificationLoss = Callable[[Float[Array, "*N K"], Int[Array, "*N"]], Float32[Array, "*N K"]]


def classification_loss(config: LossConfig) -> ClassificationLoss:
    """The loss that `loss.kind` names, with alpha and gamma filled in."""
    if config.kind == "cross_entropy":
        return cross_entropy
    if config.kind == "balanced_cross_entropy":
        return functools.partial(balanced_cross_entropy, alpha=config.alpha)
    if config.kind == "focal":
        return functools.partial(focal, alpha=config.alpha, gamma=config.gamma)
    raise ConfigError(f"loss.kind is {config.kind!r}: it must be cross_entropy, balanced_cross_entropy or focal")


def cross_entropy(logits: Float[Array, "*N K"], labels: Int[Array, "*N"]) -> Float32[Array, "*N K"]:
    """-log(p_t) (equation 1)."""
    return _weighted(logits, labels, foreground=1.0, background=1.0, gamma=0.0)


def balanced_cross_entropy(
    logits: Float[Array, "*N K"], labels: Int[Array, "*N"], *, alpha: float
) -> Float32[Array, "*N K"]:
    """-alpha_t log(p_t) (equation 3): alpha weighs the one target that is 1, 1 - alpha those that are 0."""
    return _weighted(logits, labels, foreground=alpha, background=1.0 - alpha, gamma=0.0)


def focal(
    logits: Float[Array, "*N K"], labels: Int[Array, "*N"], *, alpha: float, gamma: float
) -> Float32[Array, "*N K"]:
    """-alpha_t (1 - p_t)^gamma log(p_t) (equation 5). gamma = 0 is `balanced_cross_entropy`."""
    return _weighted(logits, labels, foreground=alpha, background=1.0 - alpha, gamma=gamma)


def _weighted(
    logits: Float[Array, "*N K"], labels: Int[Array, "*N"], *, foreground: float, background: float, gamma: float
) -> Float32[Array, "*N K"]:
    logits = logits.astype(jnp.float32)
    # Compared with a counter inside the fused loop: the one-hot target [... K] is never in memory.
    is_target = lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]
    weight = jnp.where(is_target, foreground, background) * (labels != IGNORED)[..., None].astype(jnp.float32)
    return weight * _modulated(jnp.where(is_target, logits, -logits), gamma)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _modulated(x_t: Float32[Array, "*N"], gamma: float) -> Float32[Array, "*N"]:
    """(1 - p_t)^gamma * -log(p_t)."""
    _, q_t, minus_log_p_t, minus_log_q_t = _sigmoids(x_t)
    return _power(q_t, minus_log_q_t, gamma) * minus_log_p_t


@_modulated.defjvp
def _modulated_jvp(
    gamma: float, primals: tuple[Float32[Array, "*N"]], tangents: tuple[Float32[Array, "*N"]]
) -> tuple[Float32[Array, "*N"], Float32[Array, "*N"]]:
    """Equation 10: dFL/dx_t = (1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1), sharing the value's exponentials."""
    (x_t,), (tangent,) = primals, tangents
    p_t, q_t, minus_log_p_t, minus_log_q_t = _sigmoids(x_t)
    slope = -_power(q_t, minus_log_q_t, gamma) * (gamma * p_t * minus_log_p_t + q_t)
    return _modulated(x_t, gamma), tangent * slope


def _sigmoids(x_t: Float32[Array, "*N"]) -> tuple[Array, Array, Array, Array]:
    """p_t, 1 - p_t, -log(p_t) and -log(1 - p_t), each to float32's relative accuracy, from one exponential.

    The branches meet in value and in every derivative, so the derivative of a derivative is right at 0 too: jnp.abs has
    the slope of its x >= 0 branch there, as the selections below do (jnp.maximum(x, 0) would have half of it).
    """
    positive = x_t >= 0
    shrunk = jnp.exp(-jnp.abs(x_t))  # at most 1: it cannot overflow
    log_sum = jnp.log1p(shrunk)
    reciprocal = 1.0 / (1.0 + shrunk)
    larger, smaller = reciprocal, shrunk * reciprocal
    return (
        jnp.where(positive, larger, smaller),
        jnp.where(positive, smaller, larger),
        jnp.where(positive, 0.0, -x_t) + log_sum,
        jnp.where(positive, x_t, 0.0) + log_sum,
    )


def _power(q_t: Float32[Array, "*N"], minus_log_q_t: Float32[Array, "*N"], gamma: float) -> Float32[Array, "*N"]:
    """q_t^gamma. Whole exponents are multiplied out, which is exact where it matters and spares an exponential;
    the others go through the logarithm, whose derivative stays finite where q_t is 0."""
    if gamma == int(gamma):
        return q_t ** int(gamma)
    return jnp.exp(-gamma * minus_log_q_t)
