"""Resizing and padding: Detectron's resize rule, and the few padded shapes for which programs are compiled."""

from __future__ import annotations

import atexit
import functools
import gc
import math
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from PIL import Image

from retina_jax.config import DataConfig
from retina_jax.data.source import Size

Shapes = tuple[Size, ...]  # padded shapes, each (height, width)
Boxes, Scale = Float[np.ndarray, "G 4"], Float[np.ndarray, " 2"]
Pixels, Resized = UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h2 w2 3"] | Float32[np.ndarray, "h2 w2 3"]
Ends = Literal["half_open", "inclusive"]
# TensorFlow is imported at first use. That takes seconds, and commands that read no images do not wait for it.
if TYPE_CHECKING:
    import tensorflow as tf
else:

    class _TensorFlow(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):  # from a debugger or `inspect`
                raise AttributeError(name)
            return getattr(load(), name)

    tf = _TensorFlow("tf")


@functools.cache
def load() -> ModuleType:
    """Imports TensorFlow; call it before anything that is timed."""
    import tensorflow

    # TensorFlow only reads images; the accelerators are JAX's.
    tensorflow.config.set_visible_devices([], "GPU")
    # Saves a second at exit: Python would search its 400,000 objects for garbage.
    atexit.register(gc.freeze)
    return tensorflow


def resized_size(
    height: int,
    width: int,
    short_side: int,
    long_side: int,
    rounding: str = "nearest",
    rule: str = "fit",
    factor: float = 1.0,
) -> Size:
    """Returns (height, width) of an image resized to a short side of `short_side`, or long side of `long_side` if
    smaller, times `factor`. Sides are rounded to the nearest pixel (halves up), or down with "floor", and are at least 1.
    The short side is from the paper (Section 4.1), the bound of the long side from Detectron: 1000 with 600, 1333 with
    800. With the rule "stretch" both sides are `short_side` times `factor`."""
    half = 0.5 if rounding == "nearest" else 0.0
    if rule == "stretch":
        side = max(1, int(short_side * factor + half))
        return side, side
    scale = min(short_side / min(height, width), long_side / max(height, width)) * factor
    return max(1, int(height * scale + half)), max(1, int(width * scale + half))


def train_short_sides(data: DataConfig) -> tuple[int, ...]:
    """Returns the short sides of the scale jitter in training."""
    return data.jitter_short_sides or (data.short_side,)


def buckets(data: DataConfig, short_sides: tuple[int, ...]) -> Shapes:
    """Returns padded shapes (height, width) for images resized to any of `short_sides`; multiples of `pad_multiple`.
    With S the largest short side and L the long side, 6 buckets are S by 4/3 S, 3/2 S and L, landscape and portrait; 4
    buckets (and 0) leave 3/2 out; 2 buckets are S by L and L by S; 1 bucket is L by L."""
    long = _padded(data.long_side, data)
    short = min(_padded(max(short_sides), data), long)
    if data.buckets == 1:
        return ((long, long),)
    ratios = {2: (), 6: (4 / 3, 3 / 2)}.get(data.buckets, (4 / 3,))
    longs = [*(min(_padded(ratio * max(short_sides), data), long) for ratio in ratios), long]
    return tuple(dict.fromkeys(shape for side in longs for shape in ((short, side), (side, short))))


def exact_padded_shape(size_hw: Size, data: DataConfig) -> Size:
    """Returns the smallest padded shape of an image of this size: its sides rounded up to multiples of `pad_multiple`."""
    return _padded(size_hw[0], data), _padded(size_hw[1], data)


def _padded(side: int | float, data: DataConfig) -> int:
    return math.ceil(side / data.pad_multiple) * data.pad_multiple


def assign_bucket(size_hw: Size, shapes: Shapes) -> int:
    """Returns the index of the smallest of `shapes` in which an image of this size fits; the first of equal ones."""
    fitting = [i for i, shape in enumerate(shapes) if size_hw[0] <= shape[0] and size_hw[1] <= shape[1]]
    if not fitting:
        raise ValueError(f"an image of {size_hw[0]}x{size_hw[1]} (height x width) fits none of {shapes}")
    return min(fitting, key=lambda i: shapes[i][0] * shapes[i][1])


def resize(image: tf.Tensor | np.ndarray, size_hw: tf.Tensor | Size, kind: str, pixels: str = "uint8") -> tf.Tensor:
    """Resizes uint8 [h w 3] to [h' w' 3] with half-pixel centres; `kind` is DataConfig.resize. `pixels` "uint8" is
    rounded to the nearest, halves up; "float32" is not rounded. "pillow" always gives uint8."""
    if kind == "pillow":
        resized = tf.numpy_function(resize_by_pillow, [image, size_hw], tf.uint8)
        resized.set_shape((None, None, 3))
        return resized
    # The weights of a pixel sum to 1, so the 0.5 for rounding can be added to the input, in the same pass as the cast.
    halves = plus_half(image) if pixels == "uint8" else tf.cast(image, tf.float32)
    resized = tf.image.resize(halves, size_hw, method="bilinear") if kind == "bilinear" else _antialias(halves, size_hw)
    return tf.cast(resized, tf.uint8 if pixels == "uint8" else tf.float32)


def _antialias(image: tf.Tensor, size_hw: tf.Tensor | Size) -> tf.Tensor:
    bilinear = functools.partial(tf.image.resize, image, size_hw, method="bilinear")
    # For enlarging, the antialiased kernel is the plain one, at a third of the speed.
    return tf.cond(tf.reduce_any(tf.shape(image)[:2] > size_hw), functools.partial(bilinear, antialias=True), bilinear)


def resize_by_pillow(image: Pixels, size_hw: Size | Int[np.ndarray, " 2"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Resizes as Pillow does, antialiased: one axis after the other, with integer weights, rounded to uint8 after each."""
    height, width = map(int, size_hw)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def plus_half(image: tf.Tensor | np.ndarray) -> tf.Tensor:
    """Converts uint8 to float32 and adds 0.5, exactly, in one pass over the image instead of two."""
    steps = tf.bitcast(image, tf.quint8)
    return tf.raw_ops.Dequantize(input=steps, min_range=0.5, max_range=255.5, mode="MIN_COMBINED")


def resize_large(image: Pixels, size_hw: Size, kind: str, pixels: str = "uint8") -> Resized:
    """Resizes like `resize` without a float32 copy of the image, which would need 2 GB for 179 million pixels. Because 0.5
    is added after the weights, a pixel can differ from `resize` by one grey level, except with `kind` "pillow"."""
    if kind == "pillow":
        return resize_by_pillow(image, size_hw)
    widen = kind == "antialias" and (image.shape[0] > size_hw[0] or image.shape[1] > size_hw[1])
    resized = tf.cast(tf.image.resize(image, size_hw, method="bilinear", antialias=widen), tf.float32)
    return (resized if pixels == "float32" else tf.cast(resized + 0.5, tf.uint8)).numpy()


def pad(image: tf.Tensor, padded_hw: tf.Tensor | Size) -> tf.Tensor:
    """Pads an image [h w 3] at the bottom and right with zeros to [H W 3]."""
    shape = tf.shape(image)
    # Rows of 3 w numbers: padding two axes is faster than padding three.
    rows = tf.reshape(image, (shape[0], 3 * shape[1]))
    rows = tf.pad(rows, [[0, padded_hw[0] - shape[0]], [0, 3 * (padded_hw[1] - shape[1])]])
    return tf.reshape(rows, (padded_hw[0], padded_hw[1], 3))


def to_padded_pixels(boxes_xyxy: Boxes, scale_xy: Scale, ends: Ends) -> Boxes:
    """Returns boxes of the original image in the resized one, with `scale_xy` pixels per original pixel along x and y.
    `ends` "half_open": all four coordinates are scaled. "inclusive" (Detectron): the number of the last pixel is
    scaled, so that x2 becomes (x2 - 1) s + 1, and a resized box is s - 1 pixels smaller."""
    scale = np.tile(scale_xy, 2)[None]
    return boxes_xyxy * scale + _shift_of_ends(scale, ends)


def to_original_pixels(boxes_xyxy: Boxes, scale_xy: Scale, ends: Ends) -> Boxes:
    """Inverts `to_padded_pixels`."""
    scale = np.tile(scale_xy, 2)[None]
    return (boxes_xyxy - _shift_of_ends(scale, ends)) / scale


def _shift_of_ends(scale: Float[np.ndarray, "1 4"], ends: str) -> Float[np.ndarray, "1 4"]:
    return (1 - scale) * np.array([[0, 0, 1, 1]] if ends == "inclusive" else [[0, 0, 0, 0]], scale.dtype)


def flip_boxes(boxes_xyxy: Float32[np.ndarray, "G 4"], width: int) -> Float32[np.ndarray, "G 4"]:
    """Returns boxes in the horizontally flipped image, which is `width` pixels wide: x becomes width - x."""
    x1, y1, x2, y2 = boxes_xyxy.T
    return np.stack([width - x2, y1, width - x1, y2], axis=1)
