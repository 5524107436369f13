"""Entries of a COCO JSON, each checked on its own: what they hold, or one line that says what is wrong with them."""

from __future__ import annotations

import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from retina_jax.data.segmentations import box_of
from retina_jax.data.source import DataError

LARGEST = 1e9
"""No size, coordinate or area in pixels is larger."""
LARGEST_ID = 2**53
"""Ids stay below, where every JSON writer keeps integers exact."""
LONGEST = 4096
"""No file name has more characters."""
UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, line ends and halves of characters: they break file names, log lines and terminals."""
DRIVE = re.compile(r"[A-Za-z]:[\\/]")
"""Start of an absolute path of Windows."""
DIGITS = re.compile(r"[+-]?[0-9]{1,16}", re.ASCII)
"""Text that is read as an integer."""
DECIMAL = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?", re.ASCII)
"""Text that is read as a number."""
WITHOUT_BOX = None
"""What an annotation without a box is parsed to, such as a point or keypoints."""


class Mistake(NamedTuple):
    """An entry of the file that cannot be used."""

    key: str
    """List that it stands in: categories, images or annotations."""
    index: int
    entry: Any
    text: str
    """What is wrong and what would be right, one line."""

    @property
    def place(self) -> str:
        """Where it stands, and its id where it has one."""
        named = f" (id {short(self.entry['id'])})" if isinstance(self.entry, dict) and "id" in self.entry else ""
        return f"{self.key}[{self.index}]{named}"


class CategoryEntry(NamedTuple):
    """An entry of `categories`."""

    id: int
    name: str
    supercategory: str | None


class Image(NamedTuple):
    """An entry of `images`."""

    id: int
    file_name: str
    width: int
    """Pixels; 0 where the entry has no size."""
    height: int


class Box(NamedTuple):
    """An entry of `annotations`."""

    image: int
    """Row of its image."""
    label: int
    crowd: int
    numbers: tuple[float, float, float, float]
    """`bbox` as found; x, y, width, height of the segmentation where there is none, or none with an area."""
    origin: Literal["bbox", "polygons", "mask"]
    """What `numbers` are those of."""
    area: float
    """NaN where missing."""
    id: int
    """0 where missing."""


def category_parser(texts: Counter[str]) -> Callable[[dict], CategoryEntry]:
    """Parses a category; counts in `texts` the numbers that are text, by key."""
    seen: set[int] = set()

    def parse(entry: dict) -> CategoryEntry:
        above = entry.get("supercategory")
        identity = new(seen, integer(entry, "id", texts))
        return CategoryEntry(identity, text(entry, "name"), above if isinstance(above, str) else None)

    return parse


def image_parser(texts: Counter[str], *, rooted: bool) -> Callable[[dict], Image]:
    """Parses an image. With `rooted`, a file name may be absolute or climb out of the folder: whoever opens files must not
    follow it there."""
    seen: set[int] = set()

    def parse(entry: dict) -> Image:
        width, height = (0 if entry.get(key) is None else integer(entry, key, texts) for key in ("width", "height"))
        for key, side in (("width", width), ("height", height)):
            if not 0 <= side <= LARGEST:
                raise DataError(f"{key} must be a positive number of pixels, not {side}")
        name = text(entry, "file_name")
        if not rooted and escapes(name):
            raise DataError(outside(name))
        known = width and height
        return Image(new(seen, integer(entry, "id", texts)), name, width if known else 0, height if known else 0)

    return parse


def escapes(name: str) -> bool:
    """Whether a file name leads out of the folder that it is in: it is absolute, has a drive, or climbs out with .. ."""
    if name.startswith(("/", "\\")) or DRIVE.match(name) or os.path.splitdrive(name)[0]:
        return True
    return ".." in name and ".." in name.replace("\\", "/").split("/")


def outside(name: str) -> str:
    """Why a file name that `escapes` is refused."""
    return f"file_name must be a path inside the image folder, not {short(name)}"


def annotation_parser(
    images: Sequence[Image], label_of: dict[int, int], texts: Counter[str]
) -> Callable[[dict], Box | None]:
    """Parses an annotation to a Box, or to WITHOUT_BOX where it has neither a bbox nor a segmentation."""
    row_of = {image.id: row for row, image in enumerate(images)}

    def parse(entry: dict) -> Box | None:
        row = row_of.get(integer(entry, "image_id", texts))
        if row is None:
            raise DataError(f"image_id must be the id of one of the images, not {entry['image_id']}")
        label = label_of.get(integer(entry, "category_id", texts))
        if label is None:
            raise DataError(f"category_id must be one of {short(sorted(label_of))}, not {entry['category_id']}")
        crowd = number(entry, "iscrowd", 0, texts)
        if crowd not in (0, 1):
            raise DataError(f"iscrowd must be 0 or 1, not {short(crowd)}")
        identity = 0 if entry.get("id") is None else integer(entry, "id", texts)
        area = number(entry, "area", None, texts)
        if area is not None and not is_number(area):
            raise DataError(f"area must be a number of pixels, not {short(area)}")
        box, origin = entry.get("bbox"), "bbox"
        given = box is not None and box != []
        if given and not (right := is_box(box)) and isinstance(box, list):
            box = [as_number(value, "bbox", texts) for value in box]
            right = is_box(box)
        if given and not right:
            raise DataError(f"bbox must be four finite numbers, [x, y, width, height] in pixels, not {short(box)}")
        if not given or min(box[2:]) <= 0:
            segmentation = entry.get("segmentation")
            try:
                around = box_of(segmentation, images[row][2:])
            except DataError:
                if not given:
                    raise
                around = None  # a bbox without area stays one
            if around is not None:
                box, origin = around, "mask" if isinstance(segmentation, dict) else "polygons"
                area = area or None  # 0 was that of the bbox
            elif not given:
                return WITHOUT_BOX
        return Box(row, label, int(crowd), tuple(box), origin, float("nan") if area is None else area, identity)

    return parse


def is_box(value: object) -> bool:
    """Whether a JSON value is a list of four numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def number(entry: dict, key: str, default: int | None, texts: Counter[str]) -> Any:
    """What is under `key`, as from `as_number`; `default` where it is absent or null."""
    value = entry.get(key)
    return default if value is None else as_number(value, key, texts)


def as_number(value: object, key: str, texts: Counter[str]) -> Any:
    """The number that a text is, which is counted in `texts` under `key`; any other value as it is."""
    if not isinstance(value, str) or not DECIMAL.fullmatch(value):
        return value
    texts[key] += 1
    return float(value)


def integer(entry: dict, key: str, texts: Counter[str]) -> int:
    """The integer under `key`, which may be a float without a fraction, or text of digits, which is counted in `texts`."""
    value = entry.get(key)
    if type(value) is int and -LARGEST_ID < value < LARGEST_ID:
        return value  # as nearly all are
    value = as_integer(value)
    if value is None:
        raise DataError(f"{key} must be an integer, {'not ' + short(entry[key]) if key in entry else 'but is missing'}")
    if isinstance(entry[key], str):
        texts[key] += 1
    return value


def as_integer(value: object) -> int | None:
    """The integer that a JSON value is, 3, 3.0 or "3"; None where it is none."""
    if (isinstance(value, str) and DIGITS.fullmatch(value)) or (type(value) is float and value.is_integer()):
        value = int(value)
    # `type`, because True is an instance of int.
    return value if type(value) is int and abs(value) < LARGEST_ID else None


def text(entry: dict, key: str) -> str:
    """The text under `key`, which a terminal can show."""
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise DataError(f"{key} must be text, {'not ' + short(value) if key in entry else 'but is missing'}")
    if UNSHOWN.search(value) or len(value) > LONGEST:
        wanted = f"text on one line of at most {LONGEST} characters, none of them a control character"
        raise DataError(f"{key} must be {wanted}, not {short(value)}")
    return value


def is_number(value: object) -> bool:
    """Whether a JSON value is a number of at most LARGEST."""
    # A comparison with NaN is false, one with an infinity or an integer of a thousand digits is too, without overflow.
    return type(value) in (int, float) and abs(value) <= LARGEST


def new(seen: set[int], identity: int) -> int:
    """`identity`, which is added to `seen`; DataError where it is there already."""
    if identity in seen:
        raise DataError("id is used twice; every entry must have its own")
    seen.add(identity)
    return identity


def short(value: object) -> str:
    """The value on one line, however long or deep it is."""
    return "null" if value is None else reprlib.repr(value)
