"""Tests on real data and at full size that take minutes: `.venv/bin/pytest -m slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def train(workdir: Path, config: str, *overrides: object) -> dict:
    """Runs a training; returns its summary."""
    command = [sys.executable, "scripts/train.py", "--config", f"configs/{config}.py", "--workdir", str(workdir)]
    subprocess.run([*command, *map(str, overrides)], cwd=ROOT, check=True)
    return json.loads((workdir / "summary.json").read_text())


def test_the_demo_reaches_ap_40_on_held_out_scenes(tmp_path: Path) -> None:
    summary = train(tmp_path / "run", "demo", "--data.scenes.folder", tmp_path / "scenes")
    assert summary["evaluation"]["AP"] >= 0.40


def test_own_data_reaches_ap50_70_on_blood_cells(tmp_path: Path, shared_data: Path) -> None:
    """Runs the command of docs/results/bccd.md."""
    bccd = shared_data / "bccd"
    page = (ROOT / "docs/results/bccd.md").read_text()
    command = page.split("```")[1].replace("\\\n", " ").split("--workdir")[1].split()[1:]
    overrides = [word.replace("data/bccd", str(bccd)) for word in command]
    summary = train(tmp_path / "run", "own_data", *overrides)
    assert summary["evaluation"]["images"] == 72
    assert summary["evaluation"]["AP50"] >= 0.70


def test_the_papers_default_runs_at_full_size(tmp_path: Path, shared_data: Path) -> None:
    """R50, 600 px, 80 classes, two real COCO images per step: finite losses and an evaluation of 8 images."""
    coco = shared_data / "coco_subset"
    summary = train(
        tmp_path / "run", "paper_r50_600", "--training.steps", 3, "--training.log-every", 1, "--data.batch-size", 2,
        "--training.eval-images", 8, "--devices", 1,
        "--data.train-annotations", coco / "annotations/instances_train2017.json", "--data.train-images", coco / "train2017",
        "--data.val-annotations", coco / "annotations/instances_val2017.json", "--data.val-images", coco / "val2017",
    )  # fmt: skip
    assert summary["steps"] == 3 and summary["evaluation"]["images"] == 8


def test_the_papers_orderings_hold_in_miniature(tmp_path: Path) -> None:
    """Checks those of docs/results/mini.md that exceed the standard deviation over seeds by far. It takes about ten
    minutes on two cores."""
    backbone = ("--model.backbone-weights", tmp_path / "resnet18.safetensors")
    subprocess.run([sys.executable, "scripts/pretrain.py", *map(str, backbone)], cwd=ROOT, check=True)
    sweeps = [f"configs/sweeps/{name}.py" for name in ("table1a", "table1b", "table1c", "table3")]
    names = ("alpha_0.999", "gamma_0.0", "gamma_2.0", "focal_star_2.0_1.0", "scales_1_ratios_1")
    command = [
        sys.executable, "scripts/sweep.py", "--base", "configs/mini.py", "--workdir", tmp_path / "runs", "--jobs", 2,
        "--sweep", *sweeps, "--only", *names, *backbone, "--data.scenes.folder", tmp_path / "scenes",
    ]  # fmt: skip
    subprocess.run([*map(str, command)], cwd=ROOT, check=True)
    points = [p for file in (tmp_path / "runs/sweeps").glob("*.json") for p in json.loads(file.read_text())["points"]]
    found = {
        p["name"]: 100 * json.loads((tmp_path / "runs" / p["folder"] / "summary.json").read_text())["evaluation"]["AP"]
        for p in points
        if p["name"] in names
    }
    assert found["gamma_2.0"] - found["gamma_0.0"] > 1, found
    assert found["gamma_0.0"] - found["alpha_0.999"] > 10, found
    assert abs(found["gamma_2.0"] - found["focal_star_2.0_1.0"]) < 2, found
    assert found["gamma_2.0"] - found["scales_1_ratios_1"] > 2, found
