"""Collects the metrics of training steps, writes them to metrics.jsonl, and stops a run whose loss is not finite."""

import contextlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from retina_jax import distributed
from retina_jax.console import Progress, duration, log, warn
from retina_jax.errors import PlainError, Stopped, reason
from retina_jax.runs.files import DAMAGED, DiskError, write_bytes
from retina_jax.runs.folder import Run, is_due, saved_steps
from retina_jax.training.compilation import compile_events, compile_seconds
from retina_jax.training.parallel import peak_memory_bytes
from retina_jax.training.step import FINITE
from retina_jax.training.writers import Board, WeightsAndBiases

AHEAD_ON_CPU = 16
"""Maximum number of steps that CPU devices have in flight: with some hundreds they wait for each other until XLA aborts."""
LAST_TIMED_STEP = 3  # after the start; the time per step is estimated from those after the first one
LONG_WAIT = 60.0  # seconds until the first line of metrics, from which on the estimate is logged
FIRST_STEPS = 50  # without a positive anchor, after which a warning is given


class NonFiniteLoss(PlainError, RuntimeError):
    """The loss or the gradient is not finite; the message names the step and its images."""


class Metrics(contextlib.AbstractContextManager):
    """The steps' metrics, kept on the device; their means are written per window, so that the loop waits once per window."""

    def __init__(self, run: Run, start_step: int) -> None:
        training = run.config.training
        self._run, self._file, self._start_step = run, run.folder / "metrics.jsonl", start_step
        self._writes = distributed.is_primary()
        self._evaluated = distributed.from_primary(_drop_after(self._file, start_step) if self._writes else {})
        self._progress = Progress("step", training.steps, start_step)
        self._views: list[Board | WeightsAndBiases] = []
        shows = self._writes and not self.is_complete()
        if shows and training.wandb:
            self._views.append(WeightsAndBiases(run))
        if shows and training.tensorboard:
            self._views.append(Board(run.folder / "tensorboard", start_step))
        self._pending: list[tuple[int, dict[str, Array], list[int]]] = []
        self._found_positives = False
        self._compiling, self._compiled = contextlib.ExitStack(), Counter[str]()
        self._first_step_ended = 0.0
        self.restart_window()

    def __enter__(self) -> "Metrics":
        self._compiled = self._compiling.enter_context(compile_events())
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._compiling.close()
        self._progress.close()
        for view in self._views:
            view.close(failed=not isinstance(error, Stopped | None))

    def evaluation_is_missing(self) -> bool:
        """Returns whether the run resumes from a step whose evaluation was due and is missing; the same on all hosts."""
        training, step = self._run.config.training, self._start_step
        return step > 0 and is_due(step, training.eval_every, step >= training.steps) and step not in self._evaluated

    def is_complete(self) -> bool:
        """Returns whether there is nothing left to train or to evaluate; the same on all hosts."""
        ended = self._start_step >= self._run.config.training.steps or self.ended_early()
        return ended and not self.evaluation_is_missing()

    def remaining_steps(self) -> Iterator[int]:
        """Yields the steps to take, up to `training.steps`; fewer if `ended_early`. The same on all hosts."""
        for step in range(self._start_step + 1, self._run.config.training.steps + 1):
            if self.ended_early():
                waited = f"{self._run.config.training.patience} evaluations without a new best AP (training.patience)"
                log(f"training is complete at step {step - 1}: {waited}")
                return
            yield step

    def ended_early(self) -> bool:
        """Returns whether the last `training.patience` evaluations had no AP above the best before; a score that is
        undefined is none. A function of the AP in metrics.jsonl, and so the same after a resume."""
        aps = [ap for _, ap in sorted(self._evaluated.items()) if ap is not None]
        patience = self._run.config.training.patience
        return 0 < patience < len(aps) and aps.index(max(aps)) < len(aps) - patience

    def add(self, step: int, metrics: dict[str, Array], image_ids: list[int], waited: float) -> None:
        """Adds a step: its metrics, still on the device, its images, and the seconds that it waited for data."""
        self._pending.append((step, metrics, image_ids))
        self._waited += waited
        self._timed += 1
        if len(self._pending) % AHEAD_ON_CPU == 0 and jax.default_backend() == "cpu":
            jax.block_until_ready(metrics)
        if step - self._start_step in (1, LAST_TIMED_STEP):
            jax.block_until_ready(metrics)
            self._estimate(step)

    def _estimate(self, step: int) -> None:
        """Logs the time that the run will take, if its first line of metrics is still far: seconds per step from the end of
        the first step to that of step LAST_TIMED_STEP, without compilations."""
        now = time.monotonic() - compile_seconds(self._compiled)
        if step == self._start_step + 1:
            self._first_step_ended = now
            return
        training, seconds = self._run.config.training, (now - self._first_step_ended) / (LAST_TIMED_STEP - 1)
        left, first_window = training.steps - step, len(self._pending) == LAST_TIMED_STEP
        if self._writes and left and first_window and seconds * training.log_every > LONG_WAIT:
            remaining = f"{duration(seconds * left)} for the {left} steps left"
            log(f"a step takes about {seconds:.1f} s: {remaining}; metrics are logged every {training.log_every} steps")

    def flush(self) -> None:
        """Waits for the pending steps, writes and shows the mean of those that were not skipped. Raises NonFiniteLoss,
        before that, at the first non-finite step beyond the number `training.skip_non_finite`."""
        if not self._pending:
            return
        fetched = jax.device_get([metrics for _, metrics, _ in self._pending])
        finite = []
        for (step, _, image_ids), values in zip(self._pending, fetched, strict=True):
            bad = [name for name in FINITE if not np.isfinite(values[name])]
            if bad:
                found = f"{bad[0]} is {float(values[bad[0]])} at step {step}"
                self._report_skipped(step, found, image_ids, int(values["skipped"]))
            else:
                finite.append(values)
            self._check_positives(step, float(values["positives_per_image"]))
        if finite:
            self._write_mean(step, finite)
        self._pending.clear()
        self.restart_window()

    def _report_skipped(self, step: int, found: str, image_ids: list[int], skipped: int) -> None:
        """Reports a step that was skipped because a metric is not finite; NonFiniteLoss if it was not allowed."""
        images, allowed = ", ".join(map(str, image_ids)), self._run.config.training.skip_non_finite
        if not 0 < skipped <= allowed:
            after = f", after {allowed} skipped steps (training.skip_non_finite)" if allowed else ""
            folder = self._run.folder / "checkpoints"
            saved = f"; the newest checkpoint in {folder} is from before this step" if saved_steps(folder) else ""
            raise NonFiniteLoss(
                f"{found} (seen in the window {self._pending[0][0]} to {self._pending[-1][0]}), images {images}{after}; "
                f"lower optimizer.learning_rate, set optimizer.clip_norm, or check these images{saved}"
            )
        self.write(step, {"event": "left_out", "reason": found, "images": image_ids, "skipped": skipped})
        warn(f"{found}, images {images}: step skipped ({skipped} of at most {allowed})")

    def _check_positives(self, step: int, positives: float) -> None:
        """Warns once if the FIRST_STEPS steps since the start, or all of a shorter run, had no positive anchor."""
        self._found_positives |= positives > 0
        taken, complete = step - self._start_step, step == self._run.config.training.steps and self._start_step == 0
        if not self._found_positives and self._writes and (taken == FIRST_STEPS or (complete and taken < FIRST_STEPS)):
            warn(
                f"no anchor was positive in the first {taken} steps: only background is learned; "
                "scripts/check_data.py shows why (boxes in another unit, or far smaller or larger than the anchors)"
            )

    def _write_mean(self, step: int, fetched: list[dict[str, np.ndarray]]) -> None:
        elapsed = max(time.monotonic() - self._window_start, 1e-9)
        mean: dict[str, Any] = {name: math.fsum(float(v[name]) for v in fetched) / len(fetched) for name in fetched[0]}
        mean["skipped"] = int(fetched[-1]["skipped"])
        mean["learning_rate"] = float(fetched[-1]["learning_rate"])
        mean["images_per_second"] = self._timed * self._run.config.data.batch_size / elapsed
        mean["data_wait_percent"] = 100 * self._waited / elapsed
        mean["peak_memory_mib"] = peak_memory_bytes() / 2**20
        self.write(step, {"event": "train", **mean})
        if self._writes:
            self._progress.update(
                step,
                f"loss {mean['loss']:.4f} (class {mean['classification_loss']:.4f} box {mean['box_loss']:.4f})  "
                f"lr {mean['learning_rate']:.2g}  gradient {mean['gradient_norm']:.2f}  "
                f"positives {mean['positives_per_image']:.1f}  {mean['images_per_second']:.1f} img/s  "
                f"data wait {mean['data_wait_percent']:.0f}%  peak memory {mean['peak_memory_mib'] / 1024:.1f} GiB",
                excluded=compile_seconds(self._compiled),  # of the step, of detection in evaluations, of anything else
            )

    def restart_window(self) -> None:
        """Starts a window, so that the time since the last step (an evaluation, a save) does not count in its speed."""
        self._window_start, self._waited, self._timed = time.monotonic(), 0.0, 0

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one line to metrics.jsonl (or raises DiskError), and its numbers to the other views; only on host 0."""
        if not self._writes:
            return
        self._run.check_place()
        _append(self._file, json.dumps({"step": step, **{name: _rounded(v) for name, v in values.items()}}) + "\n")
        for view in self._views:
            view.add(step, values)

    def evaluated(self, step: int, scores: Mapping[str, float | None]) -> None:
        """Writes the scores of an evaluation, and shows the pictures in RUN/pictures that it drew."""
        self._evaluated[step] = _rounded(scores["AP"])
        self.write(step, {"event": "evaluation", **scores})
        drawn, folder = re.compile(rf"step_{step:08d}_(-?[0-9]+)\.png"), self._run.folder / "pictures"
        pictures = {match[1]: path for path in sorted(folder.glob("*.png")) if (match := drawn.fullmatch(path.name))}
        for view in self._views:
            view.add_pictures(step, pictures)


def _rounded(value: Any) -> Any:
    """Returns a float as metrics.jsonl has it, with six digits; others unchanged."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _append(path: Path, line: str) -> None:
    """Appends `line` completely, or not at all with a DiskError. The system keeps it if the process is killed."""
    try:
        with path.open("ab", buffering=0) as file:
            size, data = file.tell(), line.encode()
            try:
                while data:  # a disk that is nearly full takes the first part
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {reason(error)}") from error


def _drop_after(path: Path, step: int) -> dict[int, float | None]:
    """Removes the lines after `step`, which a resumed run writes again, and malformed ones; returns the AP of each
    evaluated step."""
    if not path.exists():
        return {}
    before, kept, evaluated = path.read_bytes(), [], {}
    for line in before.split(b"\n"):
        try:
            entry = json.loads(line)
            line_step = int(entry["step"])
        except DAMAGED:
            continue
        if line_step <= step:
            kept.append(line + b"\n")
            if entry.get("event") == "evaluation":
                evaluated[line_step] = entry.get("AP")
    if (after := b"".join(kept)) != before:
        write_bytes(path, after)
    return evaluated
