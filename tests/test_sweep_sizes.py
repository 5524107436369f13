"""Every one of Table 1's 37 runs takes a training step at full size: `.venv/bin/pytest -m slow
tests/test_sweep_sizes.py`.

Each uses one image of noise with the largest padded shape of the config, 80 classes and the real optimizer; only the
batch is smaller than the paper's. Each run has its own process, so that its memory is freed.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from retina_jax.config import Config
from retina_jax.config_io import load_config
from retina_jax.sweeps.points import expand, load_sweep

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STEP = """
import json, sys, time
from pathlib import Path
import jax, numpy as np
from retina_jax.config_io import load_config, override
from retina_jax.data.transforms import buckets
from retina_jax.sweeps.points import expand, load_sweep
from retina_jax.training.parallel import Driver, peak_memory_bytes
from retina_jax.training.step import Inputs

sweep, name = Path(sys.argv[1]), sys.argv[2]
base = load_config("configs/paper_r50_600.py")
config = next(p.config for p in expand(sweep, load_sweep(sweep), base, (0,)) if p.name == name)
config = override(config, {"data.batch_size": 1, "devices": 1})
driver = Driver(config, 80)
height, width = max(buckets(config.data, (config.data.short_side,)), key=lambda shape: (shape[0] * shape[1], shape))
rng = np.random.default_rng(0)
corners = rng.uniform(0, [width / 2, height / 2], (1, config.data.max_boxes, 2))
boxes = np.concatenate([corners, corners + rng.uniform(30, min(height, width) / 2, corners.shape)], -1)
valid = np.arange(config.data.max_boxes) < 7
inputs = Inputs(
    rng.integers(0, 256, (1, height, width, 3), np.uint8), np.array([[height, width]], np.int32),
    (boxes * valid[None, :, None]).astype(np.float32), np.where(valid, 5, -1).astype(np.int32)[None], np.ones(1, bool),
)
state = driver.init_state()
begun = time.monotonic()
state, metrics = driver.step(state, driver.shard_batch(inputs))
found = {key: float(value) for key, value in jax.device_get(metrics).items()}
print(json.dumps({
    **found, "shape": [height, width], "step": int(state.step), "seconds": time.monotonic() - begun,
    "mib": peak_memory_bytes() / 2**20,
}))
"""


def distinct_runs() -> dict[str, Config]:
    """Returns the runs by the first name of each, such as "table1a alpha_0.10"."""
    base = load_config(ROOT / "configs" / "paper_r50_600.py")
    runs: dict[str, tuple[str, Config]] = {}
    for path in sorted((ROOT / "configs" / "sweeps").glob("table1?.py")):
        for point in expand(path, load_sweep(path), base, (0,)):
            runs.setdefault(point.folder, (f"{path.stem} {point.name}", point.config))
    return dict(runs.values())


RUNS = distinct_runs()


@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_table_1_takes_a_step_at_full_size(run: str) -> None:
    sweep, name = run.split()
    command = [sys.executable, "-c", STEP, f"configs/sweeps/{sweep}.py", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{run}: padded shape {found['shape']}, loss {found['loss']:.4f}, {found['seconds']:.0f} s, {found['mib']:.0f} MiB"
    )
    assert found["step"] == 1 and min(found["shape"]) >= RUNS[run].data.short_side
    assert all(math.isfinite(value) for value in found.values() if not isinstance(value, list)), found
    assert found["positives_per_image"] > 0 and found["classification_loss"] > 0 and found["box_loss"] > 0


def test_there_are_37_distinct_runs() -> None:
    assert len(RUNS) == 37
