"""A run's folder: what it was started with, what it measured, how it ended.

RUN/config.json holds the resolved config, the classes, the package versions, the git commit and the command;
RUN/metrics.jsonl a line for every `log_every` steps; RUN/evaluation/, RUN/detections/ and RUN/pictures/ what each
evaluation found; RUN/summary.json the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from retina_jax.config import Config, ConfigError
from retina_jax.config_files import from_dict, meaning_changes, to_dict
from retina_jax.evaluation import SUMMARY, Scores

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu", "tensorflow", "tensorflow-datasets",
    "pycocotools", "numpy", "Pillow",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """An open run's folder."""

    folder: Path
    config: Config
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    """COCO category id of each class."""
    data_sha256: str | None = None
    """Checksum of the training data's sizes, boxes and labels."""

    def has_evaluation(self, step: int) -> bool:
        """Whether the run was scored at `step`."""
        return (self.folder / "evaluation" / f"step_{step:08d}.json").exists()

    def path(self, kind: str, step: int, suffix: str = ".json") -> Path:
        """RUN/KIND/step_00001000.json, its folder made."""
        path = self.folder / kind / f"step_{step:08d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No second process trains in `folder` meanwhile; however this one ends, the lock ends with it."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--workdir {folder}: another process is training there") from None
        yield


def open_run(
    folder: Path,
    config: Config,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    data_sha256: str | None = None,
) -> Run:
    """Make RUN with its config.json, or check that a run already there is the same experiment.

    Raises ConfigError when the folder cannot be written, or when the run in it was started with other classes or with a
    config that computes something else (`FREE_TO_CHANGE` in config_files.py lists what may change), or on other training
    data: `data_sha256` is `Source.sha256` of it, None where there is none yet.
    """
    run = Run(folder, config, tuple(class_names), tuple(category_ids), data_sha256)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--workdir {folder}: cannot be written: {error.strerror}") from None
    if not (folder / "config.json").exists() and any((folder / "checkpoints").glob("[0-9]*")):
        raise ConfigError(
            f"--workdir {folder}: holds checkpoints and no config.json that tells of what; take another folder"
        )
    if (folder / "config.json").exists() and fresh_import(folder) is None:
        before = read_run(folder)
        if before.class_names != run.class_names:
            raise ConfigError(
                f"--workdir {folder}: its run has {len(before.class_names)} classes ({_few(before.class_names)}), the "
                f"data has {len(run.class_names)} ({_few(run.class_names)}); take the same data or another --workdir"
            )
        changes = meaning_changes(before.config, config)
        if changes:
            raise ConfigError(f"--workdir {folder}: a resumed run keeps its config, but {'; '.join(changes)}")
        if data_sha256 and before.data_sha256 not in (None, data_sha256):
            raise ConfigError(
                f"--workdir {folder}: its run was trained on other images or boxes than the training data now has; "
                "restore them, or take another --workdir"
            )
    write_json(
        folder / "config.json",
        {
            **_facts(folder),
            "config": to_dict(config),
            "class_names": list(class_names),
            "category_ids": list(category_ids),
            "data_sha256": data_sha256,
            "command": sys.argv,
            "commit": _commit(),
            "versions": _versions(),
        },
    )
    return run


def note_fact(run: Run, name: str, value: str) -> None:
    """Add a fact about how the run started to its config.json, where it stays when the run is resumed."""
    path = run.folder / "config.json"
    saved = json.loads(path.read_text())
    write_json(path, {**saved, "facts": {**saved.get("facts", {}), name: value}})


def _facts(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / "config.json"
    saved = json.loads(path.read_text()) if path.exists() and fresh_import(folder) is None else {}
    return {"facts": saved["facts"]} if "facts" in saved else {}


def fresh_import(folder: Path) -> Run | None:
    """What `import_weights.py` put into `folder`, while no step trained on it has been saved: it may take other classes
    and another config. None for every other run."""
    steps = [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    return read_run(folder, "imported.json") if (folder / "imported.json").is_file() and not any(steps) else None


def read_run(folder: Path, name: str = "config.json") -> Run:
    """The run in `folder`, from its config.json."""
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"--workdir {folder}: no run there ({path} is missing)")
    try:
        saved = json.loads(path.read_text())
        classes, ids = tuple(saved["class_names"]), tuple(saved["category_ids"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read: {type(error).__name__}: {error}") from None
    return Run(folder, from_dict(saved.get("config"), str(path)), classes, ids, saved.get("data_sha256"))


def finish_run(run: Run, step: int, seconds: float, parameters_sha256: str) -> Scores | None:
    """Write RUN/summary.json; the last evaluation's scores, None where there was none."""
    evaluations = sorted((run.folder / "evaluation").glob(f"step_{'[0-9]' * 8}.json"))
    evaluation = json.loads(evaluations[-1].read_text()) if evaluations else None
    summary = {
        "steps": step,
        "images": step * run.config.data.batch_size,
        "seconds": round(seconds, 1),
        "evaluation": evaluation,
        "parameters_sha256": parameters_sha256,
    }
    write_json(run.folder / "summary.json", summary)
    if evaluation is None:
        return None
    return Scores({name: evaluation[name] for name in SUMMARY}, evaluation["per_class"])


def is_due(step: int, every: int, last: bool) -> bool:
    """Whether something done every so many steps (0: only at the last, -1: never) is done after `step`."""
    return every >= 0 and (last or (every > 0 and step % every == 0))


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all: to a file beside it, then renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    beside.replace(path)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _commit() -> str | None:
    """Git commit of this code, with "+changes" where the tree differs from it; None outside a checkout."""
    where = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(where)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    versions["devices"] = f"{len(devices)} x {devices[0].device_kind}"
    return versions


class Clock:
    """Wall time a run has spent, over all its starts."""

    def __init__(self, folder: Path, resumed: bool) -> None:
        self._path = folder / "seconds.json"
        try:
            before = float(json.loads(self._path.read_text())) if resumed else 0.0
        except (OSError, ValueError, TypeError):  # time alone is lost with this file
            before = 0.0
        self._start = time.monotonic() - before

    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._start

    def save(self) -> None:
        """Keep the time for a later start."""
        write_json(self._path, round(self.seconds(), 1))
