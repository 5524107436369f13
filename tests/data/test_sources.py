"""The configured data set, by kind."""

from pathlib import Path

import pytest
from small_sets import document, write_coco

from retina_jax.config import ConfigError, DataConfig
from retina_jax.data.source import DataError
from retina_jax.data.sources import open_source


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("field", ["annotations", "images"])
def test_empty_path_is_named(tmp_path: Path, split: str, field: str) -> None:
    path, images = write_coco(tmp_path, document())
    paths = {f"{split}_annotations": str(path), f"{split}_images": str(images), f"{split}_{field}": ""}
    with pytest.raises(ConfigError, match=rf"^data\.{split}_{field} is empty"):
        open_source(DataConfig(**paths), split)


def test_evaluation_keeps_images_without_boxes(tmp_path: Path) -> None:
    content = document()
    del content["annotations"][0]
    path, images = map(str, write_coco(tmp_path, content))
    data = DataConfig(train_annotations=path, train_images=images, val_annotations=path, val_images=images)
    assert [record.image_id for record in open_source(data, "train").records] == [2]
    assert [record.image_id for record in open_source(data, "val").records] == [1, 2]


@pytest.mark.parametrize("kept", ["keep", "drop"])
def test_training_without_any_box_is_refused(tmp_path: Path, kept: str) -> None:
    path, images = map(str, write_coco(tmp_path, {**document(), "annotations": []}))
    data = DataConfig(
        train_annotations=path, train_images=images, val_annotations=path, val_images=images, images_without_boxes=kept
    )
    with pytest.raises(DataError, match=r"has no usable box"):
        open_source(data, "train")
    assert len(open_source(data, "val")) == 2
