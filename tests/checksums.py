"""Compares training between two commits: the parameters of tiny runs, to the last bit, on this machine.

    python tests/checksums.py OLD NEW

Checks out each commit into a temporary folder, trains every variant of the step for a few steps on two CPU devices, and
compares `parameters_sha256` of summary.json. Exits with 1 if a variant differs.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = """
--data.scenes.train-images 16 --data.scenes.val-images 4 --data.scenes.size 64 --data.scenes.max-side 40
--data.short-side 64 --data.long-side 64 --data.batch-size 8
--model.backbone resnet50 --model.base-width 8 --model.stage-blocks 1 1 1 1
--model.fpn-channels 16 --model.head-channels 16 --model.head-convs 1
--training.steps 4 --training.pictures 0 --training.no-tensorboard
"""
VARIANTS = {
    "jit": "",
    "pmap": "--parallel pmap",
    "accumulate": "--training.accumulate 2",
    "ema": "--optimizer.ema-decay 0.9",
    "norm group": "--model.norm group --model.head-norm group",
    "norm batch": "--model.norm batch",
    "normaliser per_image": "--loss.normaliser per_image",
    "normaliser per_device": "--loss.normaliser per_device",
    "normaliser ema": "--loss.normaliser ema",
    "focal_star": "--loss.kind focal_star --loss.star-beta 1",
    "ohem_1_3": "--loss.kind cross_entropy --loss.mining ohem_1_3 --loss.mining-batch 32",
    "giou, adamw": "--loss.box giou --optimizer.name adamw",
    "bfloat16, remat": "--model.dtype bfloat16 --model.remat",
    "ResNeXt": "--model.backbone resnext101_32x8d --model.base-width 8",
}


def checksum(tree: Path, name: str, folder: Path) -> str:
    """Trains one variant with the code in `tree` and returns the checksum of its parameters."""
    workdir = folder / name.replace(" ", "_").replace(",", "")
    scenes = str(folder / "scenes")
    command = [sys.executable, str(tree / "scripts" / "train.py"), "--config", str(tree / "configs" / "demo.py")]
    command += ["--workdir", str(workdir), "--data.scenes.folder", scenes, *TINY.split(), *VARIANTS[name].split()]
    environment = {**os.environ, "PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    subprocess.run(command, check=True, cwd=tree, env=environment, stdout=subprocess.DEVNULL)
    return json.loads((workdir / "summary.json").read_text())["parameters_sha256"]


def main(old: str, new: str) -> int:
    """Prints one line per variant. Returns 1 if a checksum differs."""
    differ = 0
    with tempfile.TemporaryDirectory() as temporary:
        trees = [Path(temporary) / "old", Path(temporary) / "new"]
        for tree, commit in zip(trees, (old, new), strict=True):
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], check=True, cwd=ROOT)
        try:
            for name in VARIANTS:
                before, after = (checksum(tree, name, tree / "runs" / "checksums") for tree in trees)
                differ += before != after
                print(f"{name:22} {before[:16]} {after[:16]} {'equal' if before == after else 'DIFFERENT'}", flush=True)
        finally:
            for tree in trees:
                subprocess.run(["git", "worktree", "remove", "--force", tree], check=True, cwd=ROOT)
    return int(differ > 0)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
