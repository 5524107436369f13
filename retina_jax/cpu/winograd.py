"""Winograd's convolution with 3x3 kernels, for processors where additions are cheap compared with matrix products.

A block of 2x2 outputs needs 16 products instead of 36: the map's 4x4 patch and the kernel are each transformed to 16
numbers (sums, differences, halves) and multiplied number by number, which over all blocks and channels makes 16 matrix
products, and the result is transformed to 2x2 outputs. See Lavin and Gray, "Fast Algorithms for Convolutional Neural
Networks" (2015), F(2x2, 3x3). Maps are padded by one zero on all sides, the stride is 1.

A loop computes some rows of blocks of one image at a time, whose numbers fit into the cache. Each transform is one program
that reads its terms by a table of places; as slices of the map it would be 16 programs, which take longer to compile. The
loop reads one image after the other. If XLA partitions a batch over devices automatically, it gathers the batch for that;
`Driver` avoids this with shard_map.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from retina_jax.cpu import after

OF_MAP = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)
OF_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
TO_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)
ROTATED = [3, 1, 2, 0]  # order of a kernel's four numbers along a side after rotating the kernel by 180 degrees
CACHED, REUSED = 2**21, 2
"""About how many numbers, before and after the products, a step of the loop computes: 2**21 (8 MiB), or twice as many as the
transformed kernel has, which each step reads."""

Terms = list[tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]]


class Rows(NamedTuple):
    """The blocks that are computed at a time: `number` rows of `columns` blocks, `count` times per image."""

    number: int
    columns: int
    count: int


@jax.jit  # convolutions of the same shapes are traced once
def convolution(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W D"]:
    """Convolves `x` with `kernel`."""
    taps = _on_both_sides(OF_KERNEL, kernel, x)
    return _by_rows(lambda patches: jnp.einsum("tnc,tcd->tnd", patches, taps), x, kernel.shape[3])


@jax.jit  # convolutions of the same shapes are traced once
def map_gradient(dy: Float[Array, "B H W D"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W C"]:
    """Computes the gradient of `convolution` by its map."""
    taps = _on_both_sides(OF_KERNEL[ROTATED], kernel, dy)
    return _by_rows(lambda patches: jnp.einsum("tnd,tcd->tnc", patches, taps), dy, kernel.shape[2])


@jax.jit  # convolutions of the same shapes are traced once
def kernel_gradient(x: Float[Array, "B H W C"], dy: Float[Array, "B H W D"]) -> Float[Array, "3 3 C D"]:
    """Computes the gradient of `convolution` by its kernel."""
    channels, features = x.shape[3], dy.shape[3]
    rows = _rows(x, features)
    # Without `after`, XLA keeps x as the forward pass padded it.
    x, dy = _padded(after(x, dy), rows, 1), _padded(dy, rows, 0)

    def add(step: Int[Array, ""], taps: Float[Array, "16 C D"]) -> Float[Array, "16 C D"]:
        patches = _of_patches(OF_MAP, _taken(x, step, rows, 1), rows)
        blocks = _of_patches(TO_OUTPUT.T, _taken(dy, step, rows, 0), rows)
        return taps + jnp.einsum("tnc,tnd->tcd", patches, blocks)

    taps = lax.fori_loop(0, x.shape[0] * rows.count, add, _zeros((16, channels, features), dy))
    return _on_both_sides(OF_KERNEL.T, taps.reshape(4, 4, channels, features), dy).reshape(3, 3, channels, features)


def _by_rows(
    products: Callable[[Float[Array, "16 N C"]], Float[Array, "16 N D"]], x: Float[Array, "B H W C"], features: int
) -> Float[Array, "B H W D"]:
    """Transforms `x` to the numbers of its patches, these by `products`, and the results to a map."""
    batch, height, width, _ = x.shape
    rows = _rows(x, features)
    padded = _padded(x, rows, 1)

    def add(step: Int[Array, ""], y: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        results = products(_of_patches(OF_MAP, _taken(padded, step, rows, 1), rows))
        return lax.dynamic_update_slice(y, _outputs(results, rows)[None], _start(step, rows))

    y = _zeros((batch, 2 * rows.number * rows.count, 2 * rows.columns, features), x)
    return lax.fori_loop(0, batch * rows.count, add, y)[:, :height, :width]


def _rows(x: Float[Array, "B H W C"], features: int) -> Rows:
    """Returns how many rows of blocks a step of the loop computes, so that few are computed in vain. There are two steps or
    more: XLA turns a loop of one step into separate programs that compute numbers several times."""
    _, height, width, channels = x.shape
    number, columns = -(-height // 2), -(-width // 2)
    at_a_time = max(CACHED, REUSED * 16 * channels * features)
    least = max(2, min(number, 16 * number * columns * (channels + features) // at_a_time))
    count = min(range(least, 2 * least), key=lambda count: -(-number // count) * count)
    return Rows(-(-number // count), columns, count)


def _zeros(shape: tuple[Any, ...], other: Float[Array, "_ _ _ _"]) -> Array:
    """Returns zeros, after `other`. Inside a shard_map they then vary over the devices as `other` does."""
    return after(jnp.zeros(shape, other.dtype), other)


def _padded(x: Float[Array, "B H W C"], rows: Rows, edge: int) -> Float[Array, "B h w C"]:
    """Adds an edge of zeros, and zeros below and on the right up to complete rows of blocks."""
    below, right = 2 * rows.number * rows.count - x.shape[1], 2 * rows.columns - x.shape[2]
    return jnp.pad(x, ((0, 0), (edge, edge + below), (edge, edge + right), (0, 0)))


def _start(step: Int[Array, ""], rows: Rows) -> tuple[Array | int, ...]:
    """Returns where the outputs of a step of the loop begin: image, row, column, channel."""
    # // and % also handle negative numbers, and take longer to compile.
    return lax.div(step, rows.count), lax.rem(step, rows.count) * 2 * rows.number, 0, 0


def _taken(x: Float[Array, "B h w C"], step: Int[Array, ""], rows: Rows, edge: int) -> Float[Array, "r w C"]:
    """Returns what a step of the loop needs of a padded map."""
    return lax.dynamic_slice(x, _start(step, rows), (1, 2 * rows.number + 2 * edge, *x.shape[2:]))[0]


def _of_patches(
    matrix: Float[np.ndarray, "s p"], x: Float[Array, "h w C"], rows: Rows
) -> Float[Array, "{len(matrix)**2} N C"]:
    """Computes `matrix` times the p x p patch at each block times `matrix` transposed, for all blocks row by row."""
    top, left = 2 * np.arange(rows.number), 2 * np.arange(rows.columns)
    numbers = 0.0
    for i, a in _terms(matrix):
        for j, b in _terms(matrix):
            places = (i[:, None] + top)[:, None, :, None] * x.shape[1] + (j[:, None] + left)[None, :, None, :]
            numbers += _read(x, places.reshape(len(matrix) ** 2, -1), np.kron(a, b)[:, None])
    return numbers


def _outputs(results: Float[Array, "16 N D"], rows: Rows) -> Float[Array, "h w D"]:
    """Computes the 2x2 outputs of each block, which make up a map."""
    y, x = np.arange(2 * rows.number)[:, None], np.arange(2 * rows.columns)[None]
    block = y // 2 * rows.columns + x // 2
    outputs = 0.0
    for i, a in _terms(TO_OUTPUT):
        for j, b in _terms(TO_OUTPUT):
            number = 4 * i[y % 2] + j[x % 2]
            outputs += _read(results, number * results.shape[1] + block, a[y % 2] * b[x % 2])
    return outputs


def _read(x: Float[Array, "a b C"], places: Int[np.ndarray, "r c"], factors: Float[np.ndarray, "#r #c"]) -> Array:
    """Returns the numbers of all channels at `places` of the first two axes, times `factors`."""
    x = x.reshape(-1, x.shape[-1]).at[places.astype(np.int32)].get(mode="promise_in_bounds")
    return x if (factors == 1).all() else x * factors[:, :, None]


def _terms(matrix: Float[np.ndarray, "r c"]) -> Terms:
    """Writes each row as a sum of terms: places of its numbers that are not 0, and these numbers. Rows with fewer terms than
    the longest are filled with terms of factor 0."""
    length = np.count_nonzero(matrix, axis=1).max()
    places = np.argsort(matrix == 0, axis=1, kind="stable")[:, :length]
    return list(zip(places.T, np.take_along_axis(matrix, places, axis=1).T, strict=True))


def _on_both_sides(
    matrix: Float[np.ndarray, "r c"], x: Float[Array, "c c C D"], other: Float[Array, "_ _ _ _"]
) -> Float[Array, "{len(matrix)**2} C D"]:
    """Computes `matrix` times `x` times `matrix` transposed, for all channels, as one matrix product, after `other`."""
    factors = after(jnp.asarray(np.kron(matrix, matrix)), other)
    return (factors @ x.reshape(-1, x.shape[2] * x.shape[3])).reshape(-1, *x.shape[2:])
