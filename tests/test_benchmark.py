"""The benchmark measures the variants in turn, and names a variant that it cannot measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
from benchmarks import device_check, network, worker
from benchmarks.alternation import measure
from benchmarks.inputs import candidates, class_outputs, scene
from benchmarks.table import table
from benchmarks.variants import OURS, PEERS
from benchmarks.work import BENCHMARKS, BenchmarkError, Task
from benchmarks.worker import WARM_UP

from retina_jax.config import Config
from retina_jax.config_io import override

ROOT = Path(__file__).parents[1]
TASK = Task(
    name="nms",
    size="64",
    batch=1,
    backbone="resnet18",
    dtype="float32",
    rows=200,
    classes=3,
    boxes=7,
    kept=20,
    images="",
    annotations="",
    detections=0,
    device="cpu",
    cores=1,
)


def variant(folder: Path, name: str, body: str) -> str:
    """Writes a module that workers can import; returns its name."""
    (folder / f"{name}.py").write_text(f"from benchmarks.work import Work\n{body}")
    return name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_variants_take_turns_after_their_warm_up(folder: Path) -> None:
    log = folder / "log"
    body = (
        "def run():\n    with open({log!r}, 'a') as f: f.write({name!r})\n"
        "def make(task): return Work(run, images=4, flops=10**9, facts={{'matmul_tflops': 2.0, 'rows': task.rows}})\n"
    )
    variants = {name: variant(folder, f"v_{name}", body.format(log=str(log), name=name)) for name in "abc"}
    rows = measure(TASK, variants, 4)
    warm_up, measured = log.read_text()[: 3 * WARM_UP], log.read_text()[3 * WARM_UP :]
    assert measured == "abc" * 4 and sorted(warm_up) == sorted("abc" * WARM_UP)
    assert [row["variant"] for row in rows] == ["a", "b", "c"]
    for row in rows:
        assert row["repetitions"] == 4 and row["rows"] == 200
        assert row["ratio"] == row["cpu_ms"] / rows[0]["cpu_ms"]
        assert row["images_per_second"] == pytest.approx(4000 / row["wall_ms"])
        assert row["share_of_matmul"] == pytest.approx(1 / row["wall_ms"] / 2)
    assert rows[0]["ratio"] == rows[0]["wall_ratio"] == 1


def test_time_and_peak_memory_are_measured_per_variant(folder: Path) -> None:
    waiting = variant(folder, "waiting", "import time\ndef make(task): return Work(lambda: time.sleep(0.2))\n")
    working = variant(
        folder, "working", "def make(task): return Work(lambda: (sum(range(5_000_000)), bytearray(300 * 2**20)))\n"
    )
    rested, worked = measure(TASK, {"waiting": waiting, "working": working}, 3)
    assert rested["wall_ms"] >= 200 and rested["cpu_ms"] < 100 < 1e5 * worked["cpu_ms"]
    assert worked["peak_mib"] > 300 > rested["peak_mib"]
    assert worked["ratio"] > 1


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("import not_there\n", "b: No module named 'not_there'"),
        (
            "from benchmarks.work import BenchmarkError\ndef make(task): raise BenchmarkError('no')\n",
            "b: no",
        ),
        ("def make(task): raise SystemExit(3)\n", "b: its process ended with status 3"),
        ("def make(task): raise RuntimeError('CUDA out of memory. Tried to')\n", "b: CUDA out of memory"),
        (
            "import os\ndef make(task): return Work(lambda n=[]: n.append(0) or len(n) < 4 or os._exit(9))\n",
            "b: its proc",
        ),
    ],
)
def test_a_variant_that_cannot_run_is_named(folder: Path, body: str, line: str) -> None:
    good = variant(folder, "good", "def make(task): return Work(lambda: None)\n")
    with pytest.raises(BenchmarkError, match=line):
        measure(TASK, {"a": good, "b": variant(folder, "bad", body)}, 5)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_a_gpu_that_is_missing_is_one_line_before_anything_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], library: str
) -> None:
    """JAX raises an error if JAX_PLATFORMS excludes the devices that it finds. torch is a small stand-in."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    if library == "torch":
        (folder / "torch.py").write_text("class cuda:\n    def is_available(): return False\n")
    body = f"import {library}, pathlib\ndef make(task): pathlib.Path(__file__).with_name('made').touch()\n"
    found = {
        "torch": "--device gpu: no GPU is found here",
        "jax": "JAX_PLATFORMS=cuda: JAX finds no such device here .*",
    }
    with pytest.raises(BenchmarkError, match=f"^a: {found[library]}; --device cpu times the CPU$"):
        measure(replace(TASK, device="gpu"), {"a": variant(folder, "on_gpu", body)}, 2)
    assert not (folder / "made").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_a_gpu_is_looked_for_by_the_library_of_the_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert worker.has_gpu() == (backend == "gpu")
    monkeypatch.delitem(sys.modules, "jax")  # as in a variant without either library
    assert not worker.has_gpu()


@pytest.mark.slow
def test_a_device_check_that_runs_out_of_time_loses_only_the_variant_it_waits_for(folder: Path) -> None:
    good = variant(folder, "good", "def make(task): return Work(lambda: None, images=2)\n")
    endless = variant(folder, "endless", "import time\ndef make(task): time.sleep(600)\n")
    jobs = {("step", device_check.HERE): (good, TASK), ("step", device_check.COMPILED): (endless, TASK)}
    check = device_check.Check(True, (device_check.COMPILED,), sys.executable, time.monotonic() + 5)
    made, errors = device_check.measured(jobs, check, 2)
    ((key, (answer, figures)),) = made.items()
    assert key == ("step", "retina_jax") and answer["images"] == 2 and len(figures) == 2
    assert "the time was over" in errors["errors"]["step torchvision.compiled"]


@pytest.mark.slow
def test_the_device_check_compares_and_times_on_the_cpu(tmp_path: Path) -> None:
    """--small, with quick compilation; the networks agree up to rounding."""
    command = [
        ROOT / "scripts" / "device_check.sh",
        "--small",
        "--peers",
        "--out",
        tmp_path / "out.json",
    ]
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHON": sys.executable}
    done = subprocess.run(command, env=os.environ | quick, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["versions"]["jax"] == jax.__version__
    for row in report["parts"]["compare"]["rows"]:
        most = 0.05 if row["precision"] == "bfloat16" else 1e-4
        assert max(row["outputs"], row["losses"], row["gradients"]) < most
        assert row["worst_gradient"] > 0 and row["matches"] == 0
    rows = report["parts"]["r50_600"]["rows"]
    assert [row["name"] for row in rows] == ["step", "detect"]
    assert all(min(row["wall_ms"], row["program_mib"], row["peak_mib"], row["tflops"]) > 0 for row in rows)


def test_every_benchmark_has_a_module_and_every_module_exists() -> None:
    assert set(OURS) == set(BENCHMARKS)
    for module in {*OURS.values(), *PEERS.values()}:
        assert (ROOT / "scripts" / f"{module.replace('.', '/')}.py").is_file(), module


def test_the_script_prints_one_json_object_per_line() -> None:
    done = processes.run("benchmark", "nms", "--rows", "200", "--kept", "20", "--repetitions", "2", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, done.stdout.splitlines())
    assert row["name"] == "nms" and row["variant"] == "retina_jax" and row["kept"] == 20 and row["ratio"] == 1
    assert {"size", "batch", "cpu_ms", "wall_ms", "peak_mib", "hardware", "repetitions"} <= row.keys()


def test_an_invalid_option_ends_in_one_line() -> None:
    for arguments, named in {
        ("nms", "--peer", "optax", "--rows", "50"): "optax: ",
        ("nms", "--size", "big"): "--size big",
        ("step", "--batch", "0"): "--batch 0",
    }.items():
        done = processes.run("benchmark", *arguments)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {named}") and done.stderr.count("\n") == 1


def test_a_table_has_one_line_per_variant_and_no_empty_columns() -> None:
    row = {"name": "nms", "hardware": "a machine", "cpu_ms": 1234.5, "wall_ms": 2.0, "ratio": 1.0, "tflops": None}
    lines = table([row | {"variant": "retina_jax"}, row | {"variant": "torchvision", "peak_mib": 3.25}]).splitlines()
    assert len(lines) == 4 and "a machine" in lines[0] and "TFLOP/s" not in lines[1]
    assert lines[2].split() == ["retina_jax", "1234", "1", "2"] and lines[3].split() == [
        "torchvision",
        "1234",
        "1",
        "2",
        "3.25",
    ]


@pytest.mark.slow
def test_operations_of_a_training_step_equal_the_count_by_hand() -> None:
    """Counted by hand for R50 at 256 x 256 with stem and C2 frozen: 43.4 GMAC, of which 15.3 in the forward pass."""
    task = replace(TASK, name="step", size="256", backbone="resnet50", classes=80)
    driver = network.Driver(network.config_of(task), 80)
    step = network.step_flops(driver, driver.init_state(), network.inputs_of(task))
    assert step / 2e9 == pytest.approx(43.4, rel=0.01)
    assert network.forward_flops(driver.config, 80, (256, 256)) / 2e9 == pytest.approx(15.3, rel=0.01)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the network an eighth as wide, with fewer layers, so that it compiles and runs faster."""
    small = {
        "model.base_width": 8, "model.stage_blocks": (1, 1, 1, 1), "model.min_level": 4, "model.max_level": 5,
        "model.fpn_channels": 32, "model.head_channels": 32, "model.head_convs": 1,
    }  # fmt: skip
    of_task = network.config_of
    monkeypatch.setattr(network, "config_of", lambda task: override(of_task(task), small))


@pytest.mark.parametrize("name", [pytest.param("step", marks=pytest.mark.slow), "forward", "detect"])
def test_the_networks_benchmarks_run(name: str, narrow: None) -> None:
    work = network.make(replace(TASK, name=name, batch=2))
    work.run()
    assert work.images == 2 and work.flops > 1e7 and work.facts["matmul_tflops"] > 0


def test_the_benchmark_of_compilation_reports_the_size_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a trivial step; the tests' own compilation cache is used again afterwards."""

    class Trivial:
        config, num_classes = Config(), 3

        def __init__(self, *arguments: object) -> None:
            self.step = jax.jit(lambda state, inputs: state + inputs)

        def init_state(self) -> jax.Array:
            return jax.numpy.ones(1 << 20, "float32")

    monkeypatch.setattr(network, "Driver", Trivial)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        work = network.compile_step(TASK, Trivial(), Trivial().init_state())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert work.facts["programs"] >= 1 and work.facts["program_mib"] == pytest.approx(12, abs=0.1)


def test_detection_has_the_declared_number_of_scores_above_the_threshold(narrow: None) -> None:
    task = replace(TASK, name="detect", size="128")
    driver = network.Driver(network.config_of(task), 3)
    variables = network.variables_with_scores(driver, driver.shard_batch(network.inputs_of(task)), 1)
    logits, _ = jax.jit(driver.model.apply)(variables, *driver.shard_batch(network.inputs_of(task))[:2])
    assert (jax.nn.sigmoid(logits) >= 0.0499).sum() == pytest.approx(network.SCORES_ABOVE, abs=2)


def test_inputs_are_realistic_and_reproducible() -> None:
    made = scene(2, (96, 128), 5, 4, seed=3)
    assert made.images.shape == (2, 96, 128, 3) and made.images.std() > 50
    sides = made.boxes_xyxy[..., 2:] - made.boxes_xyxy[..., :2]
    assert (
        (sides > 0).all() and (made.boxes_xyxy >= 0).all() and (made.boxes_xyxy <= [128.01, 96.01, 128.01, 96.01]).all()
    )
    assert all(np.array_equal(a, b) for a, b in zip(made, scene(2, (96, 128), 5, 4, seed=3), strict=True))
    logits, labels = class_outputs(20_000, 6, 0)
    assert 0.002 < (labels >= 0).mean() < 0.01 < (labels < -1).mean() + 0.005 and logits.mean() == pytest.approx(
        -4.6, abs=0.1
    )
    boxes = candidates(500, 80, 0)
    assert len(np.unique(boxes.labels)) > 30 and (boxes.scores > 0).all() and (boxes.scores < 1).all()
