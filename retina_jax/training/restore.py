"""Where training starts: an imported detector, else the newest checkpoint, else a backbone's weights or random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from retina_jax import distributed
from retina_jax.config import ConfigError
from retina_jax.console import warn
from retina_jax.data.classes import Category, class_indices
from retina_jax.model.initialisation import initialise, variable_shapes
from retina_jax.ops.anchors import anchors_per_cell
from retina_jax.runs.files import read_json, write_json
from retina_jax.runs.folder import Run, fresh_import, record_fact, saved_steps, training_lock
from retina_jax.training.checkpoints import Checkpoints, Step
from retina_jax.training.opening import open_run
from retina_jax.training.parallel import Driver
from retina_jax.training.state import TrainState, parameters_sha256

if TYPE_CHECKING:
    from retina_jax.weights.importing import Imported

CLASS_OUTPUT = "class_head/output"


def restore_or_init(
    driver: Driver, run: Run, checkpoints: Checkpoints, allow_missing: Sequence[str] = ()
) -> tuple[TrainState, str]:
    """Returns the state that training starts from, on the devices, and one line about its origin: the first that exists of
    a detector imported into the run (step 0), its newest checkpoint, the backbone in `model.backbone_weights`, random
    weights. `allow_missing`: parts that the backbone file may lack. ConfigError if the hosts' states differ."""
    imported = fresh_import(run.folder)
    if imported is not None:
        variables, _ = load_variables(Driver(imported.config, len(imported.class_names)), checkpoints, 0)
        weights = {path: leaf for tree in variables.values() for path, leaf in flatten_dict(tree, sep="/").items()}
        variables, head = adapt_classes(driver, run, jax.device_get(weights), imported.categories)
        state = driver.init_state(variables)
        origin = f"starting from the detector imported into {run.folder}: {head}"
    elif checkpoints.steps():
        state = checkpoints.restore(driver.init_state())
        origin = f"resuming {run.folder} at step {int(state.step)}"
        if int(state.step) >= driver.config.training.steps:
            complete = (run.folder / "summary.json").is_file()  # else its evaluation or its summary is missing
            is_last = f"{run.folder} is complete: step {int(state.step)} is its last"
            origin = is_last if complete else f"{origin}, which is its last"
    elif driver.config.model.backbone_weights:
        from retina_jax.weights.importing import with_backbone  # reads foreign formats, which other runs do not need

        template = initialise(driver.model, driver.config.seed)
        variables, origin = with_backbone(template, driver.config.model, allow_missing)
        backbone = {kind: tree["backbone"] for kind, tree in variables.items() if "backbone" in tree}
        record_fact(run, "backbone_sha256", parameters_sha256(backbone))
        state = driver.init_state(variables)
    else:
        state, origin = driver.init_state(), "starting from random weights"
        if driver.config.model.frozen_stages or driver.config.model.norm == "frozen":
            how = "set --model.backbone-weights, or train with --model.norm group --model.frozen-stages 0"
            warn(f"frozen layers start from random weights and are never trained; {how}")
    if distributed.is_multihost():
        facts = {"step": int(state.step), "sha256": parameters_sha256(state.all_parameters)}
        distributed.check_same("the parameters that training starts from", facts)
    return state, origin


def load_variables(driver: Driver, checkpoints: Checkpoints, step: Step = None) -> tuple[dict[str, Any], int]:
    """Returns the collections that detection takes, on the devices, and the step they were saved at.

    These are the averaged parameters (EMA) of a run that has them, unless detection.parameters is "raw". No optimizer state
    is made or read. Raises as `Checkpoints.restore` does.
    """
    template = variable_shapes(driver.model)
    template["step"] = jax.ShapeDtypeStruct((), np.int32)
    template = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=driver.replicated), template)
    learned = {name: template.pop(name) for name in ("params", "stats")}
    averaged = driver.config.optimizer.ema_decay > 0 and driver.config.detection.parameters == "ema"
    state = checkpoints.restore({**template, **({"ema": learned} if averaged else learned)}, step, partial=True)
    learned = state["ema"] if averaged else state
    return {"params": learned["params"], "frozen": state["frozen"], "stats": learned["stats"]}, int(state["step"])


def adapt_classes(
    driver: Driver, run: Run, weights: Mapping[str, np.ndarray], classes: Sequence[Category]
) -> tuple[dict[str, Any], str]:
    """Returns the variables of a run that starts from a detector of other `classes`, and one line about its class head.

    `weights` are by path, as in `importing.fill`. If every class of the run is one of the detector's, their columns are
    kept, in the run's order. Otherwise the last convolution of the class head is initialised (Section 3.3).
    """
    from retina_jax.weights.importing import fill, is_within

    template, source, config = initialise(driver.model, driver.config.seed), str(run.folder), driver.config
    columns, count = class_indices(run.categories, classes), len(run.class_names)
    head = {path: array for path, array in weights.items() if is_within(path, CLASS_OUTPUT)}
    others = {path: array for path, array in weights.items() if path not in head}
    if None in columns:
        filled, _ = fill(template, others, source=source, allow_missing=[CLASS_OUTPUT])
        return filled, f"a new class head for {count} classes, each with the prior {config.model.prior:g}"
    for path, array in head.items():
        by_anchor = array.reshape(*array.shape[:-1], anchors_per_cell(config.anchors), len(classes))
        head[path] = by_anchor[..., np.array(columns)].reshape(*array.shape[:-1], -1)
    filled, _ = fill(template, others | head, source=source)
    return filled, f"its class head kept, {count} of {len(classes)} classes"


def make_run(imported: Imported, folder: Path) -> Run:
    """Makes a run's folder with an imported detector as step 0; ConfigError if a run has saved a step there."""
    with training_lock(folder):
        if saved_steps(folder / "checkpoints"):
            raise ConfigError(f"--workdir {folder}: holds a run already; import into another folder")
        run = open_run(folder, imported.config, imported.class_names, imported.category_ids)
        driver = Driver(imported.config, len(imported.class_names))
        with Checkpoints(folder / "checkpoints") as checkpoints:
            checkpoints.save(0, driver.init_state(imported.variables))
        saved = read_json(folder / "config.json")
        write_json(folder / "imported.json", {**saved, "source": imported.source, "missing": list(imported.missing)})
    return run
