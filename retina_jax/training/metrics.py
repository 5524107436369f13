"""What a run says of itself: metrics.jsonl, TensorBoard, the progress line, and the stop at a loss that is no number."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from retina_jax.training.parallel import peak_memory_bytes
from retina_jax.training.run import Run

# What must be numbers after a step: a gradient or parameters that are not poison every step after, at a finite loss too.
FINITE = ("classification_loss", "box_loss", "gradient_norm", "parameter_norm")


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient stopped being a number; the message is one line with the step and its images."""


class Metrics:
    """Collects the steps' metrics on the device and writes them a window at a time, so that the loop never waits."""

    def __init__(self, run: Run, start_step: int) -> None:
        self._run, self._file = run, run.folder / "metrics.jsonl"
        _drop_after(self._file, start_step)
        self._board = None
        if run.config.training.tensorboard:
            from tensorboardX import SummaryWriter  # imports torch where it is installed: seconds

            self._board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=start_step + 1)
        self._pending: list[tuple[int, dict[str, Array], list[int]]] = []
        self._window_start, self._waited, self._timed = time.monotonic(), 0.0, 0
        self._first, self._begun = start_step, time.monotonic()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if sys.stdout.isatty():
            print()
        if self._board is not None:
            self._board.close()

    def add(self, step: int, metrics: dict[str, Array], image_ids: list[int], waited: float) -> None:
        """One finished step: its metrics still on the device, its images, the seconds waited for data."""
        self._pending.append((step, metrics, image_ids))
        self._waited += waited
        self._timed += 1

    def flush(self, *, end_line: bool = False) -> dict[str, float] | None:
        """Fetch what is pending, check that it is finite, write and print its mean. Waits for the device.

        On a terminal the progress line is written over and over; `end_line` leaves it standing.

        Raises NonFiniteLoss before anything is written for the window that holds the first such step.
        """
        if not self._pending:
            return None
        steps = [step for step, _, _ in self._pending]
        fetched = jax.device_get([metrics for _, metrics, _ in self._pending])
        for (step, _, image_ids), values in zip(self._pending, fetched, strict=True):
            bad = [n for n in FINITE if not np.isfinite(values[n])]
            if bad:
                raise NonFiniteLoss(
                    f"{bad[0]} is {float(values[bad[0]])} at step {step} (seen in the window {steps[0]} to {steps[-1]}), "
                    f"images {', '.join(map(str, image_ids))}; lower optimizer.learning_rate, set optimizer.clip_norm, or "
                    f"look at these images; {self._run.folder / 'checkpoints'} holds the state of before"
                )
        now = time.monotonic()
        elapsed = max(now - self._window_start, 1e-9)
        mean = {name: math.fsum(float(v[name]) for v in fetched) / len(fetched) for name in fetched[0]}
        mean["learning_rate"] = float(fetched[-1]["learning_rate"])
        mean["images_per_second"] = self._timed * self._run.config.data.batch_size / elapsed
        mean["data_wait_percent"] = 100 * self._waited / elapsed
        mean["peak_memory_mib"] = peak_memory_bytes() / 2**20
        self.write(steps[-1], {"event": "train", **mean})
        self._progress(steps[-1], mean, now, "\n" if end_line else "")
        self._pending.clear()
        self.restart_window()
        return mean

    def restart_window(self) -> None:
        """Leave what happened since the last step (an evaluation, a save) out of the next window's speed."""
        self._window_start, self._waited, self._timed = time.monotonic(), 0.0, 0

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers to TensorBoard."""
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        if self._board is not None:
            group = values.get("event", "train")
            for name, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{group}/{name}", value, step)
            self._board.flush()

    def _progress(self, step: int, mean: dict[str, float], now: float, end: str) -> None:
        total = self._run.config.training.steps
        left = (now - self._begun) / max(step - self._first, 1) * max(total - step, 0)
        line = (
            f"step {step}/{total}  loss {mean['loss']:.4f} (class {mean['classification_loss']:.4f} "
            f"box {mean['box_loss']:.4f})  rate {mean['learning_rate']:.2g}  gradient {mean['gradient_norm']:.2f}  "
            f"positives {mean['positives_per_image']:.1f}  {mean['images_per_second']:.1f} img/s  "
            f"data wait {mean['data_wait_percent']:.0f}%  {mean['peak_memory_mib'] / 1024:.1f} GiB  ETA {_duration(left)}"
        )
        if sys.stdout.isatty():
            fitting = line[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be written over
            print(f"\r\033[K{fitting}", end=end, flush=True)
        else:
            print(line, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _drop_after(path: Path, step: int) -> None:
    """Forget the lines of steps that a resumed run will take again, and a last line cut short by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break
    beside = path.with_name(".metrics.jsonl")
    beside.write_text("".join(kept))
    beside.replace(path)
