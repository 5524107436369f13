"""A detector over devices and data sets: every image once, and the same answers however the work is split."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_sets import rectangles

from retina_jax.config import Config
from retina_jax.config_io import override
from retina_jax.data.source import Source
from retina_jax.detector import Detector, load_detector
from retina_jax.evaluate import evaluate
from retina_jax.training.checkpoints import Checkpoints
from retina_jax.training.opening import open_run
from retina_jax.training.parallel import Driver

CONFIG = override(
    Config(),
    {
        "data.batch_size": 16, "data.short_side": 64, "data.long_side": 96, "data.max_boxes": 4,
        "model.backbone": "resnet18", "model.base_width": 4, "model.stage_blocks": (1, 1, 1, 1), "model.norm": "frozen",
        "model.frozen_stages": 0, "model.max_level": 5, "model.fpn_channels": 8,
        "model.head_channels": 8, "model.head_convs": 1, "model.num_classes": 2, "model.head_std": 0.2,
        "anchors.size_factor": 2.0, "detection.score_threshold": 0.001, "detection.max_detections": 20,
        "training.pictures": 2, "training.eval_batch_size": 10,
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """101 small images of several shapes: no multiple of anything that divides the work."""
    sizes = [(48, 32), (32, 48), (40, 30), (33, 33)]
    return rectangles(tmp_path_factory.mktemp("many"), [sizes[i % 4] for i in range(101)])


def found_with(source: Source, folder: Path, devices: int, parallel: str) -> tuple[dict, list[dict]]:
    """Scores and COCO results of the untrained network; its answers are arbitrary, and always the same."""
    config = override(CONFIG, {"devices": devices, "parallel": parallel})
    driver = Driver(config, 2)
    run = open_run(folder, config, source.class_names, source.category_ids)
    evaluate(run, Detector(driver, driver.init_state().variables, source.class_names, source.category_ids), source, 0)
    scores = json.loads((folder / "evaluation/step_00000000.json").read_text())
    return scores, json.loads((folder / "detections/step_00000000.json").read_text())


@pytest.fixture(scope="module")
def on_one_device(source: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict]]:
    return found_with(source, tmp_path_factory.mktemp("runs") / "one", 1, "jit")


def test_101_images_score_on_8_devices_as_on_one(
    source: Source, on_one_device: tuple[dict, list[dict]], tmp_path: Path
) -> None:
    scores, results = on_one_device
    assert scores["images"] == 101 and scores["AR100"] > 0
    assert {r["image_id"] for r in results} == {record.image_id for record in source.records}
    for parallel in ("jit", "pmap"):
        others, more = found_with(source, tmp_path / parallel, 8, parallel)
        for name, value in scores.items():
            if isinstance(value, float):
                assert others[name] == pytest.approx(value, abs=1e-6), name
        assert [(r["image_id"], r["category_id"]) for r in more] == [(r["image_id"], r["category_id"]) for r in results]
        np.testing.assert_allclose([r["bbox"] for r in more], [r["bbox"] for r in results], atol=1e-3)
        # Smaller shares of a batch are summed in another order: 1.2e-6 on one processor, below 1e-6 on another.
        np.testing.assert_allclose([r["score"] for r in more], [r["score"] for r in results], atol=5e-6)


def test_detect_gives_what_evaluation_gives(source: Source, on_one_device: tuple[dict, list[dict]]) -> None:
    """One by one through `detect`, from decoded pixels, the boxes of the evaluation pipeline."""
    from retina_jax.data.decoding import to_rgb

    _, results = on_one_device
    driver = Driver(override(CONFIG, {"devices": 1}), 2)
    detector = Detector(driver, driver.init_state().variables, source.class_names, source.category_ids)
    chosen = [0, 1, 2, 3, 100]
    for index, found in zip(chosen, detector.detect([to_rgb(source.read(i)) for i in chosen]), strict=True):
        mine = [r for r in results if r["image_id"] == source.records[index].image_id]
        boxes_xywh = np.array([r["bbox"] for r in mine])
        np.testing.assert_allclose(found.boxes_xyxy[:, :2], boxes_xywh[:, :2], atol=1e-3)
        np.testing.assert_allclose(found.boxes_xyxy[:, 2:] - found.boxes_xyxy[:, :2], boxes_xywh[:, 2:], atol=1e-3)
        np.testing.assert_allclose(found.scores, [r["score"] for r in mine], atol=1e-6)
        assert found.boxes_xyxy.min() >= 0 and found.boxes_xyxy[:, 2].max() <= source.records[index].width


def test_a_detector_is_loaded_without_an_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(CONFIG, {"devices": 1})
    state = Driver(config, 2).init_state()
    open_run(tmp_path, config, ("red", "green"), (1, 2))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, state.replace(step=jnp.int32(7)))

    def made(*_: object) -> None:
        raise AssertionError("an optimizer is made")

    monkeypatch.setattr("retina_jax.training.parallel.make_optimizer", made)
    detector = load_detector(tmp_path)
    assert detector.step == 7 and jax.tree.structure(detector.variables) == jax.tree.structure(state.variables)
    jax.tree.map(np.testing.assert_array_equal, detector.variables, state.variables)


def test_detect_refuses_what_is_no_rgb_image() -> None:
    driver = Driver(override(CONFIG, {"devices": 1}), 2)
    detector = Detector(driver, driver.init_state().variables, ("a", "b"), (1, 2))
    for image in (
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match="uint8"):
            detector.detect([image])
