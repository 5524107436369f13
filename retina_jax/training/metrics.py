"""What a run says of itself: metrics.jsonl, what else shows the same, and the stop at a loss that is no number."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from retina_jax import distributed
from retina_jax.console import warn
from retina_jax.errors import PlainError, Stopped, reason
from retina_jax.runs.files import DiskError, write_bytes
from retina_jax.runs.folder import Run, is_due
from retina_jax.training.parallel import peak_memory_bytes
from retina_jax.training.progress import Progress
from retina_jax.training.step import FINITE
from retina_jax.training.writers import Board, WeightsAndBiases

AHEAD_ON_CPU = 16
"""Steps that may be under way at once on CPU devices: with some hundreds they wait for each other until XLA gives up."""
FIRST_STEPS = 50
"""Steps without a single positive anchor after which a run is warned of."""


class NonFiniteLoss(PlainError, RuntimeError):
    """The loss or the gradient stopped being a number; the message is one line with the step and its images."""


class Metrics:
    """Collects the steps' metrics on the device and writes them a window at a time, so that the loop never waits."""

    def __init__(self, run: Run, start_step: int) -> None:
        self._run, self._file = run, run.folder / "metrics.jsonl"
        self._speaks = distributed.is_primary()
        evaluated = _drop_after(self._file, start_step) if self._speaks else []
        self._evaluated = distributed.from_primary(evaluated)
        training = run.config.training
        self._progress = Progress(start_step, training.steps)
        self._wandb = WeightsAndBiases(run) if self._speaks and training.wandb else None
        self._board = Board(run.folder / "tensorboard", start_step) if self._speaks and training.tensorboard else None
        self._pending: list[tuple[int, dict[str, Array], list[int]]] = []
        self._window_start, self._waited, self._timed = time.monotonic(), 0.0, 0
        self._first = start_step
        self._seeks_positives = True

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._speaks:
            self._progress.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.close(failed=not isinstance(error, Stopped | None))

    def has_evaluation(self, step: int) -> bool:
        """Whether metrics.jsonl held an evaluation at `step` when it was opened; the same on all hosts."""
        return step in self._evaluated

    def evaluation_is_missing(self) -> bool:
        """Whether the run goes on from a step at which it should have been evaluated, and was not."""
        training = self._run.config.training
        due = is_due(self._first, training.eval_every, self._first >= training.steps)
        return self._first > 0 and due and not self.has_evaluation(self._first)

    def add(self, step: int, metrics: dict[str, Array], image_ids: list[int], waited: float) -> None:
        """One finished step: its metrics still on the device, its images, the seconds waited for data."""
        self._pending.append((step, metrics, image_ids))
        self._waited += waited
        self._timed += 1
        if len(self._pending) % AHEAD_ON_CPU == 0 and jax.default_backend() == "cpu":
            jax.block_until_ready(metrics)

    def flush(self, *, end_line: bool = False) -> None:
        """Fetch what is pending, check that it is finite, write and print its mean. Waits for the device.

        On a terminal the progress line is written over and over; `end_line` leaves it standing.

        Steps that were left out for not being finite are told of and enter no mean. Raises NonFiniteLoss, before a mean is
        written for the window, at the first one more than `training.skip_non_finite`.
        """
        if not self._pending:
            return
        steps = [step for step, _, _ in self._pending]
        fetched = jax.device_get([metrics for _, metrics, _ in self._pending])
        finite = []
        for (step, _, image_ids), values in zip(self._pending, fetched, strict=True):
            bad = [n for n in FINITE if not np.isfinite(values[n])]
            if not bad:
                finite.append(values)
                continue
            found = f"{bad[0]} is {float(values[bad[0]])} at step {step}"
            images, so_far = ", ".join(map(str, image_ids)), int(values["skipped"])
            allowed = self._run.config.training.skip_non_finite
            if not 0 < so_far <= allowed:
                beyond = f", after {allowed} such steps were left out (training.skip_non_finite)" if allowed else ""
                raise NonFiniteLoss(
                    f"{found} (seen in the window {steps[0]} to {steps[-1]}), images {images}{beyond}; lower "
                    "optimizer.learning_rate, set optimizer.clip_norm, or look at these images; "
                    f"{self._run.folder / 'checkpoints'} holds the state of before"
                )
            self.write(step, {"event": "left_out", "reason": found, "images": image_ids, "skipped": so_far})
            warn(f"{found}, images {images}: left out ({so_far} of {allowed} that may be)")
        self._seek_positives(
            dict(zip(steps, (float(values["positives_per_image"]) for values in fetched), strict=True))
        )
        now = time.monotonic()
        if finite:
            self._write_mean(steps[-1], finite, now - self._window_start, end_line)
        self._pending.clear()
        self.restart_window()

    def _seek_positives(self, positives: dict[int, float]) -> None:
        """Warns once where the FIRST_STEPS steps since the start, or all of a shorter run, had no positive anchor."""
        end, last = self._first + FIRST_STEPS, max(positives)
        found = any(count > 0 for step, count in positives.items() if step <= end)
        over = last >= end or (self._first == 0 and last == self._run.config.training.steps)
        if self._seeks_positives and self._speaks and over and not found:
            steps = min(last, end) - self._first
            warn(
                f"no anchor was positive in the first {steps} steps: nothing but background is learnt; "
                "scripts/check_data.py shows why (boxes in another unit, or far smaller or larger than the anchors)"
            )
        self._seeks_positives &= not (found or over)

    def _write_mean(self, step: int, fetched: list[dict[str, np.ndarray]], elapsed: float, end_line: bool) -> None:
        elapsed = max(elapsed, 1e-9)
        mean: dict[str, Any] = {name: math.fsum(float(v[name]) for v in fetched) / len(fetched) for name in fetched[0]}
        mean["skipped"] = int(fetched[-1]["skipped"])
        mean["learning_rate"] = float(fetched[-1]["learning_rate"])
        mean["images_per_second"] = self._timed * self._run.config.data.batch_size / elapsed
        mean["data_wait_percent"] = 100 * self._waited / elapsed
        mean["peak_memory_mib"] = peak_memory_bytes() / 2**20
        self.write(step, {"event": "train", **mean})
        if self._speaks:
            self._progress.show(step, mean, end_line=end_line)

    def restart_window(self) -> None:
        """Leave what happened since the last step (an evaluation, a save) out of the next window's speed."""
        self._window_start, self._waited, self._timed = time.monotonic(), 0.0, 0

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers to TensorBoard and the like; by host 0, the others write nothing.

        Raises DiskError where the line cannot be written, and leaves the file as it was.
        """
        if not self._speaks:
            return
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        _append(self._file, json.dumps({"step": step, **rounded}) + "\n")
        for view in (self._board, self._wandb):
            if view is not None:
                view.add(step, values)

    def evaluated(self, step: int, scores: Mapping[str, float | None]) -> None:
        """The scores of an evaluation, and the pictures that it has drawn in RUN/pictures, to wherever they can be seen."""
        self.write(step, {"event": "evaluation", **scores})
        drawn = re.compile(rf"step_{step:08d}_(-?[0-9]+)\.png")
        found = {path: drawn.fullmatch(path.name) for path in sorted((self._run.folder / "pictures").glob("*.png"))}
        pictures = {match[1]: path for path, match in found.items() if match}
        for view in (self._board, self._wandb):
            if view is not None:
                view.add_pictures(step, pictures)


def _append(path: Path, line: str) -> None:
    """Write `line` whole or not at all. What is written survives a kill of the process, in the system's memory."""
    try:
        with path.open("ab", buffering=0) as file:
            size, data = file.tell(), line.encode()
            try:
                while data:  # a disk about to be full takes the first part
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {reason(error)}") from error


def _drop_after(path: Path, step: int) -> list[int]:
    """Forget the lines of steps that a resumed run will take again, and what a kill or a bad disk left that is no line.

    Returns the steps that hold an evaluation.
    """
    if not path.exists():
        return []
    before, kept, evaluated = path.read_bytes(), [], []
    for line in before.split(b"\n"):
        try:
            entry = json.loads(line)
            taken = int(entry["step"])
        except (ValueError, TypeError, LookupError):
            continue
        if taken <= step:
            kept.append(line + b"\n")
            if entry.get("event") == "evaluation":
                evaluated.append(taken)
    if (after := b"".join(kept)) != before:
        write_bytes(path, after)
    return evaluated
