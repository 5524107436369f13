"""Annotated images of any format: what every reader returns and every writer takes, and what the readers share."""

import math
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import msgspec

from retina_jax.data.coco_document import load_json
from retina_jax.data.coco_entries import LARGEST, Text, short
from retina_jax.data.image_paths import SUFFIXES
from retina_jax.data.reading import read_file
from retina_jax.data.source import DataError, Size
from retina_jax.errors import quoted, reason

Corners = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels, as annotated: reversed ones stay reversed
Points = Iterable[tuple[float, float]]
Files = dict[str, bytes]  # path inside the output folder to content
LARGEST_FILE = 2**32  # bytes of an annotation file
NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SPLITS = {
    "train": ("train", "training", "obj_train_data"),
    "val": ("val", "valid", "validation", "obj_valid_data"),
    "test": ("test", "testing", "obj_test_data"),
}
SPLITS = {alias: split for split, aliases in _SPLITS.items() for alias in aliases}


class Box(NamedTuple):
    """An annotated box."""

    label: str  # class name
    corners: Corners
    crowd: bool = False  # iscrowd of COCO, difficult of Pascal VOC: neither trained on nor scored


@dataclass(eq=False)
class Picture:
    """An image and its boxes."""

    names: tuple[
        str, ...
    ]  # paths that the file may have, the likeliest first; after `locate`, one relative to the folder
    boxes: list[Box]
    size: Size = (0, 0)  # 0, 0: unknown
    split: str = "train"
    place: str = ""  # file, and line or entry, that annotates it, for messages
    unlabelled: bool = False  # whether a format with a file of labels per image has none for it
    fractions: bool = False  # whether the boxes are in fractions of the image until `locate` knows its size
    path: Path | None = None  # the image file; None: not found
    image_id: int | None = None  # in a COCO JSON

    @property
    def name(self) -> str:
        """The path of the image file."""
        return self.names[0]


@dataclass(eq=False)
class Annotated:
    """The content of annotation files."""

    pictures: list[Picture]
    folders: list[Path]  # where the images may be, the likeliest first
    classes: list[str] = field(default_factory=list)  # classes that the files list, in order; others are added by name
    skipped: Counter[str] = field(default_factory=Counter)  # what is left out, with counts
    document: dict[str, Any] | None = None  # a COCO JSON that is only split: its entries are kept as they are

    def split(self, name: str) -> list[Picture]:
        """Returns the images of a split."""
        return [picture for picture in self.pictures if picture.split == name]

    @property
    def splits(self) -> list[str]:
        """The splits that have images, train first."""
        present = {picture.split for picture in self.pictures}
        return [name for name in _SPLITS if name in present]


@dataclass(frozen=True)
class Reading:
    """Conventions that the files leave open."""

    voc_one_based: bool = False
    difficult: Literal["ignore", "objects"] = "ignore"
    classes: tuple[str, ...] = ()


def number(value: Any, what: str) -> float:
    """Returns a text or number as a finite number of at most LARGEST; ValueError, which names `what`, otherwise."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not abs(found) <= LARGEST:
        missing = "is missing" if value is None else f"must be a number between -1e9 and 1e9, not {short(value)}"
        raise ValueError(f"{what} {missing}")
    return found


def side(value: Any, what: str) -> int:
    """Returns the width or height of an image, 0 if it is missing; ValueError, which names `what`, for another number."""
    found = number(value or 0, what)
    if found < 0 or found != int(found):
        raise ValueError(f"{what} must be a number of pixels, not {short(value)}")
    return int(found)


def class_name(value: Any, what: str = "the class") -> str:
    """Returns the name of a class without spaces around it; ValueError, which names `what`, if it cannot be one."""
    try:
        return msgspec.convert(str(value).strip() if type(value) in (str, int, float) else None, Text)
    except (msgspec.ValidationError, UnicodeEncodeError):
        raise ValueError(f"{what} must be text on one line, not {short(value)}") from None


def around(points: Points) -> Corners:
    """Returns the smallest box around points; ValueError for none."""
    if not (listed := list(points)):
        raise ValueError("has no points")
    x, y = zip(*listed, strict=True)
    return min(x), min(y), max(x), max(y)


def around_rotated(corners: Corners, degrees: float, centre: tuple[float, float]) -> Corners:
    """Returns the smallest box around a box that is rotated clockwise about `centre`, as seen on the image."""
    if not degrees:
        return corners
    (x1, y1, x2, y2), (cx, cy), turn = corners, centre, math.radians(degrees)
    cos, sin = math.cos(turn), math.sin(turn)
    offsets = [(x - cx, y - cy) for x in (x1, x2) for y in (y1, y2)]
    return around((cx + x * cos - y * sin, cy + x * sin + y * cos) for x, y in offsets)


def split_of(name: str) -> str:
    """Returns the split that the first folder of a path is named after ("valid/1.xml": val), else train."""
    first, slash, _ = name.replace("\\", "/").partition("/")
    return SPLITS.get(first.casefold(), "train") if slash else "train"


def is_image_name(name: str) -> bool:
    """Returns whether a path ends as those of images do."""
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def is_image(path: Path) -> bool:
    """Returns whether a file exists and is named as an image."""
    try:
        return is_image_name(path.name) and path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def files_below(folder: Path, *suffixes: str) -> list[Path]:
    """Returns the files below a folder with one of these suffixes in any case, sorted, without hidden ones: macOS puts
    `._1.jpg` next to 1.jpg into archives."""
    named = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and not path.name.startswith("."))
    return sorted(path for path in named if path.is_file())


def read_bytes(path: Path) -> bytes:
    """Returns the content of an annotation file; DataError if it cannot be read."""
    try:
        return read_file(path, LARGEST_FILE)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from None


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file in UTF-8, with or without a byte order mark; DataError for another encoding."""
    try:
        return read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text in UTF-8 ({reason(error)}); save it as UTF-8") from None


def read_json(path: Path, expected: Any, what: str) -> Any:
    """Returns the content of a JSON file; DataError, which names the entry, if it is not as `expected`."""
    try:
        return msgspec.json.decode(read_bytes(path), type=expected)
    except (ValueError, RecursionError):
        value = load_json(path)  # reads a byte order mark and NaN too, and names the line of malformed JSON
    try:
        return msgspec.convert(value, expected)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not {what}: {reason(error)}") from None


class _Builder(ElementTree.TreeBuilder):
    """Builds elements of documents without a DOCTYPE, the only place where XML defines entities."""

    def doctype(self, *_: object) -> None:
        """Refuses the document before any entity is expanded."""
        raise ValueError("has a DOCTYPE, which annotation tools do not write; remove it")


def read_xml(path: Path, root: str, what: str) -> ElementTree.Element:
    """Returns the root element of an XML file, which must be called `root`; DataError otherwise."""
    try:
        element = ElementTree.fromstring(read_bytes(path), ElementTree.XMLParser(target=_Builder()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise DataError(f"{path}: is not {what}: {reason(error)}") from None
    if element.tag != root:
        raise DataError(f"{path}: is not {what}: its root element must be <{root}>, not <{short(element.tag)[1:-1]}>")
    return element


def to_xml(root: ElementTree.Element) -> bytes:
    """Returns an XML file, indented."""
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def child(parent: ElementTree.Element, tag: str, text: object = None, **attributes: object) -> ElementTree.Element:
    """Appends an element to an XML tree and returns it."""
    element = ElementTree.SubElement(parent, tag, {name: xml_text(value) for name, value in attributes.items()})
    element.text = None if text is None else xml_text(text)
    return element


def xml_text(value: object) -> str:
    """Returns the text of a value; DataError if it has a character that XML excludes, even as an escape."""
    text = str(value)
    if wrong := NOT_IN_XML.search(text):
        raise DataError(f"{quoted(text)} has the character {ascii(wrong[0])[1:-1]}, which XML excludes; rename it")
    return text


def plain(value: float) -> str:
    """Returns the shortest text of a number; an integer without a decimal point."""
    return str(int(value)) if value == int(value) else repr(float(value))


def by_stem(pictures: Iterable[Picture], path: str) -> Iterator[tuple[str, Picture]]:
    """Yields each image with its annotation file: `path` with its split and stem filled in. DataError if two share one."""
    users: dict[str, Picture] = {}
    for picture in pictures:
        file = path.format(split=picture.split, stem=posixpath.splitext(picture.name)[0])
        if (other := users.setdefault(file, picture)) is not picture:
            both = " and ".join(f"{quoted(each.name)} ({each.split})" for each in (other, picture))
            advice = "rename one of the images" if other.split == picture.split else "keep one of them, or rename it"
            raise DataError(f"{both} would share one annotation file, {quoted(file)}; {advice}")
        yield file, picture
