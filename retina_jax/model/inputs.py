"""Pixels to network input, on the device: the pipeline moves uint8, a quarter of the bytes."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

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
