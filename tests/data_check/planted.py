"""A clean dataset of two splits, and mistakes to plant in it, each with the findings that the check must report."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from small_sets import encode

from retina_jax.config import Config
from retina_jax.config_io import override

WIDTH, HEIGHT = 128, 96
CONFIG = override(
    Config(), {"data.short_side": 96, "data.long_side": 128, "data.max_boxes": 4, "detection.max_detections": 4}
)
"""Images keep their size, and the boxes of 48 pixels are between anchors of 40 and 51."""


@dataclass
class Splits:
    """The documents and the files of both splits, before they are written."""

    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def image(self, i: int) -> dict[str, Any]:
        """Returns image i of train, 0 to 5, with file name 00i.jpg and id 10 + i."""
        return self.documents["train"]["images"][i]

    def box(self, i: int) -> dict[str, Any]:
        """Returns annotation i of train, 0 to 11, with id 100 + i; each image has two."""
        return self.documents["train"]["annotations"][i]

    def add_box(self, box_id: int, image_id: int = 10, bbox: tuple = (40, 30, 48, 48), **other: Any) -> None:
        """Adds an annotation to train."""
        entry = {"id": box_id, "image_id": image_id, "category_id": 1, "bbox": list(bbox), **other}
        self.documents["train"]["annotations"].append(entry)

    def add_image(self, image_id: int, name: str, content: bytes) -> None:
        """Adds an image without a box to train."""
        self.documents["train"]["images"].append({"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT})
        self.files["train"][name] = content

    def write(self, folder: Path) -> dict[str, tuple[Path, Path]]:
        """Writes all files; returns the JSON and the image folder of each split."""
        pairs = {}
        for split, document in self.documents.items():
            pairs[split] = folder / f"{split}.json", folder / split
            pairs[split][1].mkdir(parents=True)
            pairs[split][0].write_text(json.dumps(document))
            for name, content in self.files[split].items():
                (pairs[split][1] / name).write_bytes(content)
        return pairs


def clean() -> Splits:
    """Returns six images in train and three in val, each with a box of each class."""
    rng, splits = np.random.default_rng(0), Splits()
    for split, images, first in (("train", 6, 0), ("val", 3, 6)):
        entries, boxes = [], []
        for i in range(first, first + images):
            entries.append({"id": 10 + i, "file_name": f"{i:03d}.jpg", "width": WIDTH, "height": HEIGHT})
            for k in (0, 1):
                box = [4 + 64 * k + i, 20 + 2 * i, 48, 48]
                boxes.append(
                    {"id": 100 + 2 * i + k, "image_id": 10 + i, "category_id": 1 + k, "bbox": box, "iscrowd": 0}
                )
        splits.documents[split] = {
            "images": entries,
            "annotations": boxes,
            "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "dust"}],
        }
        pixels = rng.integers(0, 256, (images, HEIGHT, WIDTH, 3), np.uint8)
        splits.files[split] = {e["file_name"]: encode(p) for e, p in zip(entries, pixels, strict=True)}
    return splits


Found = set[tuple[str, str, str]]
"""Kind, split and name of findings."""
MISTAKES: dict[str, tuple[Callable[[Splits], None], Found]] = {}
"""The function that plants each mistake, and the expected findings."""


def mistake(*found: tuple[str, str, str]) -> Callable[[Callable[[Splits], None]], Callable[[Splits], None]]:
    """Registers a function that plants a mistake."""

    def register(plant: Callable[[Splits], None]) -> Callable[[Splits], None]:
        MISTAKES[plant.__name__] = plant, set(found)
        return plant

    return register


@mistake(("missing", "train", "000.jpg"))
def image_is_missing(s: Splits) -> None:
    del s.files["train"]["000.jpg"]


@mistake(("unreadable", "train", "001.jpg"))
def jpeg_is_truncated(s: Splits) -> None:
    content = s.files["train"]["001.jpg"]
    s.files["train"]["001.jpg"] = content[: len(content) // 2]


@mistake(("unreadable", "val", "006.jpg"))
def image_is_a_text_file(s: Splits) -> None:
    s.files["val"]["006.jpg"] = b"404 not found"


@mistake(("wrong_size", "train", "002.jpg"))
def size_in_the_json_is_wrong(s: Splits) -> None:
    s.image(2).update(width=HEIGHT * 2, height=WIDTH * 2)


@mistake(("zero_size", "train", "annotation 201"))
def box_has_no_width(s: Splits) -> None:
    s.add_box(201, bbox=(40, 40, 0, 9))


@mistake(("same_box", "train", "annotation 202"))
def box_occurs_twice(s: Splits) -> None:
    s.add_box(202, image_id=13, bbox=tuple(s.box(6)["bbox"]))


@mistake(("other_class", "train", "annotation 203"))
def box_has_two_classes(s: Splits) -> None:
    s.add_box(203, image_id=13, bbox=tuple(s.box(7)["bbox"]))


@mistake(("outside", "train", "annotation 204"))
def box_is_outside_its_image(s: Splits) -> None:
    s.add_box(204, bbox=(WIDTH, 10, 20, 20))


@mistake(("clipped", "train", "annotation 102"))
def coordinate_is_negative(s: Splits) -> None:
    s.box(2)["bbox"] = [-4, 22, 48, 48]


@mistake(("refused_boxes", "train", "annotations[8] (id 108)"))
def coordinate_is_not_a_number(s: Splits) -> None:
    s.box(8)["bbox"][0] = float("nan")


@mistake(("refused_boxes", "train", "annotations[9] (id 109)"))
def category_is_unknown(s: Splits) -> None:
    s.box(9)["category_id"] = 77


@mistake(("empty_class", "train", "ghost"))
def class_has_no_boxes(s: Splits) -> None:
    for document in s.documents.values():
        document["categories"].append({"id": 9, "name": "ghost"})
    s.documents["val"]["annotations"][0]["category_id"] = 9


@mistake(("no_class", "train", "things (0)"), ("no_class", "train", "cell (10)"))
def categories_are_no_classes(s: Splits) -> None:
    more = {"id": 0, "name": "things", "supercategory": "none"}, {"id": 10, "name": "cell"}
    s.documents["train"]["categories"] += more


@mistake(("same_name", "train", "cell"), ("same_name", "val", "cell"))
def two_classes_have_one_name(s: Splits) -> None:
    for document in s.documents.values():
        document["categories"][1]["name"] = "cell"


@mistake(("similar_name", "train", "'cell' and 'Cell '"), ("unscored_class", "val", "Cell "))
def two_classes_differ_in_case(s: Splits) -> None:
    s.documents["train"]["categories"].append({"id": 8, "name": "Cell "})
    s.box(0)["category_id"] = 8


@mistake(("leakage", "val", "007.jpg"))
def image_is_in_both_splits(s: Splits) -> None:
    s.files["val"]["007.jpg"] = s.files["train"]["004.jpg"]


@mistake(("same_image", "train", "copy.jpg"), ("no_boxes", "train", "copy.jpg"))
def image_occurs_twice(s: Splits) -> None:
    s.add_image(30, "copy.jpg", s.files["train"]["005.jpg"])


@mistake(("refused_images", "train", "images[6] (id 10)"))
def image_id_is_used_twice(s: Splits) -> None:
    s.documents["train"]["images"].insert(6, {**s.image(0), "file_name": "other.jpg"})


@mistake(("refused_images", "val", "images[3] (id 50)"), ("orphaned", "val", "annotations[6] (id 300)"))
def file_name_leaves_the_folder(s: Splits) -> None:
    entry = {"id": 50, "file_name": "../train/000.jpg", "width": WIDTH, "height": HEIGHT}
    s.documents["val"]["images"].append(entry)
    s.documents["val"]["annotations"].append({"id": 300, "image_id": 50, "category_id": 1, "bbox": [1, 2, 40, 40]})


@mistake(("same_id", "train", "annotation 111"))
def annotation_id_is_used_twice(s: Splits) -> None:
    s.box(10)["id"] = 111


@mistake(("crowd", "train", "annotation 205"))
def box_is_a_crowd(s: Splits) -> None:
    s.add_box(205, iscrowd=1)


@mistake(("overflow", "train", "005.jpg"), ("undetectable", "train", "005.jpg"))
def image_has_too_many_boxes(s: Splits) -> None:
    for k in range(3):
        s.add_box(206 + k, image_id=15, bbox=(20 + 9 * k, 30, 48, 48))


@mistake(("one_colour", "train", "black.jpg"), ("no_boxes", "train", "black.jpg"))
def image_is_black(s: Splits) -> None:
    s.add_image(31, "black.jpg", encode(np.zeros((HEIGHT, WIDTH, 3), np.uint8)))


@mistake(("incomplete", "train", "003.jpg"))
def jpeg_lacks_its_middle(s: Splits) -> None:
    content = s.files["train"]["003.jpg"]
    s.files["train"]["003.jpg"] = content[: len(content) // 3] + content[len(content) // 2 :]


@mistake(("pixels", "val", "val.json"))
def orientation_is_undecidable(s: Splits) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(io.BytesIO(s.files["val"]["008.jpg"])) as image:
        s.files["val"]["008.jpg"] = encode(np.asarray(image), exif=exif)


@mistake(("decoding", "train", "train.json"), ("no_boxes", "train", "deep.png"))
def sixteen_bit_image_uses_ten(s: Splits) -> None:
    values = np.random.default_rng(1).integers(0, 1024, (HEIGHT, WIDTH)).astype(np.uint16)
    s.add_image(32, "deep.png", encode(values, "PNG"))
