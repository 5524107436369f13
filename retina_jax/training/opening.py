"""Opening a run's folder: what it is started with is written down, and a run that is there must be the same experiment."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from retina_jax import distributed
from retina_jax.config import Config, ConfigError, options
from retina_jax.config_io import flatten, meaning_changes, to_dict, unknown_name
from retina_jax.console import processor
from retina_jax.data.classes import differ, match
from retina_jax.runs.folder import Run, fresh_import, make_writable, read_run, write_json

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu", "tensorflow", "tensorflow-datasets",
    "pycocotools", "numpy", "Pillow",
)  # fmt: skip

SECONDS_TO_SHOW = 30
OF_PARTS = ("per_device", "ema")
"""Normalisers to which each part of a batch counts on its own."""


def open_run(
    folder: Path,
    config: Config,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    data_sha256: str | None = None,
    parts: int | None = None,
    allow_changes: Sequence[str] = (),
) -> Run:
    """Make RUN with its config.json, or check that a run already there is the same experiment. Called by all hosts.

    Raises ConfigError when the folder cannot be written, when the hosts do not share it, or when the run in it was started
    with other classes or with a config that computes something else, but for the fields in `allow_changes`
    (those with `resume` in config.py may always change), or on other training data: `data_sha256` is
    `Source.sha256` of it, None where there is none yet. `parts` must stay where the loss depends on it.
    """
    run = Run(folder, config, tuple(class_names), tuple(category_ids), data_sha256, parts)
    if unknown := sorted(set(allow_changes) - set(flatten(config))):
        raise ConfigError(f"--allow-changes {unknown[0]}: {unknown_name(unknown[0], flatten(config))}")
    shared = {name: value for name, value in flatten(config).items() if not options(Config)[name].per_host}
    distributed.check_same(f"--workdir {folder}", {"class_names": list(class_names), "data": data_sha256, **shared})
    if distributed.first():
        make_writable(folder)
        changed = _changes(run, allow_changes)
        _reopen(run)
        write_json(
            folder / "config.json",
            {
                **_kept(folder, changed),
                "config": to_dict(config),
                "class_names": list(class_names),
                "category_ids": list(category_ids),
                "data_sha256": data_sha256,
                "parts": parts,
                "command": sys.argv,
                "commit": code_commit(),
                "versions": package_versions(),
                "started": secrets.token_hex(8),
            },
        )
    if distributed.several():
        _check_shared(folder)
    return run


def _reopen(run: Run) -> None:
    """A run that is to be trained further is not complete any more."""
    summary = run.folder / "summary.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if json.loads(summary.read_text())["steps"] < run.config.training.steps:
            summary.unlink()


def _check_shared(folder: Path) -> None:
    """All hosts must see what host 0 has just written, though a network file system may take a while to show it."""
    own = json.loads((folder / "config.json").read_text())["started"] if distributed.first() else ""
    told = distributed.exchange(own)[0]
    seen, until = None, time.monotonic() + SECONDS_TO_SHOW
    while seen != told and (seen is None or time.monotonic() < until):
        try:
            seen = json.loads((folder / "config.json").read_text())["started"]
        except (OSError, ValueError, LookupError):
            seen = ""
        if seen != told:
            time.sleep(0.5)
    strangers = [str(host) for host, same in enumerate(distributed.exchange("" if seen == told else "other")) if same]
    if strangers:
        raise ConfigError(
            f"--workdir {folder}: host {', '.join(strangers)} sees another folder there than host 0; it must be on a disk "
            "that all hosts share"
        )


def _changes(run: Run, allowed: Sequence[str]) -> list[str]:
    """What differs from the run that is in the folder already, all of it allowed; ConfigError where some is not."""
    folder = run.folder
    if not (folder / "config.json").exists() and any((folder / "checkpoints").glob("[0-9]*")):
        raise ConfigError(
            f"--workdir {folder}: holds checkpoints and no config.json that tells of what; take another folder"
        )
    if not (folder / "config.json").exists() or fresh_import(folder) is not None:
        return []
    before = read_run(folder)
    if match(before.categories, run.categories) != list(range(len(run.categories))):
        raise differ(before.categories, run.categories, f"--workdir {folder}")
    changes = meaning_changes(before.config, run.config)
    means = [bool(config.optimizer.ema_decay) for config in (before.config, run.config)]
    if means[0] != means[1]:
        raise ConfigError(
            f"--workdir {folder}: its run keeps {'' if means[0] else 'no '}running means of the parameters, which cannot be "
            f"changed: optimizer.ema_decay is {before.config.optimizer.ema_decay:g} there; take that, or another --workdir"
        )
    refused = [change for change in changes if change.partition(":")[0] not in allowed]
    if refused:
        raise ConfigError(
            f"--workdir {folder}: a resumed run keeps its config, but {'; '.join(refused)} (if it is meant: "
            f"--allow-changes {' '.join(change.partition(':')[0] for change in refused)})"
        )
    if run.data_sha256 and before.data_sha256 not in (None, run.data_sha256):
        raise ConfigError(
            f"--workdir {folder}: its run was trained on other images or boxes than the training data now has; "
            "restore them, or take another --workdir"
        )
    parts, config = {before.parts, run.parts} - {None}, run.config
    by_norm = config.model.norm == "batch" and config.training.accumulate > 1
    if len(parts) > 1 and (by_norm or config.loss.normaliser in OF_PARTS):
        why = "model.norm batch" if by_norm else f"loss.normaliser {config.loss.normaliser}"
        raise ConfigError(
            f"--workdir {folder}: its run took each batch in {before.parts} parts (devices x training.accumulate), this "
            f"one would in {run.parts}, and {why} depends on it; set --devices and --training.accumulate to make "
            f"{before.parts}"
        )
    return changes


def _kept(folder: Path, changed: Sequence[str]) -> dict[str, Any]:
    """What config.json keeps when a run is resumed: facts, the first start, and each change that was allowed."""
    path = folder / "config.json"
    if not path.exists() or fresh_import(folder) is not None:
        return {}
    saved = json.loads(path.read_text())
    first = {name: saved.get(name) for name in ("command", "commit", "versions")}
    kept = {"facts": saved.get("facts", {}), "first_start": saved.get("first_start", first)}
    steps = [int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
    now = [{"after_step": max(steps, default=0), "field": change} for change in changed]
    return {**kept, "changes": [*saved.get("changes", []), *now]}


def code_commit() -> str | None:
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


def package_versions() -> dict[str, str]:
    """Of Python and the packages that decide what a program computes, and the devices."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    kind = f"cpu ({processor()})" if devices[0].platform == "cpu" else devices[0].device_kind
    versions["devices"] = f"{len(devices)} x {kind}"
    return versions
