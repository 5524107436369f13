"""TensorFlow datasets with COCO's features, read by index: `image`, and `objects` with `bbox` (ymin, xmin, ymax, xmax as
fractions of the sides) and `label`; optionally `image/id`, `image/filename`, and `is_crowd` and `area` of the objects."""

import contextlib
import hashlib
import io
import json
import os
import uuid
import zipfile
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from jaxtyping import Bool, Float64, Int64, Shaped

from retina_jax.config import DataConfig
from retina_jax.console import cache_folder, track
from retina_jax.data.classes import COCO_CATEGORIES, Category, class_indices, listed
from retina_jax.data.coco_document import Content, parse_coco
from retina_jax.data.decoding import open_image
from retina_jax.data.reading import read_again
from retina_jax.data.source import BadImage, BoxTable, DataError, Source
from retina_jax.errors import reason

FORMAT = 1  # of the index file; increase it when the columns change
HEADER, FOOTER = 12, 4  # bytes around the data of a TFRecord
READ_ERRORS = (OSError, ValueError, IndexError, RuntimeError)
Examples = Sequence[Any]  # the examples of a split (dicts) by index, their images encoded
SKIP_DECODING = {"image": tfds.decode.SkipDecoding()}


class Index(NamedTuple):
    """Everything about a split except pixels, as columns: N images, M boxes. Making it reads every image of the split."""

    image_ids: Int64[np.ndarray, " N"]
    file_names: Shaped[np.ndarray, " N"]  # empty if the dataset has none
    sizes_wh: Int64[np.ndarray, "N 2"]
    owners: Int64[np.ndarray, " M"]  # row of the box's image
    boxes_yxyx_normalised: Float64[np.ndarray, "M 4"]
    labels: Int64[np.ndarray, " M"]
    crowd: Bool[np.ndarray, " M"]
    areas: Float64[np.ndarray, " M"]  # square pixels; NaN if the dataset has none


def read_tfds(
    name: str,
    folder: str,
    split: str,
    *,
    images_without_boxes: Literal["keep", "drop"] = "keep",
    ground_truth_annotations: str = "",
    empty_parents: Literal["drop", "keep"] = "drop",
) -> Source:
    """Returns the dataset `name` under `folder` ("": TFDS's own), or the one prepared in the folder `name` itself. The
    first call reads every image's header and saves the index in the dataset's folder, or if it is read-only in
    ~/.cache/retina_jax. `ground_truth_annotations` is the original COCO JSON to evaluate against; without it the areas are
    COCO's truncated to integers. Raises DataError if any of them is missing or not as expected."""
    called = f"{name} [{split}]"
    builder = _open_builder(name, folder)
    categories = _categories(builder, called)
    images = _open_examples(builder, split, called)
    index = _load_index(builder, split, images, called)
    image_ids, labels = index.image_ids.tolist(), index.labels
    for m in np.flatnonzero((labels < 0) | (labels >= len(categories))):
        wrong = f"objects/label is {labels[m]}; it must be 0 to {len(categories) - 1}"
        raise DataError(f"{called}: example {index.owners[m]}: {wrong}")
    content = None
    if ground_truth_annotations:
        content = parse_coco(Path(ground_truth_annotations), categories, DataConfig(empty_parents=empty_parents))
        matched = _match_ground_truth(index, content, ground_truth_annotations, categories, called)
        image_ids, categories, labels = matched
    elif len(set(image_ids)) < len(image_ids):
        raise DataError(f"{called}: image/id is used twice; every image must have its own")
    image_rows = list(zip(image_ids, index.file_names.tolist(), *index.sizes_wh.T.tolist(), strict=True))
    boxes_xyxy = index.boxes_yxyx_normalised[:, [1, 0, 3, 2]] * np.tile(index.sizes_wh[index.owners], 2)
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    boxes_xywh = np.concatenate([boxes_xyxy[:, :2], sides], axis=1)
    areas, ids = np.where(np.isnan(index.areas), sides.prod(1), index.areas), np.arange(1, len(labels) + 1)
    table = BoxTable(image_rows, categories, index.owners, labels, index.crowd, boxes_xyxy, boxes_xywh, areas, ids)
    records, rows, counts = table.make_records(images_without_boxes)

    def where(i: int) -> str:
        return f"{called} example {rows[i]} ({records[i].file_name or records[i].image_id})"

    def read(i: int) -> bytes:
        try:
            return read_again(lambda: bytes(images[rows[i]]["image"]), where(i))
        except READ_ERRORS as error:
            raise BadImage(f"{where(i)}: cannot be read: {reason(error)}") from None

    return Source(
        name=called,
        records=records,
        categories=categories,
        counts=counts,
        read=read,
        where=where,
        make_ground_truth=(content or table).ground_truth,
        annotated=(content or table).annotated,
        left_out=content.left_out if content else {},
    )


def _open_builder(name: str, folder: str) -> tfds.core.DatasetBuilder:
    try:
        if (Path(name) / "dataset_info.json").is_file():
            return tfds.builder_from_directory(name)
        builder = tfds.builder(name, data_dir=folder or None)
    except (tfds.core.DatasetNotFoundError, FileNotFoundError, ValueError, AssertionError) as error:
        wrong = f"neither a TensorFlow dataset nor a prepared folder: {reason(error)}"
        raise DataError(f"data.tfds_name {name}: {wrong}") from None
    if not builder.info.splits:
        prepare = f"tfds.builder({name!r}, data_dir={folder or 'DIR'!r}).download_and_prepare()"
        command = f'python -c "import tensorflow_datasets as tfds; {prepare}"'
        raise DataError(f"data.tfds_name {name}: not prepared under {builder.data_dir}; prepare it with `{command}`")
    return builder


def _categories(builder: tfds.core.DatasetBuilder, called: str) -> list[Category]:
    """Returns id and name of each label: COCO's own for COCO, whose TFDS names may be just "0" to "79"; otherwise ids from
    1. Raises DataError if one of the necessary features is missing."""
    features = builder.info.features
    objects = features["objects"].feature if "objects" in features else {}
    for key in ("image", "objects/bbox", "objects/label"):
        if key not in {*features, *(f"objects/{part}" for part in objects)}:
            raise DataError(f"{called}: has no feature {key}; it must have image, objects/bbox and objects/label")
    names = [objects["label"].int2str(k) for k in range(objects["label"].num_classes)]
    of_coco = builder.name == "coco" and len(names) == len(COCO_CATEGORIES)
    if of_coco or names == [str(k) for k in range(len(COCO_CATEGORIES))]:
        return list(COCO_CATEGORIES)
    return [(k + 1, name) for k, name in enumerate(names)]


def _match_ground_truth(
    index: Index, content: Content, path: str, classes: list[Category], called: str
) -> tuple[list[int], list[Category], Int64[np.ndarray, " M"]]:
    """Returns the ids of the images in the JSON `content` of `path`, its categories of `classes`, and the labels there.
    Images are matched by file name, without names by id; classes as in `class_indices`, without names (TFDS calls them
    "0", "1", ...) by ascending id. Raises DataError for a class with a box that one side lacks, and for an image that
    the JSON lacks."""
    images, categories = content.images, content.categories
    unnamed = [name for _, name in classes] == [str(k) for k in range(len(classes))]
    ascending = sorted(range(len(categories)), key=lambda i: categories[i])
    found = ascending if unnamed and len(ascending) == len(classes) else class_indices(classes, categories)
    used = set(index.labels.tolist())
    lost = [category for k, category in enumerate(classes) if found[k] is None and k in used]
    extra = [c for i, c in enumerate(categories) if c[0] in content.annotated and i not in found]
    if lost or extra:
        raise DataError(
            f"{path}: categories are not the classes of {called}: only here: {listed(extra) or 'none'}; only there: "
            f"{listed(lost) or 'none'}; give the file that the dataset was made from"
        )
    kept = [k for k, i in enumerate(found) if i is not None]
    known, id_of = {image[0] for image in images}, {image[1]: image[0] for image in images}
    image_ids = []
    for row, (image_id, file_name) in enumerate(zip(index.image_ids.tolist(), index.file_names.tolist(), strict=True)):
        image_ids.append(id_of.get(file_name, image_id))
        if image_ids[-1] not in known:
            raise DataError(f"{path}: images lists neither id {image_id} nor {file_name}, example {row} of {called}")
    return image_ids, [categories[i] for i in found if i is not None], np.searchsorted(kept, index.labels)


def _load_index(builder: tfds.core.DatasetBuilder, split: str, images: Examples, called: str) -> Index:
    """Reads the index from its file; makes and writes it if the file is missing or damaged."""
    stored = [(name, info.num_bytes, info.shard_lengths) for name, info in sorted(builder.info.splits.items())]
    key = json.dumps([FORMAT, builder.info.full_name, split, len(images), stored])
    file_name = f"retina_jax_index_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    own, home = Path(builder.data_dir), cache_folder()
    for path in filter(Path.is_file, (own / file_name, home / file_name)):
        # A damaged index is made again. From memory: numpy leaves a file open that it cannot decode.
        with contextlib.suppress(ValueError, TypeError, OSError, KeyError, EOFError, zipfile.BadZipFile):
            return Index(**np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))
    index = _make_index(images, called)
    target = own if os.access(own, os.W_OK) else home
    target.mkdir(parents=True, exist_ok=True)
    unfinished = target / f".{file_name}.{uuid.uuid4().hex}.npz"
    np.savez(unfinished, **index._asdict())
    unfinished.replace(target / file_name)
    return index


def _make_index(images: Examples, called: str) -> Index:
    columns: dict[str, list] = {field: [] for field in Index._fields}
    for row in track(f"{called}: indexing, once: examples", range(len(images)), len(images)):
        try:
            example = images[row]
            columns["sizes_wh"].append(open_image(bytes(example["image"])).size)
        except BadImage as error:
            raise BadImage(f"{called} example {row}: {error}") from None
        except READ_ERRORS as error:
            raise DataError(f"{called} example {row}: cannot be read: {reason(error)}") from None
        columns["image_ids"].append(int(example.get("image/id", row)))
        name = example.get("image/filename", b"")
        columns["file_names"].append(name.decode(errors="backslashreplace") if isinstance(name, bytes) else str(name))
        objects, n = example["objects"], len(example["objects"]["label"])
        columns["owners"] += [row] * n
        columns["boxes_yxyx_normalised"] += list(objects["bbox"])
        columns["labels"] += list(objects["label"])
        columns["crowd"] += list(objects.get("is_crowd", [False] * n))
        columns["areas"] += list(objects.get("area", [np.nan] * n))
    kinds = (np.int64, np.str_, np.int64, np.int64, np.float64, np.int64, np.bool_, np.float64)
    shapes = (-1, -1, (-1, 2), -1, (-1, 4), -1, -1, -1)
    columns_of = zip(columns.values(), kinds, shapes, strict=True)
    return Index(*[np.array(column, kind).reshape(shape) for column, kind, shape in columns_of])


def _open_examples(builder: tfds.core.DatasetBuilder, split: str, called: str) -> Examples:
    try:
        if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
            return TFRecordExamples(builder.info, split)
        return builder.as_data_source(split, decoders=SKIP_DECODING)
    except NotImplementedError:
        stored = f"{builder.data_dir} is stored as {builder.info.file_format.value}, which has no random access"
        raise DataError(f"{called}: {stored}; prepare it as tfrecord or array_record") from None
    except ValueError as error:
        known = ", ".join(sorted(builder.info.splits))
        raise DataError(f"{called}: no such split; there are {known} ({reason(error)})") from None


class TFRecordExamples(Examples):
    """The examples of a split in TFRecord files, TFDS's default format, by index. Threads may read at once. `split` is
    a name or an instruction such as train[:10%]; ValueError if there is no such split. A record is its length (8 bytes,
    little-endian), 4 bytes of checksum, the data, 4 bytes of checksum. Checksums are not verified."""

    def __init__(self, info: tfds.core.DatasetInfo, split: str) -> None:
        self._features = info.features
        self._files = info.splits[split].file_instructions
        self._ends = list(accumulate(file.take for file in self._files))
        self._offsets: dict[str, list[tuple[int, int]]] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Raises OSError if the file cannot be read, ValueError if it is damaged, IndexError from `len` on."""
        if not 0 <= row < len(self):
            raise IndexError(f"example {row} of {len(self)}")
        place = bisect_right(self._ends, row)
        file = self._files[place]
        if file.filename not in self._offsets:
            self._offsets[file.filename] = _record_offsets(file.filename, file.examples_in_shard)
        start, length = self._offsets[file.filename][file.skip + file.take - (self._ends[place] - row)]
        with open(file.filename, "rb") as stream:
            stream.seek(start)
            encoded = stream.read(length)
        try:
            return self._features.deserialize_example_np(encoded, decoders=SKIP_DECODING)
        except DecodeError:
            raise ValueError(f"{file.filename}: the record at byte {start} is not an example; it is damaged") from None


def _record_offsets(path: str, expected: int) -> list[tuple[int, int]]:
    """Returns start and length of each record's data, in bytes; ValueError if there are not `expected` complete ones."""
    offsets, place, size = [], 0, os.path.getsize(path)
    with open(path, "rb") as stream:
        while place + HEADER <= size:
            stream.seek(place)
            offsets.append((place + HEADER, int.from_bytes(stream.read(8), "little")))
            place = sum(offsets[-1]) + FOOTER
    if place != size or len(offsets) != expected:
        found = f"{len(offsets)} records in {size} bytes, not the {expected} of dataset_info.json"
        raise ValueError(f"{path}: {found}; damaged")
    return offsets
