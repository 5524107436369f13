"""Images that decode to one colour, wholly or nearly: too long a range, a damaged file, a covered lens."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8

log = logging.getLogger(__name__)
NAMED = 5
"""Images that are named when they are met; all are counted."""

GRID = 64
"""Rows and columns that are looked at, at most, evenly spread."""
NO_BOXES = np.zeros((0, 4), np.float32)
LEVELS, SHARE = 2, 0.999
"""An image has one colour if, in each channel, at least this share of its pixels is within so many of 255 levels of the
median."""


def is_one_colour(
    image: UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"], boxes_xyxy: Float32[np.ndarray, "n 4"] = NO_BOXES
) -> bool:
    """Whether the pixels (0 to 255) are of one colour, as far as a grid of GRID x GRID of them shows, and another such grid
    in each box and the pixels next to it."""
    if not _is_flat(image):
        return False
    starts = np.maximum(np.floor(boxes_xyxy[:, :2]).astype(int) - 1, 0).tolist()
    ends = np.ceil(boxes_xyxy[:, 2:]).astype(int) + 1
    return all(_is_flat(image[y1:y2, x1:x2]) for (x1, y1), (x2, y2) in zip(starts, ends.tolist(), strict=True))


def _is_flat(image: UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"]) -> bool:
    height, width = image.shape[:2]
    grid = image[:: -(-height // GRID), :: -(-width // GRID)].astype(np.uint8).reshape(-1, image.shape[2])
    for values in grid.T:  # A histogram is ten times as fast as a median.
        upto = np.cumsum(np.bincount(values, minlength=256))
        median = int(np.searchsorted(upto, len(values) / 2))
        below = upto[median - LEVELS - 1] if median > LEVELS else 0
        if upto[min(median + LEVELS, 255)] - below < SHARE * len(values):
            return False
    return True


class OneColourImages:
    """Names of the images of a data set that came out with one colour. Each image is looked at once."""

    def __init__(self, where: Callable[[int], str], images: int) -> None:
        self._where = where
        self._seen = np.zeros(images, bool)
        self.names: list[str] = []

    def look(
        self,
        images: UInt8[np.ndarray, "b H W 3"] | Float32[np.ndarray, "b H W 3"],
        sizes_hw: Int32[np.ndarray, "b 2"],
        boxes_xyxy: Float32[np.ndarray, "b G 4"],
        indices: Int64[np.ndarray, " b"],
        valid: Bool[np.ndarray, " b"],
    ) -> None:
        """Adds the images of a batch, with boxes as in `Batch`, that have one colour, and logs the first NAMED of them."""
        for row in np.flatnonzero(valid & ~self._seen[indices]).tolist():
            index, (height, width) = int(indices[row]), sizes_hw[row]
            if self._seen[index]:
                continue
            self._seen[index] = True
            boxes = boxes_xyxy[row]
            if is_one_colour(images[row, :height, :width], boxes[boxes[:, 2] > boxes[:, 0]]):
                self.names.append(self._where(index))
                if len(self.names) <= NAMED:
                    log.warning("one colour, wholly or nearly: %s", self.names[-1])
