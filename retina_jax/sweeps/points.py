"""The points of a sweep, named overrides of a base config, and their manifest, which fixes their order.

A sweep file is a Python file with a function `get_sweep(base: Config) -> dict[str, dict[str, Any]]`, which maps names of
points to dotted overrides of `base`. Its constant BASE, if it has one, names the config file that it is written for.

DIR/sweeps/NAME.json is the manifest, so that an index is the same run for every worker:
{"sweep": NAME, "file": ..., "base": ..., "overrides": {...}, "points": [{"name", "overrides", "seed", "folder"}, ...]}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

import msgspec

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import flatten, load_config, load_module, named_errors, options, override, validate
from retina_jax.installation import HOME, config_path
from retina_jax.runs.files import exclusive_lock, write_json


@dataclass(frozen=True)
class Point:
    """A point of a sweep with one seed: the run to train."""

    name: str
    overrides: dict[str, Any]  # dotted fields of the base config and their values, without the seed
    seed: int
    folder: str  # name of the run's folder; points with the same outcome have the same name
    config: Config


def load_sweep(path: Path) -> ModuleType:
    """Returns the sweep file as a module; ConfigError if it cannot be read or has no get_sweep."""
    return load_module(path, "--sweep", "get_sweep", "get_sweep(base) that returns names and overrides")


def load_sweeps(files: Sequence[str]) -> dict[Path, ModuleType]:
    """Returns the sweep files as modules, in their order; ConfigError if two have the same name."""
    paths = [config_path(Path(file), "--sweep") for file in files]
    modules = {path: load_sweep(path) for path in paths}
    if len({path.stem for path in modules}) < len(modules):
        raise ConfigError("--sweep: two files have the same name; sweeps are identified by the name of their file")
    return modules


def base_file(modules: Mapping[Path, ModuleType], default: Path) -> Path:
    """Returns the sweeps' BASE, relative to the current folder or the installation, else `default`."""
    named = {path: str(module.BASE) for path, module in modules.items() if hasattr(module, "BASE")}
    if len(set(named.values())) > 1:
        files = " and ".join(f"{path} has {base}" for path, base in named.items())
        raise ConfigError(f"--base: required, since the sweeps have different bases: {files}")
    base = Path(next(iter(named.values()), default))
    return base if base.is_file() or not (HOME / base).is_file() else HOME / base


def expand(path: Path, module: ModuleType, base: Config, seeds: Sequence[int]) -> list[Point]:
    """Returns the points, all with the first seed, then all with the next; ConfigError, with file, point and field."""
    with named_errors(path):
        named = module.get_sweep(base)
    if not isinstance(named, Mapping) or not named:
        raise ConfigError(f"{path}: get_sweep(base) must return a dict of at least one name, not {named!r}")
    points = []
    for seed in seeds:
        for name, overrides in named.items():
            where = f"{path}, point {name!r}"
            if not isinstance(name, str) or not name.strip() or not name.isprintable():
                raise ConfigError(f"{where}: a point's name must be one line of text")
            if not isinstance(overrides, Mapping):
                raise ConfigError(f"{where}: must be a dict of dotted fields to values, not {overrides!r}")
            if "seed" in overrides:
                raise ConfigError(f"{where}: seed: give seeds on the command line, --seeds 0 1 2")
            changes = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
            try:
                config = validate(override(base, {**changes, "seed": seed}))
            except ConfigError as error:
                raise ConfigError(f"{where}: {str(error).removeprefix('config: ')}") from error
            points.append(Point(name, changes, seed, folder_name(config, base), config))
    return points


def outcome(config: Config) -> dict[str, Any]:
    """Returns the fields that change a run's result: floats as floats (2 is 2.0), files as their names without folders."""
    defaults, known = flatten(Config()), options(Config)
    values = {k: _typed(value, defaults[k]) for k, value in flatten(config).items() if known[k].outcome}
    return {k: Path(value).name if known[k].outcome == "file name" else value for k, value in values.items()}


def digest(config: Config) -> str:
    """Returns eight hex digits of the outcome; runs with equal digests are the same. Only differences from the first
    defaults of `Config` count: a new field keeps the names of folders, and a changed default gives runs another name."""
    changed_since = {k: known.first_default for k, known in options(Config).items() if known.first_default is not None}
    defaults = outcome(Config()) | changed_since
    differing = {name: value for name, value in outcome(config).items() if value != defaults[name]}
    return hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:8]


def folder_name(config: Config, base: Config) -> str:
    """Returns the name of a run's folder, its changes of `base` and its digest: "alpha_0.75-1a2b3c4d", "base-1a2b3c4d"."""
    old = outcome(base)
    changes = {name: value for name, value in outcome(config).items() if value != old[name] and name != "seed"}
    if "model.backbone" in changes:
        changes.pop("model.backbone_weights", None)  # they follow from it
    words = [f"{leaf}_{_short(value)}" for leaf, value in sorted((n.rpartition(".")[2], v) for n, v in changes.items())]
    seed = f"-seed{config.seed}" if config.seed != base.seed else ""
    slug = re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join(words) or "base")
    return f"{slug[: 96 - len(seed)].rstrip('-._')}{seed}-{digest(config)}"  # at most 96 characters before the digest


def _typed(value: Any, default: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(float, value)) if any(isinstance(d, float) for d in default or ()) else value
    return float(value) if isinstance(default, float) else value


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "_".join(map(_short, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return Path(value).stem if isinstance(value, str) else str(value)


@dataclass(frozen=True)
class Task:
    """Point with its index for `--index`."""

    index: int
    point: Point
    labels: tuple[str, ...]  # its name in each sweep; with several sweeps "table1a/alpha_0.75"


class SavedPoint(TypedDict):
    """Point in a manifest."""

    name: str
    overrides: dict[str, Any]
    seed: int
    folder: str


class Manifest(TypedDict):
    """Contents of DIR/sweeps/NAME.json, which lists the points of a sweep."""

    sweep: str
    file: str
    base: str
    overrides: dict[str, Any]
    points: list[SavedPoint]


def open_sweep(
    workdir: Path | None,
    path: Path,
    module: ModuleType,
    base_path: Path,
    base: Config,
    seeds: Sequence[int],
    write: bool,
) -> list[Point]:
    """Returns the points of the sweep: those of its manifest under `workdir` (None: none), then those of new `seeds`.

    New points come last, so existing indices do not change. With `write` the manifest is written or extended; several
    processes may do so at once. `base` is the config of `base_path` with the command line's overrides; without `seeds` its
    own seed is used. Raises ConfigError, with the difference, if the manifest has other points.
    """
    file = workdir / "sweeps" / f"{path.stem}.json" if workdir else None
    with exclusive_lock(file.parent / ".lock") if write else contextlib.nullcontext():
        before = read_manifest(file) if file and file.exists() else None
        old_seeds = [point["seed"] for point in before["points"]] if before else []
        points = expand(path, module, base, tuple(dict.fromkeys([*old_seeds, *(seeds or [base.seed])])))
        in_file = flatten(load_config(base_path))
        manifest: Manifest = {
            "sweep": path.stem,
            "file": _from_root(path),
            "base": _from_root(base_path),
            "overrides": {name: value for name, value in flatten(base).items() if value != in_file[name]},
            "points": [SavedPoint(name=p.name, overrides=p.overrides, seed=p.seed, folder=p.folder) for p in points],
        }
        manifest = json.loads(json.dumps(manifest))  # lists for tuples, as in the file
        same_seeds = {**manifest, "points": [point for point in manifest["points"] if point["seed"] in old_seeds]}
        if before and before["points"] != same_seeds["points"]:
            raise ConfigError(
                f"{file}: this sweep exists already and differs, {_difference(before, same_seeds)}; use another "
                "--workdir, or delete this file to name the points again (runs are kept, and equal runs are found again)"
            )
        if write and (before is None or len(before["points"]) < len(points)):
            write_json(file, manifest)
    return points


def read_manifest(file: Path) -> Manifest:
    """Returns the manifest in `file`; ConfigError if it is damaged."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: not a sweep's manifest: {error}; delete it to write it again") from None


def _difference(before: Manifest, now: Manifest) -> str:
    """Describes how `now` differs from `before`, which has the same seeds."""
    old, new = ({"base": manifest["base"], **manifest["overrides"]} for manifest in (before, now))
    if old != new:
        changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return "; ".join(f"{k}: {old.get(k, 'as the base')} -> {new.get(k, 'as the base')}" for k in changed)
    points, others = before["points"], now["points"]
    if [p["name"] for p in points] == [p["name"] for p in others]:
        one, other, key = next((a, b, k) for a, b in zip(points, others, strict=True) for k in a if a[k] != b[k])
        return f"point {one['name']!r}: {key}: {one[key]} -> {other[key]}"
    old, new = (dict.fromkeys(point["name"] for point in some) for some in (points, others))
    changes = {"gone": [name for name in old if name not in new], "new": [name for name in new if name not in old]}
    parts = [f"points {', '.join(names)} are {how}" for how, names in changes.items() if names]
    return " and ".join(parts) or "its points are in another order"


def tasks_of(sweeps: Mapping[str, Sequence[Point]]) -> list[Task]:
    """Returns the runs that an index counts: the points of a single sweep, or the distinct runs of several sweeps: all runs
    of the lowest seed, then those of the next, by first appearance, so adding a higher seed to one changes no index."""
    if len(sweeps) == 1:
        (points,) = sweeps.values()
        return [Task(i, point, (point.name,)) for i, point in enumerate(points)]
    named = [(point, f"{name}/{point.name}") for name, points in sweeps.items() for point in points]
    by_folder: dict[str, list[tuple[Point, str]]] = {}
    for point, label in sorted(named, key=lambda pair: pair[0].seed):
        by_folder.setdefault(point.folder, []).append((point, label))
    return [Task(i, same[0][0], tuple(label for _, label in same)) for i, same in enumerate(by_folder.values())]


def chosen(tasks: Sequence[Task], only: Sequence[str], seeds: Sequence[int] | None) -> list[Task]:
    """Returns the tasks named in `only` (empty: all) with a seed in `seeds` (None: all); ConfigError for an unknown name."""
    names = {t.index: {n for label in t.labels for n in (label, label.partition("/")[2] or label)} for t in tasks}
    known = dict.fromkeys(name for task in tasks for name in sorted(names[task.index]))
    for name in only:
        if name not in known:
            raise ConfigError(f"--only {name}: no such point; there are {', '.join(list(known)[:12])}")
    of_seeds = [task for task in tasks if seeds is None or task.point.seed in seeds]
    return [task for task in of_seeds if not only or names[task.index] & set(only)]


def distinct(tasks: Sequence[Task]) -> list[Task]:
    """Returns the first task of each folder."""
    return sorted({task.point.folder: task for task in reversed(tasks)}.values(), key=lambda task: task.index)


def _from_root(path: Path) -> str:
    """Returns the path relative to HOME if it is inside, else the absolute path."""
    path = path.resolve()
    return str(path.relative_to(HOME)) if path.is_relative_to(HOME) else str(path)
