"""Convolution in the forms that are fast: XLA's own, except on the CPU, where matrix products often win.

XLA's convolution on the CPU turns the kernel around for the gradient by the map and the map for the gradient by the kernel,
which can cost more than the sums themselves, and walks through the gradient by the kernel of groups a number at a time.
A convolution is a sum of k * k products of a shifted map with a k-th of a k-th of the kernel, a tap; taken as such nothing
is turned. The forms are equal up to rounding. Which one is taken depends on shapes alone, and is settled where the program
is lowered, so that one traced program serves all devices. docs/results/performance.md has what each one gave.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k c D"], stride: int = 1, groups: int = 1
) -> Float[Array, "B h w D"]:
    """`x` padded by k // 2 zeros on all four sides, under the kernel at every `stride`-th place; k is odd.

    Each of the groups turns c = C / groups neighbouring channels into D / groups. Sides become ceil(n / stride). Padding
    is that of Caffe2 and PyTorch: XLA's "SAME" pads an even side by (0, 1) where the stride is 2 and so shifts the map by a
    pixel against imported weights. Only reverse differentiation is defined.
    """
    if len(kernel) == 1 and groups == 1:  # on every device
        return by_columns(x, kernel, stride)
    few = groups == 1 and 4 * _positions(x, stride) <= x.shape[-1]
    plain = partial(plain_convolution, stride=stride, groups=groups)
    return lax.platform_dependent(x, kernel, cpu=partial(by_columns, stride=stride), default=plain) if few else plain(x, kernel)


def plain_convolution(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k c D"], stride: int, groups: int
) -> Float[Array, "B h w D"]:
    """`convolution` as XLA has it, gradients included."""
    pad = len(kernel) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def by_columns(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k C D"], stride: int
) -> Float[Array, "B h w D"]:
    """`convolution` of one group as a single matrix product, the shifted maps of all taps side by side."""
    k, _, channels, features = kernel.shape
    return jnp.einsum("bhwc,cd->bhwd", _columns(x, k, stride), kernel.reshape(k * k * channels, features))


def map_gradient(
    dy: Float[Array, "B h w D"],
    kernel: Float[Array, "k k c D"],
    stride: int,
    groups: int,
    size_hw: tuple[int, int],
) -> Float[Array, "B H W C"]:
    """The gradient of `convolution` by its map of `size_hw`, a tap at a time: float32 at least, as its sums are."""
    batch, h, w, features = dy.shape
    k, _, c, _ = kernel.shape
    height, width = size_hw
    dy = dy.reshape(batch, h, w, groups, features // groups)
    taps = kernel.reshape(k, k, c, groups, features // groups)
    dtype = _sums(dy)

    def placed(i: int, j: int) -> Array:
        dx = jnp.einsum("bhwgd,cgd->bhwgc", dy, taps[i, j], preferred_element_type=dtype)
        (top, left), inner = (i - k // 2, j - k // 2), stride - 1
        rows, columns = stride * (h - 1) + 1, stride * (w - 1) + 1
        sides = (0, 0, 0), (top, height - top - rows, inner), (left, width - left - columns, inner), (0, 0, 0), (0, 0, 0)
        return lax.pad(dx, jnp.zeros((), dtype), sides)  # crops where negative

    return sum(placed(i, j) for i in range(k) for j in range(k)).reshape(batch, height, width, groups * c)


def kernel_gradient(
    x: Float[Array, "B H W C"], dy: Float[Array, "B h w D"], k: int, stride: int, groups: int
) -> Float[Array, "{k} {k} _ D"]:
    """The gradient of `convolution` by its kernel, in matrix products over all places: float32 at least, as its sums are."""
    batch, h, w, features = dy.shape
    c, dtype = x.shape[-1] // groups, _sums(dy)
    if groups == 1 and batch * h * w <= c:
        columns = _columns(x, k, stride)
        return jnp.einsum("bhwc,bhwd->cd", columns, dy, preferred_element_type=dtype).reshape(k, k, c, features)

    def product(i: int, j: int) -> Array:
        # Of the two maps the gradient is shifted where it can be: the other one is read across, and so is laid out once.
        a, b = (x, _shifted(dy, k, 1, k - 1 - i, k - 1 - j)) if stride == 1 else (_shifted(x, k, stride, i, j), dy)
        a, b = a.reshape(batch, h, w, groups, c), b.reshape(batch, h, w, groups, features // groups)
        return jnp.einsum("bhwgc,bhwgd->cgd", a, b, preferred_element_type=dtype)

    return jnp.stack([product(i, j) for i in range(k) for j in range(k)]).reshape(k, k, c, features)


def _columns(x: Array, k: int, stride: int) -> Array:
    return jnp.concatenate([_shifted(x, k, stride, i, j) for i in range(k) for j in range(k)], axis=-1)


def _shifted(x: Array, k: int, stride: int, i: int, j: int) -> Array:
    """What tap (i, j) of the kernel sees of `x` at each place."""
    pad, (height, width) = k // 2, x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return x[:, i : i + height : stride, j : j + width : stride]


def _positions(x: Array, stride: int) -> int:
    batch, height, width, _ = x.shape
    return batch * -(-height // stride) * -(-width // stride)


def _sums(dy: Array) -> jnp.dtype:
    return jnp.promote_types(dy.dtype, jnp.float32)


def _forward(x: Array, kernel: Array, stride: int, groups: int) -> tuple[Array, tuple[Array, Array]]:
    return convolution(x, kernel, stride, groups), (x, kernel)


def _backward(stride: int, groups: int, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    k, features = len(kernel), dy.shape[-1]
    plain = partial(plain_convolution, stride=stride, groups=groups)
    if k == 1 and groups == 1:
        plain = partial(by_columns, stride=stride)

    def plain_dx(x: Array, kernel: Array, dy: Array) -> Array:
        return jax.linear_transpose(lambda x: plain(x, kernel), x)(dy)[0]

    def plain_dkernel(x: Array, kernel: Array, dy: Array) -> Array:
        return jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(dy)[0]

    def cpu_dx(x: Array, kernel: Array, dy: Array) -> Array:
        return map_gradient(dy, kernel, stride, groups, x.shape[1:3]).astype(dy.dtype)

    def cpu_dkernel(x: Array, kernel: Array, dy: Array) -> Array:
        return kernel_gradient(x, dy, k, stride, groups).astype(dy.dtype)

    many = k > 1 and stride == groups == 1 and _positions(x, stride) > 4 * features
    dx = lax.platform_dependent(x, kernel, dy, cpu=plain_dx if many else cpu_dx, default=plain_dx)
    dkernel = lax.platform_dependent(x, kernel, dy, cpu=cpu_dkernel, default=plain_dkernel)
    return dx, dkernel


convolution.defvjp(_forward, _backward)
