"""Imports a detector as a new run: python scripts/import_weights.py --weights torchvision:FILE --workdir RUN

The run has the detector as step 0, and the config that its weights need. evaluate.py and predict.py use it like any other
run; train.py --workdir RUN --data.train-annotations ... continues from it, with a new class head if the classes differ.
The library is torchvision, timm, detectron2 or detectron. Instead of FILE, give the name of a published file to download
it. --weights OTHER_RUN takes the best step of a run of this project, and its config.
"""

from __future__ import annotations

import retina_jax.interrupts  # noqa: F401  handles signals during the imports below

# isort: split

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from retina_jax.cli import one_line_errors, parse_command_line, set_up_jax
from retina_jax.config import ConfigError
from retina_jax.console import log, warn
from retina_jax.detector import import_run
from retina_jax.model.summary import parameter_table
from retina_jax.training.restore import make_run
from retina_jax.weights.converted import report
from retina_jax.weights.importing import import_detector, kind_of


@dataclass(frozen=True)
class Arguments:
    """Options of this script."""

    weights: str
    """KIND:FILE, KIND:NAME, or the folder of a run."""
    workdir: Path
    """Folder for the new run."""
    class_names: tuple[str, ...] = ()
    """Class names in the order of the head; empty: COCO's if the number fits, else "class 1" and so on."""
    batchnorm_eps: float | None = None
    """Epsilon of torchvision's BatchNorms; None: 0 for its published v1 file, else 1e-5."""
    allow_missing: tuple[str, ...] = ()
    """Parts of the network (fpn/output7) that may be missing from the file; they keep random values."""


def main() -> None:
    """Reads and converts the weights, writes the run, and prints a table of parameters."""
    arguments = parse_command_line(Arguments, Arguments(tyro.MISSING, tyro.MISSING), sys.argv[1:], __doc__)
    set_up_jax()
    options = {name: getattr(arguments, name) for name in ("class_names", "batchnorm_eps", "allow_missing")}
    if kind_of(arguments.weights) is None and (Path(arguments.weights) / "config.json").is_file():
        if any(option not in ((), None) for option in options.values()):
            unused = "--class-names, --batchnorm-eps and --allow-missing"
            raise ConfigError(
                f"--weights {arguments.weights}: is a run, to which {unused} do not apply; leave them out"
            )
        imported = import_run(Path(arguments.weights))
    else:
        imported = import_detector(arguments.weights, **options)
    run = make_run(imported, arguments.workdir)
    log(parameter_table(imported.variables))
    if imported.missing:
        warn(report({"missing and left random": imported.missing}))
    log(f"{len(imported.class_names)} classes; {imported.source} is step 0 of {run.folder}")


if __name__ == "__main__":
    with one_line_errors():
        main()
