"""Runs that are killed or stopped by a signal at any moment and restarted by the same command end bit for bit the same."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import Process
from small_runs import kill, measured, metrics, start, stopped_when, summary, write_config

from retina_jax.runs.folder import training_lock


@dataclass(frozen=True)
class Setting:
    """A run, and how often it saves and evaluates."""

    config: Path
    steps: int
    checkpoint_every: int
    eval_every: int

    def start(self, workdir: Path, log: Path | None = None) -> Process:
        """Starts the run, or starts it again by the same command."""
        options = {"steps": self.steps, "checkpoint-every": self.checkpoint_every, "eval-every": self.eval_every}
        words = [word for name, value in options.items() for word in (f"--training.{name}", value)]
        return start(self.config, workdir, *words, devices=1, log=log)

    def phase(self, workdir: Path, log: Path) -> str:
        """Returns what the process with this log was doing when it was stopped or killed."""
        if not re.search(r"^step \d+/", log.read_text(errors="replace"), re.MULTILINE):
            return "starting"
        if (workdir / "checkpoints" / "saving").exists():
            return "saving"
        return "evaluating" if self.awaits_evaluation(workdir) else "training"

    def awaits_evaluation(self, workdir: Path) -> bool:
        """Returns whether the newest step must still be evaluated."""
        last = metrics(workdir)[-1]
        return last["event"] == "train" and last["step"] % self.eval_every == 0


SHORT = Setting(Path(), steps=60, checkpoint_every=5, eval_every=10)


def check_same_run(workdir: Path, unbroken: Path, setting: Setting) -> None:
    """Asserts equal parameters (to the last bit), metrics, scores, detections and files, and that earlier starts left
    nothing."""
    assert summary(workdir)["parameters_sha256"] == summary(unbroken)["parameters_sha256"]
    assert measured(workdir) == measured(unbroken)
    lines = measured(workdir)
    assert [line["step"] for line in lines if line["event"] == "train"] == list(range(1, setting.steps + 1))
    due = [*range(setting.eval_every, setting.steps + 1, setting.eval_every)]
    assert [line["step"] for line in lines if line["event"] == "evaluation"] == due
    assert files(workdir) == files(unbroken)
    for kind in ("evaluation", "detections", "pictures"):
        for path in (unbroken / kind).iterdir():
            assert (workdir / kind / path.name).read_bytes() == path.read_bytes(), path.name


def files(workdir: Path) -> set[str]:
    """Returns all files in a run's folder, hidden ones too; a checkpoint counts as its name, since orbax numbers its
    files anew."""
    found = {path.relative_to(workdir) for path in workdir.rglob("*")}
    return {str(path) for path in found if path.parts[0] != "checkpoints" or len(path.parts) < 3}


When = Callable[[Process, Path], bool]
"""Returns whether a start, given with its log, has reached the moment for a signal."""


@dataclass(frozen=True)
class Life:
    """One start of the run, to its end."""

    status: int
    said: str
    seconds: float
    """Seconds from the last signal to the end."""
    metrics: list[dict]
    """Files after its end."""
    checkpoints: set[str]


@pytest.fixture(scope="module")
def uninterrupted_and_lives(
    tmp_path_factory: pytest.TempPathFactory, trained: Path
) -> tuple[Path, Path, dict[str, Life]]:
    """Returns the folder of an uninterrupted run, the folder of a run with all these signals, and its starts."""
    folder = tmp_path_factory.mktemp("kills")
    setting, workdir = dataclasses.replace(SHORT, config=trained.with_name("learns.py")), folder / "often_stopped"
    lives: dict[str, Life] = {}

    def live(name: str, when: When, *signals: signal.Signals) -> None:
        log = folder / f"{name}.log"
        with setting.start(workdir, log) as process:
            for number in signals[:1]:
                with stopped_when(process, lambda: when(process, log)):
                    process.send_signal(number)
            began = time.monotonic()
            for number in signals[1:]:
                time.sleep(0.05)
                process.send_signal(number)
            status = process.wait(240)
        seconds, said = time.monotonic() - began, log.read_text(errors="replace")
        saved = {path.name for path in workdir.glob("checkpoints/*")}
        lives[name] = Life(status, said, seconds, measured(workdir), saved)

    def in_phase(phase: str) -> When:
        return lambda _, log: setting.phase(workdir, log) == phase

    def early_in_evaluating(process: Process, log: Path) -> bool:
        """Returns whether an evaluation has just begun, possibly while the step before is still being saved."""
        return setting.phase(workdir, log) != "starting" and setting.awaits_evaluation(workdir)

    live("SIGTERM before a step", lambda process, _: catches(process, signal.SIGTERM), signal.SIGTERM)
    for phase in ("training", "saving", "evaluating"):
        live(f"SIGKILL in {phase}", in_phase(phase), signal.SIGKILL)
    live("SIGTERM in training", in_phase("training"), signal.SIGTERM)
    live("SIGTERM in evaluating", early_in_evaluating, signal.SIGTERM)
    live("SIGINT", in_phase("training"), signal.SIGINT)
    lives["SIGINT before"] = lives["SIGINT"]
    for _ in range(3):
        live("SIGINT twice", in_phase("training"), signal.SIGINT, signal.SIGINT)
        if not lives["SIGINT twice"].said.splitlines()[-1].startswith("stopped by SIGINT"):
            break
        lives["SIGINT before"] = lives["SIGINT twice"]  # the second arrived before the first was handled: they are one
    live("to its end", in_phase("training"))
    return trained, workdir, lives


def catches(process: Process, number: signal.Signals) -> bool:
    """Returns whether the process has logged that it handles the signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)


def stopped_at(life: Life, number: str) -> int:
    """Returns the step in its last line, which names the signal; checks everything else that it must leave."""
    line = life.said.splitlines()[-1]
    found = re.search(rf"\b{number}\b.*\bstep (\d+)\b", line)
    assert found, line
    step = int(found[1])
    assert str(step) in life.checkpoints and life.metrics[-1]["step"] == step
    return step


def resumed_at(life: Life, workdir: Path) -> int:
    """Returns the step in the line that reports that the run resumes."""
    (step,) = re.findall(rf"^resum.*{re.escape(str(workdir))}.*\bstep (\d+)$", life.said, re.MULTILINE)
    return int(step)


def test_kills_and_signals_do_not_change_the_result(
    uninterrupted_and_lives: tuple[Path, Path, dict[str, Life]],
) -> None:
    """The parameters are equal to the last bit, and the folder has no other files than that of the uninterrupted
    run."""
    unbroken, workdir, lives = uninterrupted_and_lives
    for phase in ("training", "saving", "evaluating"):
        assert lives[f"SIGKILL in {phase}"].status == -signal.SIGKILL
    assert "saving" in lives["SIGKILL in saving"].checkpoints
    assert lives["SIGKILL in evaluating"].metrics[-1]["event"] == "train"
    assert lives["to its end"].status == 0
    for name, life in lives.items():
        assert "Traceback" not in life.said, f"{name}: {life.said}"
    check_same_run(workdir, unbroken, SHORT)


def test_sigterm_saves_the_current_step_and_exits_0(
    uninterrupted_and_lives: tuple[Path, Path, dict[str, Life]],
) -> None:
    _, workdir, lives = uninterrupted_and_lives
    first = lives["SIGTERM before a step"]
    assert first.status == 0 and not first.metrics and not first.checkpoints
    assert "SIGTERM" in first.said.splitlines()[-1]
    assert lives["SIGTERM in training"].status == 0
    step = stopped_at(lives["SIGTERM in training"], "SIGTERM")
    assert resumed_at(lives["SIGTERM in evaluating"], workdir) == step


def test_sigterm_in_an_evaluation_postpones_it_to_the_next_start(
    uninterrupted_and_lives: tuple[Path, Path, dict[str, Life]],
) -> None:
    _, workdir, lives = uninterrupted_and_lives
    life, after = lives["SIGTERM in evaluating"], lives["SIGINT"]
    assert life.status == 0 and life.seconds < 30
    step = stopped_at(life, "SIGTERM")
    assert step % SHORT.eval_every == 0 and life.metrics[-1]["event"] == "train"
    assert resumed_at(after, workdir) == step
    assert [line["event"] for line in after.metrics if line["step"] == step] == ["train", "evaluation"]


def test_ctrl_c_saves_and_exits_130_and_twice_ends_at_once(
    uninterrupted_and_lives: tuple[Path, Path, dict[str, Life]],
) -> None:
    _, workdir, lives = uninterrupted_and_lives
    once, twice = lives["SIGINT before"], lives["SIGINT twice"]
    assert once.status == 130 and twice.status == 130
    assert resumed_at(twice, workdir) == stopped_at(once, "SIGINT")
    assert twice.said.splitlines()[-1].startswith("interrupted")
    assert twice.seconds < 30


def test_unfinished_files_of_a_killed_run_are_deleted_and_files_being_written_are_not(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    left = [
        ".seconds.json.456",
        ".config.json.123",
        ".write_test_123",
        ".metrics.jsonl",
        "evaluation/.step_00000010.json.7",
    ]
    others = ["config.json", ".config.json", ".nfs0001", ".config.json.456"]
    for name in (*left, *others):
        (tmp_path / name).write_text("{}")
    for name in (*left[1:], *others[:-1]):  # the first one is new, but only training writes it
        os.utime(tmp_path / name, (0, 0))
    with training_lock(tmp_path):
        assert files(tmp_path) == {*others, "evaluation", ".lock"}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    """SIGKILL hits starting, training, saving and evaluating at random times; the counts follow from what is found
    afterwards."""
    kills, rng = 100, random.Random(0)
    setting = Setting(write_config(tmp_path), steps=4000, checkpoint_every=10, eval_every=20)
    unbroken, workdir = tmp_path / "unbroken", tmp_path / "killed"
    began = time.monotonic()
    assert setting.start(unbroken).wait(3600) == 0, unbroken.with_suffix(".log").read_text()
    print(f"unbroken: {time.monotonic() - began:.0f} s, {summary(unbroken)['parameters_sha256']}", flush=True)
    phases: Counter[str] = Counter()
    for number in range(1, kills + 1):
        log = tmp_path / f"life_{number}.log"
        started, in_start_up = time.monotonic(), rng.random() < 0.1
        process = setting.start(workdir, log)
        delay = rng.uniform(0, 7 if in_start_up else 4)
        while not in_start_up and not (log.exists() and "\nstep " in log.read_text(errors="replace")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < started + 300, log.read_text()
            time.sleep(0.005)
        until = time.monotonic() + delay
        # The run must not end before the last kill, so it is killed early if it is beyond its share of the steps.
        share = setting.steps * number // (kills + 1)
        while time.monotonic() < until and newest(workdir) < share:
            time.sleep(0.01)
        assert process.poll() is None, log.read_text()
        kill(process)
        assert process.returncode == -signal.SIGKILL, log.read_text()
        phases[phase := setting.phase(workdir, log)] += 1
        print(f"kill {number}: {phase}, at step {newest(workdir)}, {time.monotonic() - began:.0f} s", flush=True)
        assert "Traceback" not in log.read_text(errors="replace")
    log = tmp_path / "last.log"
    assert setting.start(workdir, log).wait(3600) == 0, log.read_text()
    print(f"{kills} kills, {time.monotonic() - began:.0f} s: {dict(phases)}", flush=True)
    print(f"in the end: {summary(workdir)['parameters_sha256']}", flush=True)
    check_same_run(workdir, unbroken, setting)
    assert all(phases[phase] >= 5 for phase in ("training", "saving", "evaluating")), phases


def newest(workdir: Path) -> int:
    """Returns the newest step in the metrics; 0 before the first."""
    lines = metrics(workdir)
    return lines[-1]["step"] if lines else 0
