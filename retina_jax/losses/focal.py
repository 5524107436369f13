"""Classification losses on logits, one sigmoid a class: cross entropy (equation 1), balanced (3), focal (5), FL* (8), and
the hinge of Section 5.1.

Each takes logits [... K] and labels [...] and gives the loss of every logit, float32 [... K], not yet summed:
label k >= 0 makes target k 1 and the others 0, BACKGROUND (-1) makes all K targets 0, and IGNORED (-2) gives loss 0
and gradient 0 on all K. The paper divides the sum over anchors and classes by the number of positive anchors; that is
done in `retina_jax.losses.total`.

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
from retina_jax.ops.matching import IGNORED

LOG1P_OVER_E = (0.9999999810, 0.8671934953, 0.1237643049), (1.0, 1.3671915485, 0.4740588776, 0.0310945460)
"""Numerator and denominator, constant terms first, of a quotient that is, unrounded, within 2e-8 of log(1 + e) / e for e
from 0 to 1 (least squares with weights raised where the error is largest)."""

Example = Float32[Array, "*N"]
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
    return _weighted(logits, labels, functools.partial(_modulated, gamma=0.0), foreground=1.0, background=1.0)


def balanced_cross_entropy(
    logits: Float[Array, "*N K"], labels: Int[Array, "*N"], *, alpha: float
) -> Float32[Array, "*N K"]:
    """-alpha_t log(p_t) (equation 3): alpha weighs the one target that is 1, 1 - alpha those that are 0."""
    return _weighted(logits, labels, functools.partial(_modulated, gamma=0.0), foreground=alpha, background=1.0 - alpha)


def focal(
    logits: Float[Array, "*N K"], labels: Int[Array, "*N"], *, alpha: float, gamma: float
) -> Float32[Array, "*N K"]:
    """-alpha_t (1 - p_t)^gamma log(p_t) (equation 5). gamma = 0 is `balanced_cross_entropy`."""
    return _weighted(
        logits, labels, functools.partial(_modulated, gamma=gamma), foreground=alpha, background=1.0 - alpha
    )


def focal_star(
    logits: Float[Array, "*N K"], labels: Int[Array, "*N"], *, alpha: float, gamma: float, beta: float
) -> Float32[Array, "*N K"]:
    """-alpha_t log(p_t*) / gamma for p_t* = sigmoid(gamma x_t + beta) (equations 7 and 8, Appendix A), gamma > 0.

    gamma = 1 with beta = 0 is `balanced_cross_entropy`. The derivative by x_t is alpha_t (p_t* - 1) (equation 11).
    """
    if gamma <= 0:
        raise ConfigError(f"loss.gamma is {gamma}: it must be above 0 with loss.kind focal_star")

    def of_x_t(x_t: Example, _: Example, weight: Example) -> Example:
        shifted = gamma * x_t + beta  # cross entropy's form, steeper and shifted
        return _modulated(shifted, _magnitude(shifted, shifted), weight / gamma, 0.0)

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

    def of_x_t(x_t: Example, magnitude: Example, weight: Example) -> Example:
        p_t, *_ = _sigmoids(x_t, magnitude)
        return weight * jnp.where(p_t < margin, margin - p_t, 0.0)

    return _weighted(logits, labels, of_x_t, foreground=alpha, background=1.0 - alpha)


def _weighted(
    logits: Float[Array, "*N K"],
    labels: Int[Array, "*N"],
    of_x_t: Callable[[Example, Example, Example], Example],
    *,
    foreground: float,
    background: float,
) -> Float32[Array, "*N K"]:
    """`of_x_t` of x_t, |x_t| and alpha_t (0 where the label is IGNORED)."""
    logits = logits.astype(jnp.float32)
    # Compared with a counter inside the fused loop: the one-hot target [... K] is never in memory.
    is_target = lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]
    weight = jnp.where(is_target, foreground, jnp.where(labels == IGNORED, 0.0, background)[..., None])
    x_t = jnp.where(is_target, 1.0, -1.0) * logits
    return of_x_t(x_t, _magnitude(x_t, logits), weight)


@jax.custom_jvp
def _magnitude(x_t: Example, plus_or_minus_x_t: Example) -> Example:
    """|x_t|, by a number of the same size that is known without the labels: the exponential needs nothing else then."""
    return jnp.abs(plus_or_minus_x_t)


@_magnitude.defjvp
def _magnitude_jvp(primals: tuple[Example, Example], tangents: tuple[Example, Example]) -> tuple[Example, Example]:
    """At 0 the slope of the x_t >= 0 branch, which the selections in `_sigmoids` have too."""
    return _magnitude(*primals), jnp.where(primals[0] >= 0, tangents[0], -tangents[0])


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _modulated(x_t: Example, magnitude: Example, weight: Example, gamma: float) -> Example:
    """weight (1 - p_t)^gamma * -log(p_t), where `magnitude` is |x_t|; `weight` is taken for constant."""
    _, q_t, minus_log_p_t, minus_log_q_t = _sigmoids(x_t, magnitude)
    return weight * _power(q_t, minus_log_q_t, gamma) * minus_log_p_t


@_modulated.defjvp
def _modulated_jvp(
    gamma: float, primals: tuple[Example, Example, Example], tangents: tuple[Example, Example, Example]
) -> tuple[Example, Example]:
    """Equation 10: dFL/dx_t = (1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1), of which the value is a part."""
    x_t, magnitude, weight = primals
    value = _modulated(x_t, magnitude, weight, gamma)
    _, q_t, _, minus_log_q_t = _sigmoids(x_t, magnitude)
    # 1 - q_t is inaccurate for a p_t near 0 only, where the last term outweighs it; p_t itself would be one more division.
    slope = -(gamma * (1.0 - q_t) * value + weight * _power(q_t, minus_log_q_t, gamma) * q_t)
    return value, tangents[0] * slope


def _sigmoids(x_t: Example, magnitude: Example) -> tuple[Example, Example, Example, Example]:
    """p_t, 1 - p_t, -log(p_t) and -log(1 - p_t), each to float32's relative accuracy, from one exponential.

    The branches meet in value and in every derivative, so the derivative of a derivative is right at 0 too (jnp.maximum
    would have half the slope there). All that is long ends in an exponential or a division: what comes after the last of
    those XLA's CPU backend makes again for each that wants it.
    """
    positive = x_t >= 0
    shrunk = jnp.exp(-magnitude)  # at most 1: it cannot overflow
    log_sum = _log1p(shrunk)
    return (
        jnp.where(positive, 1.0, shrunk) / (1.0 + shrunk),
        jnp.where(positive, shrunk, 1.0) / (1.0 + shrunk),
        jnp.where(positive, 0.0, -x_t) + log_sum,
        jnp.where(positive, x_t, 0.0) + log_sum,
    )


def _log1p(e: Example) -> Example:
    """log(1 + e) for e from 0 to 1. XLA's log1p, which must do for all e, takes three times as long on the CPU."""
    numerator, denominator = (functools.reduce(lambda sum, c: sum * e + c, reversed(part)) for part in LOG1P_OVER_E)
    return e * numerator / denominator


def _power(q_t: Float32[Array, "*N"], minus_log_q_t: Float32[Array, "*N"], gamma: float) -> Float32[Array, "*N"]:
    """q_t^gamma. Whole exponents are multiplied out, which is exact where it matters and spares an exponential;
    the others go through the logarithm, whose derivative stays finite where q_t is 0."""
    if gamma == int(gamma):
        return q_t ** int(gamma)
    return jnp.exp(-gamma * minus_log_q_t)
