"""A split of a COCO data set, read by training's own reader, but to the end: mistakes are collected instead of raised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64

from retina_jax.config import DataConfig
from retina_jax.data.classes import Category, unique_names
from retina_jax.data.coco import check_folder, load_json
from retina_jax.data.coco_document import Note, configured, parse_document
from retina_jax.data.coco_entries import Mistake, as_number
from retina_jax.data.source import Record, sort_boxes
from retina_jax.data_check.findings import Finding

REFUSED = {"categories": "refused_categories", "images": "refused_images", "annotations": "refused_boxes"}


@dataclass(frozen=True, eq=False)
class Split:
    """The usable entries of a split; m is the index of a box in the order of the file."""

    name: str  # train or val
    annotations: Path
    folder: Path
    # These three are as in `coco_document.Content`, as are `paths`, `missing`, `unsized` and `notes`.
    categories: list[Category]
    annotated: frozenset[int]
    left_out: dict[Category, str]
    images: list[tuple[int, str, int, int]]  # id, file name, width, height
    paths: list[str]
    missing: dict[int, str]
    unsized: frozenset[int]
    box_ids: list[Any]  # id of each annotation as in the file; None without one
    box_rows: list[int]  # its index in the file's list of annotations
    owners: Int64[np.ndarray, " M"]  # row in `images`
    labels: Int64[np.ndarray, " M"]
    boxes_xyxy: Float64[np.ndarray, "M 4"]  # as in the file, pixels
    rules: dict[str, Bool[np.ndarray, " M"]]  # by rule of `sort_boxes`, the boxes it applies to
    records: list[Record]  # the records of training (of evaluation for val)
    record_images: list[int]  # row in `images` of each record
    mistakes: list[Mistake]
    notes: list[Note]  # how the file was read; training refuses some of these
    without_box: list[str]  # names of the annotations without a box, as in `box_name`

    @property
    def class_names(self) -> tuple[str, ...]:
        """Unique name of label k."""
        return unique_names(self.categories)

    def box_name(self, m: int) -> str:
        """How a reader finds box m in the file: `annotation 2288`."""
        return _annotation_name(self.box_rows[m], self.box_ids[m])

    def file_of(self, m: int) -> str:
        """File name of the image of box m."""
        return self.images[self.owners[m]][1]

    def trained_boxes(self) -> Int64[np.ndarray, " N"]:
        """The indices m of the boxes of all records, one record after the other, in the order of `boxes_xyxy`."""
        rows = np.flatnonzero(self.rules["usable"])
        return rows[np.argsort(self.owners[rows], kind="stable")]


def read_split(
    name: str,
    annotations: Path,
    folder: Path,
    images_without_boxes: Literal["keep", "drop"],
    known: Sequence[Category] = (),
    data: DataConfig = DataConfig(),  # noqa: B008 (immutable)
) -> Split:
    """Reads a COCO JSON as training with `data` does; `known` is as in `read_coco`. Raises DataError only if nothing can be
    checked: the file is not JSON or lacks one of its three lists, or the folder is missing."""
    document, mistakes = load_json(annotations), []
    check_folder(annotations, folder)
    content = parse_document(annotations, document, mistakes, folder=folder, **configured(data, known))
    entries = document["annotations"]
    table = content.table
    _, rules = sort_boxes(table.boxes_xyxy, table.crowd, table.sizes_wh)
    records, record_images, _ = table.records(images_without_boxes)
    return Split(
        name=name, annotations=annotations, folder=folder, mistakes=mistakes,
        categories=table.categories, images=table.images, owners=table.owners, labels=table.labels,
        boxes_xyxy=table.boxes_xyxy, rules=rules, records=records, record_images=record_images,
        annotated=content.annotated, left_out=content.left_out, paths=content.paths, missing=content.missing,
        unsized=content.unsized, notes=content.notes, box_rows=content.rows.tolist(),
        box_ids=[entries[i].get("id") for i in content.rows],
        without_box=[_annotation_name(i, entries[i].get("id")) for i in content.without_box],
    )  # fmt: skip


def split_findings(split: Split, max_boxes: int) -> list[Finding]:
    """What the annotations alone show: refused entries, how they were read, annotations without a box, ids and category
    names that occur several times, crowd boxes, boxes without area, outside or partly outside their image, duplicate boxes,
    and images with more usable boxes than `max_boxes` or none."""
    ids = Counter(_hashed(box_id) for box_id in split.box_ids if box_id is not None)
    names = Counter(name for _, name in split.categories)
    found = [
        *_refusals(split),
        *(Finding(note.kind, split.name, split.annotations.name, note.text) for note in split.notes),
        *(Finding("without_box", split.name, name) for name in split.without_box),
        *(Finding("same_id", split.name, f"annotation {i}", f"{n} annotations") for i, n in ids.items() if n > 1),
        *(Finding("same_name", split.name, name, f"{n} categories") for name, n in names.items() if n > 1),
        *_duplicates(split),
    ]
    for rule in ("zero_size", "outside", "clipped", "crowd"):
        for m in np.flatnonzero(split.rules[rule]).tolist():
            x1, y1, x2, y2 = split.boxes_xyxy[m].tolist()
            width, height = split.images[split.owners[m]][2:]
            text = f"{x2 - x1:g} x {y2 - y1:g} at {x1:g}, {y1:g} in {split.file_of(m)}, {width} x {height}"
            found.append(Finding(rule, split.name, split.box_name(m), text))
    usable, listed_boxes = (
        np.bincount(owners, minlength=len(split.images)).tolist()
        for owners in (split.owners[split.rules["usable"]], split.owners)
    )
    for (_, file_name, _, _), count, listed in zip(split.images, usable, listed_boxes, strict=True):
        if count > max_boxes:
            text = f"{count} boxes, of which {max_boxes} are trained on"
            found.append(Finding("overflow", split.name, file_name, text))
        if count == 0:
            text = f"{listed} in the file, none usable" if listed else ""
            found.append(Finding("no_boxes", split.name, file_name, text))
    return found


def _refusals(split: Split) -> list[Finding]:
    """The entries that training would refuse. An annotation whose image or category is refused is `orphaned`, so a mistake
    is reported once, not once per box."""
    categories = {category_id for category_id, _ in (*split.categories, *split.left_out)}
    known = {"images": {image[0] for image in split.images}, "categories": categories}
    entries = [(m, m.entry if isinstance(m.entry, dict) else {}) for m in split.mistakes]
    gone = {
        key: {_hashed(entry.get("id")) for mistake, entry in entries if mistake.key == key} - known[key] - {None}
        for key in known
    }
    found = []
    for mistake, entry in entries:
        orphaned = mistake.key == "annotations" and (
            _hashed(entry.get("image_id")) in gone["images"] or _hashed(entry.get("category_id")) in gone["categories"]
        )
        kind = "orphaned" if orphaned else REFUSED[mistake.key]
        found.append(Finding(kind, split.name, mistake.place, mistake.text))
    return found


def _duplicates(split: Split) -> list[Finding]:
    """Usable boxes that are equal to an earlier one of the same image, to the last bit."""
    rows = np.flatnonzero(split.rules["usable"])
    keys = np.column_stack([split.owners[rows], split.boxes_xyxy[rows]])
    order = np.lexsort(keys.T)  # stable: equal boxes stay in the order of the file
    same = np.r_[False, (keys[order][1:] == keys[order][:-1]).all(1)][: len(rows)]
    found, first = [], 0
    for place in range(len(rows)):
        if not same[place]:
            first = place
            continue
        m, before = int(rows[order[place]]), rows[order[first:place]].tolist()
        twin = next((b for b in before if split.labels[b] == split.labels[m]), None)
        other = before[0] if twin is None else twin
        name, other_name = (split.class_names[split.labels[b]] for b in (m, other))
        if twin is None:
            kind, text = "other_class", f"{name}, and {other_name} in {split.box_name(other)}, in {split.file_of(m)}"
        else:
            kind, text = "same_box", f"as {split.box_name(other)}, {name}, in {split.file_of(m)}"
        found.append(Finding(kind, split.name, split.box_name(m), text))
    return found


def _hashed(value: Any) -> Any:
    """The value if it can be an id (text is converted to a number), else None."""
    value = as_number(value)
    return value if isinstance(value, int | float) else None


def _annotation_name(row: int, annotation_id: Any) -> str:
    return f"annotations[{row}]" if annotation_id is None else f"annotation {annotation_id}"
