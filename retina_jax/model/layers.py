"""Convolution, ReLU and normalisation. The collection of a weight decides whether it is trained (`params`) or `frozen`."""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from retina_jax.cpu import convolution, on_cpu

FLOAT32 = np.dtype("float32")
EPSILON = 1e-5  # added to every variance, as in the systems whose weights are imported
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


@jax.custom_vjp
def relu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Computes max(x, 0), and its gradient from the result, which the next layer stores anyway, so x is not stored."""
    return jnp.maximum(x, 0)


relu.defvjp(lambda x: (relu(x),) * 2, lambda y, dy: (jnp.where(y > 0, dy, 0),))


@on_cpu(convolution.convolve_on_cpu)
def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k c D"], stride: int = 1, groups: int = 1
) -> Float[Array, "B h w D"]:
    """Convolves x with k // 2 zeros of padding on all four sides, k odd: h = ceil(H / stride), w = ceil(W / stride).

    Each of the groups maps c = C / groups neighbouring channels to D / groups. The padding is that of Caffe2 and PyTorch;
    XLA's "SAME" pads an even side by (0, 1) for stride 2, which would shift the map by a pixel.
    """
    padding = [(kernel.shape[0] // 2,) * 2] * 2
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, **layout)


class Conv(nn.Module):
    """`convolve` with a trained or frozen kernel [k, k, C / groups, features], plus an optional bias."""

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    bias: bool = False
    frozen: bool = False
    dtype: np.dtype = FLOAT32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = weight(self, "kernel", shape, jnp.zeros, self.frozen).astype(self.dtype)
        y = convolve(x.astype(self.dtype), kernel, self.stride, self.groups)
        if self.bias:
            bias = weight(self, "bias", (self.features,), jnp.zeros, self.frozen)
            y = y + bias.astype(self.dtype)[None, None, None]
        return y


class Norm(nn.Module):
    """(x - mean) / sqrt(var + 1e-5) * scale + bias, computed in float32 and returned in `dtype`.

    kind "frozen": mean and var are weights, and none of the four weights is trained (collection `frozen`).
    kind "group": mean and var of each image over groups of channels; `groups` is lowered to a divisor of the channels.
    kind "batch": with `train`, mean and var of the global batch (under pmap through `axis_name`), and the running statistics
    in `stats` move a tenth of the way to them; without `train`, the running statistics. The running variance is biased.

    With `frozen` scale and bias move to the collection `frozen`, and "batch" becomes "frozen".
    """

    kind: Literal["frozen", "group", "batch"]
    groups: int = 32
    frozen: bool = False
    axis_name: str | None = None
    dtype: np.dtype = FLOAT32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B H W C"]:
        frozen = self.frozen or self.kind == "frozen"
        channels = x.shape[-1:]
        scale = weight(self, "scale", channels, jnp.ones, frozen)
        bias = weight(self, "bias", channels, jnp.zeros, frozen)
        x = x.astype(jnp.float32)
        if self.kind == "group":
            mean, var = group_moments(x, largest_divisor(x.shape[-1], self.groups))
        elif frozen:
            mean = weight(self, "mean", channels, jnp.zeros, frozen)[None, None, None]
            var = weight(self, "var", channels, jnp.ones, frozen)[None, None, None]
        else:
            running_mean = self.variable("stats", "mean", jnp.zeros, channels, jnp.float32)
            running_var = self.variable("stats", "var", jnp.ones, channels, jnp.float32)
            if train:
                mean, var = batch_moments(x, self.axis_name)
                running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean[0, 0, 0]
                running_var.value = MOMENTUM * running_var.value + (1 - MOMENTUM) * var[0, 0, 0]
            else:
                mean, var = running_mean.value[None, None, None], running_var.value[None, None, None]
        gain = scale[None, None, None] * lax.rsqrt(var + EPSILON)
        return ((x - mean) * gain + bias[None, None, None]).astype(self.dtype)


def group_moments(x: Float[Array, "B H W C"], groups: int) -> tuple[Float[Array, "B 1 1 C"], Float[Array, "B 1 1 C"]]:
    """Returns mean and variance of each image and group of neighbouring channels, repeated over the group's channels."""
    size = x.shape[-1] // groups
    sums = jnp.stack([x.mean((1, 2)), jnp.square(x).mean((1, 2))])
    mean, square = jnp.repeat(sums.reshape(2, x.shape[0], groups, size).mean(-1), size, axis=-1)[:, :, None, None]
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
