"""Checks one GPU in at most 8 minutes: scripts/device_check.sh --out FILE.json [--small]

Compares outputs, losses and gradients with the CPU of the machine, then times the training step and detection in bfloat16
alongside torchvision's, eager and compiled. It needs jax, flax, optax and jaxtyping, and torchvision for its rows. FILE is
written after each part, so an interrupted check keeps what it has. --small tries the script itself, on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.alternation import answer_of, ask, row_of, started
from benchmarks.inputs import COCO_BOXES
from benchmarks.variants import HERE, OURS, PEERS
from benchmarks.work import BenchmarkError, Task

ROOT = Path(__file__).parents[2]
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "numpy", "nvidia-cudnn-cu13", "torch", "torchvision")
EAGER, COMPILED = "torchvision", "torchvision.compiled"
COMPARE = "compare"
NETWORKS = {
    "r50_600": ("resnet50", "640x1024"),
    "x101_800": ("resnext101_32x8d", "832x1344"),
    "r50_800": ("resnet50", "832x1344"),
    "r101_800": ("resnet101", "832x1344"),
}
"""Name: backbone and padded shape; those that matter most first."""
PARTS = (COMPARE, *NETWORKS)
BATCHES = (16, 8, 4, 2)
REPETITIONS = 10

Key = tuple[str, str]  # benchmark and variant
Jobs = dict[Key, tuple[str, Task]]  # with the worker's module
Measured = dict[Key, tuple[dict[str, Any], list[dict[str, Any]]]]


class Check(NamedTuple):
    """What is run."""

    small: bool
    peers: tuple[str, ...]
    peer_python: str
    end: float
    """time.monotonic() at which workers are killed."""


def main() -> None:
    """Runs the parts until the time is over."""
    parser = argparse.ArgumentParser(
        prog="device_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=(), help="parts to run; default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit; later parts are left out (default 8)")
    parser.add_argument("--small", action="store_true", help="on the CPU, with ResNet-18 and tiny images; one network")
    parser.add_argument(
        "--peers", nargs="*", choices=(EAGER, COMPILED), default=(EAGER, COMPILED), help="default: both"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="Python interpreter with torchvision")
    options = parser.parse_args()
    # Workers share the device, so none may reserve its memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    begun = time.monotonic()
    check = Check(options.small, tuple(options.peers), options.peer_python, begun + 60 * options.minutes)
    report = {"small": check.small, "begun": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    report |= {"versions": versions(), "parts": {}}
    for name in options.only or (PARTS[:2] if check.small else PARTS):
        if time.monotonic() >= check.end:
            report["parts"][name] = {"errors": {name: f"not run: {options.minutes:g} minutes were over"}}
        else:
            start = time.monotonic()
            print(f"{name}: starting, {check.end - start:.0f} s left ...", flush=True)
            report["parts"][name] = {**run_part(name, check), "seconds": round(time.monotonic() - start, 1)}
        write(options.out, report)
    parts = report["parts"].items()
    failed = [f"{name}: {line}" for name, part in parts for line in part.get("errors", {}).values()]
    print("\n".join([*failed, f"{options.out}: {time.monotonic() - begun:.0f} s, {len(failed)} errors"]))
    sys.exit(1 if failed else 0)


def task_of(name: str, part: str, check: Check, batch: int) -> Task:
    """Returns the work of one repetition of step or detect, or the comparison."""
    backbone, size = NETWORKS.get(part, ("resnet50", "256x320"))
    if check.small:
        backbone, size, batch = "resnet18", "64", min(batch, 2)
    sizes = {"rows": 0, "classes": 80, "boxes": COCO_BOXES, "kept": 300, "detections": 0, "cores": 0}
    device = "cpu" if check.small else "gpu"
    return Task(name, size, batch, backbone, dtype="bfloat16", images="", annotations="", device=device, **sizes)


def run_part(part: str, check: Check) -> dict[str, Any]:
    """Returns the figures of a part: of the largest batch that fits, for a network."""
    if part == COMPARE:
        task = replace(task_of("step", part, check, batch=2), dtype="float32")
        made, errors = measured({(COMPARE, HERE): ("benchmarks.devices", task)}, check, repetitions=0)
        return errors or made[COMPARE, HERE][0]["facts"]
    for batch in BATCHES:
        tasks = {name: task_of(name, part, check, batch) for name in ("step", "detect")}
        jobs = {(name, peer): (PEERS[peer], task) for name, task in tasks.items() for peer in check.peers}
        jobs |= {(name, HERE): (OURS[name], task) for name, task in tasks.items()}
        made, errors = measured(jobs, check, REPETITIONS)
        if not any("memory" in errors.get("errors", {}).get(f"{name} {HERE}", "") for name in tasks):
            break
    rows = [row_of(jobs[key][1], key[1], *figures) for key, figures in made.items()]
    ours = {row["name"]: row["wall_ms"] for row in rows if row["variant"] == HERE}
    for row in rows:
        row["wall_ratio"] = row["wall_ms"] / ours[row["name"]] if row["name"] in ours else None
        print("  {name} {variant}: {wall_ms:.1f} ms, {images_per_second:.1f} images/s".format(**row), flush=True)
    return {"rows": rows, **errors}


def measured(jobs: Jobs, check: Check, repetitions: int) -> tuple[Measured, dict[str, Any]]:
    """Starts a worker per job, and runs the repetitions of all in turn; those of torch.compile last, so that they are not
    waited for. Returns, by job, the worker's answer and the figures of its repetitions; and {"errors": ...} of the jobs that
    failed, {} if none did. At the end of the time the workers are killed."""
    workers: dict[Key, subprocess.Popen[str]] = {}
    answers: dict[Key, dict[str, Any]] = {}
    figures: dict[Key, list[dict[str, Any]]] = {key: [] for key in jobs}
    errors: dict[str, str] = {}

    def kill() -> None:
        for worker in [*workers.values()]:
            worker.kill()

    def tried(key: Key, call: Callable[..., Any]) -> Any:
        try:
            return call(key[1], workers[key])
        except BenchmarkError as error:
            errors[" ".join(key)] = f"{error} (the time was over)" if time.monotonic() >= check.end else str(error)

    with ExitStack() as stack:
        timer = threading.Timer(check.end - time.monotonic(), kill)
        timer.start()
        stack.callback(timer.cancel)
        # The peers first: torch compiles on the CPU while JAX tries kernels on the device, one program at a time.
        for key in sorted(jobs, key=lambda key: key[1] == HERE):
            if time.monotonic() < check.end:
                python = sys.executable if key[1] == HERE else check.peer_python
                workers[key] = stack.enter_context(started(key[1], *jobs[key], python))
                if key[1] == HERE:
                    answers[key] = tried(key, answer_of)
        for wave in ((HERE, EAGER), (COMPILED,)):
            keys = [key for key in workers if key[1] in wave]
            answers |= {key: tried(key, answer_of) for key in keys if key not in answers}
            for _ in range(repetitions):
                for key in keys:
                    if " ".join(key) not in errors and (figure := tried(key, ask)):
                        figures[key].append(figure)
    complete = {key: (answers[key], figures[key]) for key in workers if " ".join(key) not in errors}
    return complete, {"errors": errors} if errors else {}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of PACKAGES, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str | None:
    """Returns the commit of this checkout; None without git."""
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def write(path: Path, report: dict[str, Any]) -> None:
    """Replaces the file at once, so that it is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
