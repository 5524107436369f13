"""TensorFlow datasets with COCO's features that the tests write themselves."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from retina_jax.data.source import Source


def store(
    folder: Path,
    examples: list[dict[str, Any]],
    *,
    name: str = "tiny",
    names: tuple[str, ...] = ("red", "green"),
    extras: bool = True,
    file_format: str = "array_record",
) -> str:
    """Writes a TFDS dataset with COCO's features, or only the necessary ones; returns the folder it is prepared in."""
    objects = {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=list(names))}
    features = {"image": tfds.features.Image()}
    if extras:
        objects |= {"is_crowd": np.bool_, "area": np.int64, "id": np.int64}
        features |= {"image/id": np.int64, "image/filename": tfds.features.Text()}
    features["objects"] = tfds.features.Sequence(objects)
    builder = tfds.dataset_builders.store_as_tfds_dataset(
        name,
        "1.2.3",
        tfds.features.FeaturesDict(features),
        {"train": list(enumerate(examples))},
        data_dir=str(folder),
        file_format=file_format,
        disable_shuffling=True,
    )
    return str(builder.data_dir)


def example(source: Source, index: int, *, extras: bool = True) -> dict[str, Any]:
    """Returns an image of a COCO source as a TFDS example, including crowds."""
    record = source.records[index]
    path = Path(source.where(index))
    mine = [a for a in source.ground_truth["annotations"] if a["image_id"] == record.image_id]
    objects = []
    for a in mine:
        x, y, w, h = a["bbox"]
        x1, y1, x2, y2 = x / record.width, y / record.height, (x + w) / record.width, (y + h) / record.height
        box = {"bbox": tfds.features.BBox(y1, x1, y2, x2), "label": source.category_ids.index(a["category_id"])}
        more = {"is_crowd": bool(a["iscrowd"]), "area": int(a["area"]), "id": a["id"]}
        objects.append(box | (more if extras else {}))
    more = {"image/id": record.image_id, "image/filename": record.file_name}
    return {"image": str(path), "objects": objects} | (more if extras else {})
