"""What the four numbers of a bbox are: COCO's x, y, width, height in pixels, or what other tools write in their place."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

BoxFormat = Literal["auto", "xywh", "xyxy", "cxcywh", "xywh_fractions", "xyxy_fractions", "cxcywh_fractions"]
LAYOUTS = ("xywh", "xyxy", "cxcywh")
"""Corner and size; two corners; centre and size."""
PIXELS, FRACTIONS = LAYOUTS, tuple(f"{layout}_fractions" for layout in LAYOUTS)
SCALES = {100: "percent of the image's sides", 1000: "thousandths of the image's sides"}
"""Formats that no option converts."""
NEARLY_ALL = 0.95
"""Share of the boxes that must agree with a format."""
MOST = 0.5
"""Share of boxes outside of their images at which they are refused, whatever they are; at least SEVERAL."""
MANY = 0.2
"""Share of boxes that stick far out of their image when read as xywh at which they are refused, at least SEVERAL."""
SEVERAL = 3
SOME = 0.05
"""Share at which they are warned of."""
MIXED = (0.02, 5)
"""Share and number of fractions among pixels that are warned of."""
SCALED = 20
"""Boxes that must agree before SCALES are warned of in images at least twice as large."""
LEAST_SIDE = 8
"""Pixels of an image's sides below which a box is no evidence of fractions."""


class Guess(NamedTuple):
    """What the boxes look like, if not like what they are read as."""

    formats: tuple[str, ...]
    """Those that fit; none where no option converts the boxes."""
    sure: bool
    """Whether the boxes cannot be what they are read as."""
    why: str

    def text(self, read_as: BoxFormat) -> str:
        """What is wrong and what to do, one line; `read_as` is data.box_format."""
        todo = "; set " + " or ".join(f"data.box_format {name}" for name in self.formats) if self.formats else ""
        if read_as == "auto":
            kept = "xywh if they are right as they are"
            todo += f" ({kept})" if todo else f"; set data.box_format {kept}"
        return self.why + todo


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
    """Another format than xywh in pixels that the boxes are in, None where nothing speaks for one. Sizes of 0 are unknown.

    Fractions: nearly all numbers lie in 0 to 1, or those of some boxes do. Another layout: it places nearly all boxes
    inside their images, while xywh places many far outside, or `areas` (NaN where missing) are those of two corners and not
    those of a size. Where all boxes lie in the upper left of their images and no areas are given, nothing can be seen.
    """
    fractions = guess_fractions(numbers, sizes_wh)
    if fractions is not None and fractions.formats:
        return fractions
    kept = _solid(numbers, sizes_wh) & ~_units(numbers, sizes_wh)
    layout = _guess_layout(numbers[kept], areas[kept], sizes_wh[kept]) if kept.any() else None
    return layout if fractions is None or (layout is not None and layout.sure) else fractions


def guess_fractions(
    numbers: Float64[np.ndarray, "M 4"],
    sizes_wh: Int64[np.ndarray, "M 2"],
    what: str = "boxes",
    layouts: tuple[str, ...] = LAYOUTS,
) -> Guess | None:
    """Whether all `what`, or some, are fractions of their image in one of `layouts`."""
    units = _units(numbers, sizes_wh)
    if are_fractions(numbers, sizes_wh):
        ones = np.ones((units.sum(), 2))
        inside = {f"{layout}_fractions": _inside(numbers[units], layout, ones, 0.01).mean() for layout in layouts}
        formats = tuple(name for name, share in inside.items() if share >= min(NEARLY_ALL, max(inside.values())))
        why = f"the {what} look like fractions of the image: their numbers lie between 0 and 1"
        return Guess(formats, int(units.sum()) >= SEVERAL, why)
    share = units.sum() / max(1, _solid(numbers, sizes_wh, LEAST_SIDE).sum())
    if share < MIXED[0] or (units & (numbers % 1 > 0).any(1)).sum() < MIXED[1]:
        return None
    return Guess(
        (), False, f"{share:.0%} of the {what} look like fractions of the image, the others do not; write all in pixels"
    )


def are_fractions(numbers: Float64[np.ndarray, "M 4"], sizes_wh: Int64[np.ndarray, "M 2"]) -> bool:
    """Whether nearly all boxes are fractions of their image; some may stick out of it."""
    large = _solid(numbers, sizes_wh, LEAST_SIDE)
    near = (np.abs(numbers[large] - 0.5) < 1.5).all(1)
    return bool(large.any() and near.mean() >= NEARLY_ALL and _units(numbers, sizes_wh)[large].mean() >= MOST)


def guess_other(
    numbers: Float64[np.ndarray, "M 4"],
    areas: Float64[np.ndarray, " M"],
    sizes_wh: Int64[np.ndarray, "M 2"],
    chosen: BoxFormat,
) -> Guess | None:
    """Formats that fit the boxes where the `chosen` one does not; None where it fits, or nothing else does."""
    large = _solid(numbers, sizes_wh, LEAST_SIDE)
    if not large.any():
        return None
    numbers, areas, sizes_wh = numbers[large], areas[large], sizes_wh[large]
    fractions = are_fractions(numbers, sizes_wh)
    units = np.ones_like(sizes_wh) if fractions else sizes_wh
    fit = {
        name: float(_inside(numbers, layout, units, 0.01).mean())
        for name, layout in zip(FRACTIONS if fractions else PIXELS, LAYOUTS, strict=True)
    }
    good = tuple(name for name, share in fit.items() if share >= NEARLY_ALL)
    if chosen == "xyxy" and "xywh" in good and _areas_of_corners(numbers, areas) == -1:
        return Guess(
            ("xywh",), False, "data.box_format xyxy does not fit the boxes: their areas are width times height"
        )
    if good and fit.get(chosen, 0.0) < NEARLY_ALL:
        read = f"read so, {fit.get(chosen, 0.0):.0%} of them lie in their images, read as {' or '.join(good)} nearly all do"
        return Guess(good, False, f"data.box_format {chosen} does not fit the boxes: {read}")
    return None if fractions else guess_fractions(numbers, sizes_wh)


def _guess_layout(
    numbers: Float64[np.ndarray, "M 4"], areas: Float64[np.ndarray, " M"], sizes_wh: Int64[np.ndarray, "M 2"]
) -> Guess | None:
    """`guess_format` of boxes with an area that are no fractions."""
    far = float((~_inside(numbers, "xywh", sizes_wh, 0.05)).mean())
    by_area = _areas_of_corners(numbers, areas)
    formats = tuple(name for name in LAYOUTS[1:] if _inside(numbers, name, sizes_wh, 0.01).mean() >= NEARLY_ALL)
    if by_area == 1 and "xyxy" in formats:
        return Guess(("xyxy",), True, "the boxes look like x1, y1, x2, y2: their areas are (x2 - x1) (y2 - y1)")
    many = far >= MANY and far * len(numbers) >= SEVERAL
    if by_area == -1 and not many:
        formats = tuple(name for name in formats if name != "xyxy")
    if formats and far >= SOME:
        looks = {"xyxy": "x1, y1, x2, y2", "cxcywh": "centre x, centre y, width, height"}
        kinds = " or ".join(looks[layout] for layout in formats)
        read = f"read as x, y, width, height {far:.0%} of them reach far out of their images, read so almost none does"
        return Guess(formats, many, f"the boxes look like {kinds}: {read}")
    scaled = [scale for scale in SCALES if _fit_scaled(numbers, scale)]
    convert = "no other format fits them; check the sizes of the images"
    if scaled:
        convert = f"they may be {' or '.join(map(SCALES.__getitem__, scaled))}; if so, convert them to pixels"
    outside = (numbers[:, :2] >= sizes_wh).any(1) | (numbers[:, :2] + numbers[:, 2:] <= 0).any(1)
    if outside.mean() >= MOST and outside.sum() >= SEVERAL:
        return Guess((), True, f"{outside.mean():.0%} of the boxes lie outside of their images: {convert}")
    if many:
        return Guess((), False, f"{far:.0%} of the boxes reach far out of their images: {convert}")
    if scaled and len(numbers) >= SCALED and sizes_wh.min() >= 2 * scaled[0]:
        return Guess((), False, f"all boxes lie in the upper left of their images: {convert}")
    return None


def _fit_scaled(numbers: Float64[np.ndarray, "M 4"], scale: int) -> bool:
    """Whether the boxes lie in an image of `scale` by `scale`, not all of them in a corner of it."""
    shares = [_inside(numbers / scale, layout, np.ones((len(numbers), 2)), 0.01).mean() for layout in LAYOUTS]
    return bool(max(shares) >= NEARLY_ALL and numbers.max() >= scale / 2)


def _solid(
    numbers: Float64[np.ndarray, "M 4"], sizes_wh: Int64[np.ndarray, "M 2"], least_side: int = 1
) -> Bool[np.ndarray, " M"]:
    """Boxes with an area, in images with sides of at least `least_side`: from LEAST_SIDE they speak for or against
    fractions."""
    return (numbers[:, 2:] > 0).all(1) & (sizes_wh >= least_side).all(1)


def _units(numbers: Float64[np.ndarray, "M 4"], sizes_wh: Int64[np.ndarray, "M 2"]) -> Bool[np.ndarray, " M"]:
    """Boxes that speak for fractions: their numbers lie between 0 and 1."""
    return _solid(numbers, sizes_wh, LEAST_SIDE) & ((numbers > -0.01) & (numbers < 1.01)).all(1)


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
