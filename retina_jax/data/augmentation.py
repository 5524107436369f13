"""What is drawn for an image in training: its size, crop, colours and mirroring, a pure function of (seed, position).

`data.scale_jitter` is the augmentation of TF Model Garden's RetinaNet (`resize_and_crop_image`) and of detectron2's
large-scale jitter (`ResizeScale`, `FixedSizeCrop`), with their rule for boxes: clipped to the crop, dropped without area.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

from retina_jax.config import DataConfig
from retina_jax.data import sampler
from retina_jax.data.source import Size
from retina_jax.data.transforms import tf, train_short_sides

GREY = np.array([0.299, 0.587, 0.114])  # Rec. 601
YIQ = np.array([GREY, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # hue is the angle in the plane of the last two


class Draw(NamedTuple):
    """What is drawn for an image."""

    short_side: int
    flip: bool = False
    factor: float = 1.0  # of the resized size
    place_yx: tuple[float, float] = (0.0, 0.0)  # of the crop: 0 is the top and left, just below 1 the bottom and right
    colours: tuple[float, ...] = (0.0,) * 10  # as from `colour_change`; unused without data.colour_jitter


def draw(data: DataConfig, seed: int, position: int) -> Draw:
    """Returns what training draws for the image at this position of the order (`BatchIndices.positions`)."""
    bits = sampler.random_bits(sampler.AUGMENTATION, seed, position, count=9)
    uniform = ((bits >> np.uint64(11)) * 2.0**-53).tolist()  # in [0, 1)
    short_sides = train_short_sides(data)
    low, high = data.scale_jitter or (1.0, 1.0)
    drawn = Draw(
        short_side=short_sides[int(bits[1]) % len(short_sides)],
        flip=data.flip and int(bits[0]) % 2 == 1,
        factor=low + (high - low) * uniform[2],
        place_yx=(uniform[3], uniform[4]),
    )
    return drawn._replace(colours=colour_change(data.colour_jitter, *uniform[5:])) if data.colour_jitter else drawn


def crop_of(place_yx: tuple[float, float], resized_hw: Size, padded_hw: Size) -> tuple[Size, Size]:
    """Returns (top, left) and (height, width) of the part of a resized image that its padded shape holds: all of a smaller
    image, and of a larger one the part at `place_yx`, every one equally likely."""
    pairs = list(zip(place_yx, resized_hw, padded_hw, strict=True))
    top, left = (int(place * (max(0, resized - padded) + 1)) for place, resized, padded in pairs)
    return (top, left), (min(resized_hw[0], padded_hw[0]), min(resized_hw[1], padded_hw[1]))


def crop_boxes(
    boxes_xyxy: Float[np.ndarray, "G 4"], corner_yx: Size, size_hw: Size
) -> tuple[Float32[np.ndarray, "n 4"], Bool[np.ndarray, " G"]]:
    """Returns the boxes that have area in a crop, clipped to it and in its pixels, and which of all these are."""
    (top, left), (height, width) = corner_yx, size_hw
    moved = boxes_xyxy - np.array([[left, top, left, top]])
    clipped = np.clip(moved, 0, np.array([[width, height, width, height]])).astype(np.float32)
    kept = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    return clipped[kept], kept


def colour_change(
    strength: float, brightness: float, contrast: float, saturation: float, hue: float
) -> tuple[float, ...]:
    """Returns the argument of `recolour` for numbers in [0, 1): factors from 1 - strength to 1 + strength of the brightness,
    of the contrast (differences from the image's mean grey) and of the saturation (differences from a pixel's grey), and a
    turn of the hue by up to strength / 4, SimCLR's proportion. They are linear, so that one matrix does all of them."""
    b, c, s = (1 + strength * (2 * number - 1) for number in (brightness, contrast, saturation))
    angle = 2 * np.pi * strength / 4 * (2 * hue - 1)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.linalg.inv(YIQ) @ np.array([[1, 0, 0], [0, s * cos, -s * sin], [0, s * sin, s * cos]]) @ YIQ
    return (*(b * c * turn).ravel().tolist(), b * (1 - c))


def recolour(image: tf.Tensor, colours: tf.Tensor) -> tf.Tensor:
    """Returns the RGB image [h w 3] with other colours, clipped to 0 and 255; of uint8 rounded to the nearest, halves up.
    `colours` are a 3 x 3 matrix by rows and the factor of the image's mean grey, which is added. For the mean,
    pixels are rounded down to integers, and no product is fused with a sum, so that all hosts compute the same pixels."""
    size = tf.cast(tf.size(image) // 3, tf.float64)
    means = tf.cast(tf.reduce_sum(tf.cast(image, tf.int64), axis=(0, 1)), tf.float64) / size
    added = colours[9] * tf.cast(tf.reduce_sum(means * GREY), tf.float32)
    red, green, blue = tf.unstack(tf.cast(image, tf.float32), axis=2)
    rows = (colours[3 * row : 3 * row + 3] for row in range(3))
    pixels = tf.stack([red * a + green * b + blue * c + added for a, b, c in map(tf.unstack, rows)], axis=2)
    pixels = tf.clip_by_value(pixels, 0.0, 255.0)
    return tf.cast(pixels + 0.5, tf.uint8) if image.dtype == tf.uint8 else pixels
