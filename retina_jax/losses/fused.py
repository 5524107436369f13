"""The losses of `retina_jax.losses.focal` in the form that training uses: sums over each image, and gradients written out.

The derivatives are those of Appendix B; sigmoid and logarithms share one exponential. No array of the logits' size is in
memory but the logits and their gradient, in their precision. Sums are float32. The backward pass computes the gradient from
the logits: accelerators compute faster than they store it. With CPU kernels (`retina_jax.cpu`) the forward pass computes it
with the loss, in tiles.
"""

from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from retina_jax.config import LossConfig
from retina_jax.cpu import ValueAndGradient, enabled, on_cpu, tiled_sums_and_gradient
from retina_jax.losses.focal import Labels, Logits, classification_loss, targets

SummedLoss = Callable[[Float[Array, "B A K"], Int[Array, "B A"]], Float32[Array, " B"]]
Numbers = Float32[Array, "*N"]

LOG1P_OVER_E = (0.9999999810, 0.8671934953, 0.1237643049), (1.0, 1.3671915485, 0.4740588776, 0.0310945460)
"""Coefficients of a numerator and a denominator, constant terms first, whose quotient is within 2e-8 of log(1 + e) / e for
e from 0 to 1 (least squares with higher weights where the error is largest)."""


def summed(config: LossConfig) -> SummedLoss:
    """Returns the loss named by `loss.kind`, summed over the anchors and classes of each image: [B A K], [B A] -> [B].

    Equals the plain sum except for the order of the additions. It can be differentiated once, in reverse mode.
    """
    loss, in_one_pass = value_and_gradient(config), enabled()

    @jax.custom_vjp
    def total(logits: Float[Array, "B A K"], labels: Int[Array, "B A"]) -> Float32[Array, " B"]:
        return loss(logits, labels)[0].sum(axis=(1, 2))

    def forward(logits: Float[Array, "B A K"], labels: Int[Array, "B A"]) -> tuple[Array, tuple[Array, Array]]:
        sums, saved = sums_and_gradient(loss, logits, labels) if in_one_pass else (total(logits, labels), logits)
        return sums, (saved, labels)

    def backward(saved: tuple[Array, Array], of_sums: Float32[Array, " B"]) -> tuple[Array, None]:
        gradient = saved[0] if in_one_pass else loss(lax.optimization_barrier(saved[0]), saved[1])[1]
        return (gradient.astype(jnp.float32) * of_sums[:, None, None]).astype(gradient.dtype), None

    total.defvjp(forward, backward)
    return total


@on_cpu(tiled_sums_and_gradient)
def sums_and_gradient(
    loss: ValueAndGradient, logits: Float[Array, "B A K"], labels: Int[Array, "B A"]
) -> tuple[Float32[Array, " B"], Float[Array, "B A K"]]:
    """Returns (loss summed over the anchors and classes of each image, gradient of the sum by the logits)."""
    values, gradient = loss(logits, labels)
    return values.sum(axis=(1, 2)), gradient


def value_and_gradient(config: LossConfig) -> ValueAndGradient:
    """Returns the loss and gradient of every logit: [... K], [...] -> float32 [... K], [... K] in the logits' precision. A
    kind without a fast form takes the formula of `focal.py` and JAX's derivative of it."""
    plain, curve = classification_loss(config), _curve(config)
    foreground, background = (1.0, 1.0) if config.kind == "cross_entropy" else (config.alpha, 1.0 - config.alpha)

    def fast(logits: Logits, labels: Labels) -> tuple[Array, Array]:
        y, alpha_t = targets(logits, labels, foreground, background)
        x = logits.astype(jnp.float32)
        value, slope = curve(y * x, jnp.abs(x), alpha_t)
        return value, (slope * y).astype(logits.dtype)

    def by_autodiff(logits: Logits, labels: Labels) -> tuple[Array, Array]:
        values, pull_back = jax.vjp(lambda logits: plain(logits, labels), logits)
        return values, pull_back(jnp.ones_like(values))[0]

    return fast if curve else by_autodiff


def _curve(config: LossConfig) -> Callable[[Numbers, Numbers, Numbers], tuple[Numbers, Numbers]] | None:
    """Returns (x_t, |x_t|, alpha_t) -> (loss, its derivative by x_t). |x_t| = |x| is known without the labels."""
    return {
        "cross_entropy": partial(_focal, gamma=0.0),
        "balanced_cross_entropy": partial(_focal, gamma=0.0),
        "focal": partial(_focal, gamma=config.gamma),
        "focal_star": partial(_focal_star, gamma=config.gamma, beta=config.star_beta),
        "hinge": partial(_hinge, margin=config.hinge_margin),
    }.get(config.kind)


def _focal(x_t: Numbers, magnitude: Numbers, alpha_t: Numbers, *, gamma: float) -> tuple[Numbers, Numbers]:
    """Computes equations 5 and 10, with q_t = 1 - p_t: dFL/dx_t = alpha_t q_t^gamma (gamma p_t log(p_t) - q_t)."""
    positive, e = x_t >= 0, jnp.exp(-magnitude)  # e <= 1: it cannot overflow
    log_sum = _log1p(e)
    q_t = jnp.where(positive, e, 1.0) / (1.0 + e)
    minus_log_p_t = jnp.where(positive, 0.0, -x_t) + log_sum
    minus_log_q_t = jnp.where(positive, x_t, 0.0) + log_sum
    # A power of an integer is a product. Others go through the logarithm, which stays finite at q_t = 0.
    power = q_t ** int(gamma) if gamma == int(gamma) else jnp.exp(-gamma * minus_log_q_t)
    value = alpha_t * power * minus_log_p_t
    # 1 - q_t is inaccurate only for p_t near 0, where the last term outweighs it; p_t would cost another division.
    return value, -(gamma * (1.0 - q_t) * value + alpha_t * power * q_t)


def _focal_star(x_t: Numbers, _: Numbers, alpha_t: Numbers, *, gamma: float, beta: float) -> tuple[Numbers, Numbers]:
    """Computes equations 8 and 11: cross entropy of gamma x_t + beta, divided by gamma."""
    shifted = gamma * x_t + beta
    value, slope = _focal(shifted, jnp.abs(shifted), alpha_t / gamma, gamma=0.0)
    return value, slope * gamma


def _hinge(x_t: Numbers, magnitude: Numbers, alpha_t: Numbers, *, margin: float) -> tuple[Numbers, Numbers]:
    """Computes alpha_t max(0, margin - p_t). p_t is a / (1 + e) with e = exp(-|x_t|) and a = 1 or e."""
    positive, e = x_t >= 0, jnp.exp(-magnitude)
    a = jnp.where(positive, 1.0, e)
    p_t = a / (1.0 + e)
    by_p_t = jnp.where(p_t < margin, -alpha_t, 0.0)
    by_e = jnp.where(positive, 0.0, by_p_t / (1.0 + e)) - by_p_t * (1.0 + e) ** -2 * a
    slope = jnp.where(positive, -1.0, 1.0) * (by_e * e)  # de/dx_t is -e for x_t >= 0 and e for x_t < 0
    return alpha_t * jnp.where(p_t < margin, margin - p_t, 0.0), slope


def _log1p(e: Numbers) -> Numbers:
    """Computes log(1 + e) for e from 0 to 1. XLA's log1p, for all e, takes three times as long on the CPU."""
    numerator, denominator = (reduce(lambda sum, c: sum * e + c, reversed(part)) for part in LOG1P_OVER_E)
    return e * numerator / denominator
