"""DIR/sweeps/NAME.json: the points of a sweep in a fixed order, so that an index means the same run to every worker.

{"sweep": NAME, "file": ..., "base": ..., "overrides": {...}, "points": [{"name", "overrides", "seed", "folder"}, ...]}
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import flatten, load_config
from retina_jax.runs.folder import write_json
from retina_jax.sweeps.points import ROOT, Point, expand


@dataclass(frozen=True)
class Row:
    """A point and the index that `--index` knows it by."""

    index: int
    point: Point
    labels: tuple[str, ...]
    """What each sweep calls it: the point's name, and of several sweeps "table1a/alpha_0.75"."""


@dataclass(frozen=True)
class Sweep:
    """A sweep as its manifest has it."""

    name: str
    points: tuple[Point, ...]


def plan(
    workdir: Path | None, path: Path, module: ModuleType, base_path: Path, base: Config, seeds: Sequence[int] | None
) -> Sweep:
    """The sweep as `write_manifest` would have it, and nothing written; `workdir` None: as in an empty folder."""
    file = _manifest_file(workdir, path) if workdir else None
    before = read_manifest(file) if file and file.exists() else None
    points, manifest = _planned(path, module, base_path, base, seeds, before)
    if before is not None:
        _check_same(file, before, manifest)
    return Sweep(path.stem, tuple(points))


def write_manifest(
    workdir: Path, path: Path, module: ModuleType, base_path: Path, base: Config, seeds: Sequence[int] | None
) -> Sweep:
    """Write the sweep's manifest under `workdir`, or read it where it is there and add the `seeds` that it lacks.

    Added points come after the old ones, whose indices stay. Safe with several processes at once.

    Args:
      base_path: the config file that `base` comes from; `base` may have further fields overridden.
      seeds: None: the base's own.

    Raises:
      ConfigError: the manifest has other points than the sweep would have now; the line names what differs.
    """
    file = _manifest_file(workdir, path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = (file.parent / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"--workdir {workdir}: cannot be written: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = read_manifest(file) if file.exists() else None
        points, manifest = _planned(path, module, base_path, base, seeds, before)
        _check_same(file, before, manifest)
        if before is None or len(before["points"]) < len(points):
            write_json(file, manifest)
    return Sweep(path.stem, tuple(points))


def _manifest_file(workdir: Path, path: Path) -> Path:
    return workdir / "sweeps" / f"{path.stem}.json"


def _planned(
    path: Path,
    module: ModuleType,
    base_path: Path,
    base: Config,
    seeds: Sequence[int] | None,
    before: Mapping[str, Any] | None,
) -> tuple[list[Point], dict[str, Any]]:
    """The points, those of the seeds that are there `before` first, and the manifest that says so."""
    there = [point["seed"] for point in before["points"]] if before else []
    wanted = tuple(dict.fromkeys([*there, *(seeds if seeds is not None else (base.seed,))]))
    points = expand(path, module, base, wanted)
    manifest = {
        "sweep": path.stem,
        "file": _from_root(path),
        "base": _from_root(base_path),
        "overrides": _changes(base_path, base),
        "points": [{k: getattr(p, k) for k in ("name", "overrides", "seed", "folder")} for p in points],
    }
    return points, json.loads(json.dumps(manifest))


def read_manifest(file: Path) -> dict[str, Any]:
    """The manifest in `file`; ConfigError where it is damaged."""
    try:
        manifest = json.loads(file.read_text())
        wanted = {"sweep", "file", "base", "overrides", "points"}
        if wanted <= set(manifest) and all(
            {"name", "overrides", "seed", "folder"} <= set(p) for p in manifest["points"]
        ):
            return manifest
        reason = "not a sweep's manifest"
    except (ValueError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise ConfigError(f"{file}: cannot be read: {reason}; delete it, and the next call writes it anew")


def rows(sweeps: Sequence[Sweep]) -> list[Row]:
    """The runs that an index counts: of one sweep its points; of several their distinct runs, in order of first appearance.

    Of several sweeps all runs of the lowest seed come before those of the next, so that a higher seed added to them moves no
    index.
    """
    if len(sweeps) == 1:
        return [Row(i, point, (point.name,)) for i, point in enumerate(sweeps[0].points)]
    points: dict[str, Point] = {}
    labels: dict[str, list[str]] = {}
    for seed in sorted({point.seed for sweep in sweeps for point in sweep.points}):
        for sweep in sweeps:
            for point in (p for p in sweep.points if p.seed == seed):
                points.setdefault(point.folder, point)
                labels.setdefault(point.folder, []).append(f"{sweep.name}/{point.name}")
    return [Row(i, point, tuple(labels[folder])) for i, (folder, point) in enumerate(points.items())]


def chosen(all_rows: Sequence[Row], only: Sequence[str], seeds: Sequence[int] | None) -> list[Row]:
    """Those of the names in `only` (empty: all) and of `seeds` (None: all); ConfigError where a name is of no point."""
    names = {
        row.index: {n for label in row.labels for n in (label, label.partition("/")[2] or label)} for row in all_rows
    }
    known = dict.fromkeys(name for row in all_rows for name in sorted(names[row.index]))
    for name in only:
        if name not in known:
            raise ConfigError(f"--only {name}: no such point; there are {', '.join(list(known)[:12])}")
    return [
        row
        for row in all_rows
        if (seeds is None or row.point.seed in seeds) and (not only or names[row.index] & set(only))
    ]


def distinct(some_rows: Sequence[Row]) -> list[Row]:
    """Each folder once: the first row of it."""
    return list({row.point.folder: row for row in reversed(some_rows)}.values())[::-1]


def _check_same(file: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """ConfigError where `now` is not `before` with the points of further seeds at its end."""
    if before is None:
        return
    seeds = {point["seed"] for point in before["points"]}
    of_these = [point for point in now["points"] if point["seed"] in seeds]
    if before["points"] == of_these:
        return
    old, new = before["overrides"], now["overrides"]
    changed = [
        f"{k}: {old.get(k, 'as the base')} -> {new.get(k, 'as the base')}"
        for k in {**old, **new}
        if old.get(k) != new.get(k)
    ]
    if before["base"] != now["base"]:
        difference = f"base: {before['base']} -> {now['base']}"
    elif changed:
        difference = "; ".join(changed)
    else:
        difference = _point_difference(before["points"], of_these)
    raise ConfigError(
        f"{file}: this sweep is here already and differs, {difference}; take another --workdir, or delete this file to "
        "name the points anew (runs are kept, and equal ones found again)"
    )


def _point_difference(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    for old, new in zip(before, now, strict=False):
        if old["name"] != new["name"]:
            break
        if old != new:
            field = next(k for k in old if old[k] != new.get(k))
            return f"point {old['name']!r}: {field}: {old[field]} -> {new.get(field)}"
    names = [list(dict.fromkeys(point["name"] for point in points)) for points in (before, now)]
    lost, more = ([n for n in a if n not in b] for a, b in (names, names[::-1]))
    if not lost and not more:
        return "its points are in another order"
    return " and ".join(
        [f"points {', '.join(lost)} are gone"] * bool(lost) + [f"points {', '.join(more)} are new"] * bool(more)
    )


def _changes(base_path: Path, base: Config) -> dict[str, Any]:
    """The fields overridden on the command line."""
    file = flatten(load_config(base_path))
    return {name: value for name, value in flatten(base).items() if value != file[name]}


def _from_root(path: Path) -> str:
    """Relative to this repository where it lies in it, else absolute."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
