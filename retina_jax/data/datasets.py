"""Opens datasets: the configured one, whichever kind it is, or a COCO JSON and a folder of images."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from retina_jax.config import Config, ConfigError, DataConfig
from retina_jax.config_io import override, with_classes
from retina_jax.console import log, warn
from retina_jax.data.classes import Category, category_ids, listed, open_both
from retina_jax.data.coco_document import DEFAULTS, load_json, parse_document
from retina_jax.data.coco_entries import CocoFile
from retina_jax.data.decoding import read_image
from retina_jax.data.pipeline import max_boxes, overflow
from retina_jax.data.scenes import write_scenes
from retina_jax.data.source import BadImage, DataError, Source, paused_collector
from retina_jax.data.survey import with_decoding
from retina_jax.errors import quoted, reason, shortened


@paused_collector()
def read_coco(
    annotations: str | Path,
    images: str | Path,
    *,
    images_without_boxes: Literal["keep", "drop"] = "keep",
    unlabelled: bool = False,
    known: Sequence[Category] = (),
    data: DataConfig = DEFAULTS,
) -> Source:
    """Returns the dataset of a COCO JSON file. "drop" (for training) leaves out images without a usable box. With
    `unlabelled`, the key `annotations` may be missing. `known` is as in `parse_document`. Raises DataError for anything in
    the file that cannot be used, boxes that look as if in another format, and no images at all. A `file_name` that leads
    out of `images` is not followed (`find_images`); symbolic links are followed."""
    path, folder = Path(annotations), Path(images)
    document = load_json(path, CocoFile)
    labelled = not (unlabelled and isinstance(document, dict) and "annotations" not in document)
    if not labelled:
        document["annotations"] = []
    content = parse_document(path, document, folder=folder, known=known, data=data)
    records, rows, counts = content.make_records(images_without_boxes)
    if content.without_box:
        counts["without_box"] = len(content.without_box)
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
        categories=content.categories,
        counts=counts,
        read=read,
        where=paths.__getitem__,
        make_ground_truth=content.ground_truth,
        notes=tuple(note.text for note in content.notes),
        missing=missing,
        unsized=frozenset(index for index, row in enumerate(rows) if row in content.unsized),
        labelled=labelled,
        annotated=content.annotated,
        left_out=content.left_out,
    )


def open_source(
    data: DataConfig, split: Literal["train", "val"], known: Sequence[Category] = (), *, unlabelled: bool = False
) -> Source:
    """Opens the training or the evaluation images; evaluation always keeps images without boxes. `known` are classes
    that remain classes although the data has no box of them (`classes.excluded_categories`). With `unlabelled`, a COCO file
    without `annotations` is accepted (`Source.labelled`). Raises ConfigError for a missing field, DataError for
    annotations that cannot be used and, in training, without a usable box. Logs the source's notes."""
    without_boxes = data.images_without_boxes if split == "train" else "keep"
    if data.source == "tfds":
        from retina_jax.data.tfds import read_tfds  # imports TensorFlow Datasets, which takes seconds

        annotations = "" if split == "train" else data.val_annotations
        if annotations and not os.path.exists(annotations):
            found = f"{annotations} does not exist; set it to instances_val2017.json for exact areas"
            warn(f"data.val_annotations: {found}. Using the boxes in {data.tfds_name} of TFDS instead")
            annotations = ""
        name, folder, of_split = data.tfds_name, data.tfds_folder, getattr(data, f"tfds_{split}_split")
        options = {"ground_truth_annotations": annotations, "empty_parents": data.empty_parents}
        source = read_tfds(name, folder, of_split, images_without_boxes=without_boxes, **options)
    elif data.source == "scenes":
        folder, options = write_scenes(data.scenes), {"known": known, "data": DataConfig(box_format="xywh")}
        source = read_coco(folder / f"{split}.json", folder / split, images_without_boxes=without_boxes, **options)
    else:
        paths = {f"{split}_{what}": getattr(data, f"{split}_{what}") for what in ("annotations", "images")}
        for field, path in paths.items():
            if not path:
                raise ConfigError(f"data.{field} is empty; with data.source coco it must be a path")
        options = {"images_without_boxes": without_boxes, "unlabelled": unlabelled, "known": known, "data": data}
        source = read_coco(*paths.values(), **options)
    for (category_id, name), why in source.left_out.items():
        log(f"{source.name}: category {shortened(name)} ({category_id}) is left out: {why}")
    for note in source.notes:
        warn(f"{source.name}: {note}")
    if split == "train" and not any(len(record.labels) for record in source.records):
        hint = "; with data.crowds objects, crowds are objects" if source.counts["crowd"] else ""
        found = f"no usable box: {source.dropped or 'none is annotated'}"
        raise DataError(f"{source.name}: {found}; training needs at least one{hint}")
    source = with_decoding(source, data)
    if split == "val" and data.bits == "auto" and source.decoding.bits:
        used = f"the range found here, {source.decoding.bits} bits, is used; data.bits sets another"
        warn(f"{source.name}: has 16-bit images, and the range of 16-bit training images is not known: {used}")
    return source


def open_sources(
    config: Config, known: Sequence[Category] = (), workdir: str | Path = ""
) -> tuple[Source, Source, Config]:
    """Opens the training and the evaluation data of a run (the same if it is never evaluated), and returns the config with
    their classes, the range of their 16-bit images and their orientation. `known` are the classes of the run in `workdir`
    that is resumed: the training data gets its labels. Raises as `open_source` and `with_classes` do, ConfigError if
    classes or hosts do not fit each other, and DataError if an image file is missing and data.bad_images is stop."""

    def open_train(known: Sequence[Category]) -> Source:
        nonlocal config
        source = open_source(config.data, "train", known)
        changes: dict[str, Any] = {"data.bits": source.decoding.bits or config.data.bits}
        if config.data.orientation == "auto" and source.annotated_orientation in ("stored", "turned"):
            changes["data.undecided_orientation"] = source.annotated_orientation
        config = override(config, changes)
        return source

    from retina_jax import distributed  # imports JAX (100 MiB), which reading a file does not need

    if config.training.eval_every < 0:
        train = val = open_train(known)
    else:
        train, val = open_both(open_train, lambda known: open_source(config.data, "val", known), known)
        orientations = train.annotated_orientation, val.annotated_orientation
        if config.data.orientation == "auto" and orientations == ("open", "stored"):
            log(f"EXIF orientation: evaluation images are annotated as stored; reading {train.name} the same way ...")
            config = override(config, {"data.undecided_orientation": "stored"})
            train = open_train(train.categories)
    if known:
        train = train.arranged(known, f"--workdir {workdir}")
    check_classes(train.categories, val)
    if config.data.source == "coco" and config.data.bad_images == "stop":
        _check_images_exist(train, len(train))
        _check_images_exist(val, config.training.eval_images or len(val))
    config = with_classes(config, len(train.class_names))
    if config.data.tile:
        train = _cut_into_tiles(train, config.data)
    facts = {"training": train.sha256, "evaluation": val.sha256, "images": [len(train), len(val)]}
    facts |= {"decoding": [str(train.decoding), str(val.decoding)]}
    distributed.check_same("data", {**facts, "classes": list(train.class_names), "ids": list(val.category_ids)})
    log(f"train: {train}" + (f"\nval: {val}" if config.training.eval_every >= 0 else ""))
    most = max(len(record.labels) for record in train.records)
    if config.data.max_boxes == "auto":
        config = override(config, {"data.max_boxes": max_boxes(train, config.data)})
        log(f"data.max_boxes auto: {config.data.max_boxes}, for at most {most} boxes of an image or tile")
    images, boxes = overflow(train, config.data)
    if boxes:
        warn(
            f"data.max_boxes leaves out {boxes} boxes of {images} images; set --data.max-boxes {most} or auto to keep them"
        )
    return train, val, config


def _cut_into_tiles(train: Source, data: DataConfig) -> Source:
    """Returns the tiles of the training images, and logs their number. Raises DataError if none shows a box."""
    tiles = train.tiled(data.tile, data.tile_overlap, data.images_without_boxes)
    if not any(len(record.labels) for record in tiles.records):
        raise DataError(f"{train.name}: no tile of {data.tile} px shows half of a box; raise data.tile")
    log(f"{train.name}: {len(tiles)} tiles of {len(train)} images (data.tile {data.tile})")
    return tiles


def check_classes(classes: Sequence[Category], val: Source) -> None:
    """Raises ConfigError if a detector of `classes` cannot be scored on `val`; warns of classes that are not scored, and if
    there is no box to score."""
    ids = category_ids(classes, val, f"data.val_annotations {val.name}")
    if lacking := [category for category, same in zip(classes, ids, strict=True) if same is None]:
        warn(f"{val.name}: has no category for {listed(lacking)}: {len(lacking)} of {len(ids)} classes are not scored")
    if val.labelled and not any(len(record.labels) for record in val.records):
        warn(f"{val.name}: no usable box: AP cannot be computed")


def _check_images_exist(source: Source, number: int) -> None:
    """Raises DataError if one of the first `number` image files is missing; their content is checked when they are read."""
    number = min(number, len(source))
    missing = [index for index in source.missing if index < number]
    if missing:
        first = source.records[missing[0]]
        known = next((f"; {place}" for index in missing if (place := source.missing[index])), "")
        leave = ", or leave them out with --data.bad-images skip" if len(missing) < number else ""
        raise DataError(
            f"{source.name}: {len(missing)} of {number} images are missing: file_name {quoted(first.file_name)} of image id "
            f"{first.image_id} is not {source.where(missing[0])}{known}; name the folder that file_name is relative to, or "
            f"put the files there{leave}"
        )
