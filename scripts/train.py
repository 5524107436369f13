"""Trains a RetinaNet: python scripts/train.py --config configs/demo.py --workdir runs/demo [--loss.gamma 5 ...]

The same command again resumes the run from its newest checkpoint.
"""

from __future__ import annotations

import retina_jax.interrupts  # noqa: F401  handles signals during the imports below

# isort: split

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import tyro

from retina_jax import distributed
from retina_jax.cli import limit_heaps, one_line_errors, parse_command_line, set_up_jax
from retina_jax.config import Config
from retina_jax.config_io import parse_window, validate, with_epochs
from retina_jax.console import devices_line, log, warn
from retina_jax.data.datasets import open_sources
from retina_jax.data.pipeline import Batches, train_batches
from retina_jax.data.source import Source
from retina_jax.detector import Detector
from retina_jax.distributed import Interruption
from retina_jax.evaluate import evaluate, validation_loss
from retina_jax.evaluation.coco_scores import SUMMARY, Scores, coco_table, score_text
from retina_jax.model.summary import parameter_table
from retina_jax.runs.folder import Clock, Run, config_of, is_due, started_run, training_lock
from retina_jax.runs.record import finish_run
from retina_jax.training.checkpoints import Checkpoints
from retina_jax.training.compilation import CompiledStep
from retina_jax.training.metrics import Metrics
from retina_jax.training.opening import open_run
from retina_jax.training.optimizer import rate_warning, schedule_warning
from retina_jax.training.parallel import Driver
from retina_jax.training.profiling import Profiler
from retina_jax.training.restore import restore_or_init
from retina_jax.training.state import TrainState, parameters_sha256
from retina_jax.training.step import Inputs

PAPER = Path(__file__).parents[1] / "configs" / "paper_r50_600.py"


@dataclass(frozen=True)
class Arguments:
    """The options of this script; all others are fields of the config."""

    workdir: Path
    """Folder of the run; created if missing, resumed if it holds a run."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    config: Path = PAPER
    """Config file, in Python: it is executed. The other options override its fields. Default: the config of the run in
    --workdir, or configs/paper_r50_600.py for a new run."""
    allow_missing: tuple[str, ...] = ()
    """Parts of the backbone (backbone/c5) that model.backbone_weights may lack; they start random."""
    allow_changes: tuple[str, ...] = ()
    """Config fields, such as loss.gamma, that may differ from the run's config; each change is recorded in config.json."""
    together: Annotated[distributed.Hosts, tyro.conf.arg(name="")] = distributed.ALONE
    """Several hosts, which train one run together and share each batch."""


def main() -> None:
    """Reads the command line and trains."""
    defaults = Arguments(workdir=tyro.MISSING, settings=config_of(sys.argv[1:], str(PAPER)))
    arguments = parse_command_line(Arguments, defaults, sys.argv[1:], __doc__)
    limit_heaps()
    set_up_jax()
    with distributed.joined(arguments.together):
        train(validate(arguments.settings), arguments.workdir, arguments.allow_missing, arguments.allow_changes)


def train(config: Config, workdir: Path, missing: Sequence[str] = (), changes: Sequence[str] = ()) -> None:
    """Runs the training loop. `step` counts the steps taken, including the current one; files are named after it."""
    with Interruption() as interruption, contextlib.ExitStack() as stack:
        log(devices_line(small=config.data.short_side < 400))
        before = started_run(workdir)
        source, val_source, config = open_sources(config, before.categories if before else (), workdir)
        config = in_steps(config, len(source))
        driver = Driver(config, config.model.num_classes)
        driver.check_batch_size()
        training = config.training
        stack.enter_context(training_lock(workdir))
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", training.keep_checkpoints))
        run = open_run(
            workdir, config, source.class_names, source.category_ids, source.sha256, driver.num_microbatches, changes
        )
        state, origin = restore_or_init(driver, run, checkpoints, missing)
        log(f"{parameter_table(state.variables)}\n{origin}")
        for warning in filter(None, (schedule_warning(config), rate_warning(config))):
            warn(warning)
        start = int(state.step)
        batches = train_batches(source, config.data, seed=config.seed, start_step=start, **distributed.share())
        shapes = batches.padded_shapes(training.steps - start)
        eager = jax.default_backend() != "cpu"  # a program takes 30 s on a CPU, and a first run is often stopped early
        take_step = CompiledStep(driver.step, batches.num_shapes, ahead=shapes, eager=eager)
        with (
            Metrics(run, start) as metrics,
            Clock(workdir, resumed=start > 0, counts=not metrics.is_complete()) as clock,
            Profiler(workdir, parse_window(training.profile_steps)) as profiler,
        ):
            score = partial(score_step, run, driver, val_source, checkpoints, metrics, interruption)
            if metrics.evaluation_is_missing():  # it failed or was interrupted before
                score(state, start)
            for step in metrics.remaining_steps():
                started = time.monotonic()
                profiler.begin(step)
                with checkpoints.save_on_error(step - 1, state, first=metrics.flush):
                    interruption.check(step - 1)
                    batch = next(batches)
                distributed.reached()
                waited = time.monotonic() - started
                state, measured = take_step(state, driver.shard_batch(Inputs.of(batch)))
                interruption.defer()  # there is a step to save from here on
                profiler.end(step, measured)
                metrics.add(step, measured, [source.records[i].image_id for i in batch.indices], waited)
                last = step == training.steps
                evaluating = is_due(step, training.eval_every, last)
                saving = evaluating or is_due(step, training.checkpoint_every, last)
                if saving or step % training.log_every == 0:
                    metrics.flush()
                if saving:
                    checkpoints.save(step, state)
                    if evaluating:
                        score(state, step)
                    clock.save()
                    metrics.restart_window()
    report_end(run, state, clock, batches, "training.patience" if metrics.ended_early() else "training.steps")


def in_steps(config: Config, images: int) -> Config:
    """Returns `config` with its epochs of this number of images in steps (`with_epochs`), which it logs."""
    resolved = with_epochs(config, images)
    if resolved.training.epochs or resolved.optimizer.boundary_epochs:
        steps, boundaries = resolved.training.steps, ", ".join(f"{step:,}" for step in resolved.optimizer.boundaries)
        drops = f"; boundaries at steps {boundaries}" if resolved.optimizer.schedule == "piecewise" else ""
        length = f"training.steps is {steps:,}: {steps * config.data.batch_size / images:g} epochs"
        log(f"{length} of {images:,} training {'tiles' if config.data.tile else 'images'}{drops}")
    return resolved


def score_step(
    run: Run,
    driver: Driver,
    source: Source,
    checkpoints: Checkpoints,
    metrics: Metrics,
    interruption: Interruption,
    state: TrainState,
    step: int,
) -> None:
    """Evaluates `state`, which is saved as `step`; saves its AP with the checkpoint and its scores in the metrics."""
    detector = Detector.of(driver, state, run.class_names, run.category_ids)
    check = partial(interruption.checked, step)
    scores = evaluate(run, detector, source, step, check=check)
    losses: dict[str, float] = {}
    if run.config.training.validation_loss and source.labelled:
        losses = validation_loss(run, detector, source, float(state.normaliser), check)
    checkpoints.score(step, scores.summary["AP"])
    metrics.evaluated(step, {**scores.summary, **losses})
    shown = f", validation loss {losses['loss']:.4f}" if losses else ""
    log(f"step {step}: AP {score_text(scores.summary['AP'])}, AP50 {score_text(scores.summary['AP50'])}{shown}")


def report_end(run: Run, state: TrainState, clock: Clock, batches: Batches, ended: str) -> None:
    """Writes summary.json, with the field that `ended` training; logs the last evaluation and the images of all hosts that
    were skipped or have one colour."""
    checksum = parameters_sha256(state.all_parameters)
    summary = finish_run(run, int(state.step), clock.seconds, checksum, ended)
    if (evaluation := summary["evaluation"]) is not None:
        log(coco_table(Scores({name: evaluation[name] for name in SUMMARY}, evaluation["per_class"])))
    for what, names in (
        ("unreadable images were skipped", batches.skipped),
        ("images have (nearly) one colour", batches.one_colour),
    ):
        if merged := sorted(set().union(*distributed.exchange(set(names)))):
            warn(f"{len(merged)} {what}: {', '.join(merged)}")
    log(f"{summary['steps']} steps in {summary['seconds']:.0f} s; everything is in {run.folder}")


if __name__ == "__main__":
    with one_line_errors(starting=True):
        main()
