"""Sweeps by the script in real processes: failed, killed, restarted, run in parallel; most tests replace training by a
stand-in."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import processes
import pytest
from processes import Process

from retina_jax.cli import one_line_errors
from retina_jax.sweeps.points import read_manifest

ROOT = Path(__file__).parents[1]
TINY = """
from retina_jax.config import *

def get_config():
    return Config(
        data=DataConfig(source="scenes", batch_size=2, short_side=64, long_side=64, max_boxes=8,
            scenes=ScenesConfig(folder={scenes!r}, train_images=20, val_images=4, size=64, classes=3, max_side=30.0)),
        model=ModelConfig(backbone="resnet18", base_width=4, stage_blocks=(1, 1, 1, 1), norm="frozen",
            frozen_stages=0, min_level=4, max_level=5, fpn_channels=8, head_channels=8, head_convs=1),
        anchors=AnchorConfig(size_factor=1.0),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=4, boundaries=(9,), clip_norm=3.0),
        training=TrainingConfig(steps=3, log_every=1, eval_every=0, checkpoint_every=1, pictures=0, tensorboard=False),
        devices=1,
    )
"""
# Replaces scripts/train.py: takes a moment, writes the files of a run, and records each call.
STAND_IN = """
import os, time
from pathlib import Path
from retina_jax.config import ConfigError
from retina_jax.training.metrics import NonFiniteLoss
from retina_jax.runs.files import write_json

def train(config, folder):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {})
    with (folder.parent / "calls.txt").open("a") as calls:
        calls.write(folder.name + "\\n")
    if config.loss.gamma == 0.5 and not (folder.parent / "fixed").exists():
        raise ConfigError("this one always fails")
    if config.loss.gamma == 9.0:
        raise NonFiniteLoss("box_loss is inf at step 2 (seen in the window 1 to 4), images 5")
    until = time.monotonic() + float(os.environ.get("SECONDS_A_POINT", 0.2))
    while time.monotonic() < until or (folder.parent / "hold").exists():
        time.sleep(0.02)
    summary = {"steps": config.training.steps, "seconds": 1.0, "evaluation": {"AP": 0.5}, "images": 0}
    write_json(folder / "summary.json", {**summary, "parameters_sha256": ""})
"""
OWN = """
def get_sweep(base):
    return {f"gamma_{gamma}": {"loss.gamma": gamma} for gamma in (1.0, 2.0, 0.5, 9.0)}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Writes a copy of scripts/sweep.py, a stand-in for train.py, a small base config and a sweep."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "sweep.py", tmp_path / "scripts")
    (tmp_path / "scripts" / "train.py").write_text(STAND_IN)
    # The real tensorboardX imports torch if it is installed, which takes seconds in each process.
    (tmp_path / "scripts" / "tensorboardX.py").write_text("SummaryWriter = None\n")
    (tmp_path / "tiny.py").write_text(TINY.format(scenes=str(tmp_path / "scenes")))
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def words(folder: Path, arguments: Sequence[object], files: Sequence[Path]) -> list[str]:
    given = ["--sweep", *(files or [folder / "own.py"]), "--base", folder / "tiny.py", "--workdir", folder / "runs"]
    return list(map(str, [*given, *arguments]))


class Started(NamedTuple):
    """The script in its own process and session, and its output files."""

    process: Process
    out: Path
    error: Path

    def ended(self, within: float) -> tuple[int, str, str]:
        """Returns exit status, standard output and standard error."""
        return self.process.wait(within), self.out.read_text(), self.error.read_text()


def start(folder: Path, *arguments: object, seconds: float = 0.2, scripts: Path | None = None) -> Started:
    printed = Path(tempfile.mkdtemp(dir=folder))
    with (printed / "out").open("w") as out, (printed / "error").open("w") as error:
        process = processes.start(
            (scripts or folder / "scripts") / "sweep.py",
            *words(folder, arguments, ()),
            stdout=out,
            stderr=error,
            environment={"SECONDS_A_POINT": str(seconds)},
            own_session=True,
        )
    return Started(process, printed / "out", printed / "error")


Sweep = Callable[..., str]


@pytest.fixture
def sweep(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sweep:
    """Runs the script in this process, which saves the time of its imports; the script starts real processes
    nevertheless."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*arguments: object, code: int = 0, files: Sequence[Path] = (), scripts: Path | None = None) -> str:
        place = scripts or folder / "scripts"
        for name in ("sweep", "train"):
            spec = importlib.util.spec_from_file_location(name, place / f"{name}.py")
            monkeypatch.setitem(sys.modules, name, importlib.util.module_from_spec(spec))
            if name == "sweep" or place != ROOT / "scripts":
                spec.loader.exec_module(sys.modules[name])
        monkeypatch.setattr(sys, "argv", [str(place / "sweep.py"), *words(folder, arguments, files)])
        capsys.readouterr()
        try:
            with one_line_errors():
                found = sys.modules["sweep"].main()
        except SystemExit as end:
            found = end.code
        out, error = capsys.readouterr()
        assert found == code, f"exit {found}\n{out}\n{error}"
        return error if code == 2 else out

    return run


def until(holds: Callable[[], bool], started: Started | None = None, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert started is None or started.process.poll() is None, started.ended(0)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def calls(folder: Path) -> list[str]:
    """Returns the folders that were trained in, in order, one entry per call."""
    path = folder / "runs" / "calls.txt"
    return path.read_text().split() if path.exists() else []


def folders(folder: Path) -> dict[str, str]:
    points = read_manifest(folder / "runs" / "sweeps" / "own.json")["points"]
    return {point["name"]: point["folder"] for point in points}


def line_of(point: str, said: str) -> str:
    """Returns the last line about a point."""
    return next(line for line in reversed(said.splitlines()) if re.search(rf"\b{re.escape(point)}\b", line))


def test_the_local_launcher_continues_after_a_failure_and_runs_only_missing_points(folder: Path, sweep: Sweep) -> None:
    said = sweep("--jobs", 2, code=1)
    named = folders(folder)
    assert sorted(calls(folder)) == sorted(named.values())
    assert "AP 50.0" in line_of("gamma_1.0", said)
    assert re.search(r"diverged.*\bstep 2\b", line_of("gamma_9.0", said))
    assert re.search(r"failed.*exit 1\b.*this one always fails", said)
    assert "error: this one always fails" in (folder / "runs" / "logs" / f"{named['gamma_0.5']}.txt").read_text()
    diverged = json.loads((folder / "runs" / named["gamma_9.0"] / "diverged.json").read_text())
    assert diverged["step"] == 2 and diverged["message"].startswith("box_loss is inf")

    (folder / "runs" / "fixed").touch()
    said = sweep()
    assert re.search(r"\bgamma_0\.5\b.*resum", said) and "diverged" in line_of("gamma_9.0", said)
    assert calls(folder).count(named["gamma_0.5"]) == 2 and len(calls(folder)) == 5


def test_an_index_runs_one_point_and_returns_its_exit_status(folder: Path, sweep: Sweep) -> None:
    for _ in range(2):
        assert "AP 50.0" in line_of("gamma_1.0", sweep("--index", 0))
    assert re.search(r"diverged.*\bstep 2\b", line_of("gamma_9.0", sweep("--index", 3)))
    sweep("--index", 2, code=1)
    assert len(calls(folder)) == 3
    assert re.fullmatch(r"error: --index 4: .*\b3\b.*\n", sweep("--index", 4, code=2))


def test_two_processes_train_one_point_once(folder: Path) -> None:
    (folder / "runs").mkdir()
    (folder / "runs" / "hold").touch()
    both = [start(folder, "--index", 1) for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while all(one.process.poll() is None for one in both):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        (folder / "runs" / "hold").unlink()
    (status, said, _), (other_status, other_said, _) = sorted(one.ended(60) for one in both)
    assert (status, other_status) == (0, 75)
    assert "gamma_2.0" in said and "AP 50.0" in said and "gamma_2.0" in other_said
    assert len(calls(folder)) == 1


def test_two_launchers_in_one_folder_train_each_point_once(folder: Path) -> None:
    both = [start(folder, "--only", "gamma_1.0", "--seeds", *seeds, seconds=1.0) for seeds in ((0, 1), (1, 0))]
    ends = [one.ended(200) for one in both]
    assert [status for status, *_ in ends] == [0, 0], ends
    assert len(calls(folder)) == len(set(calls(folder))) == 2


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, 143), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_launcher_ends_its_points(folder: Path, sweep: Sweep, number: int, expected: int) -> None:
    started = start(folder, "--jobs", 2, seconds=100)
    until(lambda: len(calls(folder)) == 2, started)
    begun = time.monotonic()
    started.process.send_signal(number)
    status, _, error = started.ended(60)
    assert status == expected and signal.Signals(number).name in error and time.monotonic() - begun < 30
    assert "done" in line_of("gamma_1.0", sweep("--index", 0))  # its lock is free


def test_runs_shared_by_two_sweeps_are_trained_once(folder: Path, sweep: Sweep) -> None:
    own = folder / "own.py"
    own.write_text(OWN.replace("0.5, 9.0", "5.0"))
    other = folder / "other.py"
    other.write_text(OWN.replace("0.5, 9.0", "3.0").replace("gamma_{gamma}", "again_{gamma}"))
    for index in range(4):
        sweep("--index", index, files=(own, other))
    listed = sweep("--list", files=(own, other))
    assert "own/gamma_1.0 = other/again_1.0" in listed and "4 distinct runs: 4 done" in listed
    assert len(calls(folder)) == len(set(calls(folder))) == 4


def test_an_invalid_option_ends_in_one_line(folder: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # hides SLURM if it is installed
    for arguments, says in (
        (["--loss.gama", 5], "loss.gamma"),
        (["--only", "gamma_7"], "--only gamma_7"),
        (["--launcher", "slurm"], "sbatch"),
        (["--launcher", "slurm", "--slurm", "cluster=here"], "--slurm cluster=here"),
        (["--jobs", 0], "--jobs"),
        (["--sweep", folder / "own.py"], "--sweep"),
    ):
        error = sweep(*arguments, code=2)
        assert error.startswith("error: ") and error.count("\n") == 1 and says in error, error


def test_points_of_a_killed_launcher_are_trained_again(folder: Path, sweep: Sweep) -> None:
    (folder / "runs").mkdir()
    (folder / "runs" / "hold").touch()
    chosen = ("--only", "gamma_1.0", "gamma_9.0")

    def states() -> str:
        return sweep("--list", *chosen).splitlines()[-1]

    started = start(folder, "--jobs", 2, *chosen)
    until(lambda: len(calls(folder)) == 2 and " diverged" in states(), started)
    assert re.search(r"\b1 running\b", states())
    os.killpg(started.process.pid, signal.SIGKILL)
    assert started.process.wait(60) == -signal.SIGKILL
    until(lambda: " running" not in states())
    assert re.search(r"\b1 interrupted\b", states())
    (folder / "runs" / "hold").unlink()
    assert "AP 50.0" in line_of("gamma_1.0", sweep(*chosen))
    named = folders(folder)
    assert sorted(calls(folder)) == sorted([named["gamma_1.0"], named["gamma_1.0"], named["gamma_9.0"]])


@pytest.mark.slow
def test_a_killed_sweep_is_completed_by_starting_it_again(folder: Path, sweep: Sweep) -> None:
    """Trains in real processes: SIGKILL leaves finished, diverged and interrupted points; submitit then runs only the
    missing ones."""
    (folder / "own.py").write_text(
        """
def get_sweep(base):
    return {
        "boom": {"optimizer.learning_rate": 1e9, "optimizer.clip_norm": 0.0, "optimizer.warmup_steps": 0},
        "flipped": {},
    }
"""
    )
    runs, scripts = folder / "runs", ROOT / "scripts"
    started = start(folder, scripts=scripts)
    until((runs / "sweeps" / "own.json").exists, started)
    named = folders(folder)
    until(lambda: bool(list((runs / named["flipped"] / "checkpoints").glob("[1-2]"))), started)
    os.killpg(started.process.pid, signal.SIGKILL)
    assert started.process.wait(60) == -signal.SIGKILL
    message = json.loads((runs / named["boom"] / "diverged.json").read_text())["message"]
    assert "nan" in message or "inf" in message
    assert not (runs / named["boom"] / "summary.json").exists()
    before = (runs / named["boom"] / "config.json").stat().st_mtime_ns
    until(lambda: " running " not in sweep("--list", scripts=scripts))  # the child process takes a moment to end
    assert "2 distinct runs: 1 diverged, 1 interrupted" in sweep("--list", scripts=scripts)

    # Separate processes, since submitit configures logging again, which under pytest closes TensorFlow's standard error.
    slurm = ("--launcher", "slurm", "--slurm", "cluster=local")
    status, _, error = start(folder, *slurm, "nonsense=1", scripts=scripts).ended(60)
    assert status == 2 and error.startswith("error: --slurm: ") and "nonsense" in error and error.count("\n") == 1
    status, said, error = start(folder, *slurm, "timeout_min=5", scripts=scripts).ended(300)
    assert status == 0, said + error
    assert "diverged" in line_of("boom", said)
    run = runs / named["flipped"]
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2, 3]
    logs = "".join(path.read_text() for path in (runs / "slurm").glob("*_log.out"))
    assert re.search(rf"^resum.*{re.escape(str(run))}", logs, re.MULTILINE)
    assert (runs / named["boom"] / "config.json").stat().st_mtime_ns == before
    assert "1 diverged, 1 done" in sweep("--list", scripts=scripts)
