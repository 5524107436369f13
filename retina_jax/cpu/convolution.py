"""Convolution in the forms that are fast: XLA's own, except on the CPU, where matrix products often win.

A convolution sums k * k products of a shifted map with a part of the kernel, a tap. It can be taken a tap at a time, or as
one product, the shifted maps side by side in columns. For its gradients XLA on the CPU first turns kernels and maps around,
number by number, and walks through the kernel's gradient of groups in the same way: the sums themselves take less. 3x3
kernels on large maps go by Winograd's method, which takes fewer products. All forms are equal up to rounding. Which one is
taken depends on shapes alone, and is settled where the program is lowered, so that one traced program serves all devices.
docs/results/performance.md has what each one gave.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Float32

from retina_jax.cpu import winograd


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k c D"], stride: int = 1, groups: int = 1
) -> Float[Array, "B h w D"]:
    """`x` padded by k // 2 zeros on all four sides, under the kernel at every `stride`-th place; k is odd.

    Each of the groups turns c = C / groups neighbouring channels into D / groups. Sides become ceil(n / stride). Padding
    is that of Caffe2 and PyTorch: XLA's "SAME" pads an even side by (0, 1) where the stride is 2 and so shifts the map by a
    pixel against imported weights. Only reverse differentiation is defined, once.
    """
    if len(kernel) == groups == 1:  # a matrix product as it stands, on every device
        return by_columns(x, kernel, stride)
    plain = partial(plain_convolution, stride=stride, groups=groups)
    if _for_winograd(x, kernel, stride, groups):
        return lax.platform_dependent(x, kernel, cpu=winograd.convolution, default=plain)
    if groups == 1 and _wide(kernel) and 4 * _places(x, stride) <= x.shape[-1]:
        return lax.platform_dependent(x, kernel, cpu=partial(by_columns, stride=stride), default=plain)
    return plain(x, kernel)


def plain_convolution(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k c D"], stride: int, groups: int
) -> Float[Array, "B h w D"]:
    """`convolution` as XLA has it."""
    pad = len(kernel) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def by_columns(x: Float[Array, "B H W C"], kernel: Float[Array, "k k C D"], stride: int) -> Float[Array, "B h w D"]:
    """`convolution` of one group as one matrix product."""
    columns = _columns(x, len(kernel), stride)
    y = _flat(columns) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(*columns.shape[:3], kernel.shape[-1])


def map_gradient(
    dy: Float[Array, "B h w D"], kernel: Float[Array, "k k c D"], stride: int, groups: int, size_hw: tuple[int, int]
) -> Float32[Array, "B H W C"]:
    """The gradient of `convolution` by its map of `size_hw` without turning the kernel around; float32, as its sums are."""
    (batch, h, w, features), (k, _, c, _) = dy.shape, kernel.shape
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    if groups > 1:
        taps = kernel.reshape(k * k, c, groups, features // groups)
        columns = product("ngd,tcgd->ntgc", _grouped(dy, groups), taps)
    else:
        columns = product("nd,cd->nc", _flat(dy), kernel.reshape(k * k * c, features))
    x = jax.ShapeDtypeStruct((batch, *size_hw, groups * c), columns.dtype)
    (dx,) = jax.linear_transpose(lambda x: _columns(x, k, stride), x)(columns.reshape(batch, h, w, k * k * groups * c))
    return dx


def kernel_gradient(
    x: Float[Array, "B H W C"], dy: Float[Array, "B h w D"], k: int, stride: int, groups: int
) -> Float32[Array, "{k} {k} c D"]:
    """The gradient of `convolution` by its kernel without turning the maps around; float32, as its sums are."""
    c, features = x.shape[-1] // groups, dy.shape[-1]
    x, dy = lax.optimization_barrier((x, dy))  # what computes them would be computed again for every tap

    def product(a: Array, b: Array) -> Array:
        if groups == 1:
            return jnp.einsum("nc,nd->cd", _flat(a), _flat(b), preferred_element_type=jnp.float32)
        a, b = _grouped(a, groups), _grouped(b, groups)
        return jnp.einsum("ngc,ngd->cgd", a, b, preferred_element_type=jnp.float32)

    if groups == 1 and _places(dy) <= c:
        return product(_columns(x, k, stride), dy).reshape(k, k, c, features)
    taps = [(i, j) for i in range(k) for j in range(k)]
    if stride == 1:  # of the two maps the one that is shifted costs less: the other's channels are read across
        products = [product(x, _seen(dy, k, 1, k - 1 - i, k - 1 - j)) for i, j in taps]
    else:
        products = [product(_seen(x, k, stride, i, j), dy) for i, j in taps]
    return jnp.stack(products).reshape(k, k, c, features)


def _columns(x: Array, k: int, stride: int) -> Array:
    """What all taps see at each place, side by side in the order of the kernel: [B, h, w, k * k * C]."""
    height, width = x.shape[1:3]
    x = _padded(x, k)
    x = jnp.concatenate([x[:, :, j : j + width : stride] for j in range(k)], axis=-1)
    return jnp.concatenate([x[:, i : i + height : stride] for i in range(k)], axis=-1)


def _seen(x: Array, k: int, stride: int, i: int, j: int) -> Array:
    """What tap (i, j) sees at each place."""
    height, width = x.shape[1:3]
    return _padded(x, k)[:, i : i + height : stride, j : j + width : stride]


def _padded(x: Array, k: int) -> Array:
    return jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))


def _flat(x: Array) -> Array:
    """[B, h, w, C] as [B * h * w, C]: XLA leaves factors of two axes where they are, and lays others out anew."""
    return x.reshape(-1, x.shape[-1])


def _grouped(x: Array, groups: int) -> Array:
    """[B, h, w, C] as [B * h * w, groups, C / groups]."""
    return x.reshape(-1, groups, x.shape[-1] // groups)


def _places(x: Array, stride: int = 1) -> int:
    """Places of the kernel; a batch whose size is left open (`jax.export`) counts as one image."""
    batch, height, width, _ = x.shape
    batch = 1 if is_symbolic_dim(batch) else batch
    return batch * -(-height // stride) * -(-width // stride)


def _wide(kernel: Array) -> bool:
    """Whether a tap fills a matrix product; that of an image's three channels does not."""
    return min(kernel.shape[2:]) >= 32


def _for_winograd(x: Array, kernel: Array, stride: int, groups: int) -> bool:
    """Whether fewer products outweigh what the transformations cost, of the kernel above all. Told from an image alone, so
    that a batch spread over devices is computed as on one."""
    fits = len(kernel) == 3 and stride == groups == 1 and x.dtype == jnp.float32
    return fits and _wide(kernel) and x.shape[1] * x.shape[2] >= 1024


def _forward(x: Array, kernel: Array, stride: int, groups: int) -> tuple[Array, tuple[Array, Array]]:
    return convolution(x, kernel, stride, groups), (x, kernel)


def _backward(stride: int, groups: int, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    k, features = len(kernel), dy.shape[-1]

    def plain(x: Array, kernel: Array) -> Array:
        return by_columns(x, kernel, stride) if k == groups == 1 else plain_convolution(x, kernel, stride, groups)

    def plain_map_gradient(x: Array, kernel: Array, dy: Array) -> Array:
        return jax.linear_transpose(lambda x: plain(x, kernel), x)(dy)[0]

    def plain_kernel_gradient(x: Array, kernel: Array, dy: Array) -> Array:
        return jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(dy)[0]

    by_winograd = _for_winograd(x, kernel, stride, groups)

    def fast_map_gradient(x: Array, kernel: Array, dy: Array) -> Array:
        if by_winograd:
            return winograd.map_gradient(dy, kernel)
        return map_gradient(dy, kernel, stride, groups, x.shape[1:3]).astype(dy.dtype)

    def fast_kernel_gradient(x: Array, kernel: Array, dy: Array) -> Array:
        if by_winograd:
            return winograd.kernel_gradient(x, dy)
        return kernel_gradient(x, dy, k, stride, groups).astype(dy.dtype)

    fast_dx = fast_dkernel = groups > 1 or _wide(kernel)
    if (
        k > 1 and stride == groups == 1 and _places(dy) > 4 * features and not by_winograd
    ):  # the map outweighs the kernel
        fast_dx = False
    on_cpu = fast_map_gradient if fast_dx else plain_map_gradient
    dx = lax.platform_dependent(x, kernel, dy, cpu=on_cpu, default=plain_map_gradient)
    on_cpu = fast_kernel_gradient if fast_dkernel else plain_kernel_gradient
    dkernel = lax.platform_dependent(x, kernel, dy, cpu=on_cpu, default=plain_kernel_gradient)
    return dx, dkernel


convolution.defvjp(_forward, _backward)
