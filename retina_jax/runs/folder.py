"""A run's folder: its config, its lock, its list of checkpoints, and the summary that training writes at the end."""

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from retina_jax import distributed
from retina_jax.cli import option_value
from retina_jax.config import Config, ConfigError
from retina_jax.config_io import from_dict, load_config, override
from retina_jax.data.classes import Category
from retina_jax.runs.files import DAMAGED, DiskError, exclusive_lock, finite_json, read_json, write_json

TEMPORARY = re.compile(r"\.(.+\.jsonl?\.[0-9]+|write_test_[0-9]+|metrics\.jsonl)")
"""Names of files that a killed process was writing."""
SECONDS_TO_WRITE = 5  # a younger temporary file may belong to a running process, such as evaluate.py
_HELD: list[contextlib.ExitStack] = []  # locks that are held until the process ends


@dataclass(frozen=True)
class Run:
    """A run's folder and what its config.json says."""

    folder: Path
    config: Config
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]  # COCO category id of each class
    data_sha256: str | None = None  # checksum of the training data's sizes, boxes and labels
    num_microbatches: int | None = None
    """Number of micro-batches that a batch is split into: devices times training.accumulate."""
    place: tuple[int, int] | None = field(default=None, compare=False)
    """Device and inode number of the folder in which training was started (`place_of`)."""

    @property
    def categories(self) -> list[Category]:
        """Id and name of each class."""
        return list(zip(self.category_ids, self.class_names, strict=True))

    def path(self, kind: str, step: int, suffix: str = ".json") -> Path:
        """Returns RUN/KIND/step_00001000SUFFIX, and makes its folder; DiskError if the run was moved."""
        self.check_place()
        path = self.folder / kind / f"step_{step:08d}{suffix}"
        path.parent.mkdir(parents=self.place is None, exist_ok=True)
        return path

    def check_place(self) -> None:
        """Raises DiskError if training was started in another folder than the one that has this path now."""
        if self.place is not None and distributed.is_primary() and place_of(self.folder) != self.place:
            raise DiskError(f"{self.folder}: was moved or replaced; the same command resumes with its new path")


def place_of(folder: Path) -> tuple[int, int] | None:
    """Returns device and inode number of a folder, which it keeps when it is moved; None if there is no such folder."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _Saved(msgspec.Struct):
    """The fields of a config.json that are used."""

    class_names: list[str]
    category_ids: list[int]
    config: Any = None
    data_sha256: str | None = None
    parts: int | None = None
    command: list[Any] | None = None
    versions: dict[str, Any] | None = None
    facts: dict[str, Any] = {}
    first_start: dict[str, Any] | None = None
    changes: list[Any] = []


def read_run(folder: Path, name: str = "config.json") -> Run:
    """Returns the run in `folder` from its config.json; ConfigError if there is none, or it cannot be read."""
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"--workdir {folder}: no run there ({path} is missing)")
    try:
        saved = msgspec.convert(read_json(path), _Saved)
        classes, ids = tuple(saved.class_names), tuple(saved.category_ids)
        if len(classes) != len(ids):
            raise ValueError(f"{len(classes)} class_names, {len(ids)} category_ids")
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    config = from_dict(saved.config, str(path))
    return Run(folder, config, classes, ids, saved.data_sha256, saved.parts)


def config_of(argv: Sequence[str], default: str) -> Config:
    """Returns the config for training: of the file in `--config`, else of the run in `--workdir`, else of `default`."""
    workdir, file = option_value(argv, "--workdir"), option_value(argv, "--config")
    if file is None and workdir and (Path(workdir) / "config.json").is_file():
        return read_run(Path(workdir)).config
    return load_config(file or default)


def settings_of(argv: Sequence[str], exclusive: bool = False) -> Config:
    """Returns the config of a detector: of the file in `--weights`, else of the run in `--workdir`. ConfigError for both, if
    they are `exclusive`."""
    workdir, weights = option_value(argv, "--workdir"), option_value(argv, "--weights")
    if exclusive and workdir and weights:
        raise ConfigError("--workdir: give the folder of a run, or --weights KIND:FILE, and not both")
    if weights:
        from retina_jax.weights.importing import convert  # only a named file needs the readers

        return override(Config(), convert(weights).changes)
    return read_run(Path(workdir)).config if workdir else Config()


def fresh_import(folder: Path) -> Run | None:
    """Returns what `import_weights.py` saved in `folder`, which any training may start from; None if a step > 0 is saved."""
    fresh = (folder / "imported.json").is_file() and not any(saved_steps(folder / "checkpoints"))
    return read_run(folder, "imported.json") if fresh else None


def started_run(folder: Path) -> Run | None:
    """Returns the run in `folder` that training would resume; None if it has saved no step, and thus can be replaced."""
    has_config = (folder / "config.json").exists()
    return read_run(folder) if has_config and any(saved_steps(folder / "checkpoints")) else None


def saved_steps(checkpoints: Path) -> list[int]:
    """Returns the steps saved in RUN/checkpoints, oldest first. Each is a folder named by its number."""
    try:
        return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
    except (FileNotFoundError, NotADirectoryError):
        return []


def saved_ap(checkpoints: Path, step: int) -> float | None:
    """Returns the AP of a saved step; None if it was not evaluated, or the file is damaged."""
    try:
        return float(finite_json((checkpoints / str(step) / "metrics" / "metrics").read_bytes())["AP"])
    except DAMAGED:
        return None


def best_step(checkpoints: Path) -> int | None:
    """Returns the saved step with the highest AP, the newest of equal ones; None if none was evaluated."""
    scored = [(ap, step) for step in saved_steps(checkpoints) if (ap := saved_ap(checkpoints, step)) is not None]
    return max(scored)[1] if scored else None


def described_step(step: int, run: Path | None = None) -> str:
    """Returns the step of a detector in words: "step 20". If it is the best step of the folder `run`, it adds that and the
    newest one: "step 20, the best by AP (--step newest: 30)"."""
    if run is None or best_step(run / "checkpoints") != step:
        return f"step {step}"
    newest = saved_steps(run / "checkpoints")[-1]
    return f"step {step}, the best by AP" + (f" (--step newest: {newest})" if newest != step else "")


def make_writable(folder: Path) -> None:
    """Makes the folder; ConfigError if nothing can be written in it."""
    probe = folder / f".write_test_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--workdir {folder}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def training_lock(folder: Path) -> Iterator[None]:
    """Lets no second process train in `folder` during the block, and removes temporary files of a killed one. On host 0.
    After a KeyboardInterrupt a thread may still write a checkpoint: the lock is held until the process ends."""
    if not distributed.is_primary():
        yield
        return
    make_writable(folder)
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(exclusive_lock(folder / ".lock", timeout=0.0)):
            how = "wait for it, or use another --workdir"
            raise ConfigError(f"--workdir {folder}: another process is training there; {how}")
        for path in [*folder.glob(".*"), *folder.glob("evaluation/.*"), *folder.glob("detections/.*")]:
            with contextlib.suppress(OSError):  # they are useless but harmless
                if _is_left_behind(path):
                    path.unlink()
        try:
            yield
        except KeyboardInterrupt:
            _HELD.append(stack.pop_all())
            raise


def _is_left_behind(path: Path) -> bool:
    """Returns whether a killed process has left this temporary file. Under the lock, seconds.json has no other writer."""
    age = time.time() - path.stat().st_mtime
    return bool(TEMPORARY.fullmatch(path.name)) and (path.name.startswith(".seconds.json.") or age > SECONDS_TO_WRITE)


def record_fact(run: Run, name: str, value: str) -> None:
    """Adds a fact about the start of the run to config.json, where it stays when the run is resumed."""
    if distributed.is_primary():
        saved = read_json(run.folder / "config.json")
        write_json(run.folder / "config.json", {**saved, "facts": {**saved.get("facts", {}), name: value}})


def is_due(step: int, every: int, last: bool) -> bool:
    """Returns whether something done every `every` steps (0: only at the last, -1: never) is due after `step`."""
    return every >= 0 and (last or (every > 0 and step % every == 0))


class Clock(contextlib.AbstractContextManager):
    """The seconds that a run has taken over all its starts; saved when the `with` block ends, however it ends."""

    def __init__(self, folder: Path, resumed: bool, counts: bool = True) -> None:
        """Starts with the seconds of earlier starts if the run is `resumed`; this start adds its own if it `counts`."""
        self._path = folder / "seconds.json"
        try:
            before = float(finite_json(self._path.read_bytes())) if resumed else 0.0
        except DAMAGED:  # only the time of earlier starts is lost
            before = 0.0
        self.seconds = before
        """The seconds up to the last save."""
        self._start = time.monotonic() - before if counts else None

    def __exit__(self, *error: object) -> None:
        self.save()

    def save(self) -> None:
        """Saves the time for a later start. A full disk only loses the time."""
        if self._start is not None:
            self.seconds = round(time.monotonic() - self._start, 1)
            with contextlib.suppress(DiskError):
                write_json(self._path, self.seconds)
