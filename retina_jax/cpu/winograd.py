"""Winograd's convolution by 3x3 kernels, for processors where sums are cheap beside matrix products.

Two outputs in a row of a kernel of three need four products instead of six, a block of 2x2 outputs 16 instead of 36: the
map's 4x4 patch and the kernel are each taken to 16 numbers (sums, differences, halves), multiplied number by number,
which over all blocks and channels makes 16 matrix products, and taken back to 2x2. Written out with matrices in Lavin and
Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), F(2x2, 3x3). The numbers are small, so that rounding
stays as small as the plain sum's; blocks of 4x4 outputs are no faster here and ten times less accurate.

Maps are padded by a zero on all sides, the stride is 1. Both gradients have the same form, from the same two
transformations: the map's is a convolution by the kernel turned around, the kernel's a product over all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

Matrix = Sequence[Sequence[float]]

OF_MAP: Matrix = ((1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, -1.0, 1.0, 0.0), (0.0, 1.0, 0.0, -1.0))
OF_KERNEL: Matrix = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
TO_OUTPUT: Matrix = ((1.0, 1.0, 1.0, 0.0), (0.0, 1.0, -1.0, -1.0))
TURNED = (3, 1, 2, 0)
"""Where each of a kernel's four numbers comes from when the kernel is turned around."""


def convolution(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W D"]:
    """The sum of products of each 3x3 patch of `x` with `kernel`."""
    products = [patch @ tap for patch, tap in zip(_of_patches(x), _of_kernel(kernel), strict=True)]
    return _outputs(products, x)


def map_gradient(dy: Float[Array, "B H W D"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W C"]:
    """The gradient of `convolution` by its map."""
    taps = _of_kernel(kernel)
    turned = [taps[4 * u + v] for u in TURNED for v in TURNED]
    products = [jnp.einsum("nd,cd->nc", patch, tap) for patch, tap in zip(_of_patches(dy), turned, strict=True)]
    return _outputs(products, dy)


def kernel_gradient(x: Float[Array, "B H W C"], dy: Float[Array, "B H W D"]) -> Float[Array, "3 3 C D"]:
    """The gradient of `convolution` by its kernel."""
    x, dy = _known_with(dy, x), _evened(dy)
    blocks = [dy[:, i::2, j::2] for i in range(2) for j in range(2)]
    blocks = [block.reshape(-1, dy.shape[-1]) for block in _twice(_transposed(TO_OUTPUT), blocks)]
    taps = [jnp.einsum("nc,nd->cd", patch, block) for patch, block in zip(_of_patches(x), blocks, strict=True)]
    return jnp.stack(_twice(_transposed(OF_KERNEL), taps)).reshape(3, 3, x.shape[-1], dy.shape[-1])


def _of_patches(x: Float[Array, "B H W C"]) -> list[Float[Array, "N C"]]:
    """The 16 numbers of every 4x4 patch around a block of 2x2, blocks row by row."""
    x = jnp.pad(_evened(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1] - 3, x.shape[2] - 3
    patches = [x[:, i : i + height : 2, j : j + width : 2] for i in range(4) for j in range(4)]
    return [number.reshape(-1, x.shape[-1]) for number in _twice(OF_MAP, patches)]


def _of_kernel(kernel: Float[Array, "3 3 C D"]) -> list[Float[Array, "C D"]]:
    return _twice(OF_KERNEL, [kernel[i, j] for i in range(3) for j in range(3)])


def _outputs(products: list[Float[Array, "N D"]], like: Float[Array, "B H W _"]) -> Float[Array, "B H W D"]:
    """The blocks of 2x2, put side by side to a map as large as `like`."""
    batch, height, width, _ = like.shape
    rows, columns, features = -(-height // 2), -(-width // 2), products[0].shape[-1]
    blocks = [block.reshape(batch, rows, columns, features) for block in _twice(TO_OUTPUT, products)]
    upper, lower = (jnp.stack(blocks[i : i + 2], axis=3) for i in (0, 2))
    y = jnp.stack([upper, lower], axis=2).reshape(batch, 2 * rows, 2 * columns, features)
    return y[:, :height, :width]


def _known_with(dy: Float[Array, "B H W D"], x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """`x`, but not before `dy`. XLA would else keep the numbers that the forward pass made of it, or make them anew long
    before they are needed: either takes four times the memory of the map. (A barrier it takes away too early.)"""
    return x + 0.0 * dy[:, :1, :1, :1]


def _twice(matrix: Matrix, parts: Sequence[Array]) -> list[Array]:
    """`matrix` times the square array `parts` (row by row) times `matrix` transposed."""
    side = len(matrix[0])
    rows = [_combined(matrix, parts[j::side]) for j in range(side)]  # by column: those of one column combined
    return [number for i in range(len(matrix)) for number in _combined(matrix, [row[i] for row in rows])]


def _combined(matrix: Matrix, parts: Sequence[Array]) -> list[Array]:
    """`matrix` times the column `parts`, without products by 0 and 1."""
    combined = []
    for row in matrix:
        terms = [part if factor == 1 else factor * part for factor, part in zip(row, parts, strict=True) if factor]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        combined.append(total)
    return combined


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _evened(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """A row and a column of zeros after an odd last one."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
