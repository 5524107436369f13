"""Convolution as matrix products, which are often faster than XLA's own convolution on the CPU.

A convolution is a sum over the k * k taps of its kernel; each tap is a matrix product with a shifted map. It can be
computed tap by tap, or as one product with the shifted maps in columns. For gradients, XLA on the CPU first transposes
kernels and maps element by element, which takes longer than the sums. Large maps with 3x3 kernels use Winograd's method.
A small convolution of one group is left to XLA, whose own is as fast there; each other form is many small programs to
compile. The choice depends on shapes and the type alone. docs/results/performance.md has the measurements.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Float32

from retina_jax.cpu import after, by_platform, stored, winograd

Convolution = Callable[[Array, Array, int, int], Array]

FEW_PRODUCTS, SMALL_KERNEL = 2**26, 2**18
"""Products of a small convolution of one image, for instance 128 channels on a map of 21x21, and numbers in its kernel."""
FEW_PLACES = 16
"""A kernel is large for a map if both of its sides, as a matrix, are at least this many times the number of places. XLA's
product by YNNPACK first copies its right factor to another layout, which for a large kernel takes as long as the product."""
FEW_NUMBERS = 2**22
"""Largest number of inputs of all taps at all places for which windows of several groups fit into the caches: they are
taken by slices, also for the forward pass."""
WINOGRAD_PLACES = 1024
"""Smallest number of places of a map for which Winograd's method is faster, for instance 32x32."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def convolve_on_cpu(
    plain: Convolution, x: Float[Array, "B H W C"], kernel: Float[Array, "k k c D"], stride: int = 1, groups: int = 1
) -> Float[Array, "B h w D"]:
    """Computes `plain(x, kernel, stride, groups)`, which is `layers._convolve`, in the form that is fastest on the CPU. On
    other devices it is `plain`. Only reverse-mode differentiation is defined, once."""
    by_xla = partial(plain, stride=stride, groups=groups)
    if _for_winograd(x, kernel, stride, groups):
        return by_platform(winograd.convolution, by_xla, x, kernel)
    if groups == 1 and (len(kernel) == 1 or (_for_products(x, kernel) and 4 * _places(x, stride) <= x.shape[-1])):
        return by_platform(partial(by_columns, stride=stride), by_xla, x, kernel)
    if groups > 1 and stride == 1 and len(kernel) > 1 and _few_inputs(x, len(kernel)):
        return by_platform(partial(by_windows, groups=groups), by_xla, x, kernel)
    return by_xla(x, kernel)


def by_columns(x: Float[Array, "B H W C"], kernel: Float[Array, "k k C D"], stride: int) -> Float[Array, "B h w D"]:
    """Computes the convolution of one group as one matrix product."""
    columns = _columns(x, len(kernel), stride)
    kernel = kernel.reshape(-1, kernel.shape[-1])
    if _few_places(columns, *kernel.shape):
        # With the places last XLA takes Eigen's product. The barrier keeps it from reversing the transposition.
        y = jnp.einsum("cn,cd->nd", lax.optimization_barrier(_flat(columns).T), kernel)
    else:
        y = _flat(columns) @ kernel
    return y.reshape(*columns.shape[:3], kernel.shape[-1])


def by_windows(x: Float[Array, "B H W C"], kernel: Float[Array, "k k c D"], groups: int) -> Float[Array, "B H W D"]:
    """Computes the convolution of several groups with stride 1 as one matrix product per group."""
    factors = _windows(x, len(kernel), groups), _kernel_by_group(kernel, groups, x)
    return jnp.einsum("gnc,gcd->ngd", *factors).reshape(*x.shape[:3], kernel.shape[-1])


def map_gradient(
    dy: Float[Array, "B h w D"], kernel: Float[Array, "k k c D"], stride: int, groups: int, size_hw: tuple[int, int]
) -> Float32[Array, "B H W C"]:
    """Computes the gradient by the map of size `size_hw`, without transposing the kernel; float32, like its sums."""
    (batch, h, w, features), (k, _, c, _) = dy.shape, kernel.shape
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    if groups > 1:  # as maps of the groups, so that XLA does not transpose the columns
        columns = product("gnd,gcd->gnc", _by_group(dy, groups), _kernel_by_group(kernel, groups, dy))
    elif k == 1 and _few_places(dy, c, features):  # as the left factor it is not copied
        columns = product("cd,dn->cn", kernel[0, 0], lax.optimization_barrier(_flat(dy).T))
        columns = lax.optimization_barrier(columns).T
    else:
        columns = product("nd,cd->nc", _flat(dy), kernel.reshape(k * k * c, features))
    x = jax.ShapeDtypeStruct((groups * batch, *size_hw, c), columns.dtype)
    (dx,) = jax.linear_transpose(lambda x: _columns(x, k, stride), x)(columns.reshape(-1, h, w, k * k * c))
    if groups > 1:
        dx = jnp.moveaxis(dx.reshape(groups, batch, *size_hw, c), 0, 3).reshape(batch, *size_hw, groups * c)
    return dx


def kernel_gradient(
    x: Float[Array, "B H W C"], dy: Float[Array, "B h w D"], k: int, stride: int, groups: int
) -> Float32[Array, "{k} {k} c D"]:
    """Computes the gradient by the kernel without transposing the maps; float32, like its sums."""
    c, features = x.shape[-1] // groups, dy.shape[-1]
    x, dy = lax.optimization_barrier((x, dy))  # else XLA computes x and dy again for every tap

    def product(a: Array, b: Array) -> Array:
        if groups == 1:
            return jnp.einsum("nc,nd->cd", _flat(a), _flat(b), preferred_element_type=jnp.float32)
        a, b = _grouped(a, groups), _grouped(b, groups)
        return jnp.einsum("ngc,ngd->cgd", a, b, preferred_element_type=jnp.float32)

    if groups == 1 and _places(dy) <= c:
        return product(_columns(after(x, dy), k, stride), dy).reshape(k, k, c, features)
    if groups > 1 and stride == 1 and k > 1:
        windows, dy = lax.optimization_barrier((_windows(after(x, dy), k, groups), _by_group(dy, groups)))
        products = jnp.einsum("gnd,gnc->gdc", dy, windows, preferred_element_type=jnp.float32)
        return products.transpose(2, 0, 1).reshape(k, k, c, features)
    taps = [(i, j) for i in range(k) for j in range(k)]
    if stride == 1:  # shifting dy costs less than shifting x, whose channels are the contiguous ones of the product
        products = [product(x, _shifted(dy, k, 1, k - 1 - i, k - 1 - j)) for i, j in taps]
    else:
        x = after(x, dy)
        products = [product(_shifted(x, k, stride, i, j), dy) for i, j in taps]
    return jnp.stack(products).reshape(k, k, c, features)


def _columns(x: Array, k: int, stride: int, keep: Callable[[Array], Array] = lambda x: x) -> Array:
    """Returns the inputs of all taps at each place, in the order of the kernel: [B, h, w, k * k * C]. `keep` is applied to
    the maps between the steps."""
    height, width = x.shape[1:3]
    x = keep(_padded(x, k))
    x = keep(jnp.concatenate([x[:, :, j : j + width : stride] for j in range(k)], axis=-1))
    return jnp.concatenate([x[:, i : i + height : stride] for i in range(k)], axis=-1)


def _shifted(x: Array, k: int, stride: int, i: int, j: int) -> Array:
    """Returns the input of tap (i, j) at each place."""
    height, width = x.shape[1:3]
    return _padded(x, k)[:, i : i + height : stride, j : j + width : stride]


def _padded(x: Array, k: int) -> Array:
    return jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))


def _flat(x: Array) -> Array:
    """Reshapes to [B * h * w, C]: XLA takes factors of two axes as they are, and copies others to a new layout."""
    return x.reshape(-1, x.shape[-1])


def _by_group(x: Array, groups: int) -> Array:
    """Reshapes to [groups, all other axes, C / groups]."""
    return _grouped(x, groups).swapaxes(0, 1)


def _kernel_by_group(kernel: Array, groups: int, other: Array) -> Array:
    """Reshapes to [groups, k * k * c, D / groups], after `other` is computed. Reading in long strides is three times as fast
    if the kernel was copied first: the copy is in the caches."""
    return _by_group(stored(after(kernel, other)), groups)


def _windows(x: Array, k: int, groups: int) -> Array:
    """Returns the inputs of all taps at each place, one group after another: [groups, B * H * W, k * k * C / groups]."""
    batch, height, width, channels = x.shape
    maps = _by_group(x, groups).reshape(groups * batch, height, width, channels // groups)
    if _few_inputs(x, k):
        return _columns(maps, k, 1, keep=stored).reshape(groups, -1, k * k * channels // groups)
    # Windows that do not fit into the caches are read by a table of places, up to twice as fast as by slices.
    places = np.pad(np.arange(height * width).reshape(height, width), k // 2, constant_values=height * width)
    table = np.lib.stride_tricks.sliding_window_view(places, (k, k)).reshape(-1).astype(np.int32)
    maps = maps.reshape(groups, batch, height * width, channels // groups)
    maps = stored(jnp.pad(maps, ((0, 0), (0, 0), (0, 1), (0, 0))))  # a place of zeros
    windows = maps.at[:, :, table].get(mode="promise_in_bounds")
    return windows.reshape(groups, -1, k * k * channels // groups)


def _grouped(x: Array, groups: int) -> Array:
    """Reshapes to [B * h * w, groups, C / groups]."""
    return x.reshape(-1, groups, x.shape[-1] // groups)


def _places(x: Array, stride: int = 1) -> int:
    """Returns the number of output places; a symbolic batch size (`jax.export`) counts as one image."""
    batch, height, width, _ = x.shape
    return (1 if is_symbolic_dim(batch) else batch) * -(-height // stride) * -(-width // stride)


def _few_places(x: Array, *sides: int) -> bool:
    """Returns whether a matrix with these sides is large for the number of places, which must be known."""
    return _known(x) and FEW_PLACES * _places(x) <= min(sides)


def _few_inputs(x: Array, k: int) -> bool:
    """Returns whether the inputs of all taps at all places of `x` are few; their number must be known."""
    return _known(x) and _places(x) * k * k * x.shape[-1] <= FEW_NUMBERS


def _known(x: Array) -> bool:
    return not any(map(is_symbolic_dim, x.shape))


def _for_products(x: Array, kernel: Array) -> bool:
    """Returns whether a tap fills a matrix product, which the three channels of an image do not, and the convolution of one
    image is large enough for a form of its own."""
    small = kernel.size <= SMALL_KERNEL and x.shape[1] * x.shape[2] * kernel.size <= FEW_PRODUCTS
    return min(kernel.shape[2:]) >= 32 and not small


def _for_winograd(x: Array, kernel: Array, stride: int, groups: int) -> bool:
    """Returns whether the saved products outweigh the transformations, above all of the kernel. It depends on the size of
    one image, so a batch is computed in the same way on one device and on several."""
    fits = len(kernel) == 3 and stride == groups == 1 and x.dtype == jnp.float32
    return fits and _for_products(x, kernel) and x.shape[1] * x.shape[2] >= WINOGRAD_PLACES


def _forward(plain: Convolution, x: Any, kernel: Any, stride: int, groups: int) -> tuple[Array, tuple]:
    # Empty tuple or None: whether the gradient by the map is needed is known when the program is traced.
    needed = () if x.perturbed else None
    return convolve_on_cpu(plain, x.value, kernel.value, stride, groups), (x.value, kernel.value, needed)


def _backward(plain: Convolution, stride: int, groups: int, saved: tuple, dy: Any) -> tuple[Array | None, Array]:
    x, kernel, needed = saved
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    k, features = len(kernel), dy.shape[-1]
    by_winograd = _for_winograd(x, kernel, stride, groups)

    def plain_dx(x: Array, kernel: Array, dy: Array) -> Array:
        return jax.linear_transpose(lambda x: plain(x, kernel, stride, groups), x)(dy)[0]

    def plain_dkernel(x: Array, kernel: Array, dy: Array) -> Array:
        return jax.linear_transpose(lambda kernel: plain(x, kernel, stride, groups), kernel)(dy)[0]

    def fast_dx(x: Array, kernel: Array, dy: Array) -> Array:
        if by_winograd:
            return winograd.map_gradient(dy, kernel)
        return map_gradient(dy, kernel, stride, groups, x.shape[1:3]).astype(dy.dtype)

    def fast_dkernel(x: Array, kernel: Array, dy: Array) -> Array:
        if by_winograd:
            return winograd.kernel_gradient(x, dy)
        return kernel_gradient(x, dy, k, stride, groups).astype(dy.dtype)

    fast = k == 1 or groups > 1 or _for_products(x, kernel)
    map_outweighs_kernel = k > 1 and stride == groups == 1 and _places(dy) > 4 * features and not by_winograd
    dx = fast_dx if fast and not map_outweighs_kernel else plain_dx
    dkernel = fast_dkernel if fast else plain_dkernel
    if needed is None:
        return None, by_platform(dkernel, plain_dkernel, x, kernel, dy)
    # A kernel can be updated in its place as soon as its gradient is known if nothing reads it later: its gradient waits
    # for that of the map. Otherwise XLA copies it first.
    of_map = by_platform(dx, plain_dx, x, kernel, dy)
    if _places(dy) * features < kernel.size:
        return of_map, by_platform(dkernel, plain_dkernel, x, kernel, after(dy, of_map))
    return of_map, after(by_platform(dkernel, plain_dkernel, x, kernel, dy), of_map)


convolve_on_cpu.defvjp(_forward, _backward, symbolic_zeros=True)
