"""The gradient of 3x3 max pooling with stride 2: first the place of the largest number of each window, one row of windows
after the other, then each place reads the gradients of its windows.

XLA stores the four coordinates of each of these places, and adds the gradients there one at a time, into an array with
padding. This takes several times as long, and memory for the coordinates and that array.
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
    (height, width), (h, w) = x.shape[1:3], dy.shape[1:3]
    places = jnp.arange(height, dtype=jnp.int32)[:, None] * width + jnp.arange(width, dtype=jnp.int32)[None]
    largest, dx = _places(x, dy), 0.0
    for row in _windows(height):
        for column in _windows(width):
            inside = (row[:, None] < h) & (column[None] < w)
            place, dy_there = (_taken(_taken(a, row, 1), column, 2) for a in (largest, dy))
            dx += jnp.where((place == places[None, :, :, None]) & inside[None, :, :, None], dy_there, 0)
    return dx


def _places(x: Float[Array, "B H W C"], dy: Float[Array, "B h w C"]) -> Int[Array, "B h w C"]:
    """Returns row * width + column of the first of the largest numbers of each window. Where it holds NaN, it is one of its
    places."""
    height, width = x.shape[1:3]

    def add_row(i: Int[Array, ""], places: Int[Array, "B h w C"]) -> Int[Array, "B h w C"]:
        largest = place = None
        for row in (2 * i - 1, 2 * i, 2 * i + 1):
            row = jnp.clip(row, 0, height - 1)  # a row that is read twice has no number larger than its own
            numbers = lax.dynamic_index_in_dim(x, row, axis=1, keepdims=False)
            for tap in (-1, 0, 1):
                columns = np.clip(2 * np.arange(dy.shape[2]) + tap, 0, width - 1).astype(np.int32)
                number, here = _taken(numbers, columns, 1), row * width + columns[None, :, None]
                if largest is None:
                    largest, place = number, jnp.broadcast_to(here, number.shape)
                else:
                    larger = ~(largest >= number)
                    largest, place = jnp.where(larger, number, largest), jnp.where(larger, here, place)
        return lax.dynamic_update_index_in_dim(places, place, i, axis=1)

    # XLA stores what a loop has made. Otherwise it would compute it again for each number of the gradient.
    return lax.fori_loop(0, dy.shape[1], add_row, jnp.zeros_like(dy, jnp.int32))


_taken = partial(jnp.take, mode="clip")  # the last place instead of those behind it


def _windows(side: int) -> np.ndarray:
    """Returns the two windows along a side that hold each place; for an even place the second is one behind the last."""
    places, number = np.arange(side), -(-side // 2)
    return np.stack([places // 2, np.where(places % 2, (places + 1) // 2, number)])


def _forward(plain: Pooling, x: Array) -> tuple[Array, Array]:
    return plain(x), x


def _backward(plain: Pooling, x: Array, dy: Array) -> tuple[Array]:
    return (by_platform(gradient, lambda x, dy: jax.vjp(plain, x)[1](dy)[0], x, dy),)


max_pool_on_cpu.defvjp(_forward, _backward)
