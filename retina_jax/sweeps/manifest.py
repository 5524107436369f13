"""DIR/sweeps/NAME.json: the points of a sweep in a fixed order, so that an index is the same run for every worker.

{"sweep": NAME, "file": ..., "base": ..., "overrides": {...}, "points": [{"name", "overrides", "seed", "folder"}, ...]}
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

import filelock
import msgspec

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import flatten, load_config
from retina_jax.runs.folder import write_json
from retina_jax.sweeps.points import ROOT, Point, expand


@dataclass(frozen=True)
class Row:
    """A point and its index for `--index`."""

    index: int
    point: Point
    labels: tuple[str, ...]
    """Its name in each sweep; with several sweeps "table1a/alpha_0.75"."""


@dataclass(frozen=True)
class Sweep:
    """The points of a manifest."""

    name: str
    points: tuple[Point, ...]


class SavedPoint(TypedDict):
    """A point in a manifest."""

    name: str
    overrides: dict[str, Any]
    seed: int
    folder: str


class Manifest(TypedDict):
    """A manifest's contents."""

    sweep: str
    file: str
    base: str
    overrides: dict[str, Any]
    points: list[SavedPoint]


def plan(
    workdir: Path | None, path: Path, module: ModuleType, base_path: Path, base: Config, seeds: Sequence[int] | None
) -> Sweep:
    """Returns the sweep that `write_manifest` would write; `workdir` None: as in an empty folder."""
    before = _read_if_exists(_manifest_file(workdir, path)) if workdir else None
    return _planned(path, module, base_path, base, seeds, before, workdir)[0]


def write_manifest(
    workdir: Path, path: Path, module: ModuleType, base_path: Path, base: Config, seeds: Sequence[int] | None
) -> Sweep:
    """Writes the sweep's manifest under `workdir`; to an existing one it adds the points of new `seeds`.

    New points come last, so existing indices do not change. Several processes may call this at once.

    Args:
      base_path: the config file of `base`, which may have further overrides.
      seeds: None: the base's own.

    Raises:
      ConfigError: the existing manifest has other points; the message names the difference.
    """
    file = _manifest_file(workdir, path)
    with exclusive_lock(file.parent / ".lock"):
        before = _read_if_exists(file)
        sweep, manifest = _planned(path, module, base_path, base, seeds, before, workdir)
        if before is None or len(before["points"]) < len(sweep.points):
            write_json(file, manifest)
    return sweep


@contextlib.contextmanager
def exclusive_lock(path: Path, timeout: float = -1.0) -> Iterator[bool]:
    """Yields whether this process got the lock on `path` within `timeout` seconds (-1: waits without limit), and holds it.

    The lock ends with the process, however it ends. Raises ConfigError if `path` cannot be written or locked.
    """
    lock = filelock.FileLock(path, timeout=timeout, poll_interval=0.02, fallback_to_soft=False)
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock)
        except filelock.Timeout:
            pass
        except (OSError, NotImplementedError) as error:
            raise ConfigError(f"{path}: cannot be locked: {error}; use a --workdir on another disk") from None
        yield lock.is_locked


def _manifest_file(workdir: Path, path: Path) -> Path:
    return workdir / "sweeps" / f"{path.stem}.json"


def _read_if_exists(file: Path) -> Manifest | None:
    return read_manifest(file) if file.exists() else None


def read_manifest(file: Path) -> Manifest:
    """Returns the manifest in `file`; ConfigError if it is damaged."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(
            f"{file}: not a sweep's manifest: {error}; delete it, and the next call writes it again"
        ) from None


def _planned(
    path: Path,
    module: ModuleType,
    base_path: Path,
    base: Config,
    seeds: Sequence[int] | None,
    before: Manifest | None,
    workdir: Path | None,
) -> tuple[Sweep, Manifest]:
    """Returns the sweep, with the seeds of `before` first, and its manifest; ConfigError if it contradicts `before`."""
    old_seeds = [point["seed"] for point in before["points"]] if before else []
    points = expand(path, module, base, tuple(dict.fromkeys([*old_seeds, *(seeds or (base.seed,))])))
    in_file = flatten(load_config(base_path))
    manifest: Manifest = {
        "sweep": path.stem,
        "file": _from_root(path),
        "base": _from_root(base_path),
        "overrides": {name: value for name, value in flatten(base).items() if value != in_file[name]},
        "points": [SavedPoint(name=p.name, overrides=p.overrides, seed=p.seed, folder=p.folder) for p in points],
    }
    manifest = json.loads(json.dumps(manifest))  # as it is read back: lists for tuples
    same_seeds = [point for point in manifest["points"] if point["seed"] in old_seeds]
    if before and before["points"] != same_seeds:
        raise ConfigError(
            f"{_manifest_file(workdir, path)}: this sweep exists already and differs, "
            f"{_difference(before, manifest, same_seeds)}; use another --workdir, or delete this file to name the points "
            "again (runs are kept, and equal runs are found again)"
        )
    return Sweep(path.stem, tuple(points)), manifest


def _difference(before: Manifest, now: Manifest, points: Sequence[SavedPoint]) -> str:
    """Describes how `now`, and its `points` of the same seeds, differ from `before`."""
    if before["base"] != now["base"]:
        return f"base: {before['base']} -> {now['base']}"
    old, new = before["overrides"], now["overrides"]
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        return "; ".join(f"{k}: {old.get(k, 'as the base')} -> {new.get(k, 'as the base')}" for k in changed)
    if [p["name"] for p in before["points"]] == [p["name"] for p in points]:
        one, other = next((a, b) for a, b in zip(before["points"], points, strict=True) if a != b)
        key = next(key for key in one if one[key] != other[key])
        return f"point {one['name']!r}: {key}: {one[key]} -> {other[key]}"
    names = [list(dict.fromkeys(point["name"] for point in some)) for some in (before["points"], points)]
    removed, added = ([n for n in a if n not in b] for a, b in (names, names[::-1]))
    parts = [f"points {', '.join(removed)} are gone"] * bool(removed) + [f"points {', '.join(added)} are new"] * bool(
        added
    )
    return " and ".join(parts) or "its points are in another order"


def rows(sweeps: Sequence[Sweep]) -> list[Row]:
    """Returns the runs that an index counts: the points of a single sweep, or the distinct runs of several sweeps.

    With several sweeps, all runs of the lowest seed come first, then those of the next seed, each in order of first
    appearance: adding a higher seed to one of them changes no index.
    """
    if len(sweeps) == 1:
        return [Row(i, point, (point.name,)) for i, point in enumerate(sweeps[0].points)]
    named = [(point, f"{sweep.name}/{point.name}") for sweep in sweeps for point in sweep.points]
    by_folder: dict[str, list[tuple[Point, str]]] = {}
    for point, label in sorted(named, key=lambda pair: pair[0].seed):
        by_folder.setdefault(point.folder, []).append((point, label))
    return [Row(i, same[0][0], tuple(label for _, label in same)) for i, same in enumerate(by_folder.values())]


def chosen(all_rows: Sequence[Row], only: Sequence[str], seeds: Sequence[int] | None) -> list[Row]:
    """Returns the rows whose name is in `only` (empty: all) and whose seed is in `seeds` (None: all).

    Raises ConfigError if a name is not the name of a point.
    """
    names = {
        row.index: {n for label in row.labels for n in (label, label.partition("/")[2] or label)} for row in all_rows
    }
    known: Mapping[str, None] = dict.fromkeys(name for row in all_rows for name in sorted(names[row.index]))
    for name in only:
        if name not in known:
            raise ConfigError(f"--only {name}: no such point; there are {', '.join(list(known)[:12])}")
    of_seeds = [row for row in all_rows if seeds is None or row.point.seed in seeds]
    return [row for row in of_seeds if not only or names[row.index] & set(only)]


def distinct(some_rows: Sequence[Row]) -> list[Row]:
    """Returns the first row of each folder."""
    first: dict[str, Row] = {}
    for row in some_rows:
        first.setdefault(row.point.folder, row)
    return list(first.values())


def _from_root(path: Path) -> str:
    """Returns the path relative to this repository if it is inside, else the absolute path."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
