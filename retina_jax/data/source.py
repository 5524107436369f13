"""Datasets of every kind: records (sizes, boxes, labels) in memory, and encoded images that are read one by one."""

import contextlib
import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from retina_jax.data.classes import Category, class_indices, classes_error
from retina_jax.data.tiles import Tile, boxes_in, tiles_of
from retina_jax.errors import PlainError

WHY_DROPPED = {
    "crowd": "crowd",
    "zero_size": "without area",
    "outside": "outside the image",
    "without_box": "without bbox",
    "in_no_tile": "too large for data.tile",
}
Orientation = Literal["stored", "turned"]
Size = tuple[int, int]  # width and height in pixels; height and width where a name ends in `_hw`
ImageRow = tuple[int, str, int, int]  # id, file name, width and height in pixels (0, 0 if unknown)


class DataError(PlainError, ValueError):
    """An error in annotations; the message is one line that names the file, the field and what would be right."""


class BadImage(DataError):
    """An image that is missing, broken or of another size than its annotations say; the message names it."""


class WrongSize(BadImage):
    """An image of another size than its annotations say."""


@dataclass(frozen=True)
class Decoding:
    """Conventions for the image files of a dataset where the files and the annotated sizes leave them open."""

    orientation: Orientation = "turned"  # pixels that boxes lie on if the annotated sizes do not show it
    bits: int | None = None  # bits that 16-bit images use: 2^bits - 1 is white. None: 16; the dataset has no such image


AS_VIEWERS = Decoding()  # decodes as image viewers: turned by the EXIF orientation; 16-bit images use all bits


@dataclass(frozen=True, eq=False)
class Record:
    """One image, or a tile of one, and the boxes that can be trained on."""

    image_id: int  # in the ground truth of the evaluation
    file_name: str
    width: int  # pixels, as the boxes count them
    height: int
    boxes_xyxy: Float32[np.ndarray, "n 4"]  # pixels of the original image, inside it, no crowds, sides longer than 0
    labels: Int32[np.ndarray, " n"]  # 0 to K-1
    tile: Tile | None = None  # the part of `Source.uncut` that this is; sizes and boxes are those of the tile


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset."""

    name: str  # for messages: the path of its JSON, or the TFDS name and split
    records: list[Record]
    categories: list[Category]  # id and name of the class of each label; names may repeat
    # Boxes by rule of `classify_boxes`, `images_without_boxes`, and of a COCO JSON `without_box`: points and such, dropped.
    counts: dict[str, int]
    read: Callable[[int], bytes]  # reads a record's encoded image, BadImage if that fails; many threads call it at once
    where: Callable[[int], str]  # returns the name of a record's image for messages
    make_ground_truth: Callable[[], dict[str, Any]]  # makes `ground_truth`
    labelled: bool = True  # False: images without annotations (COCO's test images), which cannot be scored
    annotated: frozenset[int] = frozenset()  # ids of the categories with an annotation, crowds included
    left_out: dict[Category, str] = field(default_factory=dict)  # as from `classes.excluded_categories`
    notes: tuple[str, ...] = ()  # how the dataset was read, one line each; `open_source` logs them as warnings
    missing: Mapping[int, str] = field(default_factory=dict)  # records without image file; where files of that name are
    decoding: Decoding = AS_VIEWERS  # how its image files are decoded; set by `survey.with_decoding`
    unsized: frozenset[int] = frozenset()  # records whose annotations have no size: it is that of the file
    annotated_orientation: Orientation | Literal["open"] | None = None  # `Votes.shown`; set by `survey.with_decoding`
    uncut: "Source | None" = None  # the images that the records are tiles of

    @cached_property
    def ground_truth(self) -> dict[str, Any]:
        """Ground truth in COCO's format for pycocotools: every box as annotated, unclipped, crowds included. It always has
        `iscrowd`, `area` and unique ids from 1 on, no `segmentation`, and as categories only the classes."""
        return self.make_ground_truth()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label."""
        return tuple(name for _, name in self.categories)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Category id of each label."""
        return tuple(category_id for category_id, _ in self.categories)

    def arranged(self, classes: Sequence[Category], where: str) -> "Source":
        """Returns the data with the labels of a run of `classes`; ConfigError, starting with `where`, for other classes."""
        order = class_indices(classes, self.categories)
        if None in order or len(order) != len(self.categories):
            raise classes_error(classes, self.categories, where)
        labels = np.argsort(order).astype(np.int32)
        records = [replace(record, labels=labels[record.labels]) for record in self.records]
        return replace(self, records=records, categories=[self.categories[k] for k in order])

    def tiled(self, side: int, overlap: float, without_boxes: Literal["drop", "keep"] = "keep") -> "Source":
        """Returns the tiles of all images (`tiles_of`, `boxes_in`), image by image; with "drop", those that show a box."""
        records, lost = [], 0
        for image, record in enumerate(self.records):
            unseen = np.ones(len(record.labels), bool)
            for tile in tiles_of(image, record.height, record.width, side, overlap):
                boxes, kept = boxes_in(tile, record.boxes_xyxy)
                unseen[kept] = False
                if len(kept) or without_boxes == "keep":
                    size = {"width": tile.width, "height": tile.height}
                    records.append(replace(record, boxes_xyxy=boxes, labels=record.labels[kept], tile=tile, **size))
            lost += int(unseen.sum())

        def image_of(index: int) -> int:
            return records[index].tile.image

        reading = {"read": lambda i: self.read(image_of(i)), "where": lambda i: self.where(image_of(i))}
        counts = {**self.counts, "in_no_tile": lost}
        return replace(self, records=records, counts=counts, uncut=self, missing={}, unsized=frozenset(), **reading)

    def __len__(self) -> int:
        return len(self.records)

    def __str__(self) -> str:
        """Returns the numbers of images and classes, and `counts`."""
        clipped, empty = self.counts.get("clipped"), self.counts.get("images_without_boxes")
        found = {"dropped boxes": self.dropped, "clipped boxes": clipped, "images without boxes": empty}
        unusual = "; ".join(f"{what}: {number}" for what, number in found.items() if number) or "nothing unusual"
        return f"{len(self)} images, {len(self.categories)} classes; {unusual}"

    @property
    def dropped(self) -> str:
        """The dropped boxes in `counts`: "5 crowd, 2 without area"; empty if there are none."""
        return ", ".join(f"{self.counts[rule]} {why}" for rule, why in WHY_DROPPED.items() if self.counts.get(rule))

    @cached_property
    def sha256(self) -> str:
        """Checksum of all that training takes from the records: their order, ids, sizes, boxes and labels."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for record in self.records:
            digest.update(f"{record.image_id} {record.width} {record.height} {len(record.labels)}\n".encode())
            digest.update(record.boxes_xyxy.tobytes() + record.labels.tobytes())
        return digest.hexdigest()


def classify_boxes(
    boxes_xyxy: Float64[np.ndarray, "M 4"], crowd: Bool[np.ndarray, " M"], sizes_wh: Int64[np.ndarray, "M 2"]
) -> tuple[Float32[np.ndarray, "M 4"], dict[str, Bool[np.ndarray, " M"]]]:
    """Returns the boxes cut to their images, and which of them each rule applies to. A box is dropped by the first rule
    that applies: crowd, zero_size (a side of 0 or less), outside (at most touches the edge of its image), or zero_size
    again if nothing is left of it in float32. The others are `usable`. Those of them that extend beyond the image by
    more than 0.01 pixel, the rounding of two decimals, are also `clipped`."""
    clipped = np.clip(boxes_xyxy, 0, np.tile(sizes_wh, 2)).astype(np.float32)
    inside = (boxes_xyxy[:, :2] < sizes_wh).all(1) & (boxes_xyxy[:, 2:] > 0).all(1)
    solid, left = ((boxes[:, 2:] > boxes[:, :2]).all(1) for boxes in (boxes_xyxy, clipped))
    usable = ~crowd & solid & inside & left
    return clipped, {
        "crowd": crowd,
        "zero_size": ~crowd & (~solid | (inside & ~left)),
        "outside": ~crowd & solid & ~inside,
        "clipped": usable & (np.abs(clipped - boxes_xyxy).max(1, initial=0) > 0.01),
        "usable": usable,
    }


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Pauses garbage collection: a large file or the trace of a program becomes many objects, and it would visit all that
    there are again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@dataclass(frozen=True, eq=False)
class BoxTable:
    """Annotations of a dataset as columns of M boxes."""

    images: list[ImageRow]
    categories: list[Category]  # the class of label k
    owners: Int64[np.ndarray, " M"]  # row in `images`
    labels: Int64[np.ndarray, " M"]
    crowd: Bool[np.ndarray, " M"]
    boxes_xyxy: Float64[np.ndarray, "M 4"]  # pixels, as annotated
    boxes_xywh: Float64[np.ndarray, "M 4"]
    areas: Float64[np.ndarray, " M"]  # square pixels
    ids: Int64[np.ndarray, " M"]  # 0 where missing

    @property
    def annotated(self) -> frozenset[int]:
        """Ids of the categories with a box, crowds included."""
        return frozenset(self.categories[label][0] for label in np.unique(self.labels))

    @property
    def sizes_wh(self) -> Int64[np.ndarray, "M 2"]:
        """Width and height of each box's image."""
        return np.array([image[2:] for image in self.images], np.int64).reshape(-1, 2)[self.owners]

    def make_records(self, images_without_boxes: str) -> tuple[list[Record], list[int], dict[str, int]]:
        """Returns the records, each one's row in `images`, and `Source.counts`; "drop" leaves out images without a box."""
        boxes, kinds = classify_boxes(self.boxes_xyxy, self.crowd, self.sizes_wh)
        rows = np.flatnonzero(kinds.pop("usable"))
        rows = rows[np.argsort(self.owners[rows], kind="stable")]
        number = np.bincount(self.owners[rows], minlength=len(self.images))
        ends = [0, *np.cumsum(number).tolist()]
        kept = [i for i in range(len(number)) if ends[i] < ends[i + 1] or images_without_boxes == "keep"]
        boxes, labels = boxes[rows], self.labels[rows].astype(np.int32)
        slices = (slice(ends[i], ends[i + 1]) for i in kept)  # views: 118,000 copies would take half a second
        records = [Record(*self.images[i], boxes[of], labels[of]) for i, of in zip(kept, slices, strict=True)]
        counts = {kind: int(which.sum()) for kind, which in kinds.items()}
        return records, kept, counts | {"images_without_boxes": int((number == 0).sum())}

    @paused_collector()
    def ground_truth(self) -> dict[str, Any]:
        """Returns `Source.ground_truth`. If ids repeat or are below 1 (pycocotools: unmatched), all become 1, 2, ..."""
        ids = self.ids
        if len(np.unique(ids)) < len(ids) or (ids < 1).any():
            ids = np.arange(1, len(ids) + 1)
        columns = {
            "id": ids.tolist(),
            "image_id": [self.images[row][0] for row in self.owners.tolist()],
            "category_id": [self.categories[label][0] for label in self.labels.tolist()],
            "bbox": self.boxes_xywh.tolist(),
            "area": self.areas.tolist(),
            "iscrowd": self.crowd.astype(int).tolist(),
        }
        keys = ("id", "file_name", "width", "height")
        return {
            "info": {},
            "images": [dict(zip(keys, image, strict=True)) for image in self.images],
            "annotations": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
            "categories": [{"id": category_id, "name": name} for category_id, name in self.categories],
        }
