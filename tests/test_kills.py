"""Runs killed and told to stop at any moment, started again by the same command: the same run in the end, to the bit."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_runs import kill, measured, metrics, start, stop_when, summary, wait_for_step, write_config

@dataclass(frozen=True)
class Setting:
    """A run, and how often it saves and evaluates."""

    config: Path
    steps: int
    checkpoint_every: int
    eval_every: int

    def start(self, workdir: Path, log: Path | None = None) -> subprocess.Popen[bytes]:
        """The one command that starts the run and starts it again."""
        options = {"steps": self.steps, "checkpoint-every": self.checkpoint_every, "eval-every": self.eval_every}
        words = [word for name, value in options.items() for word in (f"--training.{name}", value)]
        return start(self.config, workdir, *words, devices=2, log=log)

    def phase(self, workdir: Path, log: Path) -> str:
        """What the process that said `log` was doing when it was stopped or killed."""
        if not any(line.startswith("step ") for line in log.read_text(errors="replace").splitlines()):
            return "starting"
        if (workdir / "checkpoints" / "saving").exists():
            return "saving"
        last = metrics(workdir)[-1]
        return "evaluating" if last["event"] == "train" and last["step"] % self.eval_every == 0 else "training"


def check_same_run(workdir: Path, unbroken: Path, setting: Setting) -> None:
    """The same parameters to the bit, metrics, scores, detections and files, and nothing left of a start before the last."""
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
    """All that is in a run's folder, hidden files too; of a checkpoint its name, as orbax numbers its files anew."""
    found = {path.relative_to(workdir) for path in workdir.rglob("*")}
    return {str(path) for path in found if path.parts[0] != "checkpoints" or len(path.parts) < 3}


@dataclass(frozen=True)
class Life:
    """One start of the run, to its end."""

    status: int
    said: str
    seconds: float
    """From the last signal to the end."""
    metrics: list[dict]
    """As it left them."""
    checkpoints: set[str]


@pytest.fixture(scope="module")
def unbroken_and_lives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Life]]:
    """The folders of a run that nothing happened to and of one that all of this happened to, one start after the other."""
    folder = tmp_path_factory.mktemp("kills")
    setting = Setting(write_config(folder), steps=40, checkpoint_every=5, eval_every=10)
    unbroken, workdir = folder / "unbroken", folder / "often_stopped"
    beside = setting.start(unbroken)
    wait_for_step(unbroken, 1, beside)  # it writes the scenes for both
    lives: dict[str, Life] = {}

    def live(name: str, when: Callable[[Path], bool], *signals: signal.Signals) -> None:
        log = folder / f"{name}.log"
        process = setting.start(workdir, log)
        if signals:
            stop_when(process, lambda: when(log))
        began = time.monotonic()
        for number in signals:
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.05)
        status = process.wait(240)
        seconds, said = time.monotonic() - began, log.read_text(errors="replace")
        saved = {path.name for path in (workdir / "checkpoints").iterdir()}
        lives[name] = Life(status, said, seconds, metrics(workdir), saved)

    def in_phase(phase: str) -> Callable[[Path], bool]:
        return lambda log: setting.phase(workdir, log) == phase

    live("SIGTERM before a step", lambda log: "starting from random" in log.read_text(), signal.SIGTERM)
    for phase in ("training", "saving", "evaluating"):
        live(f"SIGKILL in {phase}", in_phase(phase), signal.SIGKILL)
    live("SIGTERM in training", in_phase("training"), signal.SIGTERM)
    live("SIGTERM in evaluating", in_phase("evaluating"), signal.SIGTERM)
    live("SIGINT", in_phase("training"), signal.SIGINT)
    live("SIGINT twice", in_phase("training"), signal.SIGINT, signal.SIGINT)
    live("to its end", in_phase("training"))
    assert beside.wait(240) == 0, unbroken.with_suffix(".log").read_text()
    return unbroken, workdir, lives


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    """SIGKILL while starting, training, saving and evaluating: drawn in time, counted by what is found afterwards."""
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
        # The run must not end before the last kill: it is killed early where it is further than its share of steps.
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
    """Newest step in the metrics; 0 before the first."""
    lines = metrics(workdir)
    return lines[-1]["step"] if lines else 0
