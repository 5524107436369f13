"""Formats of a bbox: COCO's x, y, width, height in pixels, or what other tools write in their place."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

BoxFormat = Literal["auto", "xywh", "xyxy", "cxcywh", "xywh_fractions", "xyxy_fractions", "cxcywh_fractions"]
Numbers = Float64[np.ndarray, "M 4"]
Areas = Float64[np.ndarray, " M"]  # NaN where missing
Sizes = Int64[np.ndarray, "M 2"]  # width and height of each box's image; 0 if unknown
LAYOUTS = {"xywh": "x, y, width, height", "xyxy": "x1, y1, x2, y2", "cxcywh": "centre x, centre y, width, height"}
SCALES = {100: "percent of the image's sides", 1000: "thousandths of the image's sides"}  # no option converts them
NEARLY_ALL = 0.95  # share of the boxes that must agree with a format
OUTSIDE_REFUSED = 0.5  # share of boxes outside their images from which on any format is refused; at least SEVERAL
FAR_REFUSED = 0.2  # the same for boxes that are far outside their images, read as xywh
SEVERAL = 3
SAMPLE = 100_000  # larger files are judged by some 50,000 to 100,000 boxes, evenly spread (860,000 take 1.4 s)
SOME = 0.05  # share from which on there is a warning
MIXED = (0.02, 5)  # share and number of fractions among pixels from which on there is a warning
SCALED = 20  # boxes that must agree with SCALES for a warning; their images must be at least twice as large
LEAST_SIDE = 8  # boxes in images with a smaller side, in pixels, are no evidence of fractions


class Guess(NamedTuple):
    """Formats that boxes look like, if they do not look like the one they are read in."""

    formats: tuple[str, ...]  # those that fit; none if no option converts the boxes
    sure: bool  # whether the boxes cannot be what they are read as
    why: str

    def text(self, read_as: BoxFormat) -> str:
        """Returns what is wrong and what to do, one line; `read_as` is data.box_format."""
        todo = "; set " + " or ".join(f"data.box_format {name}" for name in self.formats) if self.formats else ""
        if read_as == "auto":
            kept = "xywh if the boxes are correct as they are"
            todo += f" ({kept})" if todo else f"; set data.box_format {kept}"
        return self.why + todo


def boxes_in_pixels(
    numbers: Numbers, areas: Areas, sizes_wh: Sizes, origin: Shaped[np.ndarray, " M"], box_format: BoxFormat
) -> tuple[Numbers, Areas, list[Guess]]:
    """Returns boxes (x, y, width, height) and areas in pixels, and what the numbers look like. `origin` is bbox, or
    polygons or mask: the numbers are those of a segmentation, which has no layout."""
    given, polygons = origin == "bbox", origin == "polygons"
    fractions = box_format.endswith("_fractions")
    guesses = []
    if box_format != "xywh":
        columns = [column[given][:: 1 + int(given.sum()) // SAMPLE] for column in (numbers, areas, sizes_wh)]
        guess = guess_format(*columns) if box_format == "auto" else guess_other(*columns, box_format)
        guesses += [guess] if guess else []
        mixed = guess_fractions(numbers[polygons], sizes_wh[polygons], "polygons", ("xywh",))
        if mixed and not fractions and not (guess and guess.formats):
            formats, sure, why = mixed
            if given.any() and formats:
                formats, why = (), f"{why}, but those of the boxes do not; convert all of them to pixels"
            guesses.append(Guess(formats, sure and box_format == "auto", why))
    scaled = polygons & (fractions and are_fractions(numbers[polygons], sizes_wh[polygons]))
    other = given & (box_format not in ("auto", "xywh"))
    boxes = numbers.copy()
    boxes[scaled] = to_xywh(numbers[scaled], "xywh_fractions", sizes_wh[scaled])
    boxes[other] = to_xywh(numbers[other], box_format, sizes_wh[other])
    products = boxes[:, 2] * boxes[:, 3]
    # The area of a box in another format is in that format too, or that of a smaller mask in pixels.
    converted = scaled | (other & (fractions | (areas > products)))
    return boxes, np.where(np.isnan(areas) | converted, products, areas), guesses


def to_xywh(numbers: Numbers, format: BoxFormat, sizes_wh: Sizes) -> Numbers:
    """Converts boxes in `format` to x, y, width, height in pixels; `auto` is xywh."""
    layout, _, fractions = format.partition("_")
    if layout not in ("auto", "xywh"):
        first, second = np.split(_corners(numbers, layout), 2, axis=1)
        numbers = np.concatenate([first, second - first], axis=1)
    return numbers * np.tile(sizes_wh, 2) if fractions else numbers


def guess_format(numbers: Numbers, areas: Areas, sizes_wh: Sizes) -> Guess | None:
    """Returns the format of boxes that are probably not xywh in pixels, else None. Fractions: all numbers, or those of
    some boxes, are between 0 and 1. Another layout: it places nearly all boxes inside their images while xywh places
    many far outside, or `areas` are those of two corners and not those of a size."""
    fractions = guess_fractions(numbers, sizes_wh)
    if fractions is not None and fractions.formats:
        return fractions
    kept = _solid(numbers, sizes_wh) & ~_units(numbers, sizes_wh)
    layout = _guess_layout(numbers[kept], areas[kept], sizes_wh[kept]) if kept.any() else None
    return layout if fractions is None or (layout is not None and layout.sure) else fractions


def guess_fractions(
    numbers: Numbers, sizes_wh: Sizes, what: str = "boxes", layouts: Iterable[str] = LAYOUTS
) -> Guess | None:
    """Returns those of `layouts` in which all `what`, or some, are fractions of their image; None if they are not."""
    units = _units(numbers, sizes_wh)
    if are_fractions(numbers, sizes_wh):
        ones = np.ones((units.sum(), 2))
        inside = {f"{layout}_fractions": _inside(numbers[units], layout, ones).mean() for layout in layouts}
        formats = tuple(name for name, share in inside.items() if share >= min(NEARLY_ALL, max(inside.values())))
        why = f"the {what} look like fractions of the image: their numbers are between 0 and 1"
        return Guess(formats, int(units.sum()) >= SEVERAL, why)
    share = units.sum() / max(1, _solid(numbers, sizes_wh, LEAST_SIDE).sum())
    if share < MIXED[0] or (units & (numbers % 1 > 0).any(1)).sum() < MIXED[1]:
        return None
    return Guess((), False, f"{share:.0%} of the {what} look like fractions of the image; convert them all to pixels")


def are_fractions(numbers: Numbers, sizes_wh: Sizes) -> bool:
    """Returns whether nearly all boxes are fractions of their image; some may extend beyond it."""
    large = _solid(numbers, sizes_wh, LEAST_SIDE)
    near = (np.abs(numbers[large] - 0.5) < 1.5).all(1)
    return bool(large.any() and near.mean() >= NEARLY_ALL and _units(numbers, sizes_wh)[large].mean() >= 0.5)


def guess_other(numbers: Numbers, areas: Areas, sizes_wh: Sizes, chosen: BoxFormat) -> Guess | None:
    """Returns the formats that fit the boxes if the `chosen` one does not; None if it fits, or no other does."""
    large = _solid(numbers, sizes_wh, LEAST_SIDE)
    if not large.any():
        return None
    numbers, areas, sizes_wh = numbers[large], areas[large], sizes_wh[large]
    fractions = are_fractions(numbers, sizes_wh)
    ending, units = ("_fractions", np.ones_like(sizes_wh)) if fractions else ("", sizes_wh)
    fit = {layout + ending: float(_inside(numbers, layout, units).mean()) for layout in LAYOUTS}
    good = tuple(name for name, share in fit.items() if share >= NEARLY_ALL)
    why = f"data.box_format {chosen} does not fit the boxes"
    if chosen == "xyxy" and "xywh" in good and _areas_of_corners(numbers, areas) == -1:
        return Guess(("xywh",), False, f"{why}: their areas are width times height")
    if good and fit.get(chosen, 0.0) < NEARLY_ALL:
        share = f"with it, {fit.get(chosen, 0.0):.0%} of the boxes are inside their images"
        return Guess(good, False, f"{why}: {share}; as {' or '.join(good)}, nearly all are")
    return None if fractions else guess_fractions(numbers, sizes_wh)


def _guess_layout(numbers: Numbers, areas: Areas, sizes_wh: Sizes) -> Guess | None:
    """Does the work of `guess_format` for boxes with an area that are no fractions."""
    far = float((~_inside(numbers, "xywh", sizes_wh, 0.05)).mean())
    many = far >= FAR_REFUSED and far * len(numbers) >= SEVERAL
    by_area = _areas_of_corners(numbers, areas)
    others = ("xyxy", "cxcywh") if by_area >= 0 or many else ("cxcywh",)
    formats = tuple(name for name in others if _inside(numbers, name, sizes_wh).mean() >= NEARLY_ALL)
    if by_area == 1 and "xyxy" in formats:
        return Guess(("xyxy",), True, "the boxes look like x1, y1, x2, y2: their areas are (x2 - x1) (y2 - y1)")
    if formats and far >= SOME:
        other = " or ".join(LAYOUTS[layout] for layout in formats)
        share = f"as x, y, width, height, {far:.0%} extend far beyond their images"
        return Guess(formats, many, f"the boxes look like {other}: {share}; as {other}, almost none")
    # Whether the boxes are in an image of `scale` by `scale`, and not all of them in its upper left.
    shares = {s: max(_inside(numbers / s, layout, np.ones_like(sizes_wh)).mean() for layout in LAYOUTS) for s in SCALES}
    scaled = [scale for scale, share in shares.items() if share >= NEARLY_ALL and numbers.max() >= scale / 2]
    convert = "no other format fits them; check the sizes of the images"
    if scaled:
        convert = f"they may be {' or '.join(SCALES[scale] for scale in scaled)}; if so, convert them to pixels"
    outside = (numbers[:, :2] >= sizes_wh).any(1) | (numbers[:, :2] + numbers[:, 2:] <= 0).any(1)
    if outside.mean() >= OUTSIDE_REFUSED and outside.sum() >= SEVERAL:
        return Guess((), True, f"{outside.mean():.0%} of the boxes are outside their images: {convert}")
    if many:
        return Guess((), False, f"{far:.0%} of the boxes extend far beyond their images: {convert}")
    if scaled and len(numbers) >= SCALED and sizes_wh.min() >= 2 * scaled[0]:
        return Guess((), False, f"all boxes are in the upper left of their images: {convert}")
    return None


def _solid(numbers: Numbers, sizes_wh: Sizes, least_side: int = 1) -> Bool[np.ndarray, " M"]:
    """Returns which boxes have an area and are in images with sides of at least `least_side`."""
    return (numbers[:, 2:] > 0).all(1) & (sizes_wh >= least_side).all(1)


def _units(numbers: Numbers, sizes_wh: Sizes) -> Bool[np.ndarray, " M"]:
    """Returns which boxes are evidence of fractions: their numbers are between 0 and 1."""
    return _solid(numbers, sizes_wh, LEAST_SIDE) & ((numbers > -0.01) & (numbers < 1.01)).all(1)


def _corners(numbers: Numbers, layout: str) -> Numbers:
    first, second = numbers[:, :2], numbers[:, 2:]
    if layout == "cxcywh":
        return np.concatenate([first - second / 2, first + second / 2], axis=1)
    return np.concatenate([first, first + second if layout == "xywh" else second], axis=1)


def _inside(numbers: Numbers, layout: str, sizes_wh: np.ndarray, tolerance: float = 0.01) -> Bool[np.ndarray, " M"]:
    """Returns which boxes have an area and are in their image, up to `tolerance` of its sides and, in pixels, two pixels."""
    corners = _corners(numbers, layout)
    margin = tolerance * sizes_wh + 2 * (sizes_wh > 1)
    inside = (corners[:, :2] >= -margin).all(1) & (corners[:, 2:] <= sizes_wh + margin).all(1)
    return inside & (corners[:, 2:] > corners[:, :2]).all(1)


def _areas_of_corners(numbers: Numbers, areas: Areas) -> int:
    """Returns 1 if the areas are those of two corners, -1 if they are those of a size, 0 if they are neither."""
    of_size = numbers[:, 2:].prod(1)
    of_corners = (numbers[:, 2:] - numbers[:, :2]).prod(1)
    differ = (areas > 0) & (np.abs(of_size - of_corners) > 0.05 * of_size)
    if differ.sum() < SEVERAL:
        return 0
    agree = [np.mean(np.abs(product - areas)[differ] <= 0.01 * areas[differ]) for product in (of_size, of_corners)]
    return int(agree[1] >= NEARLY_ALL) - int(agree[0] >= NEARLY_ALL)
