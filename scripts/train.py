"""Train a RetinaNet: python scripts/train.py --config configs/demo.py --workdir runs/demo [--loss.gamma 5 ...]

Started again with the same command, a run resumes from its newest checkpoint.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from retina_jax import distributed
from retina_jax.cli import one_line_errors, parse_command_line, set_up_jax
from retina_jax.config import Config, parse_window
from retina_jax.config_io import validate
from retina_jax.console import log, warn
from retina_jax.data.datasets import open_sources
from retina_jax.data.pipeline import train_batches
from retina_jax.detector import Detector
from retina_jax.evaluate import assess
from retina_jax.evaluation.coco_scores import number
from retina_jax.model.summary import parameter_table
from retina_jax.runs.base_config import config_of
from retina_jax.runs.folder import Clock, alone_in, finish_run, is_due, started_run
from retina_jax.training.checkpoints import Checkpoints
from retina_jax.training.compilation import CompiledStep
from retina_jax.training.interruption import Interruption
from retina_jax.training.metrics import Metrics
from retina_jax.training.opening import open_run
from retina_jax.training.optimizer import unreached
from retina_jax.training.parallel import Driver
from retina_jax.training.profiling import Profiler
from retina_jax.training.restore import first_state
from retina_jax.training.state import parameters_sha256
from retina_jax.training.step import Inputs

PAPER = Path(__file__).parents[1] / "configs" / "paper_r50_600.py"


@dataclass(frozen=True)
class Arguments:
    """Options of this script; all others are fields of the config."""

    workdir: Path
    """Folder of the run; made where it is missing, resumed where it holds a run."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    config: Path = PAPER
    """Config file whose fields the other options override; not given, and with a run in the folder: that run's."""
    allow_missing: tuple[str, ...] = ()
    """Parts of the backbone (backbone/c5) that model.backbone_weights may lack; they start random."""
    allow_changes: tuple[str, ...] = ()
    """Fields (loss.gamma) that a resumed run may have other than it was started with; noted in its config.json."""
    together: Annotated[distributed.Hosts, tyro.conf.arg(name="")] = distributed.ALONE
    """Several hosts."""


def main() -> None:
    """Read the command line and train."""
    defaults = Arguments(workdir=tyro.MISSING, settings=config_of(sys.argv[1:], str(PAPER)))
    arguments = parse_command_line(Arguments, defaults, sys.argv[1:], __doc__)
    set_up_jax()
    with distributed.joined(arguments.together):
        train(validate(arguments.settings), arguments.workdir, arguments.allow_missing, arguments.allow_changes)


def train(config: Config, workdir: Path, missing: Sequence[str] = (), changes: Sequence[str] = ()) -> None:
    """The loop. `step` counts the steps taken, the running one included; files are named after it."""
    before = started_run(workdir)
    source, val_source, config = open_sources(config, before.categories if before else (), workdir)
    driver = Driver(config, config.model.num_classes)
    driver.check_batch_size()
    training, keep = config.training, config.training.keep_checkpoints
    with Interruption() as interruption, alone_in(workdir), Checkpoints(workdir / "checkpoints", keep) as checkpoints:
        run = open_run(workdir, config, source.class_names, source.category_ids, source.sha256, driver.parts, changes)
        state, told = first_state(driver, run, checkpoints, missing)
        log(f"{parameter_table(state.variables)}\n{told}")
        if short := unreached(config):
            warn(short)
        step = start = int(state.step)
        clock = Clock(workdir, resumed=start > 0)
        batches = train_batches(source, config.data, seed=config.seed, start_step=start, **distributed.share())
        take_step = CompiledStep(driver.step, config.data.buckets or 4, ahead=batches.canvases(training.steps - start))
        with clock, Metrics(run, start) as metrics, Profiler(workdir, parse_window(training.profile_steps)) as profiler:

            def evaluate() -> float | None:
                detector = Detector.of(driver, state, run.class_names, run.category_ids)
                with checkpoints.saved_if_it_fails(step, state):
                    scores = assess(run, detector, val_source, step, check=partial(interruption.checked, step)).summary
                metrics.evaluated(step, scores)
                log(f"step {step}: AP {number(scores['AP'])}, AP50 {number(scores['AP50'])}")
                return scores["AP"]

            if metrics.evaluation_is_missing():
                checkpoints.score(start, evaluate())  # it failed, or was stopped, when it was due
            for step in range(start + 1, training.steps + 1):
                asked = time.monotonic()
                profiler.begin(step)
                with checkpoints.saved_if_it_fails(step - 1, state, first=metrics.flush):
                    interruption.check(step - 1)
                    batch = next(batches)
                waited = time.monotonic() - asked
                state, measured = take_step(state, driver.place(Inputs.of(batch)))
                profiler.end(step, measured)
                metrics.add(step, measured, [source.records[i].image_id for i in batch.indices], waited)
                last = step == training.steps
                evaluating = is_due(step, training.eval_every, last)
                saving = evaluating or is_due(step, training.checkpoint_every, last)
                if saving or step % training.log_every == 0:
                    metrics.flush()
                if saving:
                    checkpoints.save(step, state, ap=evaluate() if evaluating else None)
                    clock.save()
                    metrics.restart_window()
    strange = batches.skipped, batches.one_colour.names
    finish_run(run, int(state.step), clock, parameters_sha256(state.everything), *strange)


if __name__ == "__main__":
    with one_line_errors():
        main()
