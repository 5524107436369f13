"""Evaluates a run's checkpoint on its validation data: python scripts/evaluate.py --workdir RUN [--step N]

With --weights KIND:FILE it evaluates a detector of another library, and the results are written to --workdir. Inference
settings can be overridden (--detection.nms-iou 0.6, --data.short-side 800, --data.val-annotations FILE,
--training.eval-images 500); the network cannot. For images without annotations (--data.val-annotations
image_info_test-dev2017.json) a submission to COCO's server is written to RUN/detections. Test-time augmentation:
--detection.tta-flip, --detection.tta-short-sides 500 700. A run with averaged parameters (EMA) is evaluated with them;
--detection.parameters raw uses the parameters without averaging.
"""

from __future__ import annotations

import retina_jax.interrupts  # noqa: F401  handles signals during the imports below

# isort: split

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import jax
import tyro

from retina_jax import distributed
from retina_jax.cli import one_line_errors, parse_command_line, set_up_jax
from retina_jax.config import Config, ConfigError
from retina_jax.config_io import flatten, override, training_changes, validate
from retina_jax.console import log, warn
from retina_jax.data.datasets import check_classes, open_source
from retina_jax.detector import load_detector
from retina_jax.evaluate import evaluate, write_submission
from retina_jax.evaluation.coco_scores import coco_table
from retina_jax.runs.folder import Run, settings_of
from retina_jax.training.checkpoints import Step

# These fields, and those that a resumed run may change, may differ from training.
INFERENCE = ("data.", "training.")
OVERRIDABLE = (
    r"data\.(?!train_)|detection\.|training\.(eval_(images|batch_size)|evaluator|pictures)|cpu_kernels|parallel|devices"
)
"""Fields that `--help` lists."""


@dataclass(frozen=True)
class Arguments:
    """Options of this script; all others are fields of the run's config."""

    workdir: Path
    """Folder of the run; with --weights, the folder that receives the results."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    step: Step = "newest"
    """Saved step, best (the step with the highest AP) or newest."""
    weights: str = ""
    """KIND:FILE or KIND:NAME of a detector of another library; KIND is torchvision, detectron2 or detectron."""
    class_names: tuple[str, ...] = ()
    """Names of the classes of --weights, if they are not COCO's."""
    together: Annotated[distributed.Hosts, tyro.conf.arg(name="")] = distributed.ALONE
    """Several hosts, each of which evaluates a share of the images."""


def main() -> None:
    """Evaluates the detector, writes RUN/evaluation/step_N.json, prints the COCO table."""
    settings = settings_of(sys.argv[1:])
    defaults = Arguments(tyro.MISSING, settings)
    arguments = parse_command_line(Arguments, defaults, sys.argv[1:], __doc__, listed=OVERRIDABLE)
    set_up_jax()
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM ends this at once
    with distributed.joined(arguments.together):
        score(arguments, settings)


def score(arguments: Arguments, settings: Config) -> None:
    """Evaluates the detector with `arguments.settings`; `settings` are those it was trained with."""
    config = validate(arguments.settings)
    usual = flatten(settings)
    others = {name: value for name, value in flatten(config).items() if value != usual[name]}
    of_network = [change for change in training_changes(settings, config) if not change.startswith(INFERENCE)]
    if of_network:
        raise ConfigError(f"{'; '.join(of_network)}: the network must stay as it was trained; leave this option out")
    detector = load_detector(
        arguments.weights or arguments.workdir,
        step=arguments.step,
        config=config,
        class_names=arguments.class_names,
    )
    run = Run(arguments.workdir, config, detector.class_names, detector.category_ids)
    source, step = open_source(config.data, "val", run.categories, unlabelled=True), detector.step
    if not source.labelled and config.training.eval_images:
        warn(
            f"training.eval_images {config.training.eval_images} is ignored: a submission holds all {len(source)} images"
        )
        run = replace(run, config=override(config, {"training.eval_images": 0}))
    distributed.check_same(
        "--workdir",
        {"step": step, "config": repr(config), "evaluation data": source.sha256, "decoding": str(source.decoding)},
    )
    check_classes(run.categories, source)
    # Scores with other settings get a separate name.
    variant = "" if not others or arguments.weights else f"_{hashlib.sha256(repr(config).encode()).hexdigest()[:8]}"
    scores = evaluate(run, detector, source, step, variant, others)
    if not source.labelled:
        submission = write_submission(run, step, variant, config.data.val_annotations)
        log(
            f"nothing to score: {source.name} has no annotations\n"
            f"step {step}; written to {submission}: zip it and upload it to COCO's evaluation server"
        )
        return
    log(coco_table(scores))
    log(f"step {step}; written to {run.path('evaluation', step, f'{variant}.json')}")


if __name__ == "__main__":
    with one_line_errors():
        main()
