"""Class and box subnets (Section 4): one pyramid level to its anchors' outputs."""

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from retina_jax.config import ModelConfig
from retina_jax.model.layers import Conv, Norm, relu


class Head(nn.Module):
    """A subnet: `head_convs` 3x3 convolutions with ReLU, then a 3x3 convolution to `outputs` numbers an anchor.

    The same instance is applied to every level, which is what shares its weights; the class and the box subnet are two
    instances and share nothing. With `head_norm` "group" a GroupNorm stands before each ReLU and takes over the
    convolution's bias; its statistics are those of the level at hand.

    The channels of the last convolution are anchor-major (all outputs of anchor 0, then of anchor 1, ...), so the result is
    ordered by row, column, anchor.
    """

    config: ModelConfig
    anchors_per_cell: int
    outputs: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H*W*{self.anchors_per_cell} {self.outputs}"]:
        config, dtype = self.config, np.dtype(self.config.dtype)
        plain = config.head_norm == "none"
        for i in range(1, config.head_convs + 1):
            x = Conv(config.head_channels, 3, bias=plain, dtype=dtype, name=f"conv{i}")(x)
            if not plain:
                x = Norm("group", config.norm_groups, dtype=dtype, name=f"norm{i}")(x)
            x = relu(x)
        x = Conv(self.anchors_per_cell * self.outputs, 3, bias=True, dtype=dtype, name="output")(x)
        return x.reshape(x.shape[0], -1, self.outputs)
