"""Tiles of large images: where they are, which boxes they show, and which of their detections remain.

The same geometry serves training, evaluation and detection. Tiles are squares of data.tile pixels of the image; those of
an image that is shorter are as short. Neighbours overlap by data.tile_overlap or more. This file needs only numpy and
jaxtyping.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, UInt8

VISIBLE = 0.5  # a box is an object of a tile that shows at least this share of its area
# A detection that ends nearer than this share of data.tile to a border inside the image may be cut off by it. The predicted
# ends of an object that the border cuts are on the border or a few pixels before it.
BORDER = 0.01


class Tile(NamedTuple):
    """A part of an image, in its pixels."""

    image: int  # number of the image
    left: int
    top: int
    width: int
    height: int

    def of(self, pixels: UInt8[np.ndarray, "_ _ 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
        """Returns the pixels of the tile."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


def tiles_of(image: int, height: int, width: int, side: int, overlap: float) -> list[Tile]:
    """Returns the tiles of an image by rows; one tile if `side` is 0 or the image is not larger."""
    tops, lefts = (_starts(length, side or length, overlap) for length in (height, width))
    wide, high = min(width, side or width), min(height, side or height)
    return [Tile(image, left, top, wide, high) for top in tops for left in lefts]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """Returns where the fewest tiles that overlap enough begin, spread evenly from one end of the image to the other."""
    if length <= side:
        return [0]
    number = 1 + math.ceil((length - side) / max(1, side - math.ceil(side * overlap)))
    return [i * (length - side) // (number - 1) for i in range(number)]


def boxes_in(
    tile: Tile, boxes_xyxy: Float[np.ndarray, "G 4"]
) -> tuple[Float32[np.ndarray, "n 4"], Int64[np.ndarray, " n"]]:
    """Returns the objects of a tile, clipped to it and in its pixels, and their indices. The boxes of which it shows less
    than VISIBLE are background there; a neighbour shows all of them unless they are larger than the overlap."""
    boxes = boxes_xyxy.astype(np.float64)
    clipped = np.clip(boxes - np.array([[tile.left, tile.top] * 2]), 0, np.array([[tile.width, tile.height] * 2]))
    shown, area = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (clipped, boxes))
    kept = np.flatnonzero((shown > 0) & (shown >= VISIBLE * area))
    return clipped[kept].astype(np.float32), kept


def cut_off(
    boxes_xyxy: Float[np.ndarray, "N 4"], own: Tile, tiles: Sequence[Tile], size_wh: tuple[int, int]
) -> Bool[np.ndarray, " N"]:
    """Returns which detections of the tile `own`, in pixels of the image, end at a border of it inside the image while
    another of the image's `tiles` has room around them: that one sees more of the object, so they are dropped. An object
    that no tile shows completely is kept in parts."""
    corners = np.array([(tile.left, tile.top) for tile in tiles], np.float64)
    ends = corners + np.array([(tile.width, tile.height) for tile in tiles])
    margin = BORDER * max(own.width, own.height)
    low = np.where(corners > 0, corners + margin, -np.inf)
    high = np.where(ends < np.array([size_wh]), ends - margin, np.inf)
    boxes = boxes_xyxy.astype(np.float64)[:, None]
    within = ((boxes[..., :2] >= low[None]) & (boxes[..., 2:] <= high[None])).all(axis=2)
    return ~within[:, list(tiles).index(own)] & within.any(axis=1)
