"""A run's folder: what it was started with, what it measured, how it ended.

RUN/config.json holds the resolved config, the classes, the package versions, the git commit and the command;
RUN/metrics.jsonl a line for every `log_every` steps; RUN/evaluation/, RUN/detections/ and RUN/pictures/ what each
evaluation found; RUN/summary.json the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from retina_jax import distributed
from retina_jax.config import Config, ConfigError
from retina_jax.config_io import from_dict
from retina_jax.console import log, warn
from retina_jax.data.classes import Category
from retina_jax.errors import reason
from retina_jax.evaluation.coco_scores import SUMMARY, Scores, coco_table
from retina_jax.runs.files import DiskError

LEFTOVER = re.compile(r"\.(.+\.json\.[0-9]+|write_test_[0-9]+|metrics\.jsonl)")
"""Names of files on their way to another name, which a kill leaves as they are."""
_HELD: list[TextIO] = []
"""Locks that only the end of the process opens."""
SECONDS_TO_WRITE = 5
"""A file of such a name and younger than this may be of a process that lives, such as evaluate.py."""


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
    parts: int | None = None
    """Parts that its batches are taken in: devices times training.accumulate."""

    @property
    def categories(self) -> list[Category]:
        """Id and name of each class."""
        return list(zip(self.category_ids, self.class_names, strict=True))

    def path(self, kind: str, step: int, suffix: str = ".json") -> Path:
        """RUN/KIND/step_00001000.json, its folder made."""
        path = self.folder / kind / f"step_{step:08d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def make_writable(folder: Path) -> None:
    """Make the folder; ConfigError where nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--workdir {folder}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No second process trains in `folder` meanwhile; however this one ends, the lock ends with it. Host 0 holds it, and
    clears away what a killed one left half written. After a KeyboardInterrupt, which gives up a save that a thread may
    still be writing, the lock is held until the process has ended."""
    if not distributed.first():
        yield
        return
    make_writable(folder)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((folder / ".lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--workdir {folder}: another process is training there") from None
        except OSError as error:
            raise ConfigError(
                f"--workdir {folder}: cannot be locked ({error.strerror}); take one on a file system with locks"
            ) from None
        for path in [path for kind in ("", "evaluation", "detections") for path in (folder / kind).glob(".*")]:
            with contextlib.suppress(OSError):  # of no use, and no harm
                if LEFTOVER.fullmatch(path.name) and time.time() - path.stat().st_mtime > SECONDS_TO_WRITE:
                    path.unlink()
        try:
            yield
        except KeyboardInterrupt:
            _HELD.append(lock)
            stack.pop_all()
            raise


def note_fact(run: Run, name: str, value: str) -> None:
    """Add a fact about how the run started to its config.json, where it stays when the run is resumed."""
    if not distributed.first():
        return
    path = run.folder / "config.json"
    saved = json.loads(path.read_text())
    write_json(path, {**saved, "facts": {**saved.get("facts", {}), name: value}})


def fresh_import(folder: Path) -> Run | None:
    """What `import_weights.py` put into `folder`, while no step trained on it has been saved: it may take other classes
    and another config. None for every other run."""
    steps = [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    return read_run(folder, "imported.json") if (folder / "imported.json").is_file() and not any(steps) else None


def started_run(folder: Path) -> Run | None:
    """The run in `folder` that training would resume; None if there is none, or only a fresh import."""
    return read_run(folder) if (folder / "config.json").exists() and fresh_import(folder) is None else None


def read_run(folder: Path, name: str = "config.json") -> Run:
    """The run in `folder`, from its config.json."""
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"--workdir {folder}: no run there ({path} is missing)")
    try:
        saved = json.loads(path.read_text())
        classes, ids = tuple(map(str, saved["class_names"])), tuple(map(int, saved["category_ids"]))
        if len(classes) != len(ids):
            raise ValueError(f"{len(classes)} class_names, {len(ids)} category_ids")
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read: {type(error).__name__}: {error}") from None
    return Run(
        folder, from_dict(saved.get("config"), str(path)), classes, ids, saved.get("data_sha256"), saved.get("parts")
    )


def finish_run(
    run: Run,
    step: int,
    clock: Clock,
    parameters_sha256: str,
    skipped: Collection[str] = (),
    one_colour: Collection[str] = (),
) -> dict[str, Any]:
    """Write RUN/summary.json, by which two runs can be compared, print the last evaluation's table, and say what is where.

    `skipped` are the images that this host could not read, `one_colour` those that it read with one colour. Returns the
    summary.
    """
    evaluations = sorted((run.folder / "evaluation").glob(f"step_{'[0-9]' * 8}.json"))
    evaluation = json.loads(evaluations[-1].read_text()) if evaluations else None
    seconds = clock.seconds()
    summary = {
        "steps": step,
        "images": step * run.config.data.batch_size,
        "seconds": round(seconds, 1),
        "evaluation": evaluation,
        "parameters_sha256": parameters_sha256,
    }
    write_json(run.folder / "summary.json", summary)
    if evaluation is not None:
        log(coco_table(Scores({name: evaluation[name] for name in SUMMARY}, evaluation["per_class"])))
    for what, names in (
        ("unreadable images were skipped", skipped),
        ("images have one colour, wholly or nearly", one_colour),
    ):
        of_hosts = sorted(
            {name for text in distributed.exchange(json.dumps(sorted(names))) for name in json.loads(text)}
        )
        if of_hosts:
            warn(f"{len(of_hosts)} {what}: {', '.join(of_hosts)}")
    log(f"{step} steps in {seconds:.0f} s; everything is in {run.folder}")
    return summary


def is_due(step: int, every: int, last: bool) -> bool:
    """Whether something done every so many steps (0: only at the last, -1: never) is done after `step`."""
    return every >= 0 and (last or (every > 0 and step % every == 0))


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write whole or not at all: to a file beside it, then renamed. Of several hosts the first alone writes. Raises
    DiskError where it cannot be written."""
    if not distributed.first():
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n")
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise DiskError(f"{path}: cannot be written: {reason(error)}") from error


class Clock:
    """Wall time a run has spent, over all its starts; kept when the `with` block ends, however it does."""

    def __init__(self, folder: Path, resumed: bool) -> None:
        self._path = folder / "seconds.json"
        try:
            before = float(json.loads(self._path.read_text())) if resumed else 0.0
        except (OSError, ValueError, TypeError):  # time alone is lost with this file
            before = 0.0
        self._start = time.monotonic() - before

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *error: object) -> None:
        self.save()

    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._start

    def save(self) -> None:
        """Keep the time for a later start; a full disk loses no more than that."""
        with contextlib.suppress(DiskError):
            write_json(self._path, round(self.seconds(), 1))
