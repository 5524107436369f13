"""The changes in docs/extending.md are applied to a copy of the package, compared with formulas, and trained."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "extending.md").read_text()
DIFFS = re.findall(r"^```diff\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
SWEEP = re.search(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)[1]
TINY = shlex.split("""
--data.scenes.train-images 8 --data.scenes.val-images 4 --data.batch-size 4 --data.short-side 64 --data.long-side 64
--data.scenes.size 64 --data.scenes.min-side 16 --data.scenes.max-side 40 --model.base-width 8 --training.steps 2
--model.stage-blocks 1 1 1 1 --model.min-level 4 --model.max-level 5 --model.fpn-channels 16 --model.head-channels 16
--model.head-convs 1 --model.norm frozen --training.log-every 1 --training.eval-every -1 --training.no-tensorboard
""")
LOGITS = np.array([-20.0, -3.0, -0.5, 0.0, 0.5, 3.0, 20.0])
PROBE = """
import json, sys
import jax, jax.numpy as jnp
from retina_jax.config import ConfigError, LossConfig, ModelConfig
from retina_jax.losses.focal import classification_loss
from retina_jax.model.resnet import ResNet
from retina_jax.weights.importing import with_backbone
import retina_jax

logits = jnp.array(json.loads(sys.argv[1]), jnp.float32)[:, None]
answers = {"package": retina_jax.__file__}
for label in (0, -1, -2):
    labels = jnp.full(len(logits), label)
    loss = classification_loss(LossConfig(kind="poly_focal", alpha=0.3, gamma=1.5, poly_epsilon=2.0))
    answers[str(label)] = [
        loss(logits, labels)[:, 0].tolist(),
        jax.grad(lambda logits: loss(logits, labels).sum())(logits)[:, 0].tolist(),
    ]
config = ModelConfig(backbone="resnet26")
shapes = jax.eval_shape(ResNet(config).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
answers["kernels"] = sum(a.size for a in jax.tree.leaves(shapes) if len(a.shape) == 4)
try:
    with_backbone({}, ModelConfig("resnet26", backbone_weights="imagenet", input_normalisation="imagenet"))
except ConfigError as error:
    answers["refused"] = str(error)
print(json.dumps(answers))
"""
TRAIN_AND_LIST = """
import runpy, sys

given = sys.argv[1:]
sys.path.insert(0, "scripts")
for last in (["--index", "3"], ["--list"]):
    sys.argv = ["scripts/sweep.py", *given, *last]
    try:
        runpy.run_path("scripts/sweep.py", run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of the package with the additions of the guide."""
    folder = tmp_path_factory.mktemp("extended")
    for part in ("retina_jax", "scripts", "configs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for diff in DIFFS:
        apply_by_lines(folder, diff)
    (folder / "poly.py").write_text(SWEEP)
    return folder


def apply_by_lines(folder: Path, diff: str) -> None:
    """Applies a diff whose hunks have no line numbers, which would change with every edit. The old lines of each hunk
    must occur exactly once in the file."""
    for target, hunks in re.findall(r"^--- a/\S+\n\+\+\+ b/(\S+)\n(.*?)(?=^--- a/|\Z)", diff, re.MULTILINE | re.DOTALL):
        text = (folder / target).read_text()
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] or "\n" for line in lines if line[0] in " -\n")
            new = "".join(line[1:] or "\n" for line in lines if line[0] in " +\n")
            assert text.count(old) == 1, f"{target} has {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
        (folder / target).write_text(text)


def run(folder: Path, *command: str) -> str:
    """Runs a command in the copy, with its package; returns what it prints."""
    environment = os.environ | {
        "PYTHONPATH": str(folder),
    }
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_addition_is_under_twenty_lines() -> None:
    assert len(DIFFS) == 2
    for diff in DIFFS:
        assert 0 < sum(line[0] == "+" and line[:3] != "+++" for line in diff.splitlines()) < 20
    assert len(SWEEP.splitlines()) < 20


def poly(x_t: np.ndarray, weight: float) -> np.ndarray:
    """Computes the guide's formula in float64."""
    p_t, q_t = 1 / (1 + np.exp(-x_t)), 1 / (1 + np.exp(x_t))
    return weight * (-(q_t**1.5) * np.log(p_t) + 2.0 * q_t**2.5)


def test_the_backbone_and_the_loss_of_the_guide_are_correct(extended: Path) -> None:
    answers = json.loads(run(extended, "-c", PROBE, json.dumps(LOGITS.tolist())).splitlines()[-1])
    assert Path(answers["package"]).is_relative_to(extended)
    assert "resnet26" in answers["refused"] and "\n" not in answers["refused"]
    for label, sign, weight in (("0", 1, 0.3), ("-1", -1, 0.7), ("-2", 1, 0.0)):
        value, gradient = answers[label]
        x, step = sign * LOGITS, 1e-4
        np.testing.assert_allclose(value, poly(x, weight), rtol=2e-5, atol=1e-9)
        slope = sign * (poly(x + step, weight) - poly(x - step, weight)) / (2 * step)
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-9)
    # timm's resnet26 has 15,995,176 parameters: 2,049,000 of the classifier, two for each of 15,424 channels of the norms.
    assert answers["kernels"] == 15_995_176 - 2_049_000 - 2 * 15_424


def test_the_sweep_lists_its_points_and_trains_the_new_backbone_with_the_new_loss(extended: Path) -> None:
    listed = run(extended, "-c", TRAIN_AND_LIST, "--sweep", "poly.py", "--workdir", "runs/poly", *TINY)
    assert re.findall(r"^\d  +(\w+)  +(\w+)", listed, re.MULTILINE) == [
        ("resnet18_focal", "waiting"),
        ("resnet18_poly_focal", "waiting"),
        ("resnet26_focal", "waiting"),
        ("resnet26_poly_focal", "done"),
    ]
    (metrics,) = extended.glob("runs/poly/*/metrics.jsonl")
    losses = [line["loss"] for line in map(json.loads, metrics.read_text().splitlines()) if line["event"] == "train"]
    assert len(losses) == 2 and np.isfinite(losses).all()
