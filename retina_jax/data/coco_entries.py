"""Entries of a COCO JSON file: their types, the check of each entry, and the boxes of segmentations. msgspec decodes a file
without mistakes into these types at once (`CocoFile`); in others `parse_entry` checks each entry."""

import functools
import itertools
import re
import reprlib
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
from jaxtyping import Bool, Float64, Int64
from msgspec import Meta, Raw

from retina_jax.data.source import DataError

LARGEST = 1e9  # size, coordinate or area, in pixels
LARGEST_ID = 2**53  # every id is smaller: JSON writers keep such integers exact
LONGEST = 4096  # characters of a name
LARGEST_SIDE = 2**15  # pixels of a mask's side
CHUNK = 2**16  # annotations decoded at once
# Control characters, line ends and lone surrogates break file names, log lines and terminals.
UNSHOWN = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
DRIVE = re.compile(r"[A-Za-z]:[\\/]")  # start of an absolute path of Windows
DECIMAL = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?", re.ASCII)  # text read as a number

Integer = Annotated[int, Meta(gt=-LARGEST_ID, lt=LARGEST_ID)]
Side = Annotated[int, Meta(ge=0, le=int(LARGEST))]
Number = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
Text = Annotated[str, Meta(min_length=1, max_length=LONGEST, pattern=rf"\A[^{UNSHOWN}]*\Z")]
EXPECTED = {  # what the value of a field must be
    **dict.fromkeys(("id", "image_id", "category_id"), "an integer"),
    **dict.fromkeys(("name", "file_name"), f"text on one line, at most {LONGEST} characters, no control characters"),
    **dict.fromkeys(("width", "height"), "a positive number of pixels, an integer"),
    "bbox": "four finite numbers, [x, y, width, height] in pixels",
    "area": "a number of pixels",
    "iscrowd": "0 or 1",
}


class CategoryEntry(msgspec.Struct, gc=False):
    """An entry of `categories`."""

    id: Integer
    name: Text
    supercategory: Any = None


class ImageEntry(msgspec.Struct, gc=False):
    """A size may be missing, null or 0."""

    id: Integer
    file_name: Text
    width: Side | None = None
    height: Side | None = None


class AnnotationEntry(msgspec.Struct, gc=False):
    """An entry of `annotations`. Fields with a default may be missing or null."""

    image_id: Integer
    category_id: Integer
    bbox: tuple[Number, Number, Number, Number] | None = None
    area: Number | None = None
    iscrowd: Literal[0, 1] | bool | None = None
    id: Integer | None = None


class CocoFile(msgspec.Struct):
    """A COCO JSON file in which every field of images and categories has its type; its annotations are not decoded yet."""

    categories: list[CategoryEntry]
    images: list[ImageEntry]
    annotations: list[Raw]


class Columns(NamedTuple):
    """Annotations by field."""

    image_ids: Int64[np.ndarray, " M"]
    category_ids: Int64[np.ndarray, " M"]
    numbers: Float64[np.ndarray, "M 4"]  # bbox; zeros if it is missing
    has_box: Bool[np.ndarray, " M"]
    areas: Float64[np.ndarray, " M"]  # NaN if missing
    crowd: Bool[np.ndarray, " M"]
    ids: Int64[np.ndarray, " M"]  # 0 if missing

    @classmethod
    def of(cls, entries: Sequence[AnnotationEntry]) -> "Columns":
        """Returns the fields of `entries`."""
        number = len(entries)
        flat = itertools.chain.from_iterable(entry.bbox or (0.0, 0.0, 0.0, 0.0) for entry in entries)
        return cls(
            np.fromiter((entry.image_id for entry in entries), np.int64, number),
            np.fromiter((entry.category_id for entry in entries), np.int64, number),
            np.fromiter(flat, np.float64, 4 * number).reshape(-1, 4),
            np.fromiter((entry.bbox is not None for entry in entries), np.bool_, number),
            np.fromiter((np.nan if entry.area is None else entry.area for entry in entries), np.float64, number),
            np.fromiter((bool(entry.iscrowd) for entry in entries), np.bool_, number),
            np.fromiter((entry.id or 0 for entry in entries), np.int64, number),
        )

    @classmethod
    def decoded(cls, annotations: Sequence[Raw]) -> "Columns":
        """Decodes CHUNK annotations at a time: as objects, all would take several times the memory of their text. Raises
        ValueError if one has a field of another type."""
        columns = cls.of([])
        columns = cls(*(np.zeros((len(annotations), *column.shape[1:]), column.dtype) for column in columns))
        decode = msgspec.json.Decoder(AnnotationEntry).decode
        for start in range(0, len(annotations), CHUNK):
            part = cls.of(list(map(decode, annotations[start : start + CHUNK])))
            for column, of_part in zip(columns, part, strict=True):
                column[start : start + CHUNK] = of_part
        return columns


class Mistake(NamedTuple):
    """An entry of the file that cannot be used."""

    key: str  # list that holds it: categories, images or annotations
    index: int
    entry: Any
    text: str  # what is wrong and what would be right, one line

    @property
    def place(self) -> str:
        """Its position, and its id if it has one."""
        entry = self.entry
        identity = entry.get("id") if isinstance(entry, dict) else getattr(entry, "id", None)
        return f"{self.key}[{self.index}]" + ("" if identity is None else f" (id {short(identity)})")


Entry = TypeVar("Entry", CategoryEntry, ImageEntry, AnnotationEntry)
fields = functools.cache(msgspec.structs.fields)


def parse_entry(entry: Any, kind: type[Entry], texts: Counter[str]) -> Entry:
    """Converts one JSON value, and counts in `texts`, by field, the numbers that are written as text. Numbers may be
    text, integers 3.0; null is a missing value, and [] a missing bbox. Raises DataError."""
    if not isinstance(entry, dict):
        raise DataError(f"must be an object, not {short(entry)}")
    values = {}
    for field in fields(kind):
        key, value = field.name, entry.get(field.name)
        parts = value if key == "bbox" and isinstance(value, list) else [value]
        if key not in ("name", "file_name", "supercategory"):
            numbers = [as_number(part) for part in parts]
            value = numbers[0] if parts is not value else numbers or None
        if value is None and not field.required:
            continue
        try:
            values[key] = msgspec.convert(value, field.type)
        except (msgspec.ValidationError, UnicodeEncodeError):  # the latter for a lone surrogate
            wrong = f"not {short(entry[key])}" if key in entry else "but is missing"
            raise DataError(f"{key} must be {EXPECTED[key]}, {wrong}") from None
        if not isinstance(value, str):
            texts[key] += sum(isinstance(part, str) for part in parts)
    return kind(**values)


def as_number(value: Any) -> Any:
    """Returns a decimal text as a number, and a number without fraction as an integer ("3" and 3.0: 3); others unchanged."""
    if isinstance(value, str) and DECIMAL.fullmatch(value):
        value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def leads_outside(name: str) -> bool:
    """Returns whether a file name leads out of the folder that it is relative to: an absolute path, a drive, or `..`."""
    return name.startswith(("/", "\\")) or bool(DRIVE.match(name)) or ".." in name.replace("\\", "/").split("/")


def short(value: object) -> str:
    """Returns the value on one line, however long or deep it is."""
    return "null" if value is None else reprlib.repr(value)


NOT_POLYGONS = "has no bbox, and its segmentation is not polygons [[x1, y1, x2, y2, ...], ...] of finite numbers"
NOT_RUNS = "has no bbox, and its segmentation is not run lengths: size [height, width] and counts that fill it"


def box_of(segmentation: Any, size_wh: tuple[int, int] = (0, 0)) -> tuple[float, float, float, float] | None:
    """Returns x, y, width, height of the smallest box around a segmentation; None if it is missing or empty. It is a list of
    polygons [x1, y1, x2, y2, ...], one such polygon, or an object with `size` and `counts`, run lengths or COCO's compressed
    text. Raises DataError for anything else, and for another size than `size_wh` of the image (0: unknown)."""
    if segmentation is None or (isinstance(segmentation, list) and all(part == [] for part in segmentation)):
        return None
    if isinstance(segmentation, dict):
        return _box_of_runs(segmentation, size_wh)
    polygons = segmentation
    if isinstance(polygons, list) and not isinstance(polygons[0], list):
        polygons = [polygons]
    if not isinstance(polygons, list) or not all(isinstance(part, list) and len(part) % 2 == 0 for part in polygons):
        raise DataError(NOT_POLYGONS)
    points = list(itertools.chain.from_iterable(polygons))
    # A comparison with NaN is false; with an integer of a thousand digits it does not overflow.
    if not points or not all(type(number) in (int, float) and abs(number) <= LARGEST for number in points):
        raise DataError(NOT_POLYGONS)
    x, y = points[::2], points[1::2]
    return float(min(x)), float(min(y)), float(max(x) - min(x)), float(max(y) - min(y))


def _box_of_runs(mask: dict[str, Any], size_wh: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """Returns the box of runs of background and object in turn, down the columns of the mask. Malformed runs are refused in
    Python: pycocotools decodes them in C without checking where they end."""
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n <= LARGEST_SIDE for n in size):
        raise DataError(NOT_RUNS)
    if size_wh[0] and tuple(size) != size_wh[::-1]:
        wrong = f"has size {size}, but the image has height {size_wh[1]} and width {size_wh[0]}"
        raise DataError(f"has no bbox, and its segmentation {wrong}; a mask must have one pixel per pixel of its image")
    height, pixels = size[0], size[0] * size[1]
    if isinstance(counts, str):
        counts = _decompressed(counts)
    if not isinstance(counts, list) or not all(type(n) is int and 0 <= n <= pixels for n in counts):
        raise DataError(NOT_RUNS)
    ends = np.cumsum(np.array(counts, np.int64))
    if not len(ends) or ends[-1] != pixels:
        raise DataError(NOT_RUNS)
    starts, ends = ends[0:-1:2], ends[1::2]
    starts, last = starts[ends > starts], ends[ends > starts] - 1
    if not len(starts):
        return None
    left, right = starts[0] // height, last[-1] // height + 1
    across = (starts // height != last // height).any()  # a run from the foot of a column to the head of the next
    top, bottom = (0, height) if across else ((starts % height).min(), (last % height).max() + 1)
    return float(left), float(top), float(right - left), float(bottom - top)


def _decompressed(text: str) -> list[int] | None:
    """Decodes COCO's text; None if malformed. Five bits per character, a sixth for "more follows"; from the third number
    on, differences to the last but one."""
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
