"""Generated scenes are reproducible, have tight boxes and visible objects, and are written once."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retina_jax.config import Config, ConfigError, DataConfig, ScenesConfig
from retina_jax.config_io import validate
from retina_jax.data.datasets import open_source, read_coco
from retina_jax.data.scenes import (
    CLASS_NAMES,
    HUES,
    LEAST_VISIBLE,
    SHAPES,
    TRAIN,
    VAL,
    draw_scene,
    draw_shape,
    write_scenes,
)

SMALL = ScenesConfig(train_images=6, val_images=3, size=96, max_side=40.0)


def test_scene_is_a_function_of_seed_stream_and_index() -> None:
    scene, again = draw_scene(SMALL, TRAIN, 3), draw_scene(SMALL, TRAIN, 3)
    assert np.array_equal(scene.image, again.image) and scene[1:] == again[1:]
    for other in ((SMALL, TRAIN, 4), (SMALL, VAL, 3), (dataclasses.replace(SMALL, seed=1), TRAIN, 3)):
        assert not np.array_equal(draw_scene(*other).image, scene.image)


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(list(SHAPES)),
    st.tuples(st.floats(0, 30), st.floats(0, 30), st.floats(6, 60), st.floats(6, 60)),
    st.floats(-0.3, 0.3),
)
def test_box_is_tight_around_the_complete_shape(shape: str, box: tuple[float, ...], rotation: float) -> None:
    (left, top), cover, inside = draw_shape(shape, box, rotation, 1.0)
    rows, columns = np.flatnonzero((cover > 0.02).any(1)), np.flatnonzero((cover > 0.02).any(0))
    drawn = np.array([left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1])
    assert np.abs(drawn - [box[0], box[1], box[0] + box[2], box[1] + box[3]]).max() <= 1
    assert (inside <= cover).all() and inside.sum() < cover.sum() <= box[2] * box[3] * 1.1


def test_shapes_differ() -> None:
    drawn = [draw_shape(shape, (0.0, 0.0, 40.0, 40.0), 0.0, 1.0)[1] for shape in SHAPES]
    difference = [np.abs(a - b).mean() for i, a in enumerate(drawn) for b in drawn[:i]]
    assert len(SHAPES) == len(HUES) == 12 and min(difference) > 0.08


def test_objects_are_inside_visible_and_within_the_configured_numbers_and_sizes() -> None:
    config = ScenesConfig(max_objects=5)
    scenes = [draw_scene(config, TRAIN, i) for i in range(60)]
    assert {len(scene.labels) for scene in scenes} == {0, 1, 2, 3, 4, 5}
    boxes = np.array([box for scene in scenes for box in scene.boxes_xywh])
    assert boxes[:, :2].min() >= 0 and (boxes[:, :2] + boxes[:, 2:]).max() <= config.size
    sides = np.sqrt(boxes[:, 2] * boxes[:, 3])
    assert config.min_side - 0.1 < sides.min() and sides.max() <= config.max_side and 10 < np.median(sides) < 18
    aspect = boxes[:, 2] / boxes[:, 3]
    assert aspect.min() > 0.59 and aspect.max() < 1.61
    visible = [share for scene in scenes for share in scene.visible]
    assert min(visible) >= LEAST_VISIBLE and min(visible) < 0.9
    assert {label for scene in scenes for label in scene.labels} == set(range(6))


def test_object_has_its_hue_in_its_box() -> None:
    config = ScenesConfig(classes=2, lookalikes=0)
    for index in range(20):
        scene = draw_scene(config, TRAIN, index)
        for label, (x, y, w, h), visible in zip(scene.labels, scene.boxes_xywh, scene.visible, strict=True):
            if visible == 1:  # Red disc or blue square; both fill their box's middle.
                middle = scene.image[int(y + 0.5 * h), int(x + 0.55 * w)].astype(int)
                assert middle[[0, 2][label]] > middle[[2, 0][label]] + 40


def test_written_scenes_are_read_as_drawn(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, folder=str(tmp_path))
    folder = write_scenes(config)
    train, val = (read_coco(folder / f"{split}.json", folder / split) for split in ("train", "val"))
    assert (len(train), len(val)) == (6, 3) and train.class_names == tuple(CLASS_NAMES[:6]) == val.class_names
    assert train.class_names[:2] == ("red disc", "blue square") and train.category_ids == (1, 2, 3, 4, 5, 6)
    for source, stream in ((train, TRAIN), (val, VAL)):
        for index, record in enumerate(source.records):
            scene = draw_scene(config, stream, index)
            assert record.labels.tolist() == scene.labels
            xywh = np.array(scene.boxes_xywh).reshape(-1, 4)
            assert np.allclose(
                record.boxes_xyxy, np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1), atol=1e-4
            )
            stored = np.asarray(Image.open(source.where(index))).astype(int)
            assert np.abs(stored - scene.image).mean() < 4
    assert {kind: train.counts[kind] for kind in ("crowd", "zero_size", "outside", "clipped")}.keys() and not any(
        train.counts[kind] for kind in ("crowd", "zero_size", "outside", "clipped")
    )


def test_scenes_are_written_once_and_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SMALL, folder=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_scenes(config)
    assert list(tmp_path.iterdir()) == []
    folder = write_scenes(config)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda *_, **__: pytest.fail("written twice"))
        assert write_scenes(config) == folder
    other = write_scenes(dataclasses.replace(config, seed=1))
    assert other != folder and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"classes": 1}, "classes"),
        ({"classes": 13}, "classes"),
        ({"max_side": 100.0}, "max_side"),
        ({"min_side": 50.0}, "min_side"),
        ({"train_images": 0}, "train_images"),
        ({"lookalikes": -1}, "lookalikes"),
    ],
)
def test_scenes_that_cannot_be_drawn_are_refused(changes: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.scenes.*{field}"):
        validate(Config(data=DataConfig(source="scenes", scenes=dataclasses.replace(SMALL, **changes))))


def test_source_opens_scenes(tmp_path: Path) -> None:
    data = DataConfig(source="scenes", scenes=dataclasses.replace(SMALL, folder=str(tmp_path), train_images=80))
    train, val = open_source(data, "train"), open_source(data, "val")
    assert all(len(record.labels) for record in train.records)
    assert len(train) == 80 - train.counts["images_without_boxes"] < 80 and len(val) == 3
