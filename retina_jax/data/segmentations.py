"""Boxes of COCO segmentations, for annotations that have no box of their own.

Malformed run lengths are refused here, in Python: pycocotools decodes them in C without checking where they end.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from retina_jax.data.source import DataError

LARGEST_SIDE = 2**15
"""Pixels of a mask's side at most."""


def box_of(segmentation: Any, size_wh: tuple[int, int] = (0, 0)) -> tuple[float, float, float, float] | None:
    """x, y, width, height of the smallest box around a segmentation; None for none or an empty one.

    A segmentation is a list of polygons [x1, y1, x2, y2, ...], one such polygon, or run lengths (a dict with `size` and
    `counts`, a list or COCO's compressed text). Raises DataError for anything else, and for run lengths of another size
    than `size_wh`, the width and height of the image (0 where unknown).
    """
    if segmentation is None or (isinstance(segmentation, list) and all(part == [] for part in segmentation)):
        return None
    if isinstance(segmentation, dict):
        return _box_of_runs(segmentation, size_wh)
    return _box_of_polygons(segmentation)


def _box_of_polygons(polygons: Any) -> tuple[float, float, float, float]:
    wrong = "has no bbox, and its segmentation is not polygons [[x1, y1, x2, y2, ...], ...] of finite numbers in pixels"
    if not isinstance(polygons, list):
        raise DataError(wrong)
    if not isinstance(polygons[0], list):
        polygons = [polygons]
    points = [number for polygon in polygons if isinstance(polygon, list) for number in polygon]
    numbers = all(type(number) in (int, float) and abs(number) <= 1e9 for number in points)
    even = all(isinstance(polygon, list) and len(polygon) % 2 == 0 for polygon in polygons)
    if not points or not numbers or not even:
        raise DataError(wrong)
    x, y = points[::2], points[1::2]
    return float(min(x)), float(min(y)), float(max(x) - min(x)), float(max(y) - min(y))


def _box_of_runs(mask: dict[str, Any], size_wh: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """Runs of background and object in turn, down the columns of the mask."""
    wrong = "has no bbox, and its segmentation is not run lengths: size [height, width] and counts that fill it"
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n <= LARGEST_SIDE for n in size):
        raise DataError(wrong)
    if size_wh[0] and tuple(size) != size_wh[::-1]:
        is_size = f"its segmentation has size {size}, but the image has height {size_wh[1]} and width {size_wh[0]}"
        raise DataError(f"has no bbox, and {is_size}; a mask must have one pixel per pixel of its image")
    if isinstance(counts, str):
        counts = _decompressed(counts)
    if not isinstance(counts, list) or not all(type(n) is int and 0 <= n <= size[0] * size[1] for n in counts):
        raise DataError(wrong)
    ends = np.array(list(itertools.accumulate(counts)), np.int64)
    if not len(ends) or ends[-1] != size[0] * size[1]:
        raise DataError(wrong)
    starts, ends = ends[0:-1:2], ends[1::2]
    solid = ends > starts
    starts, last = starts[solid], ends[solid] - 1
    if not len(starts):
        return None
    height = size[0]
    columns = starts // height, last // height
    across = (columns[0] != columns[1]).any()  # a run from the foot of a column to the head of the next
    top = 0 if across else (starts % height).min()
    bottom = height if across else (last % height).max() + 1
    left, right = columns[0].min(), columns[1].max() + 1
    return float(left), float(top), float(right - left), float(bottom - top)


def _decompressed(text: str) -> list[int] | None:
    """Counts from COCO's text: five bits a character, a sixth for "more follows", each a difference to the last but one."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return None if shift else counts
