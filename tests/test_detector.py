"""A detector over devices and datasets: every image once, and the same detections however the work is split."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_sets import rectangles

from retina_jax.config import Config, ConfigError
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
    """Writes 101 small images of several shapes: a number that no batch size or number of devices divides."""
    sizes = [(48, 32), (32, 48), (40, 30), (33, 33)]
    return rectangles(tmp_path_factory.mktemp("many"), [sizes[i % 4] for i in range(101)])


def found_with(source: Source, folder: Path, devices: int, parallel: str) -> tuple[dict, list[dict]]:
    """Returns scores and COCO results of the untrained network; its detections are arbitrary, but always the same."""
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
                assert others[name] == pytest.approx(value, abs=5e-6 if name == "f1_threshold" else 1e-6), name
        assert [(r["image_id"], r["category_id"]) for r in more] == [(r["image_id"], r["category_id"]) for r in results]
        np.testing.assert_allclose([r["bbox"] for r in more], [r["bbox"] for r in results], atol=1e-3)
        # Smaller shares of a batch are summed in another order: 1.2e-6 on one processor, below 1e-6 on another.
        np.testing.assert_allclose([r["score"] for r in more], [r["score"] for r in results], atol=5e-6)


def test_detect_equals_evaluation(source: Source, on_one_device: tuple[dict, list[dict]]) -> None:
    """`detect`, given decoded pixels one image at a time, returns the boxes of the evaluation pipeline."""
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


def untrained() -> Detector:
    driver = Driver(override(CONFIG, {"devices": 1}), 2)
    return Detector(driver, driver.init_state().variables, ("a", "b"), (1, 2))


def test_files_pillow_images_and_arrays_are_detected_alike(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    rgba = Image.fromarray(pixels)
    rgba.putalpha(255)
    array, *others = untrained().detect(
        [pixels, tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(pixels), rgba]
    )
    assert len(array.scores) > 0 and ((array.boxes_xyxy[:, 2:] > array.boxes_xyxy[:, :2]).all())
    for other in others:
        np.testing.assert_array_equal(other.boxes_xyxy, array.boxes_xyxy)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        ([np.zeros((4, 4), np.uint8)], "image 0: uint8 of shape"),
        ([np.zeros((4, 4, 4), np.uint8)], "image 0: uint8 of shape"),
        ([np.zeros((4, 4, 3))], "image 0: float64"),
        ([np.zeros((0, 4, 3), np.uint8)], "image 0: uint8"),
        ([None], "image 0: NoneType"),
        ([Image.new("I;16", (4, 4))], "image 0"),
        (["missing.png"], "missing.png"),
        ("image.png", "list"),
        (Image.new("RGB", (4, 4)), "list"),
        (3, "list"),
    ],
)
def test_detect_refuses_anything_else_in_one_line(images: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        inspect.unwrap(Detector.detect)(untrained(), images)  # without the tests' own check of types
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_1_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        untrained().detect([np.zeros((4, 4, 3), np.uint8)], batch_size=batch_size)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("nope",), "^nope: "), (("a\x1b[31m",), r"^a\\x1b\[31m: "), (("{run}", 0), "^short_side: invalid value 0")],
)
def test_load_detector_names_the_argument_that_is_wrong(tmp_path: Path, arguments: tuple, named: str) -> None:
    open_run(tmp_path, override(CONFIG, {"devices": 1}), ("red", "green"), (1, 2))
    source, *short_side = arguments
    with pytest.raises(ConfigError, match=named):
        load_detector(source.format(run=tmp_path), short_side=short_side[0] if short_side else None)


def test_the_best_step_and_its_threshold_are_the_default(source: Source, tmp_path: Path) -> None:
    config = override(CONFIG, {"devices": 1})
    state = Driver(config, 2).init_state()
    open_run(tmp_path, config, ("red", "green"), (1, 2))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, ap in ((5, None), (6, 0.5), (7, 0.25), (8, None)):
            checkpoints.save(step, state.replace(step=jnp.int32(step)))
            checkpoints.score(step, ap)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "step_00000006.json").write_text('{"f1_threshold": 0.375}')
    detector = load_detector(tmp_path)
    assert detector.step == 6 and detector.f1_threshold == 0.375
    for step, number in (("newest", 8), (7, 7), ("best", 6)):
        assert load_detector(tmp_path, step=step).step == number
    assert load_detector(tmp_path, step=7).f1_threshold is None
