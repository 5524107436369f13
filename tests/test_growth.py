"""Threads and memory of a training process over 2400 steps and 24 evaluations: `.venv/bin/pytest -m slow`."""

from __future__ import annotations

import itertools
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from small_runs import metrics, write_config

from retina_jax.paper.figures import LOOK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc"),
]
SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"
EVERY, LAST = 100, 2450  # an evaluation per 100 steps: 24 of them, 50 steps before the end
WARM = 400  # steps after which memory is compared


def sampled(config: Path, workdir: Path, *options: object) -> np.ndarray:
    """Trains in a process of its own; returns a row (step, threads, MB of resident memory) per new line of the metrics."""
    command = [sys.executable, SCRIPT, "--config", config, "--workdir", workdir, *options]
    rows: list[tuple[int, int, float]] = []
    with workdir.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log)
        while process.poll() is None:
            step = max((line["step"] for line in metrics(workdir)), default=0)
            if step > (rows[-1][0] if rows else 0):
                status = Path(f"/proc/{process.pid}/status").read_text()
                found = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", status, re.MULTILINE)}
                if "VmRSS" in found:  # not while it exits
                    rows.append((step, found["Threads"], found["VmRSS"] * 1024 / 1e6))
            time.sleep(0.02)
    assert process.returncode == 0, workdir.with_suffix(".log").read_text()
    return np.array(rows)


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the median slope of all pairs (Theil-Sen), on which single outliers have no effect."""
    return float(np.median([(y[j] - y[i]) / (x[j] - x[i]) for i, j in itertools.combinations(range(len(x)), 2)]))


def draw(path: Path, steps: np.ndarray, threads: np.ndarray, memory: np.ndarray, growth: float) -> None:
    with plt.rc_context(LOOK):
        figure, (upper, lower) = plt.subplots(2, sharex=True, figsize=(6, 4.2), layout="constrained")
        upper.plot(steps, threads, ".", markersize=3)
        upper.set(ylabel="threads", ylim=(0, 1.2 * threads.max()))
        lower.plot(steps, memory, ".", markersize=3)
        lower.set(
            ylabel="resident memory, MB", ylim=(0, 1.2 * memory.max()), xlabel=f"step (an evaluation every {EVERY})"
        )
        lower.set_title(f"{growth:+.1f} MB per 1000 steps after step {WARM}", fontsize=9)
        figure.savefig(path)
        plt.close(figure)


def test_threads_and_memory_do_not_grow(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """With `--plots FOLDER` it also draws what it measured."""
    options = {"steps": LAST, "eval_every": EVERY, "checkpoint_every": EVERY, "log_every": 10, "tensorboard": True}
    flags = [part for name, value in options.items() for part in (f"--training.{name.replace('_', '-')}", value)]
    steps, threads, memory = sampled(write_config(tmp_path), tmp_path / "run", *flags, "--data.workers", 8).T
    evaluations = [line["step"] for line in metrics(tmp_path / "run") if line["event"] == "evaluation"]
    assert evaluations == [*range(EVERY, LAST, EVERY), LAST] and len(evaluations) == 25
    first, last = (np.median(threads[(steps > at) & (steps <= at + 350)]) for at in (EVERY, LAST - 350))
    growth = 1000 * slope(steps[steps > WARM], memory[steps > WARM])
    print(f"threads: {first:.0f} from step {EVERY}, {last:.0f} up to step {LAST}; {growth:+.2f} MB per 1000 steps")
    if folder := request.config.getoption("--plots"):
        draw(Path(folder) / "threads_and_memory.png", steps, threads, memory, growth)
    assert last <= first + 2  # some come and go: of a save, of the watch for slow files
    assert growth < 5


PAGES = """
import resource
import jax, numpy as np
from retina_jax.cli import limit_heaps
from retina_jax.config import Config
from retina_jax.config_io import override
from retina_jax.training.parallel import Driver
from retina_jax.training.step import Inputs

limit_heaps()
small = {
    "model.backbone": "resnet18", "model.base_width": 16, "model.fpn_channels": 32, "model.head_channels": 32,
    "model.head_convs": 1, "model.frozen_stages": 0, "data.batch_size": 4, "devices": 1,
}
driver = Driver(override(Config(), small), 2)
inputs = driver.shard_batch(Inputs(
    images=np.zeros((4, 256, 256, 3), np.uint8), image_sizes=np.full((4, 2), 256, np.int32),
    boxes_xyxy=np.ones((4, 1, 4), np.float32), labels=np.zeros((4, 1), np.int32), valid=np.ones(4, bool),
))
state = driver.init_state()
program = driver.step.lower(state, inputs).compile()
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    state, metrics = jax.block_until_ready(program(state, inputs))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(program.memory_analysis().temp_size_in_bytes // resource.getpagesize(), *faults[3:])
"""


def test_temporaries_of_a_step_stay_in_the_process() -> None:
    """Larger blocks than glibc keeps would be mapped anew in each step, with a fault per page."""
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages, *faults = map(int, done.stdout.split())
    assert pages > 2**25 // resource.getpagesize()  # one block would be mapped
    assert sorted(faults)[len(faults) // 2] < pages / 20
