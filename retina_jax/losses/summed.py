"""The classification loss summed over an image, its gradient made beside it in one pass over the logits.

The loss of every logit is never in memory, nor is anything else of the logits' size but their gradient, which keeps their
precision; sums are float32. On the CPU the pass goes tile by tile, each small enough for the second-level cache: XLA makes
several loops of it, which would else read and write main memory each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from retina_jax.losses.classification import ClassificationLoss

SummedLoss = Callable[[Float[Array, "B A K"], Int[Array, "B A"]], Float32[Array, " B"]]

TILE = 2**15
"""Logits of a tile: 128 KiB in float32."""


def summed(loss: ClassificationLoss) -> SummedLoss:
    """`loss` summed over the anchors and classes of each image; the same value and gradient as plain summing gives, but for
    the order of additions. It can be differentiated once, in reverse mode."""

    @jax.custom_vjp
    def total(logits: Float[Array, "B A K"], labels: Int[Array, "B A"]) -> Float32[Array, " B"]:
        return loss(logits, labels).sum(axis=(1, 2))

    def forward(logits: Float[Array, "B A K"], labels: Int[Array, "B A"]) -> tuple[Array, Array]:
        return lax.platform_dependent(logits, labels, cpu=partial(_in_tiles, loss), default=partial(_at_once, loss))

    def backward(gradient: Float[Array, "B A K"], of_total: Float32[Array, " B"]) -> tuple[Array, None]:
        return (gradient.astype(jnp.float32) * of_total[:, None, None]).astype(gradient.dtype), None

    total.defvjp(forward, backward)
    return total


def _at_once(
    loss: ClassificationLoss, logits: Float[Array, "B A K"], labels: Int[Array, "B A"]
) -> tuple[Float32[Array, " B"], Float[Array, "B A K"]]:
    values, pull_back = jax.vjp(lambda logits: loss(logits, labels), logits)
    return values.sum(axis=(1, 2)), pull_back(jnp.ones_like(values))[0]


def _in_tiles(
    loss: ClassificationLoss, logits: Float[Array, "B A K"], labels: Int[Array, "B A"]
) -> tuple[Float32[Array, " B"], Float[Array, "B A K"]]:
    images, anchors, classes = logits.shape
    logits, labels = logits.reshape(images * anchors, classes), labels.reshape(-1)
    rows = min(len(labels), max(1, TILE // max(1, classes)))

    def make_tile(tile: Int[Array, ""], made: tuple[Array, Array]) -> tuple[Array, Array]:
        # The last tile ends where the anchors end, so it begins within the one before it and makes some anchors again.
        start = jnp.minimum(tile * rows, len(labels) - rows)
        own_logits, own_labels = (lax.dynamic_slice_in_dim(whole, start, rows) for whole in (logits, labels))
        values, pull_back = jax.vjp(lambda logits: loss(logits, own_labels), own_logits)
        (gradient,) = pull_back(jnp.ones_like(values))
        of_tile = values.sum(axis=1), gradient
        return tuple(lax.dynamic_update_slice_in_dim(*pair, start, axis=0) for pair in zip(made, of_tile, strict=True))

    # zeros_like, not zeros: inside a shard_map what is made must vary over the devices as the logits do.
    start = jnp.zeros_like(logits, jnp.float32, shape=len(labels)), jnp.zeros_like(logits)
    of_anchors, gradient = lax.fori_loop(0, -(-len(labels) // rows) if rows else 0, make_tile, start)
    return of_anchors.reshape(images, anchors).sum(axis=1), gradient.reshape(images, anchors, classes)
