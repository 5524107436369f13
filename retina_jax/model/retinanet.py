"""RetinaNet (Section 4, Figure 3): backbone, pyramid, class subnet, box subnet."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, UInt8

from retina_jax.config import ModelConfig
from retina_jax.model.fpn import FPN
from retina_jax.model.heads import Head
from retina_jax.model.inputs import normalise
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
