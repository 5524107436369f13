"""A split of a COCO dataset, read by training's own reader, but to the end: mistakes are collected instead of raised."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int64

from retina_jax.config import DataConfig
from retina_jax.data.classes import Category, unique_names
from retina_jax.data.coco_document import Content, configured, load_json, parse_document
from retina_jax.data.coco_entries import Mistake, as_number
from retina_jax.data.source import Record, sort_boxes
from retina_jax.data_check.findings import Finding

REFUSED = {"categories": "refused_categories", "images": "refused_images", "annotations": "refused_boxes"}


@dataclass(frozen=True, eq=False)
class Split(Content):
    """The usable entries of a split; m is the index of a box in the order of the file."""

    name: str  # train or val
    annotations: Path
    folder: Path
    annotation_ids: list[Any]  # id of each entry of the file's list of annotations; None without one
    mistakes: list[Mistake]
    rules: dict[str, Bool[np.ndarray, " M"]]  # by rule of `sort_boxes`, the boxes it applies to
    records: list[Record]  # the records of training (of evaluation for val)
    record_images: list[int]  # row in `images` of each record

    @property
    def class_names(self) -> tuple[str, ...]:
        """Unique name of label k."""
        return unique_names(self.categories)

    def box_name(self, m: int) -> str:
        """Returns the name by which a person finds box m in the file: `annotation 2288`."""
        return self.annotation_name(int(self.rows[m]))

    def annotation_name(self, row: int) -> str:
        """Returns the name of an entry of the file's list of annotations."""
        annotation_id = self.annotation_ids[row]
        return f"annotations[{row}]" if annotation_id is None else f"annotation {annotation_id}"

    def file_of(self, m: int) -> str:
        """Returns the file name of the image of box m."""
        return self.images[self.owners[m]][1]

    def trained_boxes(self) -> Int64[np.ndarray, " N"]:
        """Returns the indices m of the boxes of all records, one record after the other, in the order of `boxes_xyxy`."""
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
    """Reads a COCO JSON as training with `data` does; `known` is as in `parse_document`. Raises DataError only if nothing
    can be checked: the file is not JSON or lacks one of its three lists, or the folder is missing."""
    document, mistakes = load_json(annotations), []
    content = parse_document(annotations, document, mistakes, folder=folder, **configured(data, known))
    records, record_images, _ = content.make_records(images_without_boxes)
    return Split(
        **vars(content),
        name=name,
        annotations=annotations,
        folder=folder,
        annotation_ids=[entry.get("id") if isinstance(entry, dict) else None for entry in document["annotations"]],
        mistakes=mistakes,
        rules=sort_boxes(content.boxes_xyxy, content.crowd, content.sizes_wh)[1],
        records=records,
        record_images=record_images,
    )


def split_findings(split: Split, max_boxes: int) -> list[Finding]:
    """Returns what the annotations alone show: refused entries, how they were read, annotations without a box, ids and
    category names that occur several times, crowd boxes, boxes without area, outside or partly outside their image,
    duplicate boxes, and images with more usable boxes than `max_boxes` or none."""
    annotation_ids = [split.annotation_ids[row] for row in split.rows]
    ids = Counter(_hashed(annotation_id) for annotation_id in annotation_ids if annotation_id is not None)
    names = Counter(name for _, name in split.categories)
    found = [
        *_refusals(split),
        *(Finding(note.kind, split.name, split.annotations.name, note.text) for note in split.notes),
        *(Finding("without_box", split.name, split.annotation_name(row)) for row in split.without_box),
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
    """Returns the entries that training would refuse. An annotation whose image or category is refused is `orphaned`, so a
    mistake is reported once, not once per box."""
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
    """Returns usable boxes that are equal to an earlier one of the same image, to the last bit."""
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
    """Returns the value if it can be an id (text is converted to a number), else None."""
    value = as_number(value)
    return value if isinstance(value, int | float) else None
