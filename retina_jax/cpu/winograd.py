"""Winograd's convolution with 3x3 kernels, for processors where additions are cheap compared with matrix products.

A block of 2x2 outputs needs 16 products instead of 36: the map's 4x4 patch and the kernel are each transformed to 16
numbers (sums, differences, halves) and multiplied number by number, which over all blocks and channels makes 16 matrix
products, and the result is transformed to 2x2 outputs. See Lavin and Gray, "Fast Algorithms for Convolutional Neural
Networks" (2015), F(2x2, 3x3). Maps are padded by one zero on all sides, the stride is 1.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from retina_jax.cpu import after

Matrix = Sequence[Sequence[float]]

OF_MAP: Matrix = ((1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, -1.0, 1.0, 0.0), (0.0, 1.0, 0.0, -1.0))
OF_KERNEL: Matrix = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
TO_OUTPUT: Matrix = ((1.0, 1.0, 1.0, 0.0), (0.0, 1.0, -1.0, -1.0))
ROTATED = (3, 1, 2, 0)  # order of a kernel's four numbers along a side after rotating the kernel by 180 degrees


def convolution(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W D"]:
    """Convolves `x` with `kernel`."""
    return _outputs([patch @ tap for patch, tap in zip(_of_patches(x), _of_kernel(kernel), strict=True)], x)


def map_gradient(dy: Float[Array, "B H W D"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W C"]:
    """Computes the gradient of `convolution` by its map."""
    taps = _of_kernel(kernel)
    rotated = [taps[4 * u + v] for u in ROTATED for v in ROTATED]
    products = [jnp.einsum("nd,cd->nc", patch, tap) for patch, tap in zip(_of_patches(dy), rotated, strict=True)]
    return _outputs(products, dy)


def kernel_gradient(x: Float[Array, "B H W C"], dy: Float[Array, "B H W D"]) -> Float[Array, "3 3 C D"]:
    """Computes the gradient of `convolution` by its kernel."""
    # Otherwise XLA keeps the transformed numbers of the forward pass, which take four times the memory of the map.
    x, dy = after(x, dy), _evened(dy)
    blocks = [dy[:, i::2, j::2].reshape(-1, dy.shape[-1]) for i in range(2) for j in range(2)]
    blocks = _transform(_transposed(TO_OUTPUT), blocks)
    taps = [jnp.einsum("nc,nd->cd", patch, block) for patch, block in zip(_of_patches(x), blocks, strict=True)]
    return jnp.stack(_transform(_transposed(OF_KERNEL), taps)).reshape(3, 3, x.shape[-1], dy.shape[-1])


def _of_patches(x: Float[Array, "B H W C"]) -> list[Float[Array, "N C"]]:
    """Returns the 16 numbers of the 4x4 patch around every block of 2x2, blocks row by row."""
    x = jnp.pad(_evened(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1] - 3, x.shape[2] - 3
    patches = [x[:, i : i + height : 2, j : j + width : 2] for i in range(4) for j in range(4)]
    return [number.reshape(-1, x.shape[-1]) for number in _transform(OF_MAP, patches)]


def _of_kernel(kernel: Float[Array, "3 3 C D"]) -> list[Float[Array, "C D"]]:
    return _transform(OF_KERNEL, [kernel[i, j] for i in range(3) for j in range(3)])


def _outputs(products: list[Float[Array, "N D"]], like: Float[Array, "B H W _"]) -> Float[Array, "B H W D"]:
    """Assembles the blocks of 2x2 outputs to a map of the size of `like`."""
    batch, height, width, _ = like.shape
    rows, columns, features = -(-height // 2), -(-width // 2), products[0].shape[-1]
    blocks = [block.reshape(batch, rows, columns, features) for block in _transform(TO_OUTPUT, products)]
    upper, lower = (jnp.stack(blocks[i : i + 2], axis=3) for i in (0, 2))
    y = jnp.stack([upper, lower], axis=2).reshape(batch, 2 * rows, 2 * columns, features)
    return y[:, :height, :width]


def _transform(matrix: Matrix, parts: Sequence[Array]) -> list[Array]:
    """Computes `matrix` times the square array `parts` (row by row) times `matrix` transposed."""
    side = len(matrix[0])
    columns = [_combined(matrix, parts[j::side]) for j in range(side)]
    return [number for i in range(len(matrix)) for number in _combined(matrix, [column[i] for column in columns])]


def _combined(matrix: Matrix, parts: Sequence[Array]) -> list[Array]:
    """Computes `matrix` times the column `parts`, without multiplications by 0 and 1."""
    combined = []
    for row in matrix:
        first, *others = [part if n == 1 else n * part for n, part in zip(row, parts, strict=True) if n]
        combined.append(sum(others, start=first))
    return combined


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _evened(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Adds a row or column of zeros to odd sides."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
