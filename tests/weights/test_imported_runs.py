"""Imported detectors and backbones in use: run folders, scoring, prediction, training on other classes."""

from __future__ import annotations

import json
import re
import runpy
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from recipes import drawn, photographs, torchvision_shapes
from weight_files import flat, safetensors

from retina_jax import load_detector
from retina_jax.config import Config, ConfigError, ModelConfig
from retina_jax.config_io import load_config, override, validate
from retina_jax.errors import WeightsError
from retina_jax.model.initialisation import initialise
from retina_jax.model.retinanet import RetinaNet
from retina_jax.presets import FIELDS, PRESETS
from retina_jax.runs.folder import Run, training_lock
from retina_jax.training.parallel import Driver
from retina_jax.training.restore import adapt_classes
from retina_jax.weights.importing import import_detector, with_backbone
from retina_jax.weights.named import IMAGENET

ROOT = Path(__file__).parents[2]
CLASSES = ("square", "disc", "moon")


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    path.write_bytes(safetensors({name: ("F32", a) for name, a in drawn(shapes, 3, spread=0.3).items()}))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a torchvision detector of three classes and the background."""
    return write(tmp_path_factory.mktemp("weights") / "detector.pth", torchvision_shapes(4))


def script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")


def scenes(folder: Path) -> list[object]:
    return [
        "--data.source", "scenes", "--data.scenes.folder", folder / "scenes", "--data.scenes.train-images", 8,
        "--data.scenes.val-images", 3, "--data.scenes.size", 64, "--data.scenes.classes", 2, "--data.scenes.max-side", 40.0,
        "--data.short-side", 64, "--data.long-side", 64, "--data.batch-size", 2, "--devices", 1,
    ]  # fmt: skip


def test_a_detector_is_imported_evaluated_and_trained_on_other_classes(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", scenes(tmp_path)
    source = f"torchvision:{weights}"
    run.mkdir()
    (run / "config.json").write_text("{}")  # of an import that was interrupted
    with training_lock(run), pytest.raises(SystemExit):
        script(monkeypatch, "import_weights", "--weights", source, "--workdir", run, "--class-names", *CLASSES)
    assert "another process is training there" in capsys.readouterr().err
    script(monkeypatch, "import_weights", "--weights", source, "--workdir", run, "--class-names", *CLASSES)
    output = capsys.readouterr().out
    assert "4 classes" in output and source in output and f"step 0 of {run}" in output
    detector = load_detector(run, short_side=64, long_side=96)
    assert detector.class_names == ("__background__", *CLASSES) and detector.step == 0
    direct = load_detector(source, short_side=64, long_side=96)
    for part in ("model", "anchors", "detection", "data"):
        assert getattr(direct.config, part) == getattr(detector.config, part)
    jax.tree.map(np.testing.assert_array_equal, detector.variables, direct.variables)
    image = photographs([(70, 90)], 1)
    assert len(detector.detect(image)[0].labels) > 0

    Image.fromarray(image[0]).save(tmp_path / "photo.png")
    script(
        monkeypatch,
        "predict",
        "--weights",
        source,
        "--short-side",
        64,
        tmp_path / "photo.png",
        "--out",
        tmp_path / "out",
    )
    entry = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert entry["detector"] == source and set(entry["images"][0]["labels"]) <= {f"class {k}" for k in range(4)}

    # Other classes get a new class head, which is reported, also if the run is started again before a step is saved.
    with pytest.raises(SystemExit):
        script(monkeypatch, "evaluate", "--workdir", run, *data)
    error = capsys.readouterr().err
    assert "red disc (1), blue square (2)" in error and "__background__, square" in error
    for steps in (0, 2):
        script(monkeypatch, "train", "--workdir", run, *data, "--training.steps", steps, "--training.pictures", 0,
               "--optimizer.warmup-steps", 0, "--optimizer.learning-rate", 0.0)  # fmt: skip
        assert re.search(r"class head.*\b2 classes.*\b0\.01\b", capsys.readouterr().out)
    trained = load_detector(run)
    assert trained.step == 2 and len(trained.class_names) == 2
    before, after = flat(detector.variables), flat(trained.variables)
    same = [path for path in before if not path.startswith("class_head/output")]
    assert all(np.array_equal(before[path], after[path]) for path in same)
    np.testing.assert_allclose(after["class_head/output/bias"], -np.log(99), rtol=1e-6)

    # A run of this project is imported too, with its config.
    again = tmp_path / "again"
    script(monkeypatch, "import_weights", "--weights", run, "--workdir", again)
    copied = load_detector(again)
    assert (copied.step, copied.class_names, copied.config.data) == (0, trained.class_names, trained.config.data)
    jax.tree.map(np.testing.assert_array_equal, copied.variables, trained.variables)
    script(monkeypatch, "train", "--workdir", again, "--data.scenes.classes", 3, "--data.scenes.folder", tmp_path / "three",
           "--training.steps", 0)  # fmt: skip
    assert "a new class head for 3 classes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script(
            monkeypatch,
            "train",
            "--workdir",
            run,
            "--data.scenes.classes",
            3,
            "--data.scenes.folder",
            tmp_path / "three",
        )
    assert "import-weights" in capsys.readouterr().err
    with pytest.raises(WeightsError, match=r"is a run's folder.*import-weights"):
        with_backbone({}, ModelConfig(backbone_weights=str(run)))

    # Classes are scored by name, in any columns; a class whose name the data lacks is left out.
    first, second = trained.class_names
    script(monkeypatch, "evaluate", "--weights", source, "--class-names", second, "thing", first, *data,
           "--workdir", tmp_path / "theirs", "--training.pictures", 0)  # fmt: skip
    results = json.loads((tmp_path / "theirs" / "detections" / "step_00000000.json").read_text())
    assert {result["category_id"] for result in results} == set(trained.category_ids)
    capsys.readouterr()
    script(monkeypatch, "evaluate", "--workdir", run)
    assert "Average Precision" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script(monkeypatch, "import_weights", "--weights", source, "--workdir", run)
    assert str(run) in capsys.readouterr().err


def test_known_classes_keep_their_columns(weights: Path) -> None:
    imported = import_detector(f"torchvision:{weights}", class_names=CLASSES)
    config = override(imported.config, {"devices": 1})
    run = Run(Path("x"), config, ("moon", "square"), (1, 2))
    before = flat(imported.variables)
    made, line = adapt_classes(
        Driver(config, 2), run, before, list(zip(imported.category_ids, imported.class_names, strict=True))
    )
    assert "2 of 4 classes" in line
    bias = before["class_head/output/bias"].reshape(9, 4)
    np.testing.assert_array_equal(flat(made)["class_head/output/bias"].reshape(9, 2), bias[:, [3, 1]])
    kernel = before["class_head/output/kernel"].reshape(3, 3, -1, 9, 4)
    np.testing.assert_array_equal(flat(made)["class_head/output/kernel"].reshape(3, 3, -1, 9, 2), kernel[..., [3, 1]])


def backbone_config(path: Path, **changes: object) -> ModelConfig:
    options = {"backbone": "resnet18", "base_width": 8, "stage_blocks": (1, 1, 1, 1), "fpn_channels": 8}
    options |= {"input_normalisation": "imagenet", "backbone_weights": str(path)}
    return ModelConfig(**{**options, **changes})


def test_a_backbone_fills_only_the_backbone_and_missing_parts_are_reported(tmp_path: Path) -> None:
    shapes = torchvision_shapes(0, detector=False) | {"fc.weight": (5, 64), "fc.bias": (5,)}
    path = write(tmp_path / "complete", shapes)
    config = backbone_config(path)
    start = initialise(RetinaNet(config, 3, 9), 0)
    made, line = with_backbone(start, config)
    before, after = flat(start), flat(made)
    assert re.search(rf"\b{len(torchvision_shapes(0, detector=False))} arrays.*{re.escape(str(path))}$", line)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("backbone/")}

    # The backbone of a detector is accepted too.
    again, _ = with_backbone(start, backbone_config(write(tmp_path / "detector", torchvision_shapes(4))))
    assert flat(again).keys() == after.keys()

    part = write(tmp_path / "part", {name: s for name, s in shapes.items() if not name.startswith("layer4")})
    with pytest.raises(WeightsError, match=r"\b15 .*backbone/c5/block1/conv1/kernel"):
        with_backbone(start, backbone_config(part))
    _, report = with_backbone(start, backbone_config(part), ["backbone/c5"])
    assert re.search(r"\b15 .*: backbone/c5/block1/conv1/kernel", report)


def test_weights_of_another_convention_are_refused_by_field(tmp_path: Path) -> None:
    path = write(tmp_path / "w", torchvision_shapes(0, detector=False))
    for field, value in (("input_normalisation", "detectron"), ("norm", "group")):
        config = backbone_config(path, **{field: value})
        with pytest.raises(ConfigError, match=rf"^model\.{field}: {value}\b.*/w\b"):
            with_backbone(initialise(RetinaNet(config, 3, 9), 0), config)
    with pytest.raises(ConfigError, match=r"\bresnet18\b"):
        with_backbone({}, ModelConfig(backbone="resnet18", backbone_weights="imagenet"))
    with pytest.raises(WeightsError, match=r"--model\.backbone"):
        import_detector(f"torchvision:{path}")
    with pytest.raises(WeightsError, match=r"^absent: "):
        with_backbone({}, backbone_config(Path("absent")))


@pytest.mark.parametrize("pixels", ["detectron", "imagenet"])
def test_a_backbone_without_published_imagenet_weights_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, pixels: str
) -> None:
    monkeypatch.delitem(IMAGENET, ("resnet18", True))  # as for a backbone that a user adds
    config = ModelConfig(backbone="resnet18", backbone_weights="imagenet", input_normalisation=pixels)
    with pytest.raises(ConfigError, match=r"^model\.backbone_weights: imagenet\b[^\n]*\bresnet18\b[^\n]*$"):
        with_backbone({}, config)


def test_a_detector_defines_the_size_of_its_images(weights: Path) -> None:
    detector = load_detector(f"torchvision:{weights}")
    assert (detector.config.data.short_side, detector.config.data.long_side) == (800, 1333)
    detector = load_detector(f"torchvision:{weights}", short_side=400)
    assert (detector.config.data.short_side, detector.config.data.long_side) == (400, 666)
    with pytest.raises(ConfigError, match=r"data\.short_side"):
        load_detector(f"torchvision:{weights}", short_side=400, long_side=300)
    with pytest.raises(ConfigError, match=r"onnx:file"):
        load_detector("onnx:file")


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_names_the_same_fields_and_is_valid(name: str) -> None:
    assert tuple(PRESETS[name]) == FIELDS
    config = validate(override(Config(), PRESETS[name]))
    assert (config == Config()) == (name == "paper")
    others = [override(override(Config(), PRESETS[other]), PRESETS[name]) for other in PRESETS]
    assert all(other == config for other in others)


@pytest.mark.parametrize("name", ["detectron", "detectron2", "torchvision_v1", "torchvision_v2"])
def test_every_published_recipe_is_its_preset(name: str) -> None:
    config = validate(load_config(ROOT / "configs" / f"{name}_r50_800.py"))
    assert override(config, PRESETS[name]) == config
    assert config.model.backbone_weights == "imagenet" and config.training.steps >= 90_000


@pytest.mark.parametrize(("name", "numbers"), [("torchvision_v1", 34_014_999), ("torchvision_v2", 38_198_935)])
def test_the_presets_of_torchvision_have_its_number_of_parameters(name: str, numbers: int) -> None:
    """The numbers are those that torchvision publishes; it stores means and variances as buffers."""
    config = override(Config(), PRESETS[name]).model
    images, sizes = jax.ShapeDtypeStruct((1, 64, 64, 3), np.uint8), jax.ShapeDtypeStruct((1, 2), np.int32)
    shapes = jax.eval_shape(RetinaNet(config, 91, 9).init, jax.random.key(0), images, sizes)
    buffers = ("mean", "var", *(("scale", "bias") if config.norm == "frozen" else ()))
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = [key.key for key in path]
        if not (names[-1] in buffers and "norm" in names[-2]):
            count += int(np.prod(leaf.shape))
    assert count == numbers


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("backbone.body.conv1.weight", (100_000, 1, 1, 1)),  # the width of the network
        ("backbone.body.conv1.weight", (10**9, 0, 7, 7)),
        ("backbone.fpn.inner_blocks.2.0.weight", (10**9, 0, 1, 1)),
        ("head.classification_head.cls_logits.weight", (27, 10**9, 0, 3)),
        ("head.classification_head.cls_logits.bias", (900_000,)),  # the number of classes
        ("backbone.body.layer1.999.conv1.weight", (1, 1, 1, 1)),  # the number of blocks
        ("backbone.body.layer1.999999999.conv1.weight", (1, 1, 1, 1)),
        (f"backbone.body.layer1.{'9' * 5_000}.conv1.weight", (1, 1, 1, 1)),  # too many digits for Python
    ],
)
def test_a_network_far_larger_than_its_file_is_refused_before_it_is_made(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    weights = drawn(torchvision_shapes(3), seed=0, spread=1.0) | {name: np.zeros(shape, np.float32)}
    (tmp_path / "w.safetensors").write_bytes(safetensors({name: ("F32", array) for name, array in weights.items()}))
    tracemalloc.start()
    with pytest.raises(WeightsError) as caught:
        import_detector(f"torchvision:{tmp_path / 'w.safetensors'}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value).splitlines()) == 1 and peak < 2**26
