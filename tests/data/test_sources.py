"""The configured dataset, by kind."""

from pathlib import Path

import pytest
from small_sets import document, rectangles, write_coco

from retina_jax.config import Config, ConfigError, DataConfig
from retina_jax.config_io import override
from retina_jax.data.datasets import open_source, open_sources
from retina_jax.data.source import DataError


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("field", ["annotations", "images"])
def test_empty_path_is_named(tmp_path: Path, split: str, field: str) -> None:
    path, images = write_coco(tmp_path, document())
    paths = {f"{split}_annotations": str(path), f"{split}_images": str(images), f"{split}_{field}": ""}
    with pytest.raises(ConfigError, match=rf"^data\.{split}_{field} "):
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
    with pytest.raises(DataError, match=path):
        open_source(data, "train")
    assert len(open_source(data, "val")) == 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_image_is_named_before_training(tmp_path: Path, split: str) -> None:
    folders = {name: tmp_path / name for name in ("train", "val")}
    fields = {"model.num_classes": 2}
    for name, folder in folders.items():
        folder.mkdir()
        source = rectangles(folder, [(40, 30), (30, 40), (20, 20)])
        fields |= {f"data.{name}_annotations": source.name, f"data.{name}_images": str(folder / "images")}
    config = override(Config(), fields)
    open_sources(config)
    (folders[split] / "images" / "001.jpeg").unlink()
    line = rf"{split}/annotations.json: 1 of 3 .*'001.jpeg'.* 11 .*/{split}/"
    with pytest.raises(DataError, match=line):
        open_sources(config)
    open_sources(override(config, {"data.bad_images": "skip"}))
    if split == "val":
        open_sources(override(config, {"training.eval_images": 1}))
