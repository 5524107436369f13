"""Crops for classification, which replace ImageNet in the miniature: one of 12 shapes in one of 12 hues per crop.

A backbone that classifies them has learned the shapes and hues of generated scenes, but nothing about boxes, background or
detection losses. The same holds for the paper's ImageNet backbone.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from retina_jax.data.scenes import HUES, SHAPES, draw_background, draw_shape, painted

SIDE = 48
"""Side of a crop, pixels."""
ACROSS = 3
"""Crops are cut in a grid, ACROSS by ACROSS, from backgrounds at the scale of a scene."""
STREAM = 3
"""Random stream of the seed; scenes use 1 and 2."""
SIZES = (8.0, 40.0)
"""Smallest and largest shape: square root of the box area, pixels."""


class Crops(NamedTuple):
    """N labelled crops."""

    images: UInt8[np.ndarray, "N side side 3"]
    shapes: Int32[np.ndarray, " N"]
    """Index into `SHAPES`."""
    hues: Int32[np.ndarray, " N"]
    """Index into `HUES`."""


def draw_crops(count: int, seed: int, start: int = 0) -> Crops:
    """Returns crops `start` to `start + count` of a seed's sequence; a pure function of its arguments.

    Args:
      count: a multiple of ACROSS^2.
      start: a multiple of ACROSS^2.
    """
    each = ACROSS**2
    if count % each or start % each:
        raise ValueError(f"count and start must be multiples of {each}, not {count} and {start}")
    with ThreadPoolExecutor() as pool:
        sheets = list(pool.map(lambda i: _draw_sheet(seed, i), range(start // each, (start + count) // each)))
    return Crops(*(np.concatenate(column) for column in zip(*sheets, strict=True)))


def _draw_sheet(seed: int, index: int) -> Crops:
    rng = np.random.default_rng([seed % 2**64, STREAM, index])
    picture = draw_background(rng, SIDE * ACROSS)
    shapes = rng.integers(len(SHAPES), size=ACROSS**2)
    hues = rng.integers(len(HUES), size=ACROSS**2)
    for i, (shape, hue) in enumerate(zip(shapes, hues, strict=True)):
        side = np.exp(rng.uniform(*np.log(SIZES)))
        aspect = np.exp(rng.uniform(np.log(0.6), np.log(1.6)))
        width, height = (min(s, SIDE - 1.0) for s in (side * aspect**0.5, side / aspect**0.5))
        row, column = divmod(i, ACROSS)
        # Off the centre by at most an eighth of the free space.
        x = column * SIDE + (SIDE - width) * rng.uniform(0.375, 0.625)
        y = row * SIDE + (SIDE - height) * rng.uniform(0.375, 0.625)
        _paint_shape(rng, picture, list(SHAPES)[shape], list(HUES.values())[hue], (x, y, width, height))
    picture += 0.012 * rng.standard_normal(picture.shape, np.float32)
    sheet = (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    images = sheet.reshape(ACROSS, SIDE, ACROSS, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
    return Crops(images, shapes.astype(np.int32), hues.astype(np.int32))


def _paint_shape(
    rng: np.random.Generator,
    picture: Float32[np.ndarray, "H W 3"],
    shape: str,
    hue: float,
    box_xywh: tuple[float, float, float, float],
) -> None:
    """Paints a shape of `SHAPES` in a hue (degrees) into a box inside the picture."""
    side = float(np.sqrt(box_xywh[2] * box_xywh[3]))
    (x, y), cover, inside = draw_shape(shape, box_xywh, rng.uniform(-0.25, 0.25), 0.5 + 0.02 * side)
    patch = np.s_[y : y + cover.shape[0], x : x + cover.shape[1]]
    picture[patch] = painted(rng, picture[patch], cover, inside, hue)
