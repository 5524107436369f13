"""The gradient of the largest numbers of 3x3 windows with stride 2, one row of windows after the other.

XLA's own form makes a table of the places of all of these numbers, each with its four coordinates, and adds to them one
number at a time, in an array with padding. It takes several times as long, and memory for both.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from retina_jax.cpu import by_platform

Pooling = Callable[[Array], Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def max_pool_on_cpu(plain: Pooling, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Computes `plain(x)`, which is `layers._max_pool`. Only reverse-mode differentiation is defined, once."""
    return plain(x)


def gradient(x: Float[Array, "B H W C"], dy: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
    """Computes the gradient by `x`; that of equal numbers goes to the first of a window, row by row."""
    (height, width, channels), (h, w) = x.shape[1:], dy.shape[1:3]
    largest, dy = (a.reshape(-1, h * w, channels) for a in (_places(x, dy), dy))
    places = np.arange(height * width, dtype=np.int32).reshape(height, width)
    dx = 0.0
    for row in _windows(height):
        for column in _windows(width):
            inside = (row[:, None] < h) & (column < w)
            window = np.where(inside, row[:, None] * w + column, 0)
            place = np.where(inside, places, -1)[None, :, :, None]
            dx += jnp.where(largest[:, window] == place, dy[:, window], 0)
    return dx


def _places(x: Float[Array, "B H W C"], dy: Float[Array, "B h w C"]) -> Int[Array, "B h w C"]:
    """Returns row * width + column of the first of the largest numbers of each window."""
    height, width = x.shape[1:3]

    def add_row(i: Int[Array, ""], places: Int[Array, "B h w C"]) -> Int[Array, "B h w C"]:
        largest, place = jnp.full_like(dy[:, 0], -jnp.inf), jnp.zeros_like(dy[:, 0], jnp.int32)
        for row in (2 * i - 1, 2 * i, 2 * i + 1):
            row = jnp.clip(row, 0, height - 1)  # the padding never has the first of the largest numbers
            numbers = lax.dynamic_index_in_dim(x, row, axis=1, keepdims=False)
            for tap in (-1, 0, 1):
                columns = np.clip(2 * np.arange(dy.shape[2]) + tap, 0, width - 1).astype(np.int32)
                number = numbers[:, columns]
                place = jnp.where(number > largest, row * width + columns[None, :, None], place)
                largest = jnp.maximum(largest, number)
        return lax.dynamic_update_index_in_dim(places, place, i, axis=1)

    # XLA stores what a loop has made. Otherwise it would compute it again for each number of the gradient.
    return lax.fori_loop(0, dy.shape[1], add_row, jnp.zeros_like(dy, jnp.int32))


def _windows(side: int) -> np.ndarray:
    """Returns the two windows along a side that hold each place; for an even place the second is one behind the last."""
    places, number = np.arange(side), -(-side // 2)
    return np.stack([places // 2, np.where(places % 2, (places + 1) // 2, number)])


def _forward(plain: Pooling, x: Array) -> tuple[Array, Array]:
    return plain(x), x


def _backward(plain: Pooling, x: Array, dy: Array) -> tuple[Array]:
    return (by_platform(gradient, lambda x, dy: jax.vjp(plain, x)[1](dy)[0], x, dy),)


max_pool_on_cpu.defvjp(_forward, _backward)
