"""Opens a run's folder: writes config.json, and checks that a run that is already there is the same experiment."""

import contextlib
import importlib.metadata
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from retina_jax import distributed
from retina_jax.config import Config, ConfigError
from retina_jax.config_io import flatten, options, override, to_dict, training_changes, unknown_name
from retina_jax.console import processor
from retina_jax.data.classes import class_indices, classes_error
from retina_jax.installation import HOME, PACKAGE
from retina_jax.model.initialisation import variable_shapes
from retina_jax.runs.files import read_json, write_json
from retina_jax.runs.folder import Run, make_writable, place_of, saved_steps, started_run
from retina_jax.training.parallel import Driver

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu", "tensorflow", "tensorflow-datasets",
    "pycocotools", "numpy", "Pillow",
)  # fmt: skip

SECONDS_TO_APPEAR = 30  # a network file system may show a file to other hosts this late
PER_MICROBATCH = ("per_device", "ema")  # values of loss.normaliser that count positive anchors in each micro-batch


def open_run(
    folder: Path,
    config: Config,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    data_sha256: str | None = None,
    num_microbatches: int | None = None,
    allow_changes: Sequence[str] = (),
) -> Run:
    """Makes RUN with its config.json, or checks that the run there is the same experiment. Called by all hosts.

    `data_sha256` is `Source.sha256` of the training data; `allow_changes` are fields in which a resumed run may differ.
    Raises ConfigError if the folder cannot be written, hosts do not share it, or its run is another experiment.
    """
    run = Run(folder, config, tuple(class_names), tuple(category_ids), data_sha256, num_microbatches)
    if unknown := sorted(set(allow_changes) - set(flatten(config))):
        raise ConfigError(f"--allow-changes {unknown[0]}: {unknown_name(unknown[0], flatten(config))}")
    per_host = {name for name, option in options(Config).items() if option.per_host}
    facts = {"class_names": list(class_names), "data": data_sha256, **flatten(config)}
    distributed.check_same(f"--workdir {folder}", {name: v for name, v in facts.items() if name not in per_host})
    if distributed.is_primary():
        make_writable(folder)
        before = started_run(folder)
        if saved_steps(folder / "checkpoints") and not (folder / "config.json").exists():
            raise ConfigError(f"--workdir {folder}: holds checkpoints but no config.json; use another folder")
        changes = _changes(before, run, allow_changes) if before else []
        with contextlib.suppress(ConfigError, LookupError, TypeError, OSError):  # it no longer describes a finished run
            if read_json(folder / "summary.json")["steps"] < config.training.steps:
                (folder / "summary.json").unlink()
        values = {
            **(_kept(folder, changes) if before else {}),
            "config": to_dict(config),
            "class_names": list(class_names),
            "category_ids": list(category_ids),
            "data_sha256": data_sha256,
            "parts": num_microbatches,
            "command": sys.argv,
            "commit": code_commit(),
            "versions": package_versions(),
            "started": secrets.token_hex(8),
        }
        write_json(folder / "config.json", values)
    if distributed.is_multihost():
        _check_shared(folder)
    return replace(run, place=place_of(folder))


def _check_shared(folder: Path) -> None:
    """Raises ConfigError on all hosts if one of them does not see what host 0 has just written."""

    def token() -> str:  # every start writes another one
        with contextlib.suppress(ConfigError, LookupError):
            return read_json(folder / "config.json")["started"]
        return ""

    expected, deadline = distributed.from_primary(token()), time.monotonic() + SECONDS_TO_APPEAR
    while token() != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    same = distributed.exchange(token() == expected)
    if others := [str(host) for host, agrees in enumerate(same) if not agrees]:
        found = f"host {', '.join(others)} sees another folder there than host 0"
        raise ConfigError(f"--workdir {folder}: {found}; it must be on a disk that all hosts share")


def _state_shapes(config: Config, num_classes: int) -> tuple[PyTree, list[tuple[int, ...]]]:
    """Returns the structure and the shapes of what a checkpoint holds: variables and optimizer."""
    driver = Driver(config, num_classes, (jax.devices()[0],))  # on whatever devices it was trained
    variables = variable_shapes(driver.model)
    state = variables, jax.eval_shape(driver.optimizer.init, variables["params"])
    return jax.tree.structure(state), [leaf.shape for leaf in jax.tree.leaves(state)]


def _changes(before: Run, run: Run, allowed: Sequence[str]) -> list[str]:
    """Returns how `run` differs from the run that is in its folder; ConfigError if a difference is not allowed."""
    where, old, new = f"--workdir {run.folder}", before.config, run.config
    if class_indices(before.categories, run.categories) != list(range(len(run.categories))):
        raise classes_error(before.categories, run.categories, where)
    if ((decay := old.optimizer.ema_decay) > 0) != (new.optimizer.ema_decay > 0):
        found = f"its run has optimizer.ema_decay {decay:g}; a resumed run can neither start nor stop averaging (EMA)"
        raise ConfigError(f"{where}: {found}; use that value, or another --workdir")
    changes = training_changes(old, new)
    if changes and (saved := _state_shapes(old, len(run.class_names))) != _state_shapes(new, len(run.class_names)):
        values = {change: {name: flatten(new)[name]} for change in changes if (name := change.partition(":")[0])}
        alone = [c for c, value in values.items() if _state_shapes(override(old, value), len(run.class_names)) != saved]
        found = f"a resumed run keeps its parameters and optimizer, but {'; '.join(alone or changes)}"
        raise ConfigError(f"{where}: {found}; its checkpoints do not fit; use another --workdir")
    if refused := {change: name for change in changes if (name := change.partition(":")[0]) not in allowed}:
        found, accepted = f"a resumed run keeps its config, but {'; '.join(refused)}", " ".join(refused.values())
        raise ConfigError(
            f"{where}: {found} (use another --workdir, or if this is intended --allow-changes {accepted})"
        )
    if run.data_sha256 and before.data_sha256 not in (None, run.data_sha256):
        found = "its run was trained on other images or boxes than the training data has now"
        raise ConfigError(f"{where}: {found}; restore them, or use another --workdir")
    counts = before.num_microbatches, run.num_microbatches
    batch_norms = [name for name in ("norm", "head_norm") if getattr(new.model, name) == "batch"]
    norm = batch_norms and new.training.accumulate > 1
    if None not in counts and counts[0] != counts[1] and (norm or new.loss.normaliser in PER_MICROBATCH):
        field = f"model.{batch_norms[0]} batch" if norm else f"loss.normaliser {new.loss.normaliser}"
        raise ConfigError(
            f"{where}: its run split each batch into {counts[0]} micro-batches (devices x training.accumulate), and {field} "
            f"depends on it; this command would split it into {counts[1]}; set devices x training.accumulate to {counts[0]}"
        )
    return changes


def _kept(folder: Path, changes: Sequence[str]) -> dict[str, Any]:
    """Returns what config.json keeps of a resumed run: facts, the first start, and each allowed change."""
    saved = read_json(folder / "config.json")
    first = {name: saved.get(name) for name in ("command", "commit", "versions")}
    step = max(saved_steps(folder / "checkpoints"), default=0)
    return {
        "facts": saved.get("facts", {}),
        "first_start": saved.get("first_start", first),
        "changes": [*saved.get("changes", []), *({"after_step": step, "field": change} for change in changes)],
    }


def code_commit() -> str | None:
    """Returns the git commit of this code, with "+changes" if the tree differs from it; None outside a checkout."""
    if HOME == PACKAGE:  # a repository around an installed package is another one
        return None
    git = ["git", "-C", str(HOME)]
    try:
        commit, changes = (
            subprocess.run([*git, *arguments], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide what is computed, and the devices."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    devices = jax.devices()
    kind = f"cpu ({processor()})" if devices[0].platform == "cpu" else devices[0].device_kind
    return {**versions, "devices": f"{len(devices)} x {kind}"}
