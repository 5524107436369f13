"""Convolution, ReLU and normalisation. The collection of a weight decides whether it is trained (`params`) or `frozen`."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

from retina_jax.cpu import convolution, on_cpu, platform, pooling, stored
from retina_jax.model.patches import MAPS, UNCUT, Patches, with_edges

FLOAT32 = np.dtype("float32")
EPSILON = 1e-5  # added to every variance, as in the systems whose weights are imported
LANES = 128  # rows and columns of a TPU's matrix units
MOMENTUM = 0.9  # weight of the old running statistics in each step


def largest_divisor(number: int, at_most: int) -> int:
    """Returns the largest divisor of `number` that is <= `at_most`, both >= 1."""
    return next(d for d in range(min(number, at_most), 0, -1) if number % d == 0)


def weight(
    module: nn.Module, name: str, shape: tuple[int, ...], fill: Callable[..., Array], frozen: bool
) -> Float[Array, "..."]:
    """Makes a float32 weight in the collection `frozen` or `params`; `fill` gives shapes, `initialise` draws the values."""
    if frozen:
        value = module.variable("frozen", name, fill, shape, jnp.float32).value
    else:
        value = module.param(name, lambda _, shape: fill(shape, jnp.float32), shape)
    return jnp.asarray(value)  # outside jit it may be a numpy array


def prepared(module: nn.Module, name: str, compute: Callable[[], Array]) -> Array:
    """Returns what `compute` makes of weights alone, from the collection `prepared` if the module has it there.
    `preparation.prepare` makes that collection, so that inference computes this once for all images."""
    if module.has_variable("prepared", name):
        return module.get_variable("prepared", name)
    value = compute()
    if prepares(module):
        module.put_variable("prepared", name, value)
    return value


def prepares(module: nn.Module) -> bool:
    """Returns whether the collection `prepared` is being made."""
    return module.is_mutable_collection("prepared") and not module.is_initializing()


@jax.custom_vjp
def relu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Computes max(x, 0), and its gradient from the result, which the next layer stores anyway, so x is not stored."""
    return jnp.maximum(x, 0)


def _relu(x: Array) -> tuple[Array, Array]:
    y = relu(x)
    return y, lax.optimization_barrier(y)  # XLA would compare x instead of y with 0, and store both


@jax.custom_vjp
def stored_relu(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Computes `relu`, and on the CPU stores the result for all who read it (`cpu.stored`)."""
    return stored(relu(x))


def _stored_relu(x: Array) -> tuple[Array, Array]:
    y = stored_relu(x)
    return y, y


relu.defvjp(_relu, lambda y, dy: (jnp.where(y > 0, dy, 0),))
stored_relu.defvjp(_stored_relu, lambda y, dy: (jnp.where(y > 0, dy, 0),))


def convolve(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k k c D"],
    stride: int = 1,
    groups: int = 1,
    patches: Patches = UNCUT,
) -> Float[Array, "B h w D"]:
    """Convolves x with k // 2 zeros of padding on all four sides, k odd: h = ceil(H / stride), w = ceil(W / stride).

    Each of the groups maps c = C / groups neighbouring channels to D / groups. The padding is that of Caffe2 and PyTorch;
    XLA's "SAME" pads an even side by (0, 1) for stride 2, which would shift the map by a pixel. With `patches`, x and the
    result are cut by `patches.cut`.
    """
    if platform() == "tpu":
        return _convolve_on_tpu(x, kernel, stride, groups, patches)
    if patches != UNCUT:
        raise ValueError(f"{patches}: maps are cut on TPUs only")
    return _convolve(x, kernel, stride, groups)


@on_cpu(convolution.convolve_on_cpu)
def _convolve(x: Array, kernel: Array, stride: int, groups: int) -> Array:
    if len(kernel) == 1:  # two convolutions of the same map then share the smaller one
        x, stride = x[:, ::stride, ::stride], 1
    padding = [(kernel.shape[0] // 2,) * 2] * 2
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, **layout)


def _convolve_on_tpu(x: Array, kernel: Array, stride: int, groups: int, patches: Patches) -> Array:
    """Computes `_convolve` in forms that suit TPUs; docs/results/accelerators.md has the cycles.

    Groups of few channels are joined to blocks of 128, as wide as the matrix units, with zeros between the groups. If the
    batch has fewer than MAPS maps, XLA would cut them into strips. It leaves matrix products uncut, and convolutions whose
    last spatial axis has size 1. From an image to 64 channels, half of the matrix units would be idle: two columns are
    computed at once, with a wider kernel.
    """
    uncut = groups == 1 and patches == UNCUT
    if uncut and kernel.shape[2:] == (3, LANES // 2) and x.shape[2] % (2 * stride) == 0:
        return _convolve_two_columns(x, kernel, stride)
    kernel, groups = _joined_groups(kernel, groups)
    channels, features = kernel.shape[2:]
    if len(kernel) == 1 and groups == 1 and _few(x) and min(channels, features) >= LANES:
        x = x[:, ::stride, ::stride]
        return (x.reshape(-1, channels) @ kernel[0, 0]).reshape(*x.shape[:3], features)
    if len(kernel) == 1 or (patches == UNCUT and channels < LANES):
        return _convolve(x, kernel, stride, groups)
    return (_convolve_patches_at_stride_1 if stride == 1 else _convolve_patches)(x, kernel, stride, groups, patches)


def _convolve_two_columns(x: Array, kernel: Array, stride: int) -> Array:
    """Computes `_convolve` with twice the stride along rows, to two neighbouring columns side by side in the channels."""
    size, features = len(kernel) // 2, kernel.shape[3]
    sides = ((0, stride), (stride, 0))
    both = jnp.concatenate([jnp.pad(kernel, ((0, 0), side, (0, 0), (0, 0))) for side in sides], axis=3)
    padding = [(size, size), (size, size + stride - 1)]
    y = lax.conv_general_dilated(x, both, (stride, 2 * stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y.reshape(*y.shape[:2], -1, features)  # the same order in memory


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Takes the maximum over 3x3 windows with stride 2, padded with -inf: h = ceil(H / 2), w = ceil(W / 2)."""
    return _max_pool_on_tpu(x) if platform() == "tpu" and x.shape[2] % 2 == 0 else _max_pool(x)


@on_cpu(pooling.max_pool_on_cpu)
def _max_pool(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


@jax.custom_vjp
def _max_pool_on_tpu(x: Array) -> Array:
    """Computes `_max_pool` from pairs of columns side by side in the channels, as `_convolve_two_columns` leaves them. The
    backward pass is that of `_max_pool`, which gives the gradient of equal numbers to the first."""
    channels = x.shape[3]
    pairs = x.reshape(*x.shape[:2], -1, 2 * channels)
    pairs = nn.max_pool(pairs, (3, 1), (2, 1), ((1, 1), (0, 0)))
    even, odd = pairs[..., :channels], pairs[..., channels:]
    left = jnp.pad(odd, ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=-jnp.inf)[:, :, :-1]
    return jnp.maximum(jnp.maximum(even, odd), left)


_max_pool_on_tpu.defvjp(lambda x: (_max_pool_on_tpu(x), x), lambda x, dy: jax.vjp(_max_pool, x)[1](dy))


def _few(x: Array) -> bool:
    return not is_symbolic_dim(x.shape[0]) and x.shape[0] < MAPS


def _convolve_patches(x: Array, kernel: Array, stride: int, groups: int, patches: Patches) -> Array:
    """Convolves maps in patches, each with the edges of its neighbours."""
    size = len(kernel) // 2
    padding = [(0, 0) if parts > 1 else (size, size) for parts in patches]
    x = with_edges(x, patches, size)
    if not _few(x):
        layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
        return lax.conv_general_dilated(x, kernel, (stride, stride), padding, **layout)
    layout = {"dimension_numbers": ("NHWTC", "HWTIO", "NHWTC"), "feature_group_count": groups}
    x, kernel = x[:, :, :, None], kernel[:, :, None]
    return lax.conv_general_dilated(x, kernel, (stride, stride, 1), [*padding, (0, 0)], **layout)[:, :, :, 0]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve_patches_at_stride_1(x: Array, kernel: Array, stride: int, groups: int, patches: Patches) -> Array:
    """Computes `_convolve_patches` with stride 1. Its gradient by x also fetches edges. The gradient that JAX derives would
    add the gradients of edges to the neighbouring patches, in a separate pass."""
    return _convolve_patches(x, kernel, stride, groups, patches)


def _stride_1_backward(
    stride: int, groups: int, patches: Patches, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    k, _, channels, features = kernel.shape
    mirrored = kernel[::-1, ::-1].reshape(k, k, channels, groups, features // groups)
    mirrored = mirrored.swapaxes(2, 4).reshape(k, k, features // groups, groups * channels)
    _, by_kernel = jax.vjp(lambda kernel: _convolve_patches(x, kernel, stride, groups, patches), kernel)
    return _convolve_patches(dy, mirrored, stride, groups, patches), *by_kernel(dy)


_convolve_patches_at_stride_1.defvjp(
    lambda x, kernel, *options: (_convolve_patches(x, kernel, *options), (x, kernel)), _stride_1_backward
)


def _joined_groups(kernel: Float[Array, "k k c D"], groups: int) -> tuple[Float[Array, "k k C D"], int]:
    """Returns the kernel of an equal convolution with fewer groups, of at most LANES channels if c is not more."""
    c, features = kernel.shape[2:]
    joined = largest_divisor(groups, max(1, LANES // c))
    group_of_row, group_of_column = np.arange(joined * c) // c, np.arange(features) // (features // groups) % joined
    mask = (group_of_row[:, None] == group_of_column)[None, None]
    return jnp.where(mask, jnp.tile(kernel, (1, 1, joined, 1)), 0), groups // joined


def _at_each_place(vector: Float[Array, " D"], y: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
    """Repeats a float32 vector for each place of `y`, in its dtype. The gradient is summed over the places in float32: GPUs
    add bfloat16 numbers in bfloat16."""
    return jnp.broadcast_to(vector[None, None, None], y.shape).astype(y.dtype)


class Folded(NamedTuple):
    """A 1x1 convolution with its norm, not computed yet: `x` convolved with `kernel`, plus `shift`."""

    x: Float[Array, "B h w C"]
    kernel: Float[Array, "1 1 C D"]
    shift: Float[Array, " D"]


class Conv(nn.Module):
    """`convolve` with a trained or frozen kernel [k, k, C / groups, features], plus an optional bias. The result of `gain`,
    [features], multiplies the kernel's outputs; the module `owner` has the product among its `prepared`. With `fold`,
    returns a `Folded` with shift 0 and computes no map. `added` is a `Folded` whose outputs are added, in one convolution of
    the channels of both maps."""

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    bias: bool = False
    frozen: bool = False
    dtype: np.dtype = FLOAT32
    patches: Patches = UNCUT

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        gain: Callable[[], Float[Array, " D"]] | None = None,
        owner: nn.Module | None = None,
        added: Folded | None = None,
        fold: bool = False,
    ) -> Float[Array, "B h w D"] | Folded:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)

        def scaled() -> Array:
            kernel = weight(self, "kernel", shape, jnp.zeros, self.frozen)
            return (kernel * gain()[None, None, None] if gain else kernel).astype(self.dtype)

        kernel = prepared(owner or self, "kernel", scaled)
        if fold:
            if self.kernel_size > 1 or self.bias:
                raise ValueError("only 1x1 convolutions without a bias can be folded")
            return Folded(x[:, :: self.stride, :: self.stride], kernel, jnp.zeros(self.features))
        if added:
            x, kernel = jnp.concatenate([x, added.x], axis=3), jnp.concatenate([kernel, added.kernel], axis=2)
        y = convolve(x.astype(self.dtype), kernel, self.stride, self.groups, self.patches)
        if self.bias:
            bias = prepared(self, "bias", lambda: weight(self, "bias", (self.features,), jnp.zeros, self.frozen))
            y = y + _at_each_place(bias, y)
        return y


class Norm(nn.Module):
    """(x - mean) / sqrt(var + 1e-5) * scale + bias, computed in float32 and returned in `dtype`; with `conv`, which has no
    bias, of conv(x).

    kind "frozen": mean and var are weights, and none of the four weights is trained (collection `frozen`).
    kind "frozen_statistics": mean and var are in `frozen`, scale and bias are trained.
    kind "group": mean and var of each image over groups of channels; `groups` is lowered to a divisor of the channels.
    kind "batch": with `train`, mean and var of the global batch (through `axis_name` of all devices), and the running
    statistics in `stats` move a tenth of the way to them; without `train`, the running statistics. The running variance is
    biased.

    With `frozen` scale and bias move to the collection `frozen`, and "frozen_statistics" and "batch" become "frozen". If
    mean and var are known before `conv`, its kernel is multiplied by scale / sqrt(var + 1e-5): only an addition remains for
    each number. In a `Driver`'s training step with CPU kernels a "frozen" norm multiplies the outputs, in the pass that
    adds: multiplying the kernel would read and write every weight once more. `fold` and `added` are those of `Conv`, for
    norms whose mean and var are known (`folds`).
    """

    kind: Literal["frozen", "frozen_statistics", "group", "batch"]
    groups: int = 32
    frozen: bool = False
    axis_name: str | None = None
    dtype: np.dtype = FLOAT32
    patches: Patches = UNCUT

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        train: bool = False,
        conv: Conv | None = None,
        added: Folded | None = None,
        fold: bool = False,
    ) -> Float[Array, "B h w D"] | Folded:
        if conv and conv.bias:
            raise ValueError("a convolution with a norm needs no bias of its own")
        if (fold or added) and not self.folds(train):
            raise ValueError(f"a norm of kind {self.kind} is no part of a convolution")
        frozen = self.frozen or self.kind == "frozen"
        channels = (conv.features,) if conv else x.shape[-1:]

        @functools.cache
        def affine() -> tuple[Array, Array]:
            return weight(self, "scale", channels, jnp.ones, frozen), weight(self, "bias", channels, jnp.zeros, frozen)

        def running() -> tuple[nn.Variable, nn.Variable]:
            mean = self.variable("stats", "mean", jnp.zeros, channels, jnp.float32)
            return mean, self.variable("stats", "var", jnp.ones, channels, jnp.float32)

        def known() -> tuple[Array, Array]:
            if not frozen and self.kind == "batch":
                mean, var = running()
                return mean.value, var.value
            mean = weight(self, "mean", channels, jnp.zeros, frozen=True)
            return mean, weight(self, "var", channels, jnp.ones, frozen=True)

        if conv and self.folds(train):

            @functools.cache
            def gain_and_shift() -> tuple[Array, Array]:
                (scale, bias), (mean, var) = affine(), known()
                gain = scale * lax.rsqrt(var + EPSILON)
                return gain, bias - mean * gain

            inference = prepares(self) or self.has_variable("prepared", "shift")
            # Not in exported programs, which other devices run too. The gradient of a trained scale would store the
            # convolution's result.
            if platform() == "cpu" and frozen and not inference:
                gain, shift = gain_and_shift()
                y = conv(x).astype(jnp.float32) * gain[None, None, None] + shift[None, None, None]
                return y.astype(self.dtype)
            y = conv(x, lambda: gain_and_shift()[0], self, added, fold)
            shift = prepared(self, "shift", lambda: gain_and_shift()[1])
            if fold:
                return y._replace(shift=shift)
            if added:
                shift += added.shift
            return y + _at_each_place(shift, y)
        x = (conv(x) if conv else x).astype(jnp.float32)
        if self.kind == "group":
            mean, var = group_moments(x, largest_divisor(x.shape[-1], self.groups), self.patches)
        elif self.folds(train):
            mean, var = (moment[None, None, None] for moment in known())
        else:
            running_mean, running_var = running()
            mean, var = batch_moments(x, self.axis_name)
            running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean[0, 0, 0]
            running_var.value = MOMENTUM * running_var.value + (1 - MOMENTUM) * var[0, 0, 0]
        scale, bias = prepared(self, "scale", lambda: affine()[0]), prepared(self, "bias", lambda: affine()[1])
        gain = scale[None, None, None] * lax.rsqrt(var + EPSILON)
        return ((x - mean) * gain + bias[None, None, None]).astype(self.dtype)

    def folds(self, train: bool) -> bool:
        """Returns whether mean and var are known before the map is, so that the norm can be part of a convolution."""
        fixed = self.frozen or self.kind in ("frozen", "frozen_statistics")
        return self.kind != "group" and (fixed or not train)


def group_moments(
    x: Float[Array, "N H W C"], groups: int, patches: Patches = UNCUT
) -> tuple[Float[Array, "N 1 1 C"], Float[Array, "N 1 1 C"]]:
    """Returns mean and variance of each image and group of neighbouring channels, repeated over the group's channels and
    the image's patches."""
    size, parts = x.shape[-1] // groups, patches.rows * patches.columns
    sums = jnp.stack([x.mean((1, 2)), jnp.square(x).mean((1, 2))])
    of_groups = sums.reshape(2, -1, parts, groups, size).mean((2, 4))
    mean, square = jnp.repeat(jnp.repeat(of_groups, size, axis=-1), parts, axis=1)[:, :, None, None]
    return mean, jnp.maximum(square - jnp.square(mean), 0)


def batch_moments(
    x: Float[Array, "B H W C"], axis_name: str | None
) -> tuple[Float[Array, "1 1 1 C"], Float[Array, "1 1 1 C"]]:
    """Returns mean and variance of each channel over the batch, and over the devices of `axis_name` if it is given. Both
    come from mean(x) and mean(x^2): one pass over the activations and one all-reduce between devices."""
    sums = jnp.stack([x.mean((0, 1, 2)), jnp.square(x).mean((0, 1, 2))])
    if axis_name is not None:
        sums = jax.lax.pmean(sums, axis_name)
    mean, square = sums[:, None, None, None]
    return mean, jnp.maximum(square - jnp.square(mean), 0)
