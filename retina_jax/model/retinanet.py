"""RetinaNet (Section 4, Figure 3): input normalisation, backbone, pyramid, class subnet, box subnet."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from retina_jax.config import ModelConfig
from retina_jax.model import side_by_side
from retina_jax.model.fpn import FPN
from retina_jax.model.layers import Conv, Norm, relu
from retina_jax.model.patches import cut, join, patches_of
from retina_jax.model.resnet import ResNet

Images = UInt8[Array, "B H W 3"] | Float32[Array, "B H W 3"]


class Outputs(NamedTuple):
    """Output for every anchor, ordered by level (finest first), row, column, anchor of the cell."""

    logits: Float[Array, "B A K"]
    """Class logits: the sigmoid of each is an independent probability; there is no background class."""
    deltas: Float[Array, "B A 4"]  # box deltas (dx, dy, dw, dh) relative to the anchor


class RetinaNet(nn.Module):
    """The network: `outputs = model.apply(variables, images, image_sizes)`.

    Its variables come from `initialisation.initialise` or from imported weights; `init` only gives zeros and ones of the
    right shapes. Training with norm "batch" needs `train=True, mutable=["stats"]`.
    """

    config: ModelConfig
    num_classes: int
    anchors_per_cell: int
    axis_name: str | None = None
    """Named axis of the devices over which BatchNorm takes its statistics; None if one device has the complete batch."""

    def __call__(self, images: Images, image_sizes: Int[Array, "B 2"], train: bool = False) -> Outputs:
        """Computes logits and deltas of all anchors, in the precision of the convolutions.

        `images` are RGB, 0 to 255, padded to H x W; `image_sizes` is (height, width) of the image in the upper left corner,
        and the content of the padding has no effect. With `train`, norm "batch" takes its statistics from this batch.
        """
        levels = self.levels(images, image_sizes, train)
        return Outputs(*(jnp.concatenate(parts, axis=1) for parts in zip(*levels, strict=True)))

    @nn.compact
    def levels(self, images: Images, image_sizes: Int[Array, "B 2"], train: bool = False) -> tuple[Outputs, ...]:
        """Computes the outputs of each pyramid level, finest first: [B H*W*a K] and [B H*W*a 4]. Losses and detection take
        them as they are, because joining them would copy the largest array of the network."""
        config = self.config
        x = normalise(images, image_sizes, config.input_normalisation)
        levels = FPN(config, name="fpn")(ResNet(config, self.axis_name, name="backbone")(x, train))
        class_head = Head(config, self.anchors_per_cell, self.num_classes, self.axis_name, name="class_head")
        box_head = Head(config, self.anchors_per_cell, 4, self.axis_name, name="box_head")
        outputs, level = [], config.min_level
        for maps in side_by_side.groups(levels, shared=config.head_norm == "none"):
            heads = (head(maps, level, train) for head in (class_head, box_head))
            outputs += [Outputs(*of_map) for of_map in zip(*heads, strict=True)]
            level += len(maps)
        return tuple(outputs)


class Head(nn.Module):
    """The class or box subnet (Section 4): `head_convs` 3x3 convolutions with ReLU, then a 3x3 convolution to `outputs`
    numbers per anchor.

    One instance is applied to every level, so the levels share its weights; the two subnets share none. With `head_norm` a
    norm precedes each ReLU and replaces the convolution's bias: "group" has statistics per level, and shared weights;
    "batch" is a BatchNorm of its own for each level. The channels of the last convolution are anchor-major, so the result is
    ordered by row, column, anchor.
    """

    config: ModelConfig
    anchors_per_cell: int
    outputs: int
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, maps: Sequence[Float[Array, "B _ _ C"]], level: int, train: bool = False
    ) -> list[Float[Array, "B _ {self.outputs}"]]:
        """Returns the outputs of each of the maps, [B, H * W * anchors_per_cell, outputs]. `level` is that of the first. The
        maps are side by side in the convolutions (`side_by_side`)."""
        config, dtype = self.config, np.dtype(self.config.dtype)
        plain, of_level = config.head_norm == "none", f"_p{level}" if config.head_norm == "batch" else ""
        patches = patches_of(maps[0], level)
        x = cut(side_by_side.joined(maps), patches)
        for i in range(1, config.head_convs + 1):
            conv = Conv(config.head_channels, 3, bias=plain, dtype=dtype, patches=patches, name=f"conv{i}")
            if plain:
                x = side_by_side.cleared(relu(conv(x)), maps)
            else:
                options = (config.head_norm, config.norm_groups, False, self.axis_name, dtype, patches)
                x = relu(Norm(*options, name=f"norm{i}{of_level}")(x, train, conv))
        x = Conv(self.anchors_per_cell * self.outputs, 3, bias=True, dtype=dtype, patches=patches, name="output")(x)
        parts = side_by_side.parted(join(x, patches), maps)
        return [part.reshape(part.shape[0], -1, self.outputs) for part in parts]


STATISTICS = {
    # name: (channel order of the RGB image, mean, standard deviation), in 0-255 and in that order
    "detectron": ((2, 1, 0), (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)),
    "detectron2": ((2, 1, 0), (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),
    "imagenet": ((0, 1, 2), (0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255)),
}


def normalise(
    images: Images, image_sizes: Int[Array, "B 2"], kind: Literal["detectron", "detectron2", "imagenet"]
) -> Float[Array, "B H W 3"]:
    """Turns RGB images, 0 to 255, into float32 network input: (x - mean) / std per channel, in the order of `kind`.

    The padding (row >= height or column >= width of `image_sizes`) is 0 after the normalisation, as in Detectron and
    torchvision. This runs on the device, because uint8 images are a quarter of the bytes.
    """
    order, mean, std = STATISTICS[kind]
    x = (images if order == (0, 1, 2) else images[..., ::-1]).astype(jnp.float32)  # a gather would cost loops on TPUs
    x = (x - np.array(mean, np.float32)[None, None, None]) / np.array(std, np.float32)[None, None, None]
    height, width = images.shape[1:3]
    rows = jnp.arange(height)[None, :] < image_sizes[:, :1]
    columns = jnp.arange(width)[None, :] < image_sizes[:, 1:]
    return jnp.where(rows[:, :, None, None] & columns[:, None, :, None], x, 0)
