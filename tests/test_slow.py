"""Minutes-long proofs on real data and at full size: `.venv/bin/pytest -m slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def train(workdir: Path, config: str, *overrides: object) -> dict:
    """The summary of a training run."""
    command = [sys.executable, "scripts/train.py", "--config", f"configs/{config}.py", "--workdir", str(workdir)]
    subprocess.run([*command, *map(str, overrides)], cwd=ROOT, check=True)
    return json.loads((workdir / "summary.json").read_text())


def test_the_demo_reaches_ap_40_on_scenes_never_trained_on(tmp_path: Path) -> None:
    summary = train(tmp_path / "run", "demo", "--data.scenes.folder", tmp_path / "scenes")
    assert summary["evaluation"]["AP"] >= 0.40


def test_own_data_reaches_ap50_70_on_blood_cells(tmp_path: Path, shared_data: Path) -> None:
    """The command of docs/results/bccd.md."""
    bccd = shared_data / "bccd"
    page = (ROOT / "docs/results/bccd.md").read_text()
    command = page.split("```")[1].replace("\\\n", " ").split("--workdir")[1].split()[1:]
    overrides = [word.replace("../shared/data/bccd", str(bccd)) for word in command]
    summary = train(tmp_path / "run", "own_data", *overrides)
    assert summary["evaluation"]["images"] == 72
    assert summary["evaluation"]["AP50"] >= 0.70


def test_the_papers_default_runs_at_full_size(tmp_path: Path, shared_data: Path) -> None:
    """R50, 600 px, 80 classes, two images a step on real COCO images; finite losses and an evaluation of 8 images."""
    coco = shared_data / "coco_subset"
    summary = train(
        tmp_path / "run", "paper_r50_600", "--training.steps", 3, "--training.log-every", 1, "--data.batch-size", 2,
        "--training.eval-images", 8, "--devices", 1,
        "--data.train-annotations", coco / "annotations/instances_train2017.json", "--data.train-images", coco / "train2017",
        "--data.val-annotations", coco / "annotations/instances_val2017.json", "--data.val-images", coco / "val2017",
    )  # fmt: skip
    assert summary["steps"] == 3 and summary["evaluation"]["images"] == 8
