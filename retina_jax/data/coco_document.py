"""A COCO JSON file as arrays: its entries checked, its images located, their sizes known, its boxes in pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import msgspec
import numpy as np
from jaxtyping import Float64, Int64

from retina_jax.data.box_formats import BoxFormat, boxes_in_pixels
from retina_jax.data.classes import Category, placeholders, unique_names
from retina_jax.data.coco_entries import (
    AnnotationEntry,
    CategoryEntry,
    CocoFile,
    Entry,
    ImageEntry,
    Mistake,
    box_of,
    decode_segmentation,
    escapes,
    parse_entry,
    short,
)
from retina_jax.data.conventions import Orientation
from retina_jax.data.image_paths import find_images
from retina_jax.data.image_sizes import Size, read_sizes
from retina_jax.data.source import DataError, Image
from retina_jax.data.survey import read_votes

Crowds = Literal["ignore", "objects"]
Columns = Float64[np.ndarray, "M 7"]  # row of the image, label, crowd, and x, y, width, height in pixels
Refuse = Callable[[str, int, str], None]  # reports that an entry, by its list and position, cannot be used, and why


class CocoOptions(TypedDict, total=False):
    """How a COCO JSON file is read; the fields of DataConfig explain the first four."""

    box_format: BoxFormat
    crowds: Crowds
    orientation: Literal["auto", "stored", "turned"]
    undecided_orientation: Orientation
    known: Sequence[Category]  # classes that stay classes without a box (`classes.placeholders`)
    empty_parents: Literal["drop", "keep"]


class Note(NamedTuple):
    """What a person should know of how a file was read."""

    kind: str  # one of the kinds of `data_check.findings`
    text: str  # one line
    refused: bool = False  # whether training refuses the data set


class Content(NamedTuple):
    """What a COCO JSON file holds."""

    categories: list[Category]  # the classes in the order of the file: label k is the k-th
    annotated: frozenset[int]  # ids of the categories with a box, crowds included
    left_out: dict[Category, str]  # categories that are no classes, each with the reason (`classes.placeholders`)
    images: list[Image]
    boxes: Columns
    areas: Float64[np.ndarray, " M"]  # square pixels; width times height where the file has no area
    ids: Int64[np.ndarray, " M"]  # ids of the annotations; 0 where missing
    rows: Int64[np.ndarray, " M"]  # position of each box in the file's list of annotations
    without_box: list[int]  # positions of the annotations without a box: points and keypoints
    paths: list[str]  # file of each image, or where it should be; empty if the folder was not given
    missing: dict[int, str]  # rows of the images without a file; where files of that base name are, if anywhere
    unsized: frozenset[int]  # rows of the images whose entries have no size: it is that of the file
    notes: list[Note]


def parse_document(
    path: Path,
    document: Any,
    mistakes: list[Mistake] | None = None,
    *,
    folder: Path | None = None,
    **options: Unpack[CocoOptions],
) -> Content:
    """Returns the content of `document`: a CocoFile, or any JSON value.

    With a list of `mistakes`, entries that cannot be used are added to it and left out, refused notes are kept, and only a
    file without its three lists raises DataError. Without one, the first mistake raises DataError. Without a `folder`,
    images are not located, and missing sizes stay 0.
    """
    if not isinstance(document, CocoFile | dict):
        raise DataError(f"{path}: must be an object with images, annotations and categories, not {short(document)}")
    texts: Counter[str] = Counter()
    notes: list[Note] = []
    lists = document if isinstance(document, dict) else msgspec.structs.asdict(document)

    def refuse(key: str, index: int, text: str) -> None:
        mistake = Mistake(key, index, lists[key][index], text)
        if mistakes is None:
            raise DataError(f"{path}: {mistake.place}: {text}")
        mistakes.append(mistake)

    def entries(key: str, kind: type[Entry]) -> list[tuple[int, Entry]]:
        if not isinstance(lists.get(key), list):
            found = short(lists[key]) if key in lists else "missing"
            if key == "annotations" and key not in lists:
                found += "; only evaluate.py accepts a file without it, such as COCO's image_info of test images"
            raise DataError(f"{path}: {key} must be a list of objects, but is {found}")
        parsed = []
        for index, entry in enumerate(lists[key]):
            try:
                parsed.append((index, entry if isinstance(entry, kind) else parse_entry(entry, kind, texts)))
            except DataError as error:
                refuse(key, index, str(error))
        return parsed

    listed = [entry for _, entry in _unique("categories", entries("categories", CategoryEntry), refuse)]
    categories = [(entry.id, entry.name) for entry in listed]
    images = _unique("images", entries("images", ImageEntry), refuse)
    if not mistakes and not (categories and images):
        raise DataError(f"{path}: {'images' if categories else 'categories'} is empty; it must list at least one")
    located, paths, missing, unsized = _locate(path, images, folder, options, notes, refuse)
    annotations = entries("annotations", AnnotationEntry)
    columns, areas, ids, rows, without_box = _find_boxes(annotations, located, categories, options, notes, refuse)
    if texts:
        counted = ", ".join(f"{count} {key}" for key, count in texts.items())
        notes.append(Note("text_numbers", f"numbers are written as text ({counted}); they are read as numbers"))
    annotated = frozenset(categories[label][0] for label in np.unique(columns[:, 1]).astype(int))
    above = [entry.supercategory if isinstance(entry.supercategory, str) else None for entry in listed]
    left_out = placeholders(
        categories, above, annotated, options.get("known", ()), options.get("empty_parents", "drop")
    )
    is_class = np.array([category not in left_out for category in categories], bool)
    columns[:, 1] = (np.cumsum(is_class) - 1)[columns[:, 1].astype(int)]
    classes = [category for category in categories if category not in left_out]
    _note_crowds(columns, unique_names(classes), notes)
    for note in notes:
        if note.refused and mistakes is None:
            raise DataError(f"{path}: {note.text}")
    return Content(
        categories=classes,
        annotated=annotated,
        left_out=left_out,
        images=located,
        boxes=columns,
        areas=areas,
        ids=ids,
        rows=rows,
        without_box=without_box,
        paths=paths,
        missing=missing,
        unsized=unsized,
        notes=notes,
    )


def _unique(key: str, entries: list[tuple[int, Entry]], refuse: Refuse) -> list[tuple[int, Entry]]:
    """The entries but those with the id of one before them, which are refused."""
    seen: dict[int, int] = {}
    for index, entry in entries:
        if seen.setdefault(entry.id, index) != index:
            refuse(key, index, "id is used twice; every entry must have its own")
    return [(index, entry) for index, entry in entries if seen[entry.id] == index]


def _locate(
    path: Path,
    entries: list[tuple[int, ImageEntry]],
    folder: Path | None,
    options: CocoOptions,
    notes: list[Note],
    refuse: Refuse,
) -> tuple[list[Image], list[str], dict[int, str], frozenset[int]]:
    """Returns the images, their files, and the rows of those without a file and of those without a size in their entries.

    A missing size is that of the file, turned or not as the other images show (`conventions.Votes`). Images whose names
    lead out of the folder and those without a size are refused.
    """
    images = [(e.id, e.file_name, *((e.width, e.height) if e.width and e.height else (0, 0))) for _, e in entries]
    names = [entry.file_name for _, entry in entries]
    if folder is None:
        inside = [row for row, name in enumerate(names) if not escapes(name)]
        for row in sorted({*range(len(names))} - {*inside}):
            refuse("images", entries[row][0], _outside(names[row]))
        return [images[row] for row in inside], [], {}, frozenset()
    places = find_images(folder, names)
    if places.moved:
        first = places.moved[0]
        text = f"{len(places.moved)} of {len(names)} images are not where their file_name says: {short(names[first])} "
        notes.append(Note("moved", f"{text}is read from {places.paths[first]}"))
    unknown = [row for row, image in enumerate(images) if not image[2]]
    sizes = dict(zip(unknown, read_sizes(path, [places.paths[row] for row in unknown]), strict=True)) if unknown else {}
    orientation, undecided = options.get("orientation", "auto"), options.get("undecided_orientation", "turned")
    if orientation == "auto":
        orientation = undecided
        if any(isinstance(size, Size) and size.turned for size in sizes.values()):
            sized = [row for row in range(len(images)) if row not in sizes]
            files = [Path(places.paths[row]) for row in sized]
            votes, _ = read_votes([names[row] for row in sized], files, [images[row][2:] for row in sized])
            orientation = votes.convention(undecided)
    kept, missing = [], {}
    for row, (index, _) in enumerate(entries):
        size = sizes.get(row)
        place = f"; {places.missing[row]}" if places.missing.get(row) else ""
        if row in places.missing and escapes(names[row]):
            refuse("images", index, _outside(names[row]) + place)
            continue
        if isinstance(size, str):
            wrong = f"width and height are missing, and {places.paths[row]} cannot be read: {size}{place}"
            refuse("images", index, wrong)
            continue
        if row in places.missing:
            missing[len(kept)] = places.missing[row]
        if size is not None:
            images[row] = (*images[row][:2], *size.shown(orientation))
        kept.append(row)
    unsized = frozenset(place for place, row in enumerate(kept) if row in sizes)
    return [images[row] for row in kept], [places.paths[row] for row in kept], missing, unsized


def _outside(name: str) -> str:
    return f"file_name must be a path inside the image folder, not {short(name)}"


def _find_boxes(
    entries: list[tuple[int, AnnotationEntry]],
    images: list[Image],
    categories: list[Category],
    options: CocoOptions,
    notes: list[Note],
    refuse: Refuse,
) -> tuple[Columns, Float64[np.ndarray, " M"], Int64[np.ndarray, " M"], Int64[np.ndarray, " M"], list[int]]:
    """Returns `Content`'s boxes, with rows of `categories` as labels, areas, ids, rows and without_box; notes what the boxes
    look like.

    Only annotations without image, category or a bbox of positive size are examined one by one: COCO has 860,000 others.
    """
    row_of = {image[0]: row for row, image in enumerate(images)}
    label_of = {category_id: label for label, (category_id, _) in enumerate(categories)}
    found = [entry for _, entry in entries]
    owners = np.array([row_of.get(entry.image_id, -1) for entry in found], np.int64)
    labels = np.array([label_of.get(entry.category_id, -1) for entry in found], np.int64)
    flat = chain.from_iterable(entry.bbox or (0.0, 0.0, 0.0, 0.0) for entry in found)
    numbers = np.fromiter(flat, np.float64, 4 * len(found)).reshape(-1, 4)
    areas = np.array([np.nan if entry.area is None else entry.area for entry in found], np.float64)
    origin, kept = np.full(len(found), "bbox", "U8"), np.ones(len(found), bool)
    without_box: list[int] = []
    for m in np.flatnonzero((owners < 0) | (labels < 0) | (numbers[:, 2:] <= 0).any(1)).tolist():
        index, entry = entries[m]
        wrong, around = "", None
        if owners[m] < 0:
            wrong = f"image_id must be the id of one of the images, not {entry.image_id}"
        elif labels[m] < 0:
            wrong = f"category_id must be one of {short(sorted(label_of))}, not {entry.category_id}"
        else:
            try:
                segmentation = decode_segmentation(entry.segmentation)
                around = box_of(segmentation, images[owners[m]][2:])
            except DataError as error:
                wrong = str(error) if entry.bbox is None else ""  # a bbox without area is dropped later, with a count
        if around is not None:
            numbers[m], origin[m] = around, "mask" if isinstance(segmentation, dict) else "polygons"
            areas[m] = areas[m] or np.nan  # 0 was the area of the bbox
        elif wrong:
            kept[m] = False
            refuse("annotations", index, wrong)
        elif entry.bbox is None:
            kept[m] = False
            without_box.append(index)
    owners, labels, numbers, areas, origin = (part[kept] for part in (owners, labels, numbers, areas, origin))
    sizes_wh = np.array([image[2:] for image in images], np.int64).reshape(-1, 2)[owners]
    box_format = options.get("box_format", "auto")
    boxes_xywh, areas, guesses = boxes_in_pixels(numbers, areas, sizes_wh, origin, box_format)
    for guess in guesses:
        notes.append(Note("box_format" if guess.sure else "likely_format", guess.text(box_format), guess.sure))
    crowd = np.array([bool(entry.iscrowd) for entry in found], bool)[kept] & (
        options.get("crowds", "ignore") == "ignore"
    )
    ids = np.array([entry.id or 0 for entry in found], np.int64)[kept]
    rows = np.array([index for index, _ in entries], np.int64)[kept]
    return np.column_stack([owners, labels, crowd, boxes_xywh]), areas, ids, rows, without_box


def _note_crowds(boxes: Columns, names: Sequence[str], notes: list[Note]) -> None:
    """Notes the classes whose annotations are all crowds."""
    labels = boxes[:, 1].astype(np.int64)
    total = np.bincount(labels, minlength=len(names))
    objects = np.bincount(labels[boxes[:, 2] == 0], minlength=len(names))
    alone = np.flatnonzero((total > 0) & (objects == 0)).tolist()
    if alone:
        shown = ", ".join(short(names[k]) for k in alone[:5]) + (", ..." if len(alone) > 5 else "")
        text = (
            f"every annotation of {shown} ({total[alone].sum()} in all) has iscrowd 1, as CVAT and Datumaro write masks: "
            "they are regions to ignore; data.crowds objects takes them as objects"
        )
        notes.append(Note("all_crowds", text))
