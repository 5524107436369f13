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
from retina_jax.config_checks import validate
from retina_jax.config_io import flatten, load_module, named_errors, override

ROOT = Path(__file__).parents[2]

# Fields that change how a run is carried out and watched, and nothing of what it ends in. The number of devices is one of
# them although the normalisers per_device and ema divide by what each device holds: 0 stands for all there are anyway.
NO_OUTCOME = frozenset(
    {
        "data.train_images",
        "data.val_images",
        "data.tfds_folder",
        "data.scenes.folder",
        "data.workers",
        "data.prefetch",
        "training.log_every",
        "training.eval_every",
        "training.eval_batch_size",
        "training.checkpoint_every",
        "training.keep_checkpoints",
        "training.pictures",
        "training.tensorboard",
        "training.wandb",
        "parallel",
        "devices",
        "cpu_kernels",
    }
)
FILES = frozenset({"data.train_annotations", "data.val_annotations"})
"""Of these the file's name counts, not where it lies."""
FIRST_DEFAULTS = {"loss.normaliser": "global"}
"""Defaults that have changed since folders were first named: a folder's digest is relative to the first ones, so that no
run of an earlier version passes for one of today's."""
SLUG_LENGTH = 96
"""Most characters of a folder's name before its hash."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    overrides: dict[str, Any]
    """Dotted fields of the base config and their values, without the seed."""
    seed: int
    folder: str
    """Name of the run's folder; points with the same outcome have the same name."""
    config: Config


def load_sweep(path: Path) -> ModuleType:
    """Returns the sweep file as a module; ConfigError if it cannot be read or has no get_sweep."""
    return load_module(path, "--sweep", "get_sweep", "get_sweep(base) that returns names and overrides")


def load_sweeps(files: Sequence[str]) -> dict[Path, ModuleType]:
    """Returns the sweep files as modules, in their order."""
    modules = {Path(file): load_sweep(Path(file)) for file in files}
    if len({path.stem for path in modules}) < len(modules):
        raise ConfigError("--sweep: two files have the same name; sweeps are identified by the name of their file")
    return modules


def base_file(modules: Mapping[Path, ModuleType], default: Path) -> Path:
    """Returns the config file that the sweeps override if the command line names none: their BASE, else `default`.

    BASE is relative to the current folder or to this repository.
    """
    named = {path: str(module.BASE) for path, module in modules.items() if hasattr(module, "BASE")}
    if len(set(named.values())) > 1:
        files = " and ".join(f"{path} has {base}" for path, base in named.items())
        raise ConfigError(f"--base: required, since the sweeps have different bases: {files}")
    base = Path(next(iter(named.values()), default))
    return base if base.is_file() or not (ROOT / base).is_file() else ROOT / base


def expand(path: Path, module: ModuleType, base: Config, seeds: Sequence[int]) -> list[Point]:
    """Returns the points of a sweep over `base`: all of them with the first seed, then all with the next.

    Raises ConfigError, with the file, the point and the field, if one of them is invalid.
    """
    with named_errors(path):
        named = module.get_sweep(base)
    if not isinstance(named, Mapping) or not named:
        raise ConfigError(
            f"{path}: get_sweep(base) must return a dict of at least one name to overrides, not {named!r}"
        )
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
    """The fields that decide what a run ends in: 2 for a float is 2.0, and a file is its name, wherever it lies."""
    defaults = flatten(Config())
    values = {name: _typed(value, defaults[name]) for name, value in flatten(config).items() if name not in NO_OUTCOME}
    return {name: Path(value).name if name in FILES else value for name, value in values.items()}


def digest(config: Config) -> str:
    """Eight hex digits of the outcome: equal ones are the same run.

    Only what differs from the first defaults of `Config` is in it. A field added later, with a default that changes
    nothing, so changes no folder's name.
    """
    defaults = outcome(Config()) | FIRST_DEFAULTS
    telling = {name: value for name, value in outcome(config).items() if value != defaults[name]}
    return hashlib.sha256(json.dumps(telling, sort_keys=True).encode()).hexdigest()[:8]


def folder_name(config: Config, base: Config) -> str:
    """Returns the name of a run's folder: its changes of `base`, shortened, and its digest.

    For example "alpha_0.75-kind_balanced_cross_entropy-1a2b3c4d", or "base-..." without changes.
    """
    old = outcome(base)
    changes = {name: value for name, value in outcome(config).items() if value != old[name] and name != "seed"}
    if "model.backbone" in changes:
        changes.pop("model.backbone_weights", None)  # they follow from it
    words = [f"{leaf}_{_short(value)}" for leaf, value in sorted((n.rpartition(".")[2], v) for n, v in changes.items())]
    seed = f"-seed{config.seed}" if config.seed != base.seed else ""
    slug = re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join(words) or "base")
    return f"{slug[: SLUG_LENGTH - len(seed)].rstrip('-._')}{seed}-{digest(config)}"


def _typed(value: Any, default: Any) -> Any:
    """2 and 2.0 are the same value of a field that is a float."""
    if isinstance(value, tuple):
        floats = any(isinstance(d, float) for d in default)
        return tuple(float(v) if floats else v for v in value)
    return float(value) if isinstance(default, float) else value


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "_".join(map(_short, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return Path(value).stem if isinstance(value, str) else str(value)
