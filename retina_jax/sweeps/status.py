"""The state of a point, training it so that no two workers train the same run, and the table that `--list` prints.

A worker holds the lock DIR/.claims/FOLDER.lock while it trains: the kernel's (flock), which ends with the worker.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar

import msgspec

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import with_epochs
from retina_jax.data.transforms import buckets, train_short_sides
from retina_jax.model.summary import forward_flops
from retina_jax.runs.files import exclusive_lock, write_json
from retina_jax.sweeps.points import Point, Task
from retina_jax.training.metrics import NonFiniteLoss

T = TypeVar("T")
ENDED = ("done", "diverged")  # kinds of state in which a point is not trained again
PAPER_CLASSES = 80  # number of classes assumed for costs if `model.num_classes` is taken from the data
PAPER_IMAGES = 117_266  # number of training images assumed for costs if `training.epochs` decides the steps: COCO's


@dataclass(frozen=True)
class State:
    """Progress of a point.

    done: trained to its last step and evaluated, if its config evaluates; diverged: its loss became non-finite; running: a
    worker holds its lock; interrupted: started and will be resumed; waiting: not started.
    """

    kind: Literal["done", "diverged", "running", "interrupted", "waiting"]
    ap: float | None = None  # in [0, 1]; None: not done, or not evaluated
    step: int | None = None  # step at which it diverged
    seconds: float | None = None  # training time of a done point
    message: str = field(default="", compare=False)  # why it diverged

    def __str__(self) -> str:
        if self.ap is not None:
            return f"{self.kind}, AP {100 * self.ap:.1f}"
        return self.kind if self.step is None else f"{self.kind} at step {self.step}"


def lock_file(workdir: Path, folder: str) -> Path:
    """Returns the file that a worker locks while it trains in `folder`."""
    return workdir / ".claims" / f"{folder}.lock"


def state_of(workdir: Path, point: Point) -> State:
    """Returns the state of a point, from its folder and its lock."""
    if (end := ended(workdir / point.folder, point.config)) is not None:
        return end
    lock = lock_file(workdir, point.folder)
    if lock.exists():
        if not os.access(lock, os.W_OK):  # another user's sweep: unknown, and not free
            return State("running")
        with exclusive_lock(lock, timeout=0.2) as free:  # other processes that look at it hold it for an instant
            if not free:
                return State("running")
    started = any((workdir / point.folder / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints"))
    return State("interrupted" if started else "waiting")


def run_point(workdir: Path, point: Point, train: Callable[[Config, Path], None]) -> State:
    """Trains or resumes the point, unless it has ended or another worker trains it; returns its state afterwards.

    `train` trains a config in a folder, or resumes the run there. A non-finite loss is a result: it is written to
    FOLDER/diverged.json, and the point is not tried again while that file exists. Every other error is raised.
    """
    folder = workdir / point.folder
    with exclusive_lock(lock_file(workdir, point.folder), timeout=1.0) as locked:
        if not locked:
            return State("running")
        if (end := ended(folder, point.config)) is not None:
            return end
        try:
            train(point.config, folder)
        except NonFiniteLoss as error:
            step = re.search(r" at step (\d+)", str(error))
            write_json(folder / "diverged.json", {"step": int(step[1]) if step else None, "message": str(error)})
        end = ended(folder, point.config)
    if end is None:
        found = "missing after training, or of another step than training.steps"
        raise ConfigError(f"{folder / 'summary.json'}: {found}; delete it and run the point again")
    return end


def ended(folder: Path, config: Config) -> State | None:
    """Returns the state done or diverged of the run in `folder`, else None; ConfigError if the file about it is damaged."""
    summary = _read(folder / "summary.json", _Summary)
    # Training deletes the summary of a run that is to be trained further, so one of these runs is at its end.
    flexible = config.training.epochs > 0 or config.training.patience > 0
    if summary is not None and (flexible or summary.steps == config.training.steps):
        if summary.evaluation is not None:
            return State("done", ap=summary.evaluation.AP, seconds=summary.seconds)
        if config.training.eval_every < 0:
            return State("done", seconds=summary.seconds)
    divergence = _read(folder / "diverged.json", _Divergence)
    return None if divergence is None else State("diverged", step=divergence.step, message=divergence.message)


class _Evaluation(msgspec.Struct):
    AP: float | None = None


class _Summary(msgspec.Struct):
    steps: int
    seconds: float
    evaluation: _Evaluation | None


class _Divergence(msgspec.Struct):
    step: int | None
    message: str = ""


def _read(path: Path, kind: type[T]) -> T | None:
    """Returns the contents of a JSON file, or None if it does not exist."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; delete it to train again") from None


def mean_padded_area(config: Config) -> float:
    """Returns the mean pixels of the padded shapes in training, all assumed equally frequent."""
    return fmean(map(math.prod, buckets(config.data, train_short_sides(config.data))))


def training_pflop(config: Config) -> float:
    """Returns the 10^15 operations of training: a step costs three forward passes per image."""
    # The cost is proportional to the area where all strides divide the sides: one small shape serves runs of all sizes.
    side = 2**config.model.max_level
    forward = forward_flops(config, config.model.num_classes or PAPER_CLASSES, (side, side)) / side**2
    steps = with_epochs(config, PAPER_IMAGES).training.steps
    return 3 * forward * mean_padded_area(config) * config.data.batch_size * steps / 1e15


def listing(workdir: Path | None, tasks: Sequence[Task]) -> str:
    """Returns a line per point and a sum (`workdir` None: nothing has started), with hours, which ~ marks as estimated."""
    states = {task.point.folder: state_of(workdir, task.point) if workdir else State("waiting") for task in tasks}
    costs = {task.point.folder: training_pflop(task.point.config) for task in tasks}
    done = {name: state.seconds for name, state in states.items() if state.seconds}
    rate = sum(done.values()) / sum(costs[name] for name in done) if done else None
    several_seeds = len({task.point.seed for task in tasks}) > 1
    table = [["index", "point", "state", "PFLOP", *["hours"] * (rate is not None), "folder", "overrides"]]
    for task in tasks:
        name = " = ".join(task.labels) + (f" (seed {task.point.seed})" if several_seeds else "")
        folder = task.point.folder
        took, hours = states[folder].seconds, []
        if rate is not None:
            hours = [f"~{costs[folder] * rate / 3600:.2f}" if took is None else f"{took / 3600:.2f}"]
        overrides = " ".join(f"{k}={_value(v)}" for k, v in task.point.overrides.items()) or "none: the base itself"
        table.append([str(task.index), name, str(states[folder]), _number(costs[folder]), *hours, folder, overrides])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
    left = math.fsum(cost for folder, cost in costs.items() if states[folder].kind not in ENDED)
    counts = Counter(state.kind for state in states.values())
    expected = "" if rate is None else f", {left * rate / 3600:.2f} hours at the rate of the done points"
    rows.append(
        f"{len(states)} distinct runs: {', '.join(f'{n} {kind}' for kind, n in counts.items())}; "
        f"{_number(math.fsum(costs.values()))} PFLOP, {_number(left)} left{expected}"
    )
    return "\n".join(rows)


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
