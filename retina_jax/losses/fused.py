"""The classification loss summed over an image, its gradient made beside it in one pass over the logits.

The loss of every logit is never in memory, nor is anything else of the logits' size but their gradient, which keeps their
precision; sums are float32. On the CPU the pass goes tile by tile, each small enough for the second-level cache: XLA makes
several loops of it, which would else read and write main memory each. There the gradient takes the logits' place, a tile
at a time, so that a training step has no memory for it beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from retina_jax.losses.focal import ClassificationLoss

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
    rows = max(1, TILE // max(1, classes))
    whole, rest = divmod(anchors, rows)

    def make_tile(image: Int[Array, ""], start: int | Int[Array, ""], rows: int, made: tuple[Array, Array]) -> tuple:
        totals, logits = made
        own_logits = lax.dynamic_slice(logits, (image, start, 0), (1, rows, classes))
        own_labels = lax.dynamic_slice(labels, (image, start), (1, rows))
        values, pull_back = jax.vjp(lambda logits: loss(logits, own_labels), own_logits)
        (gradient,) = pull_back(jnp.ones_like(values))
        return totals.at[image].add(values.sum()), lax.dynamic_update_slice(logits, gradient, (image, start, 0))

    def make_image(image: Int[Array, ""], made: tuple[Array, Array]) -> tuple[Array, Array]:
        if rest:  # first: after the loop XLA would copy what the loop has made
            made = make_tile(image, whole * rows, rest, made)
        if not whole:
            return made
        return lax.fori_loop(0, whole, lambda tile, made: make_tile(image, tile * rows, rows, made), made)

    # zeros_like, not zeros: inside a shard_map what is made must vary over the devices as the logits do.
    start = jnp.zeros_like(logits, jnp.float32, shape=images), logits
    return lax.fori_loop(0, images, make_image, start)
