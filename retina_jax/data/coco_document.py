"""A COCO JSON in memory to columns: every entry checked, sizes and files of its images found, its boxes in pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retina_jax.data.box_formats import (
    BoxFormat,
    Guess,
    are_fractions,
    guess_format,
    guess_fractions,
    guess_other,
    to_xywh,
)
from retina_jax.data.classes import Category, placeholders, unique_names
from retina_jax.data.coco_entries import (
    WITHOUT_BOX,
    Box,
    Image,
    Mistake,
    annotation_parser,
    category_parser,
    escapes,
    image_parser,
    outside,
    short,
)
from retina_jax.data.conventions import Orientation
from retina_jax.data.image_paths import find_images
from retina_jax.data.source import DataError
from retina_jax.data.survey import Size, read_sizes, read_votes

T = TypeVar("T")
Crowds = Literal["ignore", "objects"]


class Note(NamedTuple):
    """What a person should know of how a file was read."""

    kind: str
    """One of the kinds of `data_check.findings`."""
    text: str
    """One line."""
    refused: bool = False
    """Whether the data set cannot be used so."""


class Content(NamedTuple):
    """What a COCO JSON holds."""

    categories: list[Category]
    """The classes, in the order of the file: label k is the k-th."""
    annotated: frozenset[int]
    """Ids of the categories that a box has, crowds included."""
    left_out: dict[Category, str]
    """Categories that are no classes, each with the reason, as from `classes.placeholders`."""
    images: list[tuple[int, str, int, int]]
    """Id, file name, width, height."""
    boxes: Float64[np.ndarray, "M 7"]
    """Row of the image, label, crowd, and x, y, width, height in pixels."""
    areas: Float64[np.ndarray, " M"]
    """Square pixels; width times height where the file has none."""
    ids: Int64[np.ndarray, " M"]
    """Of the annotations; 0 where missing."""
    rows: Int64[np.ndarray, " M"]
    """Place of each box in the file's list of annotations."""
    without_box: list[int]
    """Places of the annotations that have no box: points and keypoints."""
    paths: list[str]
    """File of each image, or where it should be; empty where the folder was not given."""
    missing: dict[int, str]
    """Rows of the images without a file; where files of that base name are, if anywhere."""
    unsized: frozenset[int]
    """Rows of the images whose entries have no size: it is that of the file."""
    notes: list[Note]


def parse_document(
    path: Path,
    document: Any,
    mistakes: list[Mistake] | None = None,
    *,
    folder: Path | None = None,
    box_format: BoxFormat = "auto",
    crowds: Crowds = "ignore",
    orientation: Literal["auto", "stored", "turned"] = "auto",
    undecided_orientation: Orientation = "turned",
    known: Sequence[Category] = (),
    empty_parents: Literal["drop", "keep"] = "drop",
) -> Content:
    """The content of what `coco.load_json` gave.

    With a list of `mistakes`, entries that cannot be used are added to it and left out, refused notes are kept, and only a
    file without the three lists raises DataError; without one, the first of them raises it. Without a `folder`, images are
    not looked for, and sizes that are missing stay 0.
    """
    if not isinstance(document, dict):
        raise DataError(f"{path}: must be an object with images, annotations and categories, not {short(document)}")
    texts: Counter[str] = Counter()
    notes: list[Note] = []
    listed = _parse_all(path, document, "categories", category_parser(texts), mistakes)
    categories = [(entry.id, entry.name) for _, entry in listed]
    images = _parse_all(path, document, "images", image_parser(texts, rooted=folder is not None), mistakes)
    if not mistakes and not (categories and images):
        raise DataError(f"{path}: {'images' if categories else 'categories'} is empty; it must list at least one")
    images, paths, missing, unsized = _located(
        path, document, images, folder, orientation, undecided_orientation, notes, mistakes
    )
    label_of = {category_id: label for label, (category_id, _) in enumerate(categories)}
    parser = annotation_parser(images, label_of, texts)
    found = _parse_all(path, document, "annotations", parser, mistakes)
    boxes = [(row, box) for row, box in found if box is not WITHOUT_BOX]
    if texts:
        counted = ", ".join(f"{count} {key}" for key, count in texts.items())
        notes.append(Note("text_numbers", f"numbers are written as text ({counted}); they are read as numbers"))
    sizes_wh = np.array([image[2:] for image in images], np.int64).reshape(-1, 2)
    columns, areas = _columns([box for _, box in boxes], sizes_wh, box_format, crowds, notes)
    annotated = frozenset(categories[label][0] for label in np.unique(columns[:, 1]).astype(int))
    above = [entry.supercategory for _, entry in listed]
    left_out = placeholders(categories, above, annotated, known, empty_parents)
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
        images=[tuple(image) for image in images],
        boxes=columns,
        areas=areas,
        ids=np.array([box.id for _, box in boxes], np.int64),
        rows=np.array([row for row, _ in boxes], np.int64),
        without_box=[row for row, box in found if box is WITHOUT_BOX],
        paths=paths,
        missing=missing,
        unsized=unsized,
        notes=notes,
    )


def _located(
    path: Path,
    document: dict,
    entries: list[tuple[int, Image]],
    folder: Path | None,
    orientation: Literal["auto", "stored", "turned"],
    undecided: Orientation,
    notes: list[Note],
    mistakes: list[Mistake] | None,
) -> tuple[list[Image], list[str], dict[int, str], frozenset[int]]:
    """The images with their files, the rows of those that have none, and the rows of those whose entries have no size: it is
    that of the file, turned or not as the other images show (`conventions.Votes`).
    Images whose names lead out of the folder and those without a size become `mistakes`."""
    if folder is None:
        return [image for _, image in entries], [], {}, frozenset()
    names = [image.file_name for _, image in entries]
    places = find_images(folder, names)
    if places.moved:
        first = places.moved[0]
        notes.append(
            Note(
                "moved",
                f"{len(places.moved)} of {len(names)} images are not where their file_name says: {short(names[first])} "
                f"is read from {places.paths[first]}",
            )
        )
    unknown = [row for row, (_, image) in enumerate(entries) if not image.width]
    sizes = dict(zip(unknown, read_sizes(path, [places.paths[row] for row in unknown]), strict=True)) if unknown else {}
    if orientation == "auto":
        orientation = undecided
        if any(isinstance(size, Size) and size.turned for size in sizes.values()):
            sized = [row for row in range(len(entries)) if row not in sizes]
            annotated = [(image.width, image.height) for _, image in (entries[row] for row in sized)]
            votes, _ = read_votes([names[row] for row in sized], [Path(places.paths[row]) for row in sized], annotated)
            orientation = votes.convention(undecided)
    kept, missing = [], {}
    for row, (index, image) in enumerate(entries):
        size, wrong = sizes.get(row), None
        place = f"; {places.missing[row]}" if places.missing.get(row) else ""
        if row in places.missing and escapes(image.file_name):
            wrong = outside(image.file_name) + place
        elif isinstance(size, str):
            wrong = f"width and height are missing, and {places.paths[row]} cannot be read: {size}{place}"
        if wrong is not None:
            _mistaken(path, Mistake("images", index, document["images"][index], wrong), mistakes)
            continue
        if row in places.missing:
            missing[len(kept)] = places.missing[row]
        if isinstance(size, Size):
            image = Image(image.id, image.file_name, *size.shown(orientation))
        kept.append((row, image))
    unsized = frozenset(index for index, (row, _) in enumerate(kept) if row in sizes)
    return [image for _, image in kept], [places.paths[row] for row, _ in kept], missing, unsized


def _columns(
    boxes: list[Box],
    sizes_wh: np.ndarray,
    box_format: BoxFormat,
    crowds: Crowds,
    notes: list[Note],
) -> tuple[Float64[np.ndarray, "M 7"], Float64[np.ndarray, " M"]]:
    """`Content.boxes` and `Content.areas`; notes what the boxes look like."""
    owners = np.array([box.image for box in boxes], np.int64)
    sizes = sizes_wh[owners] if len(boxes) else np.zeros((0, 2), np.int64)
    numbers = np.array([box.numbers for box in boxes], np.float64).reshape(-1, 4)
    areas = np.array([box.area for box in boxes], np.float64)
    given, polygons = (np.array([box.origin == origin for box in boxes], bool) for origin in ("bbox", "polygons"))
    for guess in _guesses(numbers, areas, sizes, given, polygons, box_format):
        notes.append(Note("box_format" if guess.sure else "likely_format", guess.text(box_format), guess.sure))
    # A polygon has no layout, and a mask has pixels.
    fractions = box_format.endswith("_fractions")
    scaled = polygons & (fractions and are_fractions(numbers[polygons], sizes[polygons]))
    xywh = np.where(scaled[:, None], to_xywh(numbers, "xywh_fractions", sizes), numbers)
    xywh = np.where(given[:, None], to_xywh(numbers, box_format, sizes), xywh)
    products = xywh[:, 2:].prod(1)
    # The area of a box in another format is its own, or that of a smaller mask in pixels.
    converted = scaled | (given & (box_format not in ("auto", "xywh")) & (fractions | (areas > products)))
    areas = np.where(np.isnan(areas) | converted, products, areas)
    crowd = np.array([box.crowd and crowds == "ignore" for box in boxes], np.float64)
    labels = np.array([box.label for box in boxes], np.float64)
    return np.column_stack([owners, labels, crowd, xywh]).astype(np.float64).reshape(-1, 7), areas


def _guesses(
    numbers: Float64[np.ndarray, "M 4"],
    areas: Float64[np.ndarray, " M"],
    sizes: Int64[np.ndarray, "M 2"],
    given: Bool[np.ndarray, " M"],
    polygons: Bool[np.ndarray, " M"],
    box_format: BoxFormat,
) -> list[Guess]:
    """What the given boxes look like, and the polygons in place of others, if not like what they are read as."""
    if box_format == "xywh":
        return []
    columns = numbers[given], areas[given], sizes[given]
    guesses = [guess_format(*columns) if box_format == "auto" else guess_other(*columns, box_format)]
    known = (guesses[0] is not None and guesses[0].formats) or box_format.endswith("_fractions")
    if not known and (guess := guess_fractions(numbers[polygons], sizes[polygons], "polygons", ("xywh",))) is not None:
        if given.any() and guess.formats:
            guess = guess._replace(formats=(), why=f"{guess.why}, those of the boxes do not; write all in pixels")
        guesses.append(guess._replace(sure=guess.sure and box_format == "auto"))
    return [guess for guess in guesses if guess is not None]


def _note_crowds(boxes: Float64[np.ndarray, "M 7"], names: Sequence[str], notes: list[Note]) -> None:
    """Notes the classes that have crowds and nothing else."""
    labels, crowd = boxes[:, 1].astype(np.int64), boxes[:, 2] > 0
    total = np.bincount(labels, minlength=len(names))
    alone = np.flatnonzero((total > 0) & (np.bincount(labels[crowd], minlength=len(names)) == total)).tolist()
    if alone:
        shown = ", ".join(short(names[k]) for k in alone[:5]) + (", ..." if len(alone) > 5 else "")
        notes.append(
            Note(
                "all_crowds",
                f"every annotation of {shown} ({total[alone].sum()} in all) has iscrowd 1, as CVAT and Datumaro write "
                "masks: they are regions to ignore; data.crowds objects takes them as objects",
            )
        )


def _parse_all(
    path: Path, document: dict, key: str, parse: Callable[[dict], T], mistakes: list[Mistake] | None
) -> list[tuple[int, T]]:
    """`parse` of every entry of a list in the file, with its place; its DataErrors become `mistakes` or are raised."""
    entries = document.get(key)
    if not isinstance(entries, list):
        found = short(entries) if key in document else "missing"
        if key == "annotations" and key not in document:
            found += "; only evaluate.py takes a file without it, such as COCO's image_info of test images"
        raise DataError(f"{path}: {key} must be a list of objects, but is {found}")
    parsed = []
    for i, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise DataError(f"must be an object, not {short(entry)}")
            parsed.append((i, parse(entry)))
        except DataError as error:
            _mistaken(path, Mistake(key, i, entry, str(error)), mistakes)
    return parsed


def _mistaken(path: Path, mistake: Mistake, mistakes: list[Mistake] | None) -> None:
    """Adds to `mistakes`, or raises a DataError with the file, the entry's position and id."""
    if mistakes is None:
        raise DataError(f"{path}: {mistake.place}: {mistake.text}")
    mistakes.append(mistake)
