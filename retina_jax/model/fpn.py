"""Feature pyramid (Section 4; Lin et al. 2017, Feature Pyramid Networks): C2 to C5 to the levels P3 to P7."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from retina_jax.config import ConfigError, ModelConfig
from retina_jax.model.layers import Conv, relu


def upsample(x: Float[Array, "B h w C"], size_hw: tuple[int, int]) -> Float[Array, "B H W C"]:
    """Twice the sides by nearest neighbour, cropped to `size_hw`.

    A finer map with an odd side 2n - 1 stands under a coarser one of n: the crop is then what nearest-neighbour resizing to
    exactly that side gives. Sides other than 2n and 2n - 1 are an error, raised where the two maps are added.
    """
    height, width = size_hw
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, :height, :width]


class FPN(nn.Module):
    """Pyramid levels `min_level` to `max_level`, finest first, each of `config.fpn_channels` channels.

    Levels up to P5: a 1x1 lateral of C_l plus the upsampled sum one level above, then a 3x3 convolution. P6 is a 3x3
    convolution of stride 2 on C5 (or P5, by `config.p6_from`); P7 and what lies above it a ReLU and such a convolution on
    the level below. There is no ReLU before P6.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, maps: tuple[Float[Array, "B _ _ _"], ...]) -> tuple[Float[Array, "B _ _ C"], ...]:
        low, high, channels = self.config.min_level, self.config.max_level, self.config.fpn_channels
        if not 2 <= low <= 5 <= high:
            raise ConfigError(
                f"model.min_level is {low} and model.max_level {high}: give 2 <= min_level <= 5 <= max_level"
            )

        def conv(kernel_size: int, stride: int, name: str) -> Conv:
            return Conv(channels, kernel_size, stride, bias=True, dtype=np.dtype(self.config.dtype), name=name)

        levels: dict[int, Array] = {}
        above = None
        for level in range(5, low - 1, -1):
            merged = conv(1, 1, f"lateral{level}")(maps[level - 2])
            if above is not None:
                merged = merged + upsample(above, merged.shape[1:3])
            levels[level] = conv(3, 1, f"output{level}")(merged)
            above = merged
        top = maps[-1] if self.config.p6_from == "c5" else levels[5]
        for level in range(6, high + 1):
            top = conv(3, 2, f"output{level}")(top if level == 6 else relu(top))
            levels[level] = top
        return tuple(levels[level] for level in range(low, high + 1))
