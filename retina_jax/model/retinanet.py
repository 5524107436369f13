"""RetinaNet (Section 4, Figure 3): backbone, pyramid, class subnet, box subnet."""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from retina_jax.config import ModelConfig
from retina_jax.model.fpn import FPN
from retina_jax.model.layers import Conv, Norm, relu
from retina_jax.model.resnet import ResNet


class Outputs(NamedTuple):
    """What the network says of every anchor, ordered by level (finest first), row, column, anchor of the cell."""

    logits: Float[Array, "B A K"]
    """Class logits: sigmoid of each is an independent probability; there is no background class."""
    deltas: Float[Array, "B A 4"]
    """Box deltas (dx, dy, dw, dh) relative to the anchor."""


class RetinaNet(nn.Module):
    """The whole network.

    Its variables come from `initialisation.initialise` (or from imported weights), not from `init`, which only gives zeros
    and ones of the right shapes: `outputs = model.apply(variables, images, image_sizes)`. Training with norm "batch" reads
    `outputs, updates = model.apply(variables, images, image_sizes, train=True, mutable=["stats"])`.
    """

    config: ModelConfig
    num_classes: int
    anchors_per_cell: int
    axis_name: str | None = None
    """The pmap axis over which norm "batch" takes its statistics; None under jit."""

    @nn.compact
    def __call__(
        self,
        images: UInt8[Array, "B H W 3"] | Float32[Array, "B H W 3"],
        image_sizes: Int[Array, "B 2"],
        train: bool = False,
    ) -> Outputs:
        """Logits and deltas of all anchors, in the precision of the convolutions; losses and decoding widen them.

        Args:
          images: RGB canvases, 0 to 255. Any sides will do: level l has ceil(H / 2^l) x ceil(W / 2^l) cells.
          image_sizes: (height, width) of the image in the upper left of each canvas; the rest is padding and is not seen.
          train: take the statistics of norm "batch" from this batch. Nothing else depends on it.
        """
        config = self.config
        x = normalise(images, image_sizes, config.input_normalisation)
        levels = FPN(config, name="fpn")(ResNet(config, self.axis_name, name="backbone")(x, train))
        class_head = Head(config, self.anchors_per_cell, self.num_classes, name="class_head")
        box_head = Head(config, self.anchors_per_cell, 4, name="box_head")
        return Outputs(
            logits=jnp.concatenate([class_head(level) for level in levels], axis=1),
            deltas=jnp.concatenate([box_head(level) for level in levels], axis=1),
        )


# Class and box subnets (Section 4): one pyramid level to its anchors' outputs.


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


# Pixels to network input, on the device: the pipeline moves uint8, a quarter of the bytes.

STATISTICS = {
    # name: (channel order of the RGB image, mean, standard deviation), in 0-255 and in that order
    "detectron": ((2, 1, 0), (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)),
    "detectron2": ((2, 1, 0), (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),
    "imagenet": ((0, 1, 2), (0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255)),
}


def normalise(
    images: UInt8[Array, "B H W 3"] | Float32[Array, "B H W 3"],
    image_sizes: Int[Array, "B 2"],
    kind: Literal["detectron", "detectron2", "imagenet"],
) -> Float[Array, "B H W 3"]:
    """RGB canvases to float32 network input: (x - mean) / std by channel, BGR where `kind` says so.

    Args:
      images: RGB, 0 to 255, whole or not (`data.pixels`); the image stands in the upper left corner of its canvas.
      image_sizes: (height, width) of the image inside the canvas, pixels.
      kind: the convention, as in `ModelConfig.input_normalisation`.

    The padding (row >= height or column >= width) is 0 AFTER the normalisation, the mean colour, as in Detectron and
    torchvision. What the canvas holds there never matters.
    """
    order, mean, std = STATISTICS[kind]
    x = images[..., np.array(order)].astype(jnp.float32)
    x = (x - np.array(mean, np.float32)[None, None, None]) / np.array(std, np.float32)[None, None, None]
    height, width = images.shape[1:3]
    rows = jnp.arange(height)[None, :] < image_sizes[:, :1]
    columns = jnp.arange(width)[None, :] < image_sizes[:, 1:]
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(inside, x, 0)
