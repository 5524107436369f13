"""The configured data set, whichever kind it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from retina_jax import hosts
from retina_jax.classes import Category, category_ids, listed, open_both
from retina_jax.config import Config, ConfigError, DataConfig
from retina_jax.config_files import with_classes
from retina_jax.console import tell, warn
from retina_jax.data.coco import read_coco
from retina_jax.data.pipeline import overflow
from retina_jax.data.scenes import write_scenes
from retina_jax.data.source import DataError, Source


def open_source(data: DataConfig, split: Literal["train", "val"], known: Sequence[Category] = ()) -> Source:
    """Opens the training or the evaluation images; evaluation always keeps images without boxes. `known` are classes that
    stay classes of the data although it has no box of them (`classes.placeholders`).

    Raises ConfigError for a field that is missing, DataError for annotations that cannot be used (and, in training, for
    annotations without any usable box). Prints the source's notes as warnings.
    """
    without_boxes = data.images_without_boxes if split == "train" else "keep"
    if data.source == "tfds":
        # TensorFlow Datasets takes seconds to import: only those who use it wait.
        from retina_jax.data.tfds import read_tfds

        name = data.tfds_train_split if split == "train" else data.tfds_val_split
        truth = "" if split == "train" else data.val_annotations
        source = read_tfds(
            data.tfds_name,
            data.tfds_folder,
            name,
            images_without_boxes=without_boxes,
            truth_annotations=truth,
            empty_parents=data.empty_parents,
        )
    else:
        if data.source == "scenes":
            paths = write_scenes(data.scenes)
            annotations, images = paths[:2] if split == "train" else paths[2:]
        else:
            annotations, images = getattr(data, f"{split}_annotations"), getattr(data, f"{split}_images")
            for field, value in ((f"{split}_annotations", annotations), (f"{split}_images", images)):
                if not value:
                    raise ConfigError(f"data.{field} is empty; with data.source coco it must be a path")
        source = read_coco(
            annotations,
            images,
            images_without_boxes=without_boxes,
            known=known,
            empty_parents=data.empty_parents,
        )
    if split == "train" and not any(len(record.labels) for record in source.records):
        raise DataError(f"{source.name}: has no usable box ({source.counts}); training needs at least one")
    for (category_id, name), why in source.left_out.items():
        tell(f"{source.name}: category {name} ({category_id}) is left out: {why}")
    for note in source.notes:
        warn(f"{source.name}: {note}")
    return source


def open_sources(
    config: Config, known: Sequence[Category] = (), workdir: str | Path = ""
) -> tuple[Source, Source, Config]:
    """What a run trains on, what it is evaluated on (the same where it never is), and its config with their classes.
    `known` are the classes of the run in `workdir` that is to be resumed: the training data gets its labels.

    Says what is there and what was left out of it. Raises as `open_source` and `with_classes` do, ConfigError where
    classes do not fit each other or several hosts have different data, and DataError where an image file is missing and
    data.bad_images would stop at it.
    """
    if config.training.eval_every < 0:
        train = val = open_source(config.data, "train", known)
    else:
        train, val = open_both(*(partial(open_source, config.data, split) for split in ("train", "val")), known)
    if known:
        train = train.arranged(known, f"--workdir {workdir}")
    check_classes(train.categories, val)
    if config.data.source == "coco" and config.data.bad_images == "stop":
        check_images_are_there(train, len(train))
        check_images_are_there(val, config.training.eval_images or len(val))
    config = with_classes(config, len(train.class_names))
    facts = {"training": train.sha256, "evaluation": val.sha256, "images": [len(train), len(val)]}
    hosts.check_same("data", {**facts, "classes": list(train.class_names), "ids": list(val.category_ids)})
    tell(f"train: {train}\nval: {val}")
    if (left_out := overflow(train, config.data))[1]:
        warn(f"data.max_boxes leaves out boxes: of {left_out[0]} images, {left_out[1]} boxes")
    return train, val, config


def check_classes(classes: Sequence[Category], val: Source) -> None:
    """Raises ConfigError if a detector of `classes` cannot be scored on `val`, as `category_ids` does; warns of the
    classes that are not scored."""
    ids = category_ids(classes, val, f"data.val_annotations {val.name}")
    if lacking := [category for category, same in zip(classes, ids, strict=True) if same is None]:
        warn(f"{val.name}: has no category for {listed(lacking)}: {len(lacking)} of {len(ids)} classes are not scored")


def check_images_are_there(source: Source, number: int) -> None:
    """DataError where one of the first `number` image files is missing, before anything is trained. Each folder is listed
    once (118,000 files: .2 s on a local disk); what is in the files is seen when they are read."""
    listed: dict[str, set[str]] = {}
    missing = []
    for index, record in enumerate(source.records[:number]):
        folder, name = os.path.split(source.where(index))
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listed[folder] and not os.path.exists(source.where(index)):  # some systems ignore case
            missing.append(f"file_name {record.file_name!r} of image id {record.image_id}")
    if missing:
        folder = source.where(0).removesuffix(source.records[0].file_name)
        raise DataError(
            f"{source.name}: {len(missing)} of {min(number, len(source))} images are not in {folder}: {missing[0]}"
            f"{', ...' if len(missing) > 1 else ''}; put them there, or leave them out with data.bad_images skip"
        )
