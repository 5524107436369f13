"""Classification losses on logits, one sigmoid a class: cross entropy (equation 1), balanced (3), focal (5), FL* (8), and
the hinge of Section 5.1.

Each takes logits [... K] and labels [...] and gives the loss of every logit, float32 [... K], not yet summed:
label k >= 0 makes target k 1 and the others 0, BACKGROUND (-1) makes all K targets 0, and IGNORED (-2) gives loss 0
and gradient 0 on all K. The paper divides the sum over anchors and classes by the number of positive anchors; that is
done in `retina_jax.losses.detection`.

Each is alpha_t times a function of x_t = y x (equation 6, y = ±1). For p_t = sigmoid(x_t):

    FL    = alpha_t (1 - p_t)^gamma * softplus(-x_t),       softplus(-x_t) = -log(p_t)
    FL*   = alpha_t softplus(-(gamma x_t + beta)) / gamma
    hinge = alpha_t max(0, margin - p_t)

Powers of 1 - p_t are taken of sigmoid(-x_t), never of a difference from 1, so value and gradient are accurate and
finite for every finite logit and every gamma >= 0, in particular the fractional ones of Table 1b, whose naive gradient
is inf * 0 where the sigmoid saturates. (FL* wants gamma x_t + beta finite too.)
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from retina_jax.config import ConfigError, LossConfig
from retina_jax.matching import IGNORED

ATANH_SERIES = tuple(1 / (2 * k + 1) for k in range(8))
"""atanh(s) = s + s^3 / 3 + s^5 / 5 + ..."""

ClassificationLoss = Callable[[Float[Array, "*N K"], Int[Array, "*N"]], Float32[Array, "*N K"]]


def classification_loss(config: LossConfig) -> ClassificationLoss:
    """The loss that `loss.kind` names, with its parameters filled in."""
    if config.kind == "cross_entropy":
        return cross_entropy
    if config.kind == "balanced_cross_entropy":
        return functools.partial(balanced_cross_entropy, alpha=config.alpha)
    if config.kind == "focal":
        return functools.partial(focal, alpha=config.alpha, gamma=config.gamma)
    if config.kind == "focal_star":
        return functools.partial(focal_star, alpha=config.alpha, gamma=config.gamma, beta=config.star_beta)
    if config.kind == "hinge":
        return functools.partial(hinge, alpha=config.alpha, margin=config.hinge_margin)
    raise ConfigError(
        f"loss.kind is {config.kind!r}: it must be cross_entropy, balanced_cross_entropy, focal, focal_star or hinge"
    )


def cross_entropy(logits: Float[Array, "*N K"], labels: Int[Array, "*N"]) -> Float32[Array, "*N K"]:
    """-log(p_t) (equation 1)."""
    return _weighted(logits, labels, lambda x_t: _modulated(x_t, 0.0), foreground=1.0, background=1.0)


def balanced_cross_entropy(
    logits: Float[Array, "*N K"], labels: Int[Array, "*N"], *, alpha: float
) -> Float32[Array, "*N K"]:
    """-alpha_t log(p_t) (equation 3): alpha weighs the one target that is 1, 1 - alpha those that are 0."""
    return _weighted(logits, labels, lambda x_t: _modulated(x_t, 0.0), foreground=alpha, background=1.0 - alpha)


def focal(
    logits: Float[Array, "*N K"], labels: Int[Array, "*N"], *, alpha: float, gamma: float
) -> Float32[Array, "*N K"]:
    """-alpha_t (1 - p_t)^gamma log(p_t) (equation 5). gamma = 0 is `balanced_cross_entropy`."""
    return _weighted(logits, labels, lambda x_t: _modulated(x_t, gamma), foreground=alpha, background=1.0 - alpha)


def focal_star(
    logits: Float[Array, "*N K"], labels: Int[Array, "*N"], *, alpha: float, gamma: float, beta: float
) -> Float32[Array, "*N K"]:
    """-alpha_t log(p_t*) / gamma for p_t* = sigmoid(gamma x_t + beta) (equations 7 and 8, Appendix A), gamma > 0.

    gamma = 1 with beta = 0 is `balanced_cross_entropy`. The derivative by x_t is alpha_t (p_t* - 1) (equation 11).
    """
    if gamma <= 0:
        raise ConfigError(f"loss.gamma is {gamma}: it must be above 0 with loss.kind focal_star")

    def of_x_t(x_t: Float32[Array, "*N"]) -> Float32[Array, "*N"]:
        return _modulated(gamma * x_t + beta, 0.0) / gamma  # cross entropy's closed form, steeper and shifted

    return _weighted(logits, labels, of_x_t, foreground=alpha, background=1.0 - alpha)


def hinge(
    logits: Float[Array, "*N K"], labels: Int[Array, "*N"], *, alpha: float, margin: float
) -> Float32[Array, "*N K"]:
    """alpha_t max(0, margin - p_t): linear in p_t, 0 where p_t >= margin. With p_t = margin the derivative is 0 too.

    Section 5.1 says only that its hinge loss on p_t "sets loss to 0 above a certain value of p_t", and that it was
    unstable; the slope of 1, the margin and the use of alpha are this project's. The derivative by x_t, -alpha_t p_t
    (1 - p_t) below the margin, vanishes where an example is most wrong, so a foreground that starts at p_t = pi hardly
    moves.
    """

    def of_x_t(x_t: Float32[Array, "*N"]) -> Float32[Array, "*N"]:
        p_t, *_ = _sigmoids(x_t)
        return jnp.where(p_t < margin, margin - p_t, 0.0)

    return _weighted(logits, labels, of_x_t, foreground=alpha, background=1.0 - alpha)


def _weighted(
    logits: Float[Array, "*N K"],
    labels: Int[Array, "*N"],
    of_x_t: Callable[[Float32[Array, "*N K"]], Float32[Array, "*N K"]],
    *,
    foreground: float,
    background: float,
) -> Float32[Array, "*N K"]:
    logits = logits.astype(jnp.float32)
    # Compared with a counter inside the fused loop: the one-hot target [... K] is never in memory.
    is_target = lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]
    weight = jnp.where(is_target, foreground, background) * (labels != IGNORED)[..., None].astype(jnp.float32)
    return weight * of_x_t(jnp.where(is_target, logits, -logits))


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
    one, two = 1.0 + shrunk, 2.0 + shrunk
    over_both = 1.0 / (one * two)  # a single division for two quotients
    reciprocal = two * over_both
    log_sum = _log1p_of_quotient(shrunk * one * over_both)
    larger, smaller = reciprocal, shrunk * reciprocal
    return (
        jnp.where(positive, larger, smaller),
        jnp.where(positive, smaller, larger),
        jnp.where(positive, 0.0, -x_t) + log_sum,
        jnp.where(positive, x_t, 0.0) + log_sum,
    )


def _log1p_of_quotient(quotient: Float32[Array, "*N"]) -> Float32[Array, "*N"]:
    """log(1 + e) of e / (2 + e), for e from 0 to 1: twice the area hyperbolic tangent, by its series.

    The quotient is at most 1/3, where the first term left out is 2e-9 of the sum. XLA's log1p takes three times as long on
    the CPU, since it must do for all e.
    """
    square = quotient * quotient
    series = jnp.full_like(quotient, ATANH_SERIES[-1])
    for coefficient in ATANH_SERIES[-2::-1]:
        series = series * square + coefficient
    return 2.0 * quotient * series


def _power(q_t: Float32[Array, "*N"], minus_log_q_t: Float32[Array, "*N"], gamma: float) -> Float32[Array, "*N"]:
    """q_t^gamma. Whole exponents are multiplied out, which is exact where it matters and spares an exponential;
    the others go through the logarithm, whose derivative stays finite where q_t is 0."""
    if gamma == int(gamma):
        return q_t ** int(gamma)
    return jnp.exp(-gamma * minus_log_q_t)
