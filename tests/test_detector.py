"""A detector over devices and datasets: every image once, and the same detections however the work is split."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import shutil
from pathlib import Path
from types import ModuleType
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
from retina_jax.detector import Detector, import_run, load_detector
from retina_jax.evaluate import evaluate
from retina_jax.runs.folder import described_step, read_run
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
THRESHOLD = 0.996  # F1-optimal score in the evaluation of the run `scored`


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
        [
            pixels,
            jnp.asarray(pixels),
            tmp_path / "image.png",
            str(tmp_path / "image.png"),
            Image.fromarray(pixels),
            rgba,
        ]
    )
    assert len(array.scores) > 0 and ((array.boxes_xyxy[:, 2:] > array.boxes_xyxy[:, :2]).all())
    for other in others:
        np.testing.assert_array_equal(other.boxes_xyxy, array.boxes_xyxy)


def truncated() -> Image.Image:
    """Returns an image whose file ends early, which Pillow notices when it decodes the pixels."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(file, "jpeg")
    return Image.open(io.BytesIO(file.getvalue()[:-500]))


@pytest.mark.parametrize(
    ("images", "named"),
    [
        ([np.zeros((4, 4), np.uint8)], "image 0: uint8 of shape"),
        ([np.zeros((4, 4, 4), np.uint8)], "image 0: uint8 of shape"),
        ([np.zeros((4, 4, 3))], "image 0: float64"),
        ([np.zeros((0, 4, 3), np.uint8)], "image 0: uint8"),
        ([None], "image 0: NoneType"),
        ([Image.new("I;16", (4, 4))], "image 0"),
        ([Image.new("F", (4, 4))], "image 0: has floating-point pixels"),
        ([truncated()], "image 0: cannot be decoded: image file is truncated"),
        (["missing.png"], "missing.png"),
        ("image.png", "list"),
        (np.zeros((4, 4, 3), np.uint8), "list"),
        (jnp.zeros((4, 4, 3), jnp.uint8), "list"),
        (Image.new("RGB", (4, 4)), "list"),
        (3, "list"),
    ],
)
def test_detect_refuses_anything_else_in_one_line(images: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        inspect.unwrap(Detector.detect)(untrained(), images)  # without the tests' own check of types
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("batch_size", [0, -1, "2", 1.5, None, True, 10**30])
def test_a_batch_size_that_is_no_positive_integer_is_refused(batch_size: Any) -> None:
    with pytest.raises(
        ValueError, match=f"^batch_size: invalid value {batch_size!r}; must be an integer from 1 to 2147483647$"
    ):
        inspect.unwrap(Detector.detect)(untrained(), [np.zeros((4, 4, 3), np.uint8)], batch_size=batch_size)


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        ("nope", {}, "^nope: "),
        ("a\x1b[31m", {}, r"^a\\x1b\[31m: "),
        (None, {}, "^source: .*, not a NoneType"),
        ("{run}", {"short_side": 0}, "^short_side: invalid value 0"),
        ("{run}", {"short_side": 10**6}, "^short_side: invalid value 1000000; must be an integer from 1 to 16384"),
        ("{run}", {"short_side": "a"}, "^short_side: invalid value 'a'"),
        ("{run}", {"short_side": 1.5}, "^short_side: invalid value 1.5"),
        ("{run}", {"long_side": "a"}, "^long_side: invalid value 'a'"),
        ("{run}", {"step": "6"}, "^step: invalid value '6'"),
        ("{run}", {"step": np.int64(4)}, "^--step 4: no such checkpoint"),
        ("{run}", {"step": -1}, "^step: invalid value -1"),
        ("{run}", {"config": "configs/demo.py"}, "^config: .*, not a str"),
    ],
)
def test_load_detector_names_the_argument_that_is_wrong(scored: Path, source: Any, options: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        inspect.unwrap(load_detector)(source and source.format(run=scored), **options)
    assert "\n" not in str(error.value)


def test_a_damaged_best_step_is_named_with_the_others(scored: Path, tmp_path: Path) -> None:
    shutil.copytree(scored, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6" / "state" / "d")
    with pytest.raises(
        ConfigError, match=r"step 6, the best by AP, is damaged \(.* missing.*\[5, 6, 7, 8\]; .*--step newest"
    ):
        load_detector(tmp_path / "run")
    assert load_detector(tmp_path / "run", step="newest").step == 8


def test_a_run_is_imported_with_its_best_step_and_its_config(scored: Path) -> None:
    imported, saved = import_run(scored), read_run(scored)
    assert imported.source == f"{scored}, step 6"
    assert imported.config == override(saved.config, {"model.num_classes": None})
    assert (imported.class_names, imported.category_ids) == (saved.class_names, saved.category_ids)


def test_a_detector_is_shown_in_one_short_line() -> None:
    assert repr(untrained()) == "Detector(resnet18, 64/96 px, step 0, a, b)"


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a run of four steps, of which the second has the highest AP and an evaluation."""
    folder, config = tmp_path_factory.mktemp("scored"), override(CONFIG, {"devices": 1})
    state = Driver(config, 2).init_state()
    open_run(folder, config, ("red", "green"), (1, 2))
    with Checkpoints(folder / "checkpoints", keep=None) as checkpoints:
        for step, ap in ((5, None), (6, 0.5), (7, 0.25), (8, None)):
            checkpoints.save(step, state.replace(step=jnp.int32(step)))
            checkpoints.score(step, ap)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "step_00000006.json").write_text(f'{{"f1_threshold": {THRESHOLD}}}')
    return folder


def test_the_best_step_and_its_threshold_are_the_default(scored: Path) -> None:
    detector = load_detector(scored)
    assert detector.step == 6 and detector.f1_threshold == THRESHOLD
    for step, number in (("newest", 8), (7, 7), ("best", 6)):
        assert load_detector(scored, step=step).step == number
    assert load_detector(scored, step=7).f1_threshold is None


def test_the_best_step_is_described_with_the_newest(scored: Path, tmp_path: Path) -> None:
    assert described_step(6, scored) == "step 6, the best by AP (--step newest: 8)"
    assert (described_step(6), described_step(7, scored), described_step(0, tmp_path)) == ("step 6", "step 7", "step 0")
    for step, ap in ((5, '{"AP": 0.5}'), (8, '{"AP": 0.5}')):
        (tmp_path / "checkpoints" / str(step) / "metrics").mkdir(parents=True)
        (tmp_path / "checkpoints" / str(step) / "metrics" / "metrics").write_text(ap)
    assert described_step(8, tmp_path) == "step 8, the best by AP"


def script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> ModuleType:
    """Runs the main function of a script in this process; returns its module."""
    monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
    module = importlib.import_module(name)
    module.main()
    return module


def test_predict_takes_the_best_step_and_its_threshold(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "a\nerror: \x1b[31m.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(image)
    predict, drawn = importlib.import_module("predict"), []

    def draw(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, **_: object) -> np.ndarray:
        drawn.extend(scores.tolist())
        return image

    monkeypatch.setattr(predict, "draw", draw)
    script(monkeypatch, "predict", image, "--workdir", scored, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    scores = found["images"][0]["scores"]
    assert found["step"] == 6 and min(scores) < THRESHOLD <= min(drawn)
    assert len(drawn) == sum(score >= THRESHOLD for score in scores)
    first, second, _ = capsys.readouterr().out.splitlines()
    assert second.endswith(rf"/a\nerror: \x1b[31m.png: {len(drawn)} detections")
    assert first.startswith(f"step 6, the best by AP (--step newest: 8); detections with a score of {THRESHOLD:.2f} or")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [image.name, "detections.json"]


def test_export_takes_the_best_step_and_its_threshold(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export, exported = importlib.import_module("export"), []

    def export_detector(detector: Detector, path: Path, *_: object) -> str:
        exported.append(detector)
        path.touch()
        return "compared"

    monkeypatch.setattr(export, "export_detector", export_detector)
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    script(monkeypatch, "export", "--workdir", scored, "--out", tmp_path / "d.zip", "--images", tmp_path / "a.png")
    assert [(detector.step, detector.f1_threshold) for detector in exported] == [(6, THRESHOLD)]
    assert capsys.readouterr().out.splitlines()[-1].endswith(" MiB, step 6, the best by AP (--step newest: 8)")
