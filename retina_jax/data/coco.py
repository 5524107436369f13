"""COCO-format annotations: a JSON file and a folder of images.

Everything in the file is checked once, here, so that nothing after this file meets a missing key, a string for a
number or a box outside its image.
"""

from __future__ import annotations

import gc
import json
import re
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float64

from retina_jax.classes import Category, placeholders
from retina_jax.data.decoding import largest_file
from retina_jax.data.reading import read_again, read_file
from retina_jax.data.source import BadImage, DataError, Source, make_records
from retina_jax.errors import reason

T = TypeVar("T")
LARGEST = 1e9
"""No size, coordinate or area in pixels is larger."""
LARGEST_ID = 2**53
"""Ids stay below, where every JSON writer keeps integers exact."""
LARGEST_JSON = 2**33
"""Bytes of an annotation file; the largest of COCO has half a gigabyte."""
LONGEST = 4096
"""No file name has more characters."""
UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, line ends and halves of characters: they break file names, log lines and terminals."""


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
        named = f" (id {_short(self.entry['id'])})" if isinstance(self.entry, dict) and "id" in self.entry else ""
        return f"{self.key}[{self.index}]{named}"


class Content(NamedTuple):
    """What a COCO JSON says."""

    categories: list[Category]
    """The classes, in the order of the file: label k is the k-th."""
    images: list[tuple[int, str, int, int]]
    """Id, file name, width, height."""
    boxes: Float64[np.ndarray, "M 7"]
    """Row of the image, label, crowd, and x, y, width, height in pixels, as found."""
    annotated: frozenset[int]
    """Ids of the categories that an annotation has, crowds included."""
    left_out: dict[Category, str]
    """Categories that are no classes, each with the reason, as from `classes.placeholders`."""


def read_coco(
    annotations: str | Path,
    images: str | Path,
    *,
    images_without_boxes: Literal["keep", "drop"] = "keep",
    known: Sequence[Category] = (),
    empty_parents: Literal["drop", "keep"] = "drop",
) -> Source:
    """The data set of a COCO JSON. "drop" (for training) leaves out images that have no usable box; evaluation keeps all.
    `known` and `empty_parents` decide which empty categories are classes, as in `classes.placeholders`.

    Raises DataError, one line that names the file, the entry and what would be right, for anything in the file that
    cannot be used, for no images at all, and with "drop" for no usable box at all. The images are not opened here.

    A `file_name` is a path inside `images`: one that is absolute or climbs out with .. is refused here, and a folder, pipe
    or device where the image should be is a BadImage when it is read. Symbolic links are followed wherever they lead,
    because data sets are often made of them: who may write into the folder is trusted, who wrote the JSON is not.
    """
    path, folder = Path(annotations), Path(images)
    content = parse_coco(path, known, empty_parents)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it must hold the images that {path} names")
    columns = content.boxes
    boxes_xyxy = np.concatenate([columns[:, 3:5], columns[:, 3:5] + columns[:, 5:7]], axis=1)
    records, _, counts = make_records(
        content.images,
        columns[:, 0].astype(np.int64),
        boxes_xyxy,
        columns[:, 1].astype(np.int64),
        columns[:, 2] > 0,
        images_without_boxes,
    )
    if not records:
        raise DataError(f"{path}: annotations has no usable box in any image ({counts}); training needs at least one")

    def where(index: int) -> str:
        return str(folder / records[index].file_name)

    def read(index: int) -> bytes:
        try:
            return read_image(Path(where(index)), records[index].width, records[index].height)
        except OSError as error:
            raise BadImage(f"{where(index)}: cannot be read: {reason(error)}") from None

    return Source(
        name=str(path),
        records=records,
        class_names=tuple(name for _, name in content.categories),
        category_ids=tuple(category_id for category_id, _ in content.categories),
        counts=counts,
        read=read,
        where=where,
        make_truth=lambda: read_truth(path),
        annotated=content.annotated,
        left_out=content.left_out,
    )


def read_image(path: Path, width: int, height: int) -> bytes:
    """The file of an image that its annotations say is of this size; OSError where it cannot be read."""
    largest = largest_file(width * height)
    return read_again(lambda: read_file(path, largest), str(path))


def parse_coco(path: Path, known: Sequence[Category] = (), empty_parents: Literal["drop", "keep"] = "drop") -> Content:
    """The file's content, every entry of it checked; arguments and DataError as in `read_coco`."""
    return parse_document(path, load_json(path), None, known, empty_parents)


def parse_document(
    path: Path,
    document: Any,
    mistakes: list[Mistake] | None = None,
    known: Sequence[Category] = (),
    empty_parents: Literal["drop", "keep"] = "drop",
) -> Content:
    """The content of what `load_json` gave. With a list of `mistakes`, entries that cannot be used are added to it and left
    out, and only a file without the three lists raises DataError; without one, the first such entry raises it."""
    if not isinstance(document, dict):
        raise DataError(f"{path}: must be an object with images, annotations and categories, not {_short(document)}")
    entries = _parse_all(path, document, "categories", _category_parser(), mistakes)
    categories = [(category_id, name) for category_id, name, _ in entries]
    images = _parse_all(path, document, "images", _image_parser(), mistakes)
    if not mistakes and not (categories and images):
        raise DataError(f"{path}: {'images' if categories else 'categories'} is empty; it must list at least one")
    image_rows = {image[0]: i for i, image in enumerate(images)}
    label_of = {category_id: label for label, (category_id, _) in enumerate(categories)}
    boxes = _parse_all(path, document, "annotations", _annotation_parser(image_rows, label_of), mistakes)
    columns = np.array(boxes, np.float64).reshape(-1, 7)
    annotated = frozenset(categories[label][0] for label in np.unique(columns[:, 1]).astype(int))
    left_out = placeholders(categories, [above for *_, above in entries], annotated, known, empty_parents)
    is_class = np.array([category not in left_out for category in categories], bool)
    columns[:, 1] = (np.cumsum(is_class) - 1)[columns[:, 1].astype(int)]
    return Content([c for c in categories if c not in left_out], images, columns, annotated, left_out)


def load_json(path: Path) -> Any:
    """The file's content, or DataError with the line and column where it stops being JSON."""
    try:
        encoded = read_file(path, LARGEST_JSON)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}; it must be a COCO JSON") from None
    # train2017 makes tens of millions of objects, none of them garbage: the collector would walk them again and again.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return json.loads(encoded)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON: {str(error).splitlines()[0]}") from None
    finally:
        if collecting:
            gc.enable()


def read_truth(path: Path) -> dict[str, Any]:
    """Ground truth for pycocotools from a file that `read_coco` has accepted: see `Source.truth`.

    It is read again when evaluation asks for it, so that training does not carry 860 thousand dicts around. DataError
    where the file has meanwhile become another, unusable one.
    """
    document = load_json(path)
    try:
        return _truth(document)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(f"{path}: has changed since it was opened; it must stay as it is while a run uses it") from None


def _truth(document: Any) -> dict[str, Any]:
    found = document["annotations"]
    ids = [annotation.get("id", 0) for annotation in found]
    renumber = len(set(ids)) < len(ids) or any(annotation_id < 1 for annotation_id in ids)
    truth = []
    for i, annotation in enumerate(found):
        _, _, width, height = annotation["bbox"]
        kept = {key: value for key, value in annotation.items() if key != "segmentation"}
        # Missing area and iscrowd come first, so that what the annotation has of its own wins.
        truth.append({"area": width * height, "iscrowd": 0, **kept, "id": i + 1 if renumber else ids[i]})
    return {"info": {}, "images": document["images"], "annotations": truth, "categories": document["categories"]}


def _parse_all(
    path: Path, document: dict, key: str, parse: Callable[[dict], T], mistakes: list[Mistake] | None
) -> list[T]:
    """`parse` of every entry of a list in the file; its DataErrors get the file, the entry's position and id, or become
    `mistakes`."""
    entries = document.get(key)
    if not isinstance(entries, list):
        found = _short(entries) if key in document else "missing"
        raise DataError(f"{path}: {key} must be a list of objects, but is {found}")
    parsed = []
    for i, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise DataError(f"must be an object, not {_short(entry)}")
            parsed.append(parse(entry))
        except DataError as error:
            mistake = Mistake(key, i, entry, str(error))
            if mistakes is None:
                raise DataError(f"{path}: {mistake.place}: {mistake.text}") from None
            mistakes.append(mistake)
    return parsed


def _category_parser() -> Callable[[dict], tuple[int, str, str | None]]:
    """Parses a category to (id, name, supercategory)."""
    seen = set()

    def parse(entry: dict) -> tuple[int, str, str | None]:
        above = entry.get("supercategory")
        return _new(seen, _integer(entry, "id")), _text(entry, "name"), above if isinstance(above, str) else None

    return parse


def _image_parser() -> Callable[[dict], tuple[int, str, int, int]]:
    seen = set()

    def parse(entry: dict) -> tuple[int, str, int, int]:
        width, height = _integer(entry, "width"), _integer(entry, "height")
        for key, side in (("width", width), ("height", height)):
            if not 0 < side <= LARGEST:
                raise DataError(f"{key} must be a positive number of pixels, not {side}")
        name = _text(entry, "file_name")
        rooted = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
        if rooted or ".." in PureWindowsPath(name).parts:
            raise DataError(f"file_name must be a path inside the image folder, not {_short(name)}")
        return _new(seen, _integer(entry, "id")), name, width, height

    return parse


def _annotation_parser(image_rows: dict[int, int], label_of: dict[int, int]) -> Callable[[dict], tuple]:
    """Parses an annotation to (row of its image, label, crowd, x, y, width, height)."""

    def parse(entry: dict) -> tuple:
        image = image_rows.get(_integer(entry, "image_id"))
        if image is None:
            raise DataError(f"image_id must be the id of one of the images, not {entry['image_id']}")
        label = label_of.get(_integer(entry, "category_id"))
        if label is None:
            raise DataError(f"category_id must be one of {_short(sorted(label_of))}, not {entry['category_id']}")
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DataError(f"iscrowd must be 0 or 1, not {_short(crowd)}")
        if "id" in entry:
            _integer(entry, "id")
        if "area" in entry and not _is_number(entry["area"]):
            raise DataError(f"area must be a number of pixels, not {_short(entry['area'])}")
        if "bbox" not in entry:
            only = " and only a segmentation" if "segmentation" in entry else ""
            raise DataError(f"has no bbox{only}; it must have one, [x, y, width, height] in pixels")
        box = entry["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise DataError(f"bbox must be four finite numbers, [x, y, width, height] in pixels, not {_short(box)}")
        return (image, label, crowd, *box)

    return parse


def _integer(entry: dict, key: str) -> int:
    value = entry.get(key)
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or abs(value) >= LARGEST_ID:  # `type`, because True is an instance of int.
        raise DataError(f"{key} must be an integer, {'not ' + _short(value) if key in entry else 'but is missing'}")
    return value


def _text(entry: dict, key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise DataError(f"{key} must be text, {'not ' + _short(value) if key in entry else 'but is missing'}")
    if UNSHOWN.search(value) or len(value) > LONGEST:
        wanted = f"text on one line of at most {LONGEST} characters, none of them a control character"
        raise DataError(f"{key} must be {wanted}, not {_short(value)}")
    return value


def _is_number(value: object) -> bool:
    # A comparison with NaN is false, one with an infinity or an integer of a thousand digits is too, without overflow.
    return type(value) in (int, float) and abs(value) <= LARGEST


def _new(seen: set[int], identity: int) -> int:
    if identity in seen:
        raise DataError("id is used twice; every entry must have its own")
    seen.add(identity)
    return identity


def _short(value: object) -> str:
    """The value on one line, however long or deep it is."""
    return "null" if value is None else reprlib.repr(value)
