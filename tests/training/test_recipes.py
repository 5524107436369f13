"""Published recipes take a step at reduced size, and a run with every switch of a recipe on is resumed to the bit."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from retina_jax.config import Config
from retina_jax.config_io import load_config, override, validate, with_epochs
from retina_jax.losses.total import EMA_START, ImageLosses, mean_losses
from retina_jax.model.resnet import ARCHITECTURES
from retina_jax.training.metrics import Metrics
from retina_jax.training.opening import open_run
from retina_jax.training.optimizer import schedule_warning
from retina_jax.training.parallel import Driver
from retina_jax.training.step import Inputs

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.py") if "Published:" in path.read_text())
SMALL = {
    "model.base_width": 2, "model.stage_blocks": (1, 1, 1, 1), "model.min_level": 4, "model.max_level": 5,
    "model.fpn_channels": 8, "anchors.size_factor": 2.0,
    "model.head_channels": 8, "model.head_convs": 1, "model.num_classes": 3, "model.norm_groups": 2, "devices": 1,
}  # fmt: skip
IMAGES = 117_266  # of COCO, with objects


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 9


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_its_source_and_reaches_the_end_of_its_schedule(path: Path) -> None:
    config = validate(load_config(path))
    assert schedule_warning(config) is None
    if config.training.epochs:
        assert with_epochs(config, IMAGES).training.steps == config.training.steps
        assert schedule_warning(with_epochs(config, IMAGES)) is None
    assert path.name in (ROOT / "docs" / "recipes.md").read_text()


def reduced(path: Path) -> Config:
    """Returns the recipe with a narrow network of its kind, on one device; what only the data needs is the default."""
    config = override(load_config(path), SMALL)
    kind = "resnet18" if ARCHITECTURES[config.model.backbone].groups == 1 else config.model.backbone
    parts = {name: getattr(config, name) for name in ("model", "anchors", "matching", "loss", "optimizer")}
    changes = {"model.backbone": kind, "model.backbone_weights": "", "model.dtype": "float32", "devices": 1}
    changes |= {
        "data.batch_size": 2,
        "data.max_boxes": 4,
        "optimizer.boundaries": (1,),
        "optimizer.boundary_epochs": (),
    }
    return validate(override(Config(**parts), changes))


NEW = ("tf_model_garden_r50_640", "mlperf_resnext50_800")  # the others with -m slow


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=() if path.stem in NEW else pytest.mark.slow, id=path.stem) for path in RECIPES]
)
def test_a_recipe_takes_a_finite_step(path: Path, make_inputs: Callable[..., Inputs]) -> None:
    """Where the network is the same in training and in inference, the validation loss of a batch is that of the step."""
    config = reduced(path)
    driver = Driver(config, 3)
    state, inputs = driver.init_state(), driver.shard_batch(make_inputs(1, batch_size=2))
    before, found = jax.device_get(state.params), {}
    if "batch" not in (config.model.norm, config.model.head_norm):
        losses = ImageLosses(*map(np.asarray, driver.losses(state.variables, inputs)))
        after_step = 0.9 * EMA_START + 0.1 * float(losses.positives.sum())
        found = mean_losses(losses, config.loss, after_step / 2)
    state, measured = driver.step(state, inputs)
    assert all(np.isfinite(value) for value in measured.values())
    assert measured["loss"] > 0 and measured["gradient_norm"] > 0
    assert measured["positives_per_image"] > 0 or config.matching.low_quality != "all"
    assert found == pytest.approx({name: float(measured[name]) for name in found}, rel=1e-4)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(jax.device_get(state.params)), strict=True)
    assert sum(not np.array_equal(a, b) for a, b in pairs) > 5


@pytest.mark.parametrize("normaliser", ["per_image", "per_device", "global", "ema"])
def test_the_validation_loss_is_the_mean_over_all_images_as_one_batch(normaliser: str) -> None:
    positives, classes, boxes = np.array([0.0, 2.0, 5.0]), np.array([3.0, 4.0, 10.0]), np.array([0.0, 1.0, 2.0])
    expected = {
        "per_image": ((3 + 4 / 2 + 10 / 5) / 3, (1 / 2 + 2 / 5) / 3),
        "ema": (17 / (3 * 4.5), 3 / (3 * 4.5)),
    }.get(normaliser, (17 / 7, 3 / 7))
    loss = override(Config(), {"loss.normaliser": normaliser, "loss.box_weight": 2.0}).loss
    found = mean_losses(ImageLosses(classes, boxes, positives, positives), loss, 4.5)
    assert (found["classification_loss"], found["box_loss"]) == pytest.approx(expected)
    assert found["loss"] == pytest.approx(expected[0] + 2 * expected[1])


@pytest.mark.parametrize(
    ("patience", "aps", "last"),
    [
        (0, [0.3, 0.2, 0.1, 0.0], 60),
        (2, [0.3, 0.2, 0.1], 30),
        (2, [0.1, 0.2, 0.15, 0.2], 40),  # an equal AP is no new best
        (2, [0.1, None, 0.2, 0.15, 0.3], 60),  # an undefined AP is not counted
        (1, [None, None, None], 60),
        (1, [0.2, 0.2000001], 20),  # equal as metrics.jsonl has them
    ],
)
def test_training_ends_after_evaluations_without_a_new_best(
    patience: int, aps: list[float | None], last: int, tmp_path: Path
) -> None:
    changes = {"training.steps": 60, "training.eval_every": 10, "training.patience": patience}
    config = override(Config(), changes | {"training.tensorboard": False})
    run = open_run(tmp_path, config, ("a",), (1,))
    taken = []
    with Metrics(run, 0) as metrics:
        for step in metrics.remaining_steps():
            taken.append(step)
            if step % 10 == 0:
                ap = aps[step // 10 - 1] if step // 10 <= len(aps) else 1 - 1 / step
                metrics.evaluated(step, {"AP": ap})
        assert metrics.ended_early() == (last < 60)
    assert taken == list(range(1, last + 1))
    for start in range(0, last + 1, 5):  # the same steps remain after a resume, at any step
        shutil.copytree(tmp_path, tmp_path / "copy", ignore=lambda *_: ["copy"], dirs_exist_ok=True)
        with Metrics(open_run(tmp_path / "copy", config, ("a",), (1,)), start) as metrics:
            first = next(iter(metrics.remaining_steps()), None)
        assert first == (start + 1 if start < last else None)


SWITCHES = """
from retina_jax.config import *

def get_config():
    return Config(
        data=DataConfig(source="scenes", batch_size=4, short_side=64, long_side=64, max_boxes=8, images_without_boxes="keep",
            scenes=ScenesConfig(folder={scenes!r}, train_images=30, val_images=6, size=64, classes=2, max_side=40.0)),
        model=ModelConfig(backbone="resnet18", base_width=4, stage_blocks=(1, 1, 1, 1), norm="frozen_statistics",
            frozen_stages=1, min_level=4, max_level=5, fpn_channels=8, head_channels=8, head_convs=1, head_norm="batch"),
        anchors=AnchorConfig(size_factor=2.0),
        optimizer=OptimizerConfig(warmup_steps=2, schedule="cosine"),
        detection=DetectionConfig(score_threshold=0.9, class_agnostic_nms=True),
        training=TrainingConfig(epochs=1.2, log_every=1, eval_every=2, checkpoint_every=1, keep_checkpoints=9, pictures=0,
            patience=2, validation_loss=True, tensorboard=False),
        devices=2,
    )
"""


@pytest.fixture
def script() -> ModuleType:
    """Returns scripts/train.py as a module."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "scripts" / "train.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_with_every_switch_is_resumed_to_the_bit_and_ends_early(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No score is above 0.9 at first, so each AP is 0: the run ends at step 6 of ceil(1.2 * 30 / 4) = 9."""
    (tmp_path / "switches.py").write_text(SWITCHES.format(scenes=str(tmp_path / "scenes")))
    config = validate(load_config(tmp_path / "switches.py"))

    def results(run: Path) -> tuple[dict, list[dict]]:
        script.train(config, run)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return json.loads((run / "summary.json").read_text()), lines

    summary, lines = results(tmp_path / "run")
    assert (summary["steps"], summary["ended"]) == (6, "training.patience")
    assert [line["step"] for line in lines if line["event"] == "evaluation"] == [2, 4, 6]
    for step in range(6):
        rate = 0.01 * (1 + np.cos(np.pi * step / 9)) / 2 * min(1.0, 1 / 3 + 2 / 3 * step / 2)
        (line,) = [line for line in lines if line["event"] == "train" and line["step"] == step + 1]
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-5)
    assert all(
        line["loss"] == pytest.approx(line["classification_loss"] + line["box_loss"], rel=1e-4) for line in lines
    )

    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    for step in (4, 5, 6):  # as after a kill during step 4
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / str(step))
    again, same = results(tmp_path / "resumed")
    of_the_moment = ("images_per_second", "data_wait_percent", "peak_memory_mib")
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    assert [{k: v for k, v in line.items() if k not in of_the_moment} for line in same] == [
        {k: v for k, v in line.items() if k not in of_the_moment} for line in lines
    ]

    capsys.readouterr()
    third, _ = results(tmp_path / "run")
    assert {**third, "seconds": 0} == {**summary, "seconds": 0}
    assert "training is complete at step 6" in capsys.readouterr().out
