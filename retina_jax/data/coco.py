"""COCO-format annotations: a JSON file and a folder of images.

Everything in the file is checked once, here, so that nothing after this file meets a missing key, a string for a
number or a box outside its image. Training, evaluation, its ground truth and the data check read by the same function.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from retina_jax.data.box_formats import BoxFormat
from retina_jax.data.classes import Category
from retina_jax.data.coco_document import Content, Crowds, parse_document
from retina_jax.data.conventions import Orientation
from retina_jax.data.decoding import largest_file
from retina_jax.data.reading import read_again, read_file
from retina_jax.data.source import BadImage, DataError, Source, make_records
from retina_jax.errors import reason

LARGEST_JSON = 2**33
"""Bytes of an annotation file; the largest of COCO has half a gigabyte."""


def read_coco(
    annotations: str | Path,
    images: str | Path,
    *,
    images_without_boxes: Literal["keep", "drop"] = "keep",
    box_format: BoxFormat = "auto",
    crowds: Crowds = "ignore",
    orientation: Literal["auto", "stored", "turned"] = "auto",
    undecided_orientation: Orientation = "turned",
    known: Sequence[Category] = (),
    empty_parents: Literal["drop", "keep"] = "drop",
    unlabelled: bool = False,
) -> Source:
    """The data set of a COCO JSON. "drop" (for training) leaves out images that have no usable box; evaluation keeps all.

    `box_format`, `crowds` and the orientations are as in DataConfig. Raises DataError, one line that names the file, the
    entry and what would be right, for anything in the file that cannot be used, for boxes that look as if in another format,
    for no images at all, and with "drop" for no usable box at all. Images are opened only where their sizes are missing.
    `known` and `empty_parents` decide which empty categories are classes, as in `classes.placeholders`. With `unlabelled` a
    file without the key `annotations` is accepted.

    A `file_name` is a path inside `images`: where it is absolute or climbs out with .. it is not followed, but a file of
    that base name inside is taken where it is the only one (`find_images`), else the name is refused. A folder, pipe or
    device where the image should be is a BadImage when it is read. Symbolic links are followed wherever they lead,
    because data sets are often made of them: who may write into the folder is trusted, who wrote the JSON is not.
    """
    path, folder = Path(annotations), Path(images)
    document = load_json(path)
    check_folder(path, folder)
    labelled = not unlabelled or not isinstance(document, dict) or "annotations" in document
    if not labelled:
        document = {**document, "annotations": []}
    content = parse_document(
        path,
        document,
        folder=folder,
        box_format=box_format,
        crowds=crowds,
        orientation=orientation,
        undecided_orientation=undecided_orientation,
        known=known,
        empty_parents=empty_parents,
    )
    del document
    columns = content.boxes
    boxes_xyxy = np.concatenate([columns[:, 3:5], columns[:, 3:5] + columns[:, 5:7]], axis=1)
    records, rows, counts = make_records(
        content.images,
        columns[:, 0].astype(np.int64),
        boxes_xyxy,
        columns[:, 1].astype(np.int64),
        columns[:, 2] > 0,
        images_without_boxes,
    )
    if content.without_box:
        counts["without_box"] = len(content.without_box)
    if not records:
        option = "; data.crowds objects takes crowds as objects" if counts["crowd"] else ""
        option += "".join(f"; {note.text}" for note in content.notes if note.kind == "likely_format")
        raise DataError(
            f"{path}: annotations has no usable box in any image ({counts}); training needs at least one{option}"
        )
    paths = [content.paths[row] for row in rows]
    missing = {index: content.missing[row] for index, row in enumerate(rows) if row in content.missing}

    def read(index: int) -> bytes:
        try:
            return read_image(Path(paths[index]), records[index].width, records[index].height)
        except OSError as error:
            place = f"; {missing[index]}" if missing.get(index) else ""
            raise BadImage(f"{paths[index]}: cannot be read: {reason(error)}{place}") from None

    return Source(
        name=str(path),
        records=records,
        class_names=tuple(name for _, name in content.categories),
        category_ids=tuple(category_id for category_id, _ in content.categories),
        counts=counts,
        read=read,
        where=paths.__getitem__,
        make_truth=lambda: make_truth(content),
        notes=tuple(note.text for note in content.notes),
        missing=missing,
        unsized=frozenset(index for index, row in enumerate(rows) if row in content.unsized),
        labelled=labelled,
        annotated=content.annotated,
        left_out=content.left_out,
    )


def check_folder(annotations: Path, folder: Path) -> None:
    """DataError where the folder of the images is none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it must hold the images that {annotations} names")


def read_image(path: Path, width: int, height: int) -> bytes:
    """The file of an image that its annotations say is of this size; OSError where it cannot be read."""
    largest = largest_file(width * height)
    return read_again(lambda: read_file(path, largest), str(path))


def parse_coco(path: Path, known: Sequence[Category] = (), empty_parents: Literal["drop", "keep"] = "drop") -> Content:
    """The file's content without its images' files, every entry of it checked; arguments and DataError as in `read_coco`."""
    return parse_document(path, load_json(path), known=known, empty_parents=empty_parents)


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
        raise DataError(f"{path}: is not JSON: {reason(error)}") from None
    finally:
        if collecting:
            gc.enable()


def read_truth(path: Path) -> dict[str, Any]:
    """Ground truth for pycocotools from a file; DataError as in `read_coco`."""
    return make_truth(parse_coco(path))


def make_truth(content: Content) -> dict[str, Any]:
    """Ground truth for pycocotools: see `Source.truth`."""
    ids = content.ids.tolist()
    renumber = len(set(ids)) < len(ids) or any(identity < 1 for identity in ids)
    keys = ("id", "file_name", "width", "height")
    return {
        "info": {},
        "images": [dict(zip(keys, image, strict=True)) for image in content.images],
        "annotations": [
            {
                "id": m + 1 if renumber else ids[m],
                "image_id": content.images[int(image)][0],
                "category_id": content.categories[int(label)][0],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for m, ((image, label, crowd, *box), area) in enumerate(
                zip(content.boxes.tolist(), content.areas.tolist(), strict=True)
            )
        ],
        "categories": [{"id": category_id, "name": name} for category_id, name in content.categories],
    }
