"""Feature pyramid (Section 4; Lin et al. 2017, Feature Pyramid Networks): the maps C2 to C5 to the levels P3 to P7."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from retina_jax.config import ModelConfig
from retina_jax.cpu import platform
from retina_jax.model.layers import Conv, relu
from retina_jax.model.patches import Patches, cut, join, patches_of


def upsample(x: Float[Array, "B h w C"], size_hw: tuple[int, int]) -> Float[Array, "B H W C"]:
    """Doubles the sides (nearest neighbour) and crops to `size_hw`: if the coarser side is n, the finer is 2n or 2n - 1."""
    height, width = size_hw
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, :height, :width]


@jax.custom_vjp
def separate_gradient(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns `x`. On GPUs a barrier keeps XLA from adding another gradient within the convolution that computes this one:
    cuDNN needs that gradient, of the next stage's strided 1x1 convolutions, padded with zeros and stored."""
    return x


def _backward(_: None, dy: Array) -> tuple[Array]:
    return (lax.optimization_barrier(dy) if platform() == "gpu" else dy,)


separate_gradient.defvjp(lambda x: (x, None), _backward)


class FPN(nn.Module):
    """Pyramid levels min_level (2 to 5) to max_level (from 5), finest first, each of `config.fpn_channels` channels.

    Up to P5: a 1x1 lateral convolution of C_l plus the upsampled sum of the level above, then a 3x3 convolution. P6 is a 3x3
    convolution of stride 2 on C5 (or P5, by `config.p6_from`), without a ReLU. P7 and coarser levels are a ReLU and such a
    convolution on the level below.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, maps: tuple[Float[Array, "B _ _ _"], ...]) -> tuple[Float[Array, "B _ _ C"], ...]:
        """`maps` are those of the backbone up to C5; those below C`min_level` are not used."""
        low, high, channels = self.config.min_level, self.config.max_level, self.config.fpn_channels

        def conv(x: Array, kernel_size: int, stride: int, name: str, patches: Patches) -> Array:
            dtype = np.dtype(self.config.dtype)
            return Conv(channels, kernel_size, stride, bias=True, dtype=dtype, patches=patches, name=name)(x)

        levels: dict[int, Array] = {}
        merged = None
        for level in range(5, low - 1, -1):
            x = separate_gradient(maps[level - 6])
            patches, even = patches_of(x, level), patches_of(x, level, 2)  # `even` fit the coarser map too
            finer = conv(cut(x, patches), 1, 1, f"lateral{level}", patches)
            if merged is not None:
                sides = x.shape[1] // even.rows, x.shape[2] // even.columns
                finer = finer + cut(join(upsample(cut(merged, even), sides), even), patches)
            merged = join(finer, patches)
            levels[level] = join(conv(finer, 3, 1, f"output{level}", patches), patches)
        top = maps[-1] if self.config.p6_from == "c5" else levels[5]
        for level in range(6, high + 1):
            patches = patches_of(top, level - 1, 2)
            x = cut(top if level == 6 else relu(top), patches)
            levels[level] = top = join(conv(x, 3, 2, f"output{level}", patches), patches)
        return tuple(levels[level] for level in range(low, high + 1))
