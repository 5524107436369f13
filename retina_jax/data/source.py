"""What every data set becomes: records (sizes, boxes, labels) in memory, and encoded images read one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from retina_jax.data.classes import Category, differ, match
from retina_jax.data.conventions import AS_VIEWERS, Decoding, Orientation
from retina_jax.errors import PlainError

Image = tuple[int, str, int, int]
"""Id, file name, width and height in pixels (0, 0 if unknown)."""


class DataError(PlainError, ValueError):
    """Annotations that cannot be meant; the message is one line that names the file, the field and what would be right."""


class BadImage(DataError):
    """An image that is missing, broken or of another size than its annotations say; the message names it."""


@dataclass(frozen=True, eq=False)
class Record:
    """One image and the boxes that can be trained on."""

    image_id: int
    """Id in the ground truth that evaluation compares with."""
    file_name: str
    width: int
    """Pixels, as the boxes count them."""
    height: int
    boxes_xyxy: Float32[np.ndarray, "n 4"]
    """Pixels of the original image, inside it, without crowds, every side longer than 0."""
    labels: Int32[np.ndarray, " n"]
    """0 to K-1."""


@dataclass(frozen=True, eq=False)
class Source:
    """A data set. Label k is category `category_ids[k]`, called `class_names[k]`; names may repeat."""

    name: str
    """What messages call it: the path of its JSON, or the TFDS name and split."""
    records: list[Record]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    counts: dict[str, int]
    """What cleaning found, by kind of box (`crowd`, `zero_size`, `outside`: dropped; `clipped`: cut to the image), and
    `images_without_boxes`, dropped or kept as configured; of a COCO JSON also `without_box`: points and such, dropped."""
    read: Callable[[int], bytes]
    """Encoded image of a record; BadImage where it cannot be read. Called from many threads at once."""
    where: Callable[[int], str]
    """What messages call the image of a record."""
    make_truth: Callable[[], dict[str, Any]]
    """Makes `truth`."""
    labelled: bool = True
    """False: images without annotations (COCO's test images), in which there is nothing to score."""
    annotated: frozenset[int] = frozenset()
    """Ids of the categories that an annotation has, crowds included."""
    left_out: dict[Category, str] = field(default_factory=dict)
    """Categories that are no classes, each with the reason, as from `classes.placeholders`."""
    notes: tuple[str, ...] = ()
    """What a person should know of how the data set was read, one line each; `open_source` prints them as warnings."""
    missing: Mapping[int, str] = field(default_factory=dict)
    """Records whose image file is missing, as far as that is known, with where files of that name are, if anywhere."""
    decoding: Decoding = AS_VIEWERS
    """How its image files are decoded; `survey.with_decoding` finds it."""
    unsized: frozenset[int] = frozenset()
    """Records whose annotations have no size: it is that of the file."""
    shown: Orientation | Literal["open"] | None = None
    """What its annotated sizes show of the orientation: `conventions.Votes.shown`, found by `survey.with_decoding`."""

    @cached_property
    def truth(self) -> dict[str, Any]:
        """Ground truth in COCO's format for pycocotools: every box as it was read, uncut, crowds included.

        It holds what comparing boxes needs: `iscrowd` and `area` also where the file has none, ids from 1 where ids are
        missing, repeated or below 1 (pycocotools takes id 0 for "unmatched"), no `segmentation`, and the classes alone as
        categories.
        """
        return self.make_truth()

    @property
    def categories(self) -> list[Category]:
        """Id and name of each class."""
        return list(zip(self.category_ids, self.class_names, strict=True))

    def arranged(self, classes: Sequence[Category], where: str) -> Source:
        """The same data with the labels of `classes`, those of the run in the folder that `where` names.

        Raises ConfigError if the classes are not the same ones, one to one.
        """
        order = match(classes, self.categories)
        if None in order or len(order) != len(self.class_names):
            raise differ(classes, self.categories, where)
        if order == list(range(len(order))):
            return self
        labels = np.argsort(order).astype(np.int32)
        return replace(
            self,
            records=[replace(record, labels=labels[record.labels]) for record in self.records],
            class_names=tuple(self.class_names[k] for k in order),
            category_ids=tuple(self.category_ids[k] for k in order),
        )

    def __len__(self) -> int:
        return len(self.records)

    def __str__(self) -> str:
        """Images, classes, and what cleaning found."""
        found = ", ".join(f"{count} {what}" for what, count in self.counts.items() if count) or "nothing unusual"
        return f"{len(self)} images, {len(self.class_names)} classes; {found}"

    @cached_property
    def sha256(self) -> str:
        """Checksum of all that training takes from the records: their order, ids, sizes, boxes and labels."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for record in self.records:
            digest.update(f"{record.image_id} {record.width} {record.height} {len(record.labels)}\n".encode())
            digest.update(record.boxes_xyxy.tobytes() + record.labels.tobytes())
        return digest.hexdigest()


def sort_boxes(
    boxes_xyxy: Float64[np.ndarray, "M 4"], crowd: Bool[np.ndarray, " M"], sizes_wh: Int64[np.ndarray, "M 2"]
) -> tuple[Float32[np.ndarray, "M 4"], dict[str, Bool[np.ndarray, " M"]]]:
    """Boxes cut to their images, and which of them fall to which rule.

    A box is dropped by one rule at most, the first of: crowd, zero_size (a side of 0 or less), outside (touches
    its image's edge from outside at most), or zero_size again where nothing is left of it in float32. The others are
    `usable`. `clipped` are usable boxes that stuck out by more than 0.01 pixel; what is less is the rounding of two-decimal
    annotations.
    """
    limits = np.concatenate([sizes_wh, sizes_wh], axis=1)
    clipped = np.clip(boxes_xyxy, 0, limits).astype(np.float32)

    def has_area(boxes: np.ndarray) -> np.ndarray:
        return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])

    inside = (boxes_xyxy[:, :2] < sizes_wh).all(1) & (boxes_xyxy[:, 2:] > 0).all(1)
    solid = has_area(boxes_xyxy)
    usable = ~crowd & solid & inside & has_area(clipped)
    sticks_out = np.abs(clipped - boxes_xyxy).max(1, initial=0) > 0.01
    return clipped, {
        "crowd": crowd,
        "zero_size": ~crowd & (~solid | (inside & ~has_area(clipped))),
        "outside": ~crowd & solid & ~inside,
        "clipped": usable & sticks_out,
        "usable": usable,
    }


def clean_boxes(
    boxes_xyxy: Float64[np.ndarray, "M 4"], crowd: Bool[np.ndarray, " M"], sizes_wh: Int64[np.ndarray, "M 2"]
) -> tuple[Float32[np.ndarray, "M 4"], Bool[np.ndarray, " M"], dict[str, int]]:
    """Boxes cut to their images, which of them can be trained on, and how many fell to which rule of `sort_boxes`."""
    clipped, kinds = sort_boxes(boxes_xyxy, crowd, sizes_wh)
    usable = kinds.pop("usable")
    return clipped, usable, {kind: int(boxes.sum()) for kind, boxes in kinds.items()}


def make_records(
    images: list[Image],
    owners: Int64[np.ndarray, " M"],
    boxes_xyxy: Float64[np.ndarray, "M 4"],
    labels: Int64[np.ndarray, " M"],
    crowd: Bool[np.ndarray, " M"],
    images_without_boxes: str,
) -> tuple[list[Record], list[int], dict[str, int]]:
    """Records of `images` (id, file name, width, height) from flat columns of boxes; box m lies in image `owners[m]`.

    Also the position in `images` that each record came from, and the counts. Boxes keep their order within an image.
    """
    sizes_wh = np.array([image[2:] for image in images], np.int64).reshape(-1, 2)
    boxes, usable, counts = clean_boxes(boxes_xyxy, crowd, sizes_wh[owners])
    rows = np.flatnonzero(usable)
    rows = rows[np.argsort(owners[rows], kind="stable")]
    ends = np.cumsum(np.bincount(owners[rows], minlength=len(images)))
    records, kept = [], []
    for i, (image_id, file_name, width, height) in enumerate(images):
        mine = rows[(ends[i - 1] if i else 0) : ends[i]]
        if len(mine) or images_without_boxes == "keep":
            records.append(Record(image_id, file_name, width, height, boxes[mine], labels[mine].astype(np.int32)))
            kept.append(i)
    counts["images_without_boxes"] = int((np.bincount(owners[rows], minlength=len(images)) == 0).sum())
    return records, kept, counts


def coco_truth(
    images: list[Image],
    categories: Sequence[Category],
    owners: Int64[np.ndarray, " M"],
    labels: Int64[np.ndarray, " M"],
    crowd: Bool[np.ndarray, " M"],
    boxes_xywh: Float64[np.ndarray, "M 4"],
    areas: Float64[np.ndarray, " M"],
    ids: Int64[np.ndarray, " M"],
) -> dict[str, Any]:
    """Makes `Source.truth`. Ids that repeat or are below 1 become 1, 2, ...: pycocotools takes 0 for unmatched."""
    if len(np.unique(ids)) < len(ids) or (ids < 1).any():
        ids = np.arange(1, len(ids) + 1)
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    columns = (
        ids.tolist(),
        [images[row][0] for row in owners.tolist()],
        [categories[label][0] for label in labels.tolist()],
        boxes_xywh.tolist(),
        areas.tolist(),
        crowd.astype(int).tolist(),
    )
    return {
        "info": {},
        "images": [dict(zip(("id", "file_name", "width", "height"), image, strict=True)) for image in images],
        "annotations": [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)],
        "categories": [{"id": category_id, "name": name} for category_id, name in categories],
    }
