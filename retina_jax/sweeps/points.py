"""The points of a sweep: named overrides of a base config, and the folder that each of them is trained in.

A sweep file is a Python file with a function `get_sweep(base: Config) -> dict[str, dict[str, Any]]`, which maps names of
points to dotted overrides of `base`. Its constant BASE, if it has one, names the config file that it is written for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import flatten, load_module, named_errors, options, override, validate

ROOT = Path(__file__).parents[2]

SLUG_LENGTH = 96  # Most characters of a folder's name before its hash


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

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
    modules = {Path(file): load_sweep(Path(file)) for file in files}
    if len({path.stem for path in modules}) < len(modules):
        raise ConfigError("--sweep: two files have the same name; sweeps are identified by the name of their file")
    return modules


def base_file(modules: Mapping[Path, ModuleType], default: Path) -> Path:
    """Returns the sweeps' BASE, relative to the current folder or this repository, else `default`."""
    named = {path: str(module.BASE) for path, module in modules.items() if hasattr(module, "BASE")}
    if len(set(named.values())) > 1:
        files = " and ".join(f"{path} has {base}" for path, base in named.items())
        raise ConfigError(f"--base: required, since the sweeps have different bases: {files}")
    base = Path(next(iter(named.values()), default))
    return base if base.is_file() or not (ROOT / base).is_file() else ROOT / base


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
    """Returns eight hex digits of the outcome; runs with equal digests are the same.

    It holds only what differs from the first defaults of `Config`: a new field whose default changes nothing changes no
    folder's name, and no run of an earlier version passes for one of today's.
    """
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
    return f"{slug[: SLUG_LENGTH - len(seed)].rstrip('-._')}{seed}-{digest(config)}"


def _typed(value: Any, default: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(float, value)) if any(isinstance(d, float) for d in default) else value
    return float(value) if isinstance(default, float) else value


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "_".join(map(_short, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return Path(value).stem if isinstance(value, str) else str(value)
