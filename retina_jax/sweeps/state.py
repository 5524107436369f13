"""How far a point has come, and training it so that no two workers do.

A worker holds a lock on DIR/.claims/FOLDER.lock as long as it trains. The lock is the kernel's (flock) and ends with the
worker, however it ends. On NFS it holds between machines too, where the server supports locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from retina_jax.config import Config, ConfigError
from retina_jax.runs.folder import write_json
from retina_jax.sweeps.points import Point
from retina_jax.training.metrics import NonFiniteLoss

Kind = Literal["done", "diverged", "running", "broken", "waiting"]


@dataclass(frozen=True)
class State:
    """How far a point has come."""

    kind: Kind
    """done: trained to its last step and, where its config evaluates, scored; diverged: its loss stopped being a number;
    running: a worker holds it; broken: begun and left, it will resume; waiting: not begun."""
    ap: float | None = None
    """Of a done point that was evaluated, in [0, 1]."""
    step: int | None = None
    """Where it diverged."""
    seconds: float | None = None
    """What a done point took."""

    def __str__(self) -> str:
        if self.kind == "done":
            return "done" if self.ap is None else f"done, AP {100 * self.ap:.1f}"
        return f"diverged at step {self.step}" if self.kind == "diverged" and self.step is not None else self.kind


@contextlib.contextmanager
def claim(workdir: Path, folder: str, patience: float = 0.0) -> Iterator[bool]:
    """Whether the point's lock could be had within `patience` seconds; it is held until the end of the `with` block."""
    until = time.monotonic() + patience
    path = _lock_file(workdir, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        while not (ours := _locked(lock, fcntl.LOCK_EX)) and time.monotonic() < until:
            time.sleep(0.05)
        yield ours


def _held(workdir: Path, folder: str) -> bool:
    """Whether a worker holds the point's lock. Those who only look share it, and never find each other."""
    path = _lock_file(workdir, folder)
    if not path.exists():
        return False
    with path.open("r") as lock:
        return not _locked(lock, fcntl.LOCK_SH)


def _lock_file(workdir: Path, folder: str) -> Path:
    return workdir / ".claims" / f"{folder}.lock"


def _locked(lock: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ConfigError(
            f"{lock.name}: cannot be locked: {error.strerror}; take a --workdir on another disk"
        ) from None
    return True


def state_of(workdir: Path, point: Point) -> State:
    """How far the point has come, by what its folder holds and by its lock."""
    ended = _ended(workdir / point.folder, point.config)
    if ended is not None:
        return ended
    if _held(workdir, point.folder):
        return State("running")
    begun = any((workdir / point.folder / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints"))
    return State("broken" if begun else "waiting")


def run_point(workdir: Path, point: Point, train: Callable[[Config, Path], None]) -> State:
    """Train the point, or resume it, unless it has ended or another worker holds it; its state afterwards.

    A loss that stops being a number is a result: it is written to FOLDER/diverged.json and never tried again while that
    file is there. Every other error is raised.

    Args:
      train: trains a config in a folder and resumes what is there, `scripts/train.py`'s.
    """
    folder = workdir / point.folder
    # Whoever looks at a point's state holds its lock for an instant.
    with claim(workdir, point.folder, patience=1.0) as ours:
        if not ours:
            return State("running")
        ended = _ended(folder, point.config)
        if ended is not None:
            return ended
        try:
            train(point.config, folder)
        except NonFiniteLoss as error:
            at = re.search(r" at step (\d+)", str(error))
            write_json(folder / "diverged.json", {"step": int(at[1]) if at else None, "message": str(error)})
        ended = _ended(folder, point.config)
    if ended is None:
        raise ConfigError(
            f"{folder / 'summary.json'}: training ended without it, or at another step than training.steps"
        )
    return ended


def _ended(folder: Path, config: Config) -> State | None:
    """The end of a run that has ended, done or diverged; ConfigError where the file that tells of it is damaged."""
    for name in ("summary.json", "diverged.json"):
        path = folder / name
        try:
            found = json.loads(path.read_text())
            if name == "diverged.json":
                return State("diverged", step=found["step"])
            scored = found["evaluation"] is not None or config.training.eval_every < 0
            if found["steps"] == config.training.steps and scored:
                ap = (found["evaluation"] or {}).get("AP")
                return State("done", ap=ap, seconds=found["seconds"])
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: cannot be read: {type(error).__name__}: {error}; delete it to train again"
            ) from None
    return None
