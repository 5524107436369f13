"""From an image to its place on a canvas: the resize rule of Detectron and the few canvas shapes that are compiled for."""

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

# TensorFlow, imported when it is first used: that takes seconds, which a command that reads no image need not wait for.

if TYPE_CHECKING:
    import tensorflow as tf
else:

    class _TensorFlow(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):  # a debugger's question, or inspect's
                raise AttributeError(name)
            return getattr(load(), name)

    tf = _TensorFlow("tf")


@functools.cache
def load() -> ModuleType:
    """Import it now, where the wait would else fall into something timed."""
    import tensorflow

    # It reads images and nothing else: the accelerators are JAX's.
    tensorflow.config.set_visible_devices([], "GPU")
    # At exit Python would look through its 400,000 objects for garbage: a second.
    atexit.register(gc.freeze)
    return tensorflow


def resized_size(
    height: int, width: int, short_side: int, long_side: int, rounding: Literal["nearest", "floor"] = "nearest"
) -> tuple[int, int]:
    """(height, width) of the resized image: short side `short_side`, or long side `long_side` where that is the smaller one.

    Sides are rounded to the nearest pixel, halves up, or with "floor" down, and are at least 1. The paper (Section 4.1)
    gives the short side; the bound of the long one is Detectron's: 1000 with 600, 1333 with 800.
    """
    scale = min(short_side / min(height, width), long_side / max(height, width))
    half = 0.5 if rounding == "nearest" else 0.0
    return max(1, int(height * scale + half)), max(1, int(width * scale + half))


def train_short_sides(data: DataConfig) -> tuple[int, ...]:
    """Short sides that training draws from."""
    return data.jitter_short_sides or (data.short_side,)


def buckets(data: DataConfig, short_sides: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Canvas shapes (height, width) that hold every image resized to any of `short_sides`; all multiples of `pad_multiple`.

    With S the largest short side and L the long side: 4 buckets are landscape and portrait, S by 4/3 S (where most
    photographs fit) and S by L; 2 buckets are S by L and L by S; 1 is L by L. Shapes that coincide are given once.
    0 buckets are those of 4: what only training uses.
    """
    long = _padded(data.long_side, data)
    short = min(_padded(max(short_sides), data), long)
    if data.buckets == 1:
        return ((long, long),)
    longs = [long] if data.buckets == 2 else [min(_padded(4 / 3 * max(short_sides), data), long), long]
    return tuple(dict.fromkeys(shape for side in longs for shape in ((short, side), (side, short))))


def exact_canvas(size_hw: tuple[int, int], data: DataConfig) -> tuple[int, int]:
    """The smallest canvas that holds an image of this size, its sides multiples of `pad_multiple`."""
    return _padded(size_hw[0], data), _padded(size_hw[1], data)


def _padded(side: int | float, data: DataConfig) -> int:
    return math.ceil(side / data.pad_multiple) * data.pad_multiple


def assign_bucket(size_hw: tuple[int, int], shapes: tuple[tuple[int, int], ...]) -> int:
    """Smallest of `shapes` that holds an image of this size; of two equally small, the first."""
    fitting = [i for i, shape in enumerate(shapes) if size_hw[0] <= shape[0] and size_hw[1] <= shape[1]]
    if not fitting:
        raise ValueError(f"an image resized to {size_hw[0]}x{size_hw[1]} (height x width) fits none of {shapes}")
    return min(fitting, key=lambda i: shapes[i][0] * shapes[i][1])


def resize(
    image: tf.Tensor | np.ndarray, size_hw: tf.Tensor | tuple[int, int], kind: str, pixels: str = "uint8"
) -> tf.Tensor:
    """Resizes uint8 [h w 3] to [h' w' 3], half-pixel centres, `pixels` as in DataConfig.

    "uint8" is rounded to the nearest, halves up; "float32" is not rounded at all.

    `kind` is "bilinear" (two by two neighbours: cv2, Detectron, torchvision), "antialias" (the kernel widens with the
    reduction; enlarging, both are the same) or "pillow" (`resize_by_pillow`, always uint8: detectron2).
    """
    if kind == "pillow":
        resized = tf.numpy_function(resize_by_pillow, [image, size_hw], tf.uint8)
        resized.set_shape((None, None, 3))
        return resized
    # The weights of a pixel sum to 1, so the half that makes truncation round is added where there are fewest pixels.
    halves = plus_half(image) if pixels == "uint8" else tf.cast(image, tf.float32)
    # Enlarging, the wider kernel is the plain one, at a third of the speed.
    widen = tf.reduce_any(tf.shape(image)[:2] > size_hw) if kind == "antialias" else tf.constant(False)
    resized = tf.cond(
        widen,
        lambda: tf.image.resize(halves, size_hw, method="bilinear", antialias=True),
        lambda: tf.image.resize(halves, size_hw, method="bilinear"),
    )
    return tf.cast(resized, tf.uint8 if pixels == "uint8" else tf.float32)


def resize_by_pillow(
    image: UInt8[np.ndarray, "h w 3"], size_hw: tuple[int, int] | Int[np.ndarray, " 2"]
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Pillow's antialiased bilinear resize: along x, then along y, with integer weights, rounded to uint8 after each."""
    height, width = map(int, size_hw)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def plus_half(image: tf.Tensor | np.ndarray) -> tf.Tensor:
    """uint8 to float32, and 0.5 added, exactly: in one pass over the image, where a cast and a sum are two."""
    steps = tf.bitcast(image, tf.quint8)
    return tf.raw_ops.Dequantize(input=steps, min_range=0.5, max_range=255.5, mode="MIN_COMBINED")


def resize_large(
    image: UInt8[np.ndarray, "h w 3"], size_hw: tuple[int, int], kind: str, pixels: str = "uint8"
) -> UInt8[np.ndarray, "h2 w2 3"] | Float32[np.ndarray, "h2 w2 3"]:
    """As `resize`, without a copy of the whole image in float32: an image of 179 million pixels would need 4 GB for it.

    The half that rounds is added after the weights, so where 32 bits round, a pixel can be one grey level off `resize`;
    with `kind` "pillow" none is.
    """
    if kind == "pillow":
        return resize_by_pillow(image, size_hw)
    widen = kind == "antialias" and (image.shape[0] > size_hw[0] or image.shape[1] > size_hw[1])
    resized = tf.image.resize(image, size_hw, method="bilinear", antialias=widen)
    if pixels == "float32":
        return tf.cast(resized, tf.float32).numpy()
    return tf.cast(tf.cast(resized, tf.float32) + 0.5, tf.uint8).numpy()


def pad(image: tf.Tensor, canvas: tf.Tensor | tuple[int, int]) -> tf.Tensor:
    """[h w 3] at the upper left of a canvas [H W 3] of zeros that holds it."""
    shape = tf.shape(image)
    # Rows of 3 w numbers: padding two axes is faster than three.
    rows = tf.reshape(image, (shape[0], 3 * shape[1]))
    rows = tf.pad(rows, [[0, canvas[0] - shape[0]], [0, 3 * (canvas[1] - shape[1])]])
    return tf.reshape(rows, (canvas[0], canvas[1], 3))


def to_canvas_pixels(
    boxes_xyxy: Float[np.ndarray, "G 4"], scale_xy: Float[np.ndarray, " 2"], ends: Literal["half_open", "inclusive"]
) -> Float[np.ndarray, "G 4"]:
    """Boxes of the original image on the canvas, whose pixels are `scale_xy` to an original one along x and y.

    `ends` "half_open": all four sides times the scale. "inclusive" (Detectron): a box ends on its last pixel, and that
    pixel's number is scaled, so the side x2 becomes (x2 - 1) s + 1; a resized box is s - 1 pixels smaller for it.
    """
    scale = np.tile(scale_xy, 2)[None]
    return boxes_xyxy * scale + (_last_pixel(1 - scale) if ends == "inclusive" else 0)


def to_original_pixels(
    boxes_xyxy: Float[np.ndarray, "G 4"], scale_xy: Float[np.ndarray, " 2"], ends: Literal["half_open", "inclusive"]
) -> Float[np.ndarray, "G 4"]:
    """The inverse of `to_canvas_pixels`."""
    scale = np.tile(scale_xy, 2)[None]
    return (boxes_xyxy - (_last_pixel(1 - scale) if ends == "inclusive" else 0)) / scale


def _last_pixel(shift: Float[np.ndarray, "1 4"]) -> Float[np.ndarray, "1 4"]:
    return shift * np.array([[0, 0, 1, 1]], shift.dtype)


def flip_boxes(boxes_xyxy: Float32[np.ndarray, "G 4"], width: int) -> Float32[np.ndarray, "G 4"]:
    """Boxes of the image mirrored left to right, `width` pixels wide: x becomes width - x."""
    x1, y1, x2, y2 = boxes_xyxy.T
    return np.stack([width - x2, y1, width - x1, y2], axis=1)
