"""Real training processes of a few seconds, with a config that learns something, started alone or as several hosts."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import processes
from processes import Process

OF_THE_MOMENT = ("images_per_second", "data_wait_percent", "peak_memory_mib")
"""Keys of the metrics that depend on the machine and its load."""
LEARNS = """
from retina_jax.config import *

def get_config():
    scenes = ScenesConfig(folder={scenes!r}, train_images=64, val_images=11, size=64, classes=2, max_objects=2,
        min_side=24.0, max_side=40.0, lookalikes=0)
    return Config(
        data=DataConfig(source="scenes", batch_size=8, short_side=64, long_side=64, max_boxes=8, scenes=scenes),
        model=ModelConfig(backbone="resnet18", base_width=8, stage_blocks=(1, 1, 1, 1), norm="frozen",
            frozen_stages=0, min_level=4, max_level=5, fpn_channels=16, head_channels=16, head_convs=1),
        anchors=AnchorConfig(size_factor=2.0),
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.005, warmup_steps=10, boundaries=(50,), clip_norm=1.0,
            ema_decay=0.9),
        training=TrainingConfig(steps=60, log_every=1, eval_every=10, checkpoint_every=5, pictures=2, tensorboard=False),
    )
"""


def write_config(folder: Path) -> Path:
    """Writes a config that reaches AP50 0.4 in 60 steps of 8 images, in about ten seconds."""
    path = folder / "learns.py"
    path.write_text(LEARNS.format(scenes=str(folder / "scenes")))
    return path


def start(
    config: Path,
    workdir: Path,
    *options: object,
    devices: int,
    log: Path | None = None,
    namespaces_of: int | None = None,
) -> Process:
    """Starts scripts/train.py on this many CPU devices. It prints to `log`, by default WORKDIR.log."""
    with (log or workdir.with_suffix(".log")).open("ab") as file:
        arguments = ("--config", config, "--workdir", workdir, *options)
        return processes.start("train", *arguments, stdout=file, devices=devices, namespaces_of=namespaces_of)


class Pair:
    """Two hosts of two devices each, as processes of this machine. Leaving the `with` block kills those still
    running."""

    def __init__(
        self, config: Path, workdir: Path, *options: object, own: Sequence[Sequence[object]] = ((), ())
    ) -> None:
        """`own`: options of each host."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.logs = [workdir.with_name(f"{workdir.name}_host{host}_{time.monotonic_ns()}.log") for host in (0, 1)]
        together = ("--coordinator", f"127.0.0.1:{port}", "--hosts", 2)
        self.hosts = [
            start(config, workdir, *together, "--host", host, *options, *own[host], devices=2, log=self.logs[host])
            for host in (0, 1)
        ]

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.hosts:
            process.kill()
            process.wait()

    def ended(self, within: float = 240) -> list[int]:
        """Returns the exit statuses of both."""
        until = time.monotonic() + within
        return [process.wait(max(0.1, until - time.monotonic())) for process in self.hosts]

    def said(self) -> str:
        """Returns the output of both, host 0 first."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs)


def wait_for_step(workdir: Path, step: int, *processes: Process, within: float = 240) -> None:
    """Waits until the run's metrics contain `step`; fails if a process ends before."""
    until = time.monotonic() + within
    while not any(line["step"] >= step for line in metrics(workdir)):
        assert all(process.poll() is None for process in processes), f"ended before step {step}"
        assert time.monotonic() < until, f"no step {step} within {within} s"
        time.sleep(0.02)


@contextlib.contextmanager
def stopped_when(process: Process, what: Callable[[], bool], within: float = 240) -> Iterator[None]:
    """Stops the process (SIGSTOP) for the duration of the block, at a moment when `what` holds."""
    until = time.monotonic() + within
    while True:
        assert process.poll() is None, "it ended before"
        if what():
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)
            if what():  # the condition may have ended meanwhile
                break
            process.send_signal(signal.SIGCONT)
        if time.monotonic() > until:
            kill(process)
            raise AssertionError(f"not within {within} s")
        time.sleep(0.002)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def metrics(workdir: Path) -> list[dict]:
    """Returns the complete lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def measured(workdir: Path) -> list[dict]:
    """Returns every line of metrics.jsonl without the keys that depend on the machine."""
    return [{name: value for name, value in line.items() if name not in OF_THE_MOMENT} for line in metrics(workdir)]


def losses(workdir: Path) -> dict[int, float]:
    """Returns the loss by step; asserts that each step occurs once and none is missing."""
    lines = [line for line in metrics(workdir) if line["event"] == "train"]
    steps = [line["step"] for line in lines]
    assert steps == list(range(1, len(steps) + 1)), f"gaps or duplicates: {steps}"
    return {line["step"]: line["loss"] for line in lines}


def summary(workdir: Path) -> dict:
    """Returns RUN/summary.json."""
    return json.loads((workdir / "summary.json").read_text())


def kill(process: Process) -> None:
    """Sends SIGKILL."""
    process.send_signal(signal.SIGKILL)
    process.wait()
