"""Draws a figure of the paper: python scripts/figures.py --figure 1|2|4|5|6|7 --out FILE.png|.svg|.pdf [--workdir DIR]

Figures 1, 5 and 6 show the losses. Figure 2 shows speed against accuracy; with --workdir also that of the sweep table1e
there. Figure 4 shows the distribution of the loss over the evaluation images of the finished run in --workdir. Figure 7
shows FL* by AP, for the sweep fig7 in --workdir.
"""

from __future__ import annotations

import retina_jax.interrupts  # noqa: F401  handles signals during the imports below

# isort: split

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from retina_jax.cli import one_line_errors, parse_command_line, set_up_jax
from retina_jax.config import ConfigError
from retina_jax.console import log
from retina_jax.paper import figures
from retina_jax.paper.measured import (
    NEGATIVES,
    POSITIVES,
    effective_ap,
    finished_run,
    speeds,
    star_runs,
    val_windows,
)
from retina_jax.paper.results import read_sweeps


@dataclass(frozen=True)
class Arguments:
    """Options of this script."""

    figure: Literal[1, 2, 4, 5, 6, 7]
    """Number of the figure in the paper; Figure 3 is not a plot."""
    out: Path
    """File to write: .png, .svg or .pdf."""
    workdir: Path | None = None
    """Figures 2 and 7: folder of sweeps; figure 4: folder of a finished run."""
    images: int = 0
    """Figure 4: number of evaluation images, drawn at random; 0: all."""
    seed: int = 0
    """Figure 4: seed of the random images and windows."""
    positives: int = POSITIVES
    """Figure 4: maximum number of positive windows."""
    negatives: int = NEGATIVES
    """Figure 4: maximum number of negative windows."""
    threshold: float | None = None
    """Figure 7: AP in percent above which a setting is effective; default: the paper's 33.5 for runs of its config, else 0.5
    below the focal loss or, without such a run, below the best setting."""


def main() -> None:
    """Draws the figure and writes it."""
    arguments = parse_command_line(Arguments, Arguments(tyro.MISSING, tyro.MISSING), sys.argv[1:], __doc__)
    for name, least in (("images", 0), ("seed", 0), ("positives", 1), ("negatives", 1)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name}: invalid value {getattr(arguments, name)}; must be at least {least}")
    if arguments.out.suffix.lower() not in figures.SUFFIXES:
        raise ConfigError(f"--out {arguments.out}: its suffix must be one of {', '.join(figures.SUFFIXES)}")
    set_up_jax()
    figures.save(draw(arguments), arguments.out)
    log(f"wrote figure {arguments.figure} to {arguments.out}")


def draw(arguments: Arguments) -> figures.Figure:
    """Returns the figure with the number `arguments.figure`."""
    plain = {1: figures.figure1, 5: figures.figure5, 6: figures.figure6}
    if arguments.figure in plain:
        return plain[arguments.figure]()
    if arguments.workdir is None:
        if arguments.figure == 2:
            return figures.figure2()
        kind = "a run" if arguments.figure == 4 else "sweeps"
        raise ConfigError(f"--workdir: figure {arguments.figure} needs results; give the folder of {kind}")
    if arguments.figure == 4:
        run = finished_run(arguments.workdir)
        samples = val_windows(
            arguments.workdir, arguments.images, arguments.positives, arguments.negatives, arguments.seed
        )
        log(f"{run}\n{figures.shares_table(samples)}")
        return figures.figure4(samples, run)
    sweeps = read_sweeps(arguments.workdir)
    if arguments.figure == 2:
        return figures.figure2(*speeds(sweeps))
    runs, left_out = star_runs(sweeps)
    threshold = effective_ap(sweeps) if arguments.threshold is None else arguments.threshold
    return figures.figure7(runs, threshold, left_out)


if __name__ == "__main__":
    with one_line_errors():
        main()
