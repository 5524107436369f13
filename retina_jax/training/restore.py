"""Where a run starts from: its newest checkpoint, a detector imported into its folder, a backbone's weights, or random."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from retina_jax import distributed
from retina_jax.config import ConfigError
from retina_jax.data.classes import Category, match
from retina_jax.model.initialisation import initialise
from retina_jax.ops.anchors import anchors_per_cell
from retina_jax.runs.folder import Run, fresh_import, note_fact, write_json
from retina_jax.training.checkpoints import Checkpoints
from retina_jax.training.opening import open_run
from retina_jax.training.parallel import Driver
from retina_jax.training.state import TrainState, parameters_sha256
from retina_jax.weights.filling import fill, is_within
from retina_jax.weights.importing import Imported, with_backbone

CLASS_OUTPUT = "class_head/output"
RANDOM = "starting from random weights"
RANDOM_FROZEN = (
    "warning: frozen parts start from random weights and stay so; give --model.backbone-weights, or train with "
    "--model.norm group --model.frozen-stages 0"
)


def first_state(
    driver: Driver, run: Run, checkpoints: Checkpoints, allow_missing: Sequence[str] = ()
) -> tuple[TrainState, str]:
    """The state a run goes on from, on the devices, and one line that says where it comes from.

    `allow_missing` are parts of the backbone that `model.backbone_weights` may lack. Every host makes its own; ConfigError
    where they came out different.
    """
    state, told = _first_state(driver, run, checkpoints, allow_missing)
    if distributed.several():
        facts = {"step": int(state.step), "sha256": parameters_sha256(state.everything)}
        distributed.check_same("the parameters that training starts from", facts)
    return state, told


def _first_state(
    driver: Driver, run: Run, checkpoints: Checkpoints, allow_missing: Sequence[str]
) -> tuple[TrainState, str]:
    imported = fresh_import(run.folder)
    norm_frozen = driver.config.model.norm == "frozen"
    if checkpoints.steps() and imported is None:
        state = checkpoints.restore(driver.init_state())
        return state, f"resuming {run.folder} at step {int(state.step)}"
    if imported is not None:
        before = Driver(imported.config, len(imported.class_names))
        weights = flat(checkpoints.restore(before.init_state(), 0).variables)
        variables, told = continued(driver, run, weights, imported.categories)
        told = f"starting from the detector imported into {run.folder}: {told}"
    elif driver.config.model.backbone_weights:
        template = initialise(driver.model, driver.config.seed)
        variables, told = with_backbone(template, driver.config.model, allow_missing)
        backbone = {kind: tree["backbone"] for kind, tree in variables.items() if "backbone" in tree}
        note_fact(run, "backbone_sha256", parameters_sha256(backbone))
    else:
        return driver.init_state(), RANDOM_FROZEN if driver.config.model.frozen_stages or norm_frozen else RANDOM
    return driver.init_state(variables), told


def continued(
    driver: Driver, run: Run, weights: Mapping[str, np.ndarray], classes: Sequence[Category]
) -> tuple[dict[str, Any], str]:
    """The variables of a run that starts from a detector of other `classes`, and what became of its class head.

    If every class of the run is one of the detector's (`classes.match`), their columns are kept, in the run's order. Else
    the last convolution of the class head starts anew: small random weights, and the prior in its bias (Section 3.3).
    """
    weights = dict(weights)
    template = initialise(driver.model, driver.config.seed)
    columns = match(run.categories, classes)
    if None not in columns:
        cell = anchors_per_cell(driver.config.anchors)
        for leaf in ("kernel", "bias"):
            head = weights[f"{CLASS_OUTPUT}/{leaf}"]
            by_anchor = head.reshape(*head.shape[:-1], cell, len(classes))[..., np.array(columns)]
            weights[f"{CLASS_OUTPUT}/{leaf}"] = by_anchor.reshape(*head.shape[:-1], -1)
        filled, _ = fill(template, weights, source=str(run.folder))
        return filled, f"its class head kept, {len(run.class_names)} of {len(classes)} classes"
    weights = {path: array for path, array in weights.items() if not is_within(path, CLASS_OUTPUT)}
    filled, _ = fill(template, weights, source=str(run.folder), allow_missing=[CLASS_OUTPUT])
    prior = driver.config.model.prior
    return filled, f"a new class head for {len(run.class_names)} classes, each with the prior {prior:g}"


def make_run(imported: Imported, folder: Path) -> Run:
    """A run's folder with an imported detector as step 0; ConfigError where a run is there already."""
    if (folder / "config.json").exists():
        raise ConfigError(f"--workdir {folder}: holds a run already; import into another folder")
    run = open_run(folder, imported.config, imported.class_names, imported.category_ids)
    driver = Driver(imported.config, len(imported.class_names))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(0, driver.init_state(imported.variables))
    saved = json.loads((folder / "config.json").read_text())
    write_json(folder / "imported.json", {**saved, "source": imported.source, "missing": list(imported.missing)})
    return run


def flat(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Path without its collection to array, as `filling.fill` takes them."""
    return {
        path: np.asarray(jax.device_get(leaf))
        for tree in variables.values()
        for path, leaf in flatten_dict(tree, sep="/").items()
    }
