"""Reads a COCO JSON file as columns: entries checked, images located, their sizes known, boxes in pixels."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from jaxtyping import Int64

from retina_jax.config import DataConfig
from retina_jax.console import log
from retina_jax.data import coco_entries
from retina_jax.data.box_formats import boxes_in_pixels
from retina_jax.data.classes import Category, excluded_categories, unique_names
from retina_jax.data.coco_entries import CocoFile, Columns, Entry, Mistake, leads_outside, short
from retina_jax.data.decoding import Header
from retina_jax.data.image_paths import Places, find_images
from retina_jax.data.reading import read_file
from retina_jax.data.source import BoxTable, DataError, ImageRow, Size, paused_collector
from retina_jax.data.survey import read_sizes, survey_files
from retina_jax.errors import reason

LARGEST_JSON = 2**33  # bytes of an annotation file; the largest of COCO has half a gigabyte
SLOW_JSON = 10**8  # bytes of a file that takes more than a second
DEFAULTS = DataConfig()
Rows = Int64[np.ndarray, " M"]


class Note(NamedTuple):
    """A remark on how a file was read."""

    kind: str  # one of the kinds of `data_check.findings`
    text: str  # one line
    refused: bool = False  # whether training refuses the dataset


@dataclass(frozen=True, eq=False)
class Content(BoxTable):
    """The boxes of a COCO JSON file, and how it was read; the classes are in the order of the file."""

    left_out: dict[Category, str]  # categories that are not classes, each with the reason (`excluded_categories`)
    rows: Rows  # position of each box in the file's list of annotations
    without_box: list[int]  # positions in that list of the annotations without a box: points and keypoints
    paths: list[str]  # file of each image, or where it should be; empty if the folder was not given
    missing: dict[int, str]  # rows of the images without a file; where files of that base name are, if anywhere
    unsized: frozenset[int]  # rows of the images whose entries have no size: it is that of the file
    notes: list[Note]


def parse_coco(path: Path, known: Sequence[Category] = (), data: DataConfig = DEFAULTS) -> Content:
    """Returns the content of a file, every entry checked, without its images; as `parse_document` does."""
    return parse_document(path, load_json(path, CocoFile), known=known, data=data)


@paused_collector()
def load_json(path: Path, expected: Any = Any) -> Any:
    """Decodes a file as `expected`, else as any JSON value; raises DataError with the line and column of malformed JSON."""
    try:
        if (size := path.stat().st_size) >= SLOW_JSON:
            log(f"reading {path.name} ({size / 1e6:.0f} MB) ...")
        encoded = read_file(path, LARGEST_JSON)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}; it must be a COCO JSON{_advice(path)}") from None
    try:
        return msgspec.json.decode(encoded, type=expected)
    except (ValueError, RecursionError):
        # json reads more (NaN, other encodings), and names the line and column of a mistake.
        try:
            return json.loads(encoded)
        except (ValueError, RecursionError) as error:
            why = reason(error)
            if isinstance(error, json.JSONDecodeError):
                why = f"line {error.lineno}, column {error.colno}: {error.msg}"
            raise DataError(f"{path}: is not JSON: {why}{_advice(path)}") from None


def _advice(path: Path) -> str:
    """Returns where to go with annotations of another format, which the name or a folder gives away."""
    return "" if path.suffix == ".json" else "; scripts/convert_data.py reads the formats of other tools"


@paused_collector()
def parse_document(
    path: Path,
    document: Any,
    mistakes: list[Mistake] | None = None,
    *,
    folder: Path | None = None,
    known: Sequence[Category] = (),
    data: DataConfig = DEFAULTS,
) -> Content:
    """Returns the content of `document`: any JSON value, or a CocoFile, which loses its annotations. `known` are classes
    that stay classes without a box (`excluded_categories`). Without a `folder`, images are not located, and missing sizes
    stay 0. The first mistake raises DataError. With a list of `mistakes`, entries that cannot be used are added to it and
    left out, refused notes are kept, and only a file without its three lists raises DataError."""
    if not isinstance(document, CocoFile | dict):
        raise DataError(f"{path}: must be an object with images, annotations and categories, not {short(document)}")
    if folder is not None and not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it must hold the images that {path} names")
    if isinstance(document, dict):
        return _Parser(path, document, mistakes, data).parse(folder, known)
    parser = _Parser(path, msgspec.structs.asdict(document), mistakes, data)
    document.annotations = []  # so that the parser frees their text, most of the memory, when they are decoded
    return parser.parse(folder, known)


class _Parser:
    """The parser of one file; collects notes and, if they are wanted, mistakes."""

    def __init__(self, path: Path, lists: dict, mistakes: list[Mistake] | None, data: DataConfig) -> None:
        self.path, self.lists, self.mistakes, self.data = path, lists, mistakes, data
        self.notes: list[Note] = []
        self.texts: Counter[str] = Counter()

    def parse(self, folder: Path | None, known: Sequence[Category]) -> Content:
        """Returns the content of the file; `folder` and `known` are as in `parse_document`."""
        _, listed = self.entries("categories", coco_entries.CategoryEntry)
        categories = [(entry.id, entry.name) for entry in listed]
        positions, entries = self.entries("images", coco_entries.ImageEntry)
        if not self.mistakes and not (categories and entries):
            empty = "images" if categories else "categories"
            raise DataError(f"{self.path}: {empty} is empty; it must contain at least one entry")
        images, paths, missing, unsized = self.locate(positions, entries, folder)
        table, rows, without_box = self.boxes(images, categories)
        if texts := +self.texts:
            counted = ", ".join(f"{count} {key}" for key, count in texts.items())
            text = f"numbers are written as text ({counted}); they are read as numbers"
            self.notes.append(Note("text_numbers", text))
        above = [entry.supercategory if isinstance(entry.supercategory, str) else None for entry in listed]
        left_out = excluded_categories(categories, above, table.annotated, known, self.data.empty_parents)
        is_class = np.array([category not in left_out for category in categories], bool)
        classes = [category for category in categories if category not in left_out]
        columns = vars(table) | {"categories": classes, "labels": (np.cumsum(is_class) - 1)[table.labels]}
        names = unique_names(classes)
        total = np.bincount(columns["labels"], minlength=len(names))
        objects = np.bincount(columns["labels"], ~table.crowd, minlength=len(names))
        if alone := np.flatnonzero((total > 0) & (objects == 0)).tolist():
            shown = ", ".join(short(names[k]) for k in alone[:5]) + (", ..." if len(alone) > 5 else "")
            text = f"every annotation of {shown} ({total[alone].sum()} in all) has iscrowd 1, as CVAT writes masks"
            self.notes.append(Note("all_crowds", f"{text}: they are ignored; data.crowds objects makes them objects"))
        for note in self.notes:
            if note.refused and self.mistakes is None:
                raise DataError(f"{self.path}: {note.text}")
        located = {"paths": paths, "missing": missing, "unsized": unsized}
        return Content(**columns, left_out=left_out, rows=rows, without_box=without_box, **located, notes=self.notes)

    def refuse(self, key: str, index: int, text: str) -> None:
        """Raises DataError for an entry that cannot be used, or collects it."""
        mistake = Mistake(key, index, _decoded(self.lists[key][index]), text)
        if self.mistakes is None:
            raise DataError(f"{self.path}: {mistake.place}: {text}")
        self.mistakes.append(mistake)

    def entries(self, key: str, kind: type[Entry]) -> tuple[Sequence[int], list[Entry]]:
        """Returns the entries of a list that have the right types, and their positions; checks that ids are unique."""
        listed = self.lists.get(key)
        if not isinstance(listed, list):
            found = short(listed) if key in self.lists else "missing"
            if key == "annotations" and key not in self.lists:
                found += "; only evaluate.py accepts a file without it, such as COCO's image_info of test images"
            raise DataError(f"{self.path}: {key} must be a list of objects, but is {found}")
        if listed and isinstance(listed[0], kind):  # from a CocoFile, in which each of these has its type
            positions, parsed = range(len(listed)), listed
        else:
            positions, parsed = [], []
            for index, entry in enumerate(listed):
                try:
                    parsed.append(coco_entries.parse_entry(entry, kind, self.texts))
                    positions.append(index)
                except DataError as error:
                    self.refuse(key, index, str(error))
        if key == "annotations":
            return positions, parsed
        unique: dict[int, int] = {}  # id to the row of its first entry
        for row, entry in enumerate(parsed):
            if unique.setdefault(entry.id, row) != row:
                self.refuse(key, positions[row], "id is used twice; ids must be unique")
        return [positions[row] for row in unique.values()], [parsed[row] for row in unique.values()]

    def locate(
        self, positions: Sequence[int], entries: list[coco_entries.ImageEntry], folder: Path | None
    ) -> tuple[list[ImageRow], list[str], dict[int, str], frozenset[int]]:
        """Returns the images and their `Content.paths`, `missing` and `unsized`; refuses names that lead out of `folder`."""
        images = [(e.id, e.file_name, *((e.width, e.height) if e.width and e.height else (0, 0))) for e in entries]
        names = [entry.file_name for entry in entries]
        sizes: dict[int, Size | str] = {}
        if folder is not None:
            places = find_images(folder, names)
            sizes = self.missing_sizes(images, places.paths)
        else:
            outside = {row: "" for row, name in enumerate(names) if leads_outside(name)}
            places = Places([""] * len(names), outside, [])
        if places.moved:
            first = f"{short(names[places.moved[0]])} is read from {places.paths[places.moved[0]]}"
            text = f"{len(places.moved)} of {len(names)} images are not at the path in file_name: {first}"
            self.notes.append(Note("moved", text))
        kept, missing = [], {}
        for row, index in enumerate(positions):
            size, place = sizes.get(row), f"; {places.missing[row]}" if places.missing.get(row) else ""
            if row in places.missing and leads_outside(names[row]):
                wrong = f"file_name must be a path inside the image folder, not {short(names[row])}"
                self.refuse("images", index, wrong + place)
            elif isinstance(size, str):
                wrong = f"width and height are missing, and {places.paths[row]} cannot be read: {size}"
                self.refuse("images", index, wrong + place)
            else:
                if row in places.missing:
                    missing[len(kept)] = places.missing[row]
                images[row] = (*images[row][:2], *(size or images[row][2:]))
                kept.append(row)
        unsized = frozenset(place for place, row in enumerate(kept) if row in sizes)
        return [images[row] for row in kept], [places.paths[row] for row in kept if folder], missing, unsized

    def missing_sizes(self, images: list[ImageRow], paths: list[str]) -> dict[int, Size | str]:
        """Returns the width and height of the files of images without a size, by row, or why a file cannot be read.
        They are turned by their EXIF orientation or not as the other images show (`survey.Votes`)."""
        unsized = [row for row, image in enumerate(images) if not image[2]]
        headers = read_sizes(self.path, [Path(paths[row]) for row in unsized])
        orientation = self.data.orientation
        if orientation == "auto":
            orientation = self.data.undecided_orientation
            if any(isinstance(header, Header) and header.orientation >= 5 for header in headers):
                sized = [row for row, image in enumerate(images) if image[2]]
                names, sizes_wh = [images[row][1] for row in sized], [images[row][2:] for row in sized]
                orientation = survey_files(names, [Path(paths[row]) for row in sized], sizes_wh).votes.convention(
                    orientation
                )
        sizes = (header if isinstance(header, str) else header.sizes[orientation] for header in headers)
        return dict(zip(unsized, sizes, strict=True))

    def annotations(self) -> tuple[Sequence[int], Columns]:
        """Returns the annotations that have the right types, by field, and their positions."""
        listed = self.lists.get("annotations")
        if isinstance(listed, list) and listed and isinstance(listed[0], msgspec.Raw):
            try:
                return range(len(listed)), Columns.decoded(listed)
            except ValueError:  # each is then converted or refused by itself
                self.lists["annotations"] = [_decoded(raw) for raw in listed]
        positions, found = self.entries("annotations", coco_entries.AnnotationEntry)
        return positions, Columns.of(found)

    def boxes(self, images: list[ImageRow], categories: list[Category]) -> tuple[BoxTable, Rows, list[int]]:
        """Returns the boxes of `categories`, and `Content.rows` and `without_box`; notes what the boxes look like."""
        positions, (image_ids, category_ids, numbers, has_box, areas, crowd, ids) = self.annotations()
        owners = _places((image[0] for image in images), image_ids)
        labels = _places((category[0] for category in categories), category_ids)
        origin, kept = np.full(len(ids), "bbox", object), np.ones(len(ids), bool)
        without_box: list[int] = []
        # Only annotations without image, category or a bbox of positive size, one by one: COCO has 860,000 others.
        for m in np.flatnonzero((owners < 0) | (labels < 0) | (numbers[:, 2] <= 0) | (numbers[:, 3] <= 0)).tolist():
            index, wrong, around = positions[m], "", None
            if owners[m] < 0:
                wrong = f"image_id must be the id of one of the images, not {image_ids[m]}"
            elif labels[m] < 0:
                wrong = f"category_id must be one of {short(sorted(c[0] for c in categories))}, not {category_ids[m]}"
            else:
                try:
                    segmentation = _decoded(self.lists["annotations"][index]).get("segmentation")
                    around = coco_entries.box_of(segmentation, images[owners[m]][2:])
                except (ValueError, RecursionError) as error:
                    if not has_box[m]:  # a bbox without area is dropped later, and counted
                        wrong = str(error) if isinstance(error, DataError) else coco_entries.NOT_POLYGONS
            if around is not None:
                numbers[m], origin[m] = around, "mask" if isinstance(segmentation, dict) else "polygons"
                areas[m] = areas[m] or np.nan  # 0 was the area of the bbox
            elif wrong:
                kept[m] = False
                self.refuse("annotations", index, wrong)
            elif not has_box[m]:
                kept[m] = False
                without_box.append(index)
        self.lists = {}
        if not kept.all():
            parts = owners, labels, numbers, areas, origin, crowd, ids
            owners, labels, numbers, areas, origin, crowd, ids = (part[kept] for part in parts)
        sizes_wh = np.array([image[2:] for image in images], np.int64).reshape(-1, 2)[owners]
        box_format = self.data.box_format
        boxes, areas, guesses = boxes_in_pixels(numbers, areas, sizes_wh, origin, box_format)
        for guess in guesses:
            kind = "box_format" if guess.sure else "likely_format"
            self.notes.append(Note(kind, guess.text(box_format), refused=guess.sure))
        crowd &= self.data.crowds == "ignore"
        boxes_xyxy = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        table = BoxTable(images, categories, owners, labels, crowd, boxes_xyxy, boxes, areas, ids)
        return table, np.array(positions, np.int64)[kept], without_box


def _decoded(entry: Any) -> Any:
    """Returns the JSON value of an annotation of a CocoFile; others unchanged. json reads more than msgspec (1e400), here
    also bytes that are not UTF-8, which msgspec accepts in fields that are not read."""
    return json.loads(bytes(entry).decode(errors="replace")) if isinstance(entry, msgspec.Raw) else entry


def _places(ids: Iterable[int], wanted: Rows) -> Rows:
    """Returns the position of each wanted id in `ids`, -1 if absent; a dict misses the processor's cache each time."""
    every = np.array([*ids, coco_entries.LARGEST_ID], np.int64)
    order = np.argsort(every)
    found = order[np.searchsorted(every[order], wanted)]
    return np.where(every[found] == wanted, found, -1)
