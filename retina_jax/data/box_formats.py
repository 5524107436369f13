"""What the four numbers of a bbox are: COCO's x, y, width, height in pixels, or what other tools write in their place."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

BoxFormat = Literal["auto", "xywh", "xyxy", "cxcywh", "xywh_fractions", "xyxy_fractions", "cxcywh_fractions"]
LAYOUTS = ("xywh", "xyxy", "cxcywh")
"""Corner and size; two corners; centre and size."""
NEARLY_ALL = 0.95
"""Share of the boxes that must agree with a format."""
MANY = 0.2
"""Share of boxes that stick far out of their image when read as xywh at which they are refused, at least SEVERAL."""
SEVERAL = 3
SOME = 0.05
"""Share at which they are warned of."""
LEAST_SIDE = 8
"""Pixels of an image's sides below which a box is no evidence of fractions."""


class Guess(NamedTuple):
    """Formats that fit the boxes better than xywh in pixels."""

    formats: tuple[str, ...]
    sure: bool
    """Whether the boxes cannot be xywh in pixels."""
    why: str


def to_xywh(
    numbers: Float64[np.ndarray, "M 4"], format: BoxFormat, sizes_wh: Int64[np.ndarray, "M 2"]
) -> Float64[np.ndarray, "M 4"]:
    """x, y, width, height in pixels of boxes in `format`; `sizes_wh` are those of their images."""
    layout, _, fractions = format.partition("_")
    x, y, right, lower = _corners(numbers, "xywh" if layout == "auto" else layout).T
    boxes = numbers if layout in ("auto", "xywh") else np.stack([x, y, right - x, lower - y], axis=1)
    return boxes * np.tile(sizes_wh, 2) if fractions else boxes


def guess_format(
    numbers: Float64[np.ndarray, "M 4"], areas: Float64[np.ndarray, " M"], sizes_wh: Int64[np.ndarray, "M 2"]
) -> Guess | None:
    """Another format than xywh in pixels that the boxes are in, None where nothing speaks for one.

    Fractions: nearly all numbers lie in 0 to 1. Another layout: it places nearly all boxes inside their images, while xywh
    places many far outside, or `areas` (NaN where missing) are those of two corners and not those of a size. Where all
    boxes lie in the upper left of their images and no areas are given, nothing can be seen.
    """
    solid = (numbers[:, 2:] > 0).all(1)
    large = solid & (sizes_wh >= LEAST_SIDE).all(1)
    if large.any() and ((numbers[large] > -0.01) & (numbers[large] < 1.01)).all(1).mean() >= NEARLY_ALL:
        units = np.ones((large.sum(), 2))
        fitting = [layout for layout in LAYOUTS if _inside(numbers[large], layout, units, 0.01).mean() >= NEARLY_ALL]
        formats = tuple(f"{layout}_fractions" for layout in fitting or LAYOUTS)
        return Guess(formats, True, "the boxes look like fractions of the image: their numbers lie between 0 and 1")
    numbers, areas, sizes_wh = numbers[solid], areas[solid], sizes_wh[solid]
    if not len(numbers):
        return None
    far = float((~_inside(numbers, "xywh", sizes_wh, 0.05)).mean())
    by_area = _areas_of_corners(numbers, areas)
    formats = tuple(name for name in LAYOUTS[1:] if _inside(numbers, name, sizes_wh, 0.01).mean() >= NEARLY_ALL)
    if by_area == 1 and "xyxy" in formats:
        return Guess(("xyxy",), True, "the boxes look like x1, y1, x2, y2: their areas are (x2 - x1) (y2 - y1)")
    sure = far >= MANY and far * len(numbers) >= SEVERAL
    if by_area == -1 and not sure:
        formats = tuple(name for name in formats if name != "xyxy")
    if not formats or far < SOME:
        return None
    looks = {"xyxy": "x1, y1, x2, y2", "cxcywh": "centre x, centre y, width, height"}
    kinds = " or ".join(looks[layout] for layout in formats)
    read = f"read as x, y, width, height {far:.0%} of them reach far out of their images, read so almost none does"
    return Guess(formats, sure, f"the boxes look like {kinds}: {read}")


def _corners(numbers: Float64[np.ndarray, "M 4"], layout: str) -> Float64[np.ndarray, "M 4"]:
    first, second = numbers[:, :2], numbers[:, 2:]
    if layout == "cxcywh":
        return np.concatenate([first - second / 2, first + second / 2], axis=1)
    return np.concatenate([first, first + second if layout == "xywh" else second], axis=1)


def _inside(
    numbers: Float64[np.ndarray, "M 4"], layout: str, sizes_wh: np.ndarray, tolerance: float
) -> Bool[np.ndarray, " M"]:
    """Boxes with an area, inside their image to a share `tolerance` of its sides and two pixels (of more than one)."""
    corners = _corners(numbers, layout)
    margin = tolerance * sizes_wh + 2 * (sizes_wh > 1)
    inside = (corners[:, :2] >= -margin).all(1) & (corners[:, 2:] <= sizes_wh + margin).all(1)
    return inside & (corners[:, 2:] > corners[:, :2]).all(1)


def _areas_of_corners(numbers: Float64[np.ndarray, "M 4"], areas: Float64[np.ndarray, " M"]) -> int:
    """1 where the areas are those of two corners, -1 where they are those of a size, 0 where they are neither."""
    of_size = numbers[:, 2:].prod(1)
    of_corners = (numbers[:, 2:] - numbers[:, :2]).prod(1)
    differ = (areas > 0) & (np.abs(of_size - of_corners) > 0.05 * of_size)
    if differ.sum() < SEVERAL:
        return 0
    agree = [np.mean(np.abs(product - areas)[differ] <= 0.01 * areas[differ]) for product in (of_size, of_corners)]
    return int(agree[1] >= NEARLY_ALL) - int(agree[0] >= NEARLY_ALL)
