"""The classification loss and its gradient tile by tile, each tile small enough for the processor's second-level cache.

XLA makes several loops of the loss on the CPU. Over all logits each loop would read and write main memory. The gradient
overwrites the logits tile by tile, so a training step needs no second array of their size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

TILE = 2**15
"""Logits per tile: 128 KiB in float32."""

ValueAndGradient = Callable[
    [Float[Array, "*N K"], Int[Array, "*N"]], tuple[Float32[Array, "*N K"], Float[Array, "*N K"]]
]


def sums_and_gradient(
    plain: Callable[..., Any], loss: ValueAndGradient, logits: Float[Array, "B A K"], labels: Int[Array, "B A"]
) -> tuple[Float32[Array, " B"], Float[Array, "B A K"]]:
    """`plain(loss, logits, labels)`, in tiles on the CPU."""
    return lax.platform_dependent(logits, labels, cpu=partial(in_tiles, loss), default=partial(plain, loss))


def in_tiles(
    loss: ValueAndGradient, logits: Float[Array, "B A K"], labels: Int[Array, "B A"]
) -> tuple[Float32[Array, " B"], Float[Array, "B A K"]]:
    """(loss summed over the anchors and classes of each image, gradient by the logits)."""
    images, anchors, classes = logits.shape
    rows = max(1, TILE // max(1, classes))
    full_tiles, rest = divmod(anchors, rows)

    def add_tile(image: Int[Array, ""], start: int | Int[Array, ""], rows: int, done: tuple[Array, Array]) -> tuple:
        sums, logits = done
        tile = lax.dynamic_slice(logits, (image, start, 0), (1, rows, classes))
        values, gradient = loss(tile, lax.dynamic_slice(labels, (image, start), (1, rows)))
        return sums.at[image].add(values.sum()), lax.dynamic_update_slice(logits, gradient, (image, start, 0))

    def add_image(image: Int[Array, ""], done: tuple[Array, Array]) -> tuple[Array, Array]:
        if rest:  # before the loop: after it XLA would copy the result of the loop
            done = add_tile(image, full_tiles * rows, rest, done)
        if not full_tiles:
            return done
        return lax.fori_loop(0, full_tiles, lambda tile, done: add_tile(image, tile * rows, rows, done), done)

    # zeros_like instead of zeros: inside a shard_map the sums must vary over the devices as the logits do.
    return lax.fori_loop(0, images, add_image, (jnp.zeros_like(logits, jnp.float32, shape=images), logits))
