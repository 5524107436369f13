"""Train a RetinaNet: python scripts/train.py --config configs/demo.py --workdir runs/demo [--loss.gamma 5 ...]

Started again with the same command, a run resumes from its newest checkpoint.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retina_jax.command_line import config_of, one_line_errors, parse_command_line, set_up_jax
from retina_jax.config import Config
from retina_jax.config_files import validate, with_classes
from retina_jax.data.pipeline import overflow, train_batches
from retina_jax.data.sources import open_source
from retina_jax.detector import Detector
from retina_jax.evaluation import coco_table, number
from retina_jax.model.table import parameter_table
from retina_jax.training.assessment import assess
from retina_jax.training.checkpoints import Checkpoints
from retina_jax.training.metrics import Metrics
from retina_jax.training.parallel import Driver
from retina_jax.training.run import Clock, alone_in, finish_run, is_due, open_run
from retina_jax.training.start import first_state
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


def main() -> None:
    """Read the command line and train."""
    defaults = Arguments(workdir=tyro.MISSING, settings=config_of(sys.argv[1:], str(PAPER)))
    arguments = parse_command_line(Arguments, defaults, sys.argv[1:], __doc__)
    set_up_jax()
    train(validate(arguments.settings), arguments.workdir, arguments.allow_missing)


def train(config: Config, workdir: Path, allow_missing: tuple[str, ...] = ()) -> None:
    """The loop. `step` counts the steps taken, the running one included; files are named after it."""
    # Data: what is there, and what was left out of it.
    source = open_source(config.data, "train")
    val_source = source if config.training.eval_every < 0 else open_source(config.data, "val")
    config = with_classes(config, source.class_names, val_source.class_names)
    print(f"train: {source}\nval: {val_source}")
    if (left_out := overflow(source, config.data))[1]:
        print(f"warning: data.max_boxes leaves out boxes: of {left_out[0]} images, {left_out[1]} boxes")

    # Network and state: from the newest checkpoint, from imported weights, or random.
    driver = Driver(config, config.model.num_classes)
    driver.check_batch_size(config.data.batch_size, "data.batch_size")
    run = open_run(workdir, config, source.class_names, source.category_ids, source.sha256)
    with alone_in(workdir), Checkpoints(workdir / "checkpoints", config.training.keep_checkpoints) as checkpoints:
        state, told = first_state(driver, run, checkpoints, allow_missing)
        print(f"{parameter_table(state.variables)}\n{told}")
        start = int(state.step)
        clock = Clock(workdir, resumed=start > 0)
        with Metrics(run, start) as metrics:

            def evaluate() -> float | None:
                detector = Detector(driver, state.variables, run.class_names, run.category_ids)
                with checkpoints.saved_if_it_fails(step, state):
                    scores = assess(run, detector, val_source, step).summary
                metrics.write(step, {"event": "evaluation", **scores})
                print(f"step {step}: AP {number(scores['AP'])}, AP50 {number(scores['AP50'])}")
                return scores["AP"]

            step, last_step, every = start, config.training.steps, config.training.eval_every
            if start and is_due(start, every, start >= last_step) and not run.has_evaluation(start):
                evaluate()  # it failed, or was stopped, when it was due
            batches = train_batches(source, config.data, seed=config.seed, start_step=start)
            for step in range(start + 1, last_step + 1):
                asked = time.monotonic()
                with checkpoints.saved_if_it_fails(step - 1, state, first=metrics.flush):
                    batch = next(batches)
                waited = time.monotonic() - asked
                inputs = Inputs(batch.images, batch.image_sizes, batch.boxes_xyxy, batch.labels, batch.valid)
                state, measured = driver.step(state, driver.place(inputs))
                metrics.add(step, measured, [source.records[i].image_id for i in batch.indices], waited)
                last = step == last_step
                evaluating = is_due(step, every, last)
                saving = evaluating or is_due(step, config.training.checkpoint_every, last)
                if saving or step % config.training.log_every == 0:
                    metrics.flush(end_line=evaluating or last)
                if saving:
                    checkpoints.save(step, state, ap=evaluate() if evaluating else None)
                    clock.save()
                    metrics.restart_window()

    # The end: a summary that two runs can be compared by.
    if (scores := finish_run(run, int(state.step), clock.seconds(), parameters_sha256(state.variables))) is not None:
        print(coco_table(scores))
    if batches.skipped:
        print(f"warning: {len(batches.skipped)} unreadable images were skipped: {', '.join(batches.skipped)}")
    print(f"{int(state.step)} steps in {clock.seconds():.0f} s; everything is in {run.folder}")


if __name__ == "__main__":
    with one_line_errors():
        main()
