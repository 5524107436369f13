"""TensorFlow data sets with COCO's features, read by index: no shuffle buffer, no state.

Features: `image`, and `objects` with `bbox` (ymin, xmin, ymax, xmax over the image's sides) and `label`; where present
also `image/id`, `image/filename`, and of the objects `is_crowd` and `area`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float64, Int64, Shaped

from retina_jax.data import coco
from retina_jax.data.classes import COCO_CATEGORIES, Category, listed, match
from retina_jax.data.coco_document import Content
from retina_jax.data.decoding import open_image
from retina_jax.data.reading import read_again
from retina_jax.data.source import BadImage, DataError, Source, make_records
from retina_jax.data.tfrecords import Examples, TFRecordExamples
from retina_jax.errors import reason

FORMAT = 1
"""Of the index file; raised when its columns change."""


class Index(NamedTuple):
    """Everything about a split but pixels, as columns: N images, M boxes. Reading it from the data set reads every image."""

    image_ids: Int64[np.ndarray, " N"]
    file_names: Shaped[np.ndarray, " N"]
    """Empty where the data set has none."""
    sizes_wh: Int64[np.ndarray, "N 2"]
    owners: Int64[np.ndarray, " M"]
    """Row of the image that a box lies in."""
    boxes_yxyx_normalised: Float64[np.ndarray, "M 4"]
    labels: Int64[np.ndarray, " M"]
    crowd: Bool[np.ndarray, " M"]
    areas: Float64[np.ndarray, " M"]
    """Square pixels; NaN where the data set has none."""


def read_tfds(
    name: str,
    folder: str,
    split: str,
    *,
    images_without_boxes: Literal["keep", "drop"] = "keep",
    truth_annotations: str = "",
    empty_parents: Literal["drop", "keep"] = "drop",
) -> Source:
    """The data set `name` under `folder` ("": TFDS's own), or the one prepared in the folder `name` itself.

    Its first opening reads every image's header and keeps the index in the data set's folder, or in ~/.cache/retina_jax
    where that cannot be written. `truth_annotations` is the original COCO JSON to evaluate against: images are found in it
    by id (by file name where the data set has no ids), its categories give names and ids (`_match_truth`), and
    `empty_parents` is as in `read_coco`. Without it the ground truth is made from the features, whose areas are truncated
    to integers in COCO's.

    Raises DataError: the data set is unknown, not prepared, stored without random access, has no such split, lacks a
    feature, has labels outside its classes, or its images or classes are not those of `truth_annotations`.
    """
    called = f"{name} [{split}]"
    builder = _open_builder(name, folder)
    label = _check_features(builder, called)
    try:
        images = _open_examples(builder, split)
    except NotImplementedError:
        raise DataError(
            f"{called}: {builder.data_dir} is stored as {builder.info.file_format.value}, which has no random access; "
            "prepare it as tfrecord or array_record"
        ) from None
    except ValueError as error:
        known = ", ".join(sorted(builder.info.splits))
        raise DataError(f"{called}: no such split; there are {known} ({reason(error)})") from None
    index = _load_index(builder, split, images, called)

    classes = label.num_classes
    if len(index.labels) and not 0 <= index.labels.min() <= index.labels.max() < classes:
        wrong = int(np.flatnonzero((index.labels < 0) | (index.labels >= classes))[0])
        raise DataError(
            f"{called}: example {index.owners[wrong]}: objects/label is {index.labels[wrong]}; it must be 0 to {classes - 1}"
        )
    image_ids, categories = index.image_ids.tolist(), _categories(builder, label)
    annotated, left_out = frozenset(categories[k][0] for k in set(index.labels.tolist())), {}
    if truth_annotations:
        content = coco.parse_coco(Path(truth_annotations), categories, empty_parents)
        image_ids, categories, labels = _match_truth(index, content, truth_annotations, categories, called)
        index = index._replace(labels=labels)
        annotated, left_out = content.annotated, content.left_out
    elif len(set(image_ids)) < len(image_ids):
        raise DataError(f"{called}: image/id is used twice; every image must have its own")
    parsed = [
        (image_id, str(file_name), int(width), int(height))
        for image_id, file_name, (width, height) in zip(image_ids, index.file_names, index.sizes_wh, strict=True)
    ]
    records, rows, counts = make_records(
        parsed, index.owners, _pixels(index), index.labels, index.crowd, images_without_boxes
    )
    if not records:
        raise DataError(f"{called}: objects has no usable box in any image ({counts}); training needs at least one")

    def where(i: int) -> str:
        return f"{called} example {rows[i]} ({records[i].file_name or records[i].image_id})"

    def read(i: int) -> bytes:
        try:
            return read_again(lambda: bytes(images[rows[i]]["image"]), where(i))
        except (OSError, ValueError, IndexError, RuntimeError) as error:
            raise BadImage(f"{where(i)}: cannot be read: {reason(error)}") from None

    def make_truth() -> dict[str, Any]:
        return coco.make_truth(content) if truth_annotations else _truth(index, parsed, categories)

    return Source(
        name=called,
        records=records,
        class_names=tuple(name for _, name in categories),
        category_ids=tuple(category_id for category_id, _ in categories),
        counts=counts,
        read=read,
        where=where,
        make_truth=make_truth,
        annotated=annotated,
        left_out=left_out,
    )


def _open_examples(builder: tfds.core.DatasetBuilder, split: str) -> Examples:
    """Examples by index, their images encoded. NotImplementedError for a format without random access, ValueError if there
    is no such split."""
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        return TFRecordExamples(builder.info, split)
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


def _open_builder(name: str, folder: str) -> tfds.core.DatasetBuilder:
    try:
        if (Path(name) / "dataset_info.json").is_file():
            return tfds.builder_from_directory(name)
        builder = tfds.builder(name, data_dir=folder or None)
    except (tfds.core.DatasetNotFoundError, FileNotFoundError, ValueError, AssertionError) as error:
        raise DataError(
            f"data.tfds_name {name}: neither a TensorFlow data set nor a prepared folder: {reason(error)}"
        ) from None
    if not builder.info.splits:
        raise DataError(
            f'data.tfds_name {name}: not prepared under {builder.data_dir}; prepare it with `python -c "import '
            f'tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir={folder or "DIR"!r}).download_and_prepare()"`'
        )
    return builder


def _check_features(builder: tfds.core.DatasetBuilder, called: str) -> tfds.features.ClassLabel:
    """The label feature, once it is sure that there are an image and boxes too."""
    features = builder.info.features
    missing = [key for key in ("image", "objects") if key not in features]
    if not missing:
        objects = features["objects"].feature
        missing = [f"objects/{key}" for key in ("bbox", "label") if key not in objects]
    if missing:
        raise DataError(f"{called}: has no feature {missing[0]}; it must have image, objects/bbox and objects/label")
    return objects["label"]


def _categories(builder: tfds.core.DatasetBuilder, label: tfds.features.ClassLabel) -> list[Category]:
    """Id and name of each label: COCO's own for COCO, whose TFDS names may be no more than "0" to "79"; else from 1."""
    if builder.name == "coco" and label.num_classes == len(COCO_CATEGORIES):
        return list(COCO_CATEGORIES)
    names = [label.int2str(k) for k in range(label.num_classes)]
    if names == [str(k) for k in range(len(COCO_CATEGORIES))]:
        return list(COCO_CATEGORIES)
    return [(k + 1, name) for k, name in enumerate(names)]


def _match_truth(
    index: Index, content: Content, path: str, classes: list[Category], called: str
) -> tuple[list[int], list[Category], Int64[np.ndarray, " M"]]:
    """Ids that the images have in the JSON `content` of `path`, the categories there of the data set's `classes`, and the
    labels among them.

    Classes are found as in `classes.match`; those without names, which TFDS calls "0", "1" and so on, by ascending id. A
    class or category that the other side lacks is left out if it has no box. Raises DataError for one that has, and for an
    image that the JSON lacks.
    """
    unnamed = [name for _, name in classes] == [str(k) for k in range(len(classes))]
    ascending = sorted(range(len(content.categories)), key=lambda i: content.categories[i])
    by_id = unnamed and len(ascending) == len(classes)
    found = ascending if by_id else match(classes, content.categories)
    used = set(index.labels.tolist())
    lost = [category for k, category in enumerate(classes) if found[k] is None and k in used]
    extra = [c for i, c in enumerate(content.categories) if c[0] in content.annotated and i not in found]
    if lost or extra:
        raise DataError(
            f"{path}: categories are not the classes of {called}: only here: {listed(extra) or 'none'}; only there: "
            f"{listed(lost) or 'none'}; give the file that the data set was made from"
        )
    kept = [k for k, i in enumerate(found) if i is not None]
    categories = [content.categories[i] for i in found if i is not None]
    labels = np.searchsorted(kept, index.labels)
    known = {image[0] for image in content.images}
    id_of = {image[1]: image[0] for image in content.images}
    image_ids = []
    for row, (image_id, file_name) in enumerate(zip(index.image_ids.tolist(), index.file_names, strict=True)):
        image_ids.append(id_of.get(str(file_name), image_id))
        if image_ids[-1] not in known:
            raise DataError(f"{path}: images lists neither id {image_id} nor {file_name!s}, example {row} of {called}")
    return image_ids, categories, labels


def _pixels(index: Index) -> Float64[np.ndarray, "M 4"]:
    """Boxes (x1, y1, x2, y2) in pixels of their images."""
    return index.boxes_yxyx_normalised[:, [1, 0, 3, 2]] * np.tile(index.sizes_wh[index.owners], 2)


def _truth(index: Index, images: list[tuple[int, str, int, int]], categories: list[tuple[int, str]]) -> dict[str, Any]:
    boxes = _pixels(index)
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = np.where(np.isnan(index.areas), sides.prod(1), index.areas)
    annotations = [
        {
            "id": m + 1,
            "image_id": images[index.owners[m]][0],
            "category_id": categories[index.labels[m]][0],
            "bbox": [*boxes[m, :2].tolist(), *sides[m].tolist()],
            "area": float(areas[m]),
            "iscrowd": int(index.crowd[m]),
        }
        for m in range(len(boxes))
    ]
    keys = ("id", "file_name", "width", "height")
    return {
        "info": {},
        "images": [dict(zip(keys, image, strict=True)) for image in images],
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for category_id, name in categories],
    }


def _load_index(builder: tfds.core.DatasetBuilder, split: str, images: Examples, called: str) -> Index:
    """The index from its file; made and written first where there is none."""
    stored = [(name, info.num_bytes, info.shard_lengths) for name, info in sorted(builder.info.splits.items())]
    key = json.dumps([FORMAT, builder.info.full_name, split, len(images), stored])
    file_name = f"retina_jax_index_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    own, home = Path(builder.data_dir), Path.home() / ".cache" / "retina_jax"
    for path in (own / file_name, home / file_name):
        if path.is_file():
            try:
                # From memory: numpy leaves a file that it cannot make out open.
                with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as columns:
                    return Index(**columns)
            except (ValueError, TypeError, OSError, KeyError, EOFError, zipfile.BadZipFile):
                continue  # Broken by someone else: made again below.
    index = _make_index(images, called)
    target = own if os.access(own, os.W_OK) else home
    target.mkdir(parents=True, exist_ok=True)
    unfinished = target / f".{file_name}.{uuid.uuid4().hex}.npz"
    np.savez(unfinished, **index._asdict())
    unfinished.replace(target / file_name)
    return index


def _make_index(images: Examples, called: str) -> Index:
    image_ids, file_names, sizes, owners, boxes, labels, crowd, areas = [], [], [], [], [], [], [], []
    for row in range(len(images)):
        try:
            example = images[row]
        except (OSError, ValueError, IndexError, RuntimeError) as error:
            raise DataError(f"{called} example {row}: cannot be read: {reason(error)}") from None
        try:
            sizes.append(open_image(bytes(example["image"])).size)
        except BadImage as error:
            raise BadImage(f"{called} example {row}: {error}") from None
        image_ids.append(int(example.get("image/id", row)))
        file_name = example.get("image/filename", b"")
        file_names.append(
            file_name.decode(errors="backslashreplace") if isinstance(file_name, bytes) else str(file_name)
        )
        objects = example["objects"]
        n = len(objects["label"])
        owners.extend([row] * n)
        boxes.extend(objects["bbox"])
        labels.extend(objects["label"])
        crowd.extend(objects.get("is_crowd", [False] * n))
        areas.extend(objects.get("area", [np.nan] * n))
    return Index(
        np.array(image_ids, np.int64),
        np.array(file_names, np.str_),
        np.array(sizes, np.int64).reshape(-1, 2),
        np.array(owners, np.int64),
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(crowd, np.bool_),
        np.array(areas, np.float64),
    )
