"""Box regression losses (Section 4.1; smooth L1 of Fast R-CNN, Girshick 2015, equation 3)."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from retina_jax.config import LossConfig
from retina_jax.cpu import platform
from retina_jax.ops.boxes import decode, encode, giou


def smooth_l1(error: Float[Array, "*N"], *, beta: float) -> Float[Array, "*N"]:
    """Computes error^2 / (2 beta) where |error| < beta, |error| - beta / 2 elsewhere; elementwise, beta >= 0.

    beta = 0 is exactly `l1`. Detectron's beta is 0.11 in units of the box deltas; Fast R-CNN's is 1.
    """
    size = l1(error)
    if beta == 0:
        return size
    return jnp.where(size < beta, 0.5 / beta * error * error, size - 0.5 * beta)


def l1(error: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Computes |error|, elementwise; its gradient at 0 is 0."""
    return jnp.maximum(error, -error)  # jnp.abs would have gradient 1 at 0 and move a perfect box


def box_loss(
    deltas: Float[Array, "A 4"],
    anchors: Float[Array | np.ndarray, "A 4"],
    targets_xyxy: Float[Array, "A 4"],
    *,
    config: LossConfig,
) -> Float[Array, " A"]:
    """Computes the loss named by `loss.box`, per anchor.

    smooth_l1 and l1 compare deltas with the encoded target and sum over the 4 coordinates. giou is 1 - GIoU of the decoded
    box with the target, in [0, 2]. Value and gradient are finite on padded targets; the caller masks them.
    """
    if config.box == "giou":
        return 1.0 - giou(decode(deltas, anchors), targets_xyxy)
    targets = jnp.moveaxis(encode(targets_xyxy, anchors), -1, 0)
    # By coordinate, not by anchor: TPUs would fill rows of 128 numbers with the four of an anchor.
    deltas = jnp.moveaxis(deltas, -1, 0)
    error = (lax.optimization_barrier(deltas) if platform() == "tpu" else deltas) - targets
    return (l1(error) if config.box == "l1" else smooth_l1(error, beta=config.beta)).sum(axis=0)
