"""The paper's figures that are plots: 1, 2, 4, 5, 6 and 7, drawn with the package's own losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from jaxtyping import Float32
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from retina_jax.config import ConfigError
from retina_jax.paper.loss_analysis import (
    GAMMAS,
    SELECTED,
    cumulative_loss,
    fl,
    fl_star,
    loss_slopes,
    loss_values,
    x_of_p,
)
from retina_jax.paper.published import OTHER_SYSTEMS, TABLE_1E
from retina_jax.reports.charts import COLOURS

SUFFIXES = (".png", ".svg", ".pdf")
"""Of the files that can be written."""
BLUE, ORANGE = COLOURS[:2]
GREY = "#555555"
LOOK = {
    "font.size": 10,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "retina_jax",
}


@dataclass(frozen=True)
class Timed:
    """A run of Table 1e as Figure 2 shows it."""

    depth: str
    """50 or 101, which choose its looks, or whatever the person's own sweep calls it."""
    network: str
    """What the legend calls it; a miniature's "50" is no ResNet-50."""
    scale: str
    """Short side, pixels."""
    milliseconds: float
    ap: float
    """Percent."""


@dataclass(frozen=True)
class StarRun:
    """A finished run of FL* as Figure 7 shows it."""

    gamma: float
    beta: float
    ap: float | None
    """Percent; None: it, or one of its seeds, diverged."""


def figure1() -> Figure:
    """Focal loss over the probability of the true class."""
    with mpl.rc_context(LOOK):
        figure, (axes,) = _figure(1, width=4.8, height=3.8)
        p_t = np.linspace(0.002, 0.9999, 800)
        for gamma, colour in zip((0.0, 0.5, 1.0, 2.0, 5.0), COLOURS, strict=False):
            name = "γ = 0 (CE)" if gamma == 0 else f"γ = {gamma:g}"
            axes.plot(p_t, loss_values(fl(gamma), x_of_p(p_t)), color=colour, label=name)
        axes.axvspan(0.5, 1, color="#000000", alpha=0.05, lw=0)
        axes.text(0.75, 2.05, "well-classified\nexamples", ha="center", fontsize=9)
        axes.text(0.14, 4.45, r"$\mathrm{FL}(p_t) = -(1 - p_t)^\gamma \log(p_t)$", fontsize=9)
        axes.set(xlabel="probability of the ground-truth class, $p_t$", ylabel="loss", xlim=(0, 1), ylim=(0, 5))
        axes.legend()
    return figure


def figure5() -> Figure:
    """CE, FL and FL* over x_t."""
    return _selected(loss_values, "loss", (0.0, 5.0), "upper right")


def figure6() -> Figure:
    """Their derivatives by x_t."""
    return _selected(loss_slopes, "derivative of the loss by $x_t$", (-1.5, 0.1), "lower right")


def _selected(
    curve: Callable[..., Float32[np.ndarray, " N"]], label: str, limits: tuple[float, float], legend: str
) -> Figure:
    with mpl.rc_context(LOOK):
        figure, (axes,) = _figure(1, width=4.8, height=3.8)
        x_t = np.linspace(-5, 5, 501)
        axes.axvspan(0, 5, color="#000000", alpha=0.05, lw=0)
        for (name, loss), colour in zip(SELECTED.items(), COLOURS, strict=False):
            axes.plot(x_t, curve(loss, x_t), color=colour, label=name)
        axes.set(xlabel="$x_t = yx$", ylabel=label, xlim=(-5, 5), ylim=limits)
        axes.text(4.9, 0.4 * limits[0] + 0.6 * limits[1], "classified right", ha="right", fontsize=9)
        axes.legend(loc=legend)
    return figure


def figure7(runs: Sequence[StarRun], threshold: float, not_run: int = 0) -> Figure:
    """FL* of each run over x_t: blue where its AP is above `threshold` (percent); orange where it is not, exactly at it
    included, or where a seed diverged.

    Raises:
      ValueError: there is no run.
    """
    if not runs:
        raise ValueError("runs is empty: give at least one")
    with mpl.rc_context(LOOK):
        figure, (axes,) = _figure(1, width=5.2, height=4.2)
        x_t = np.linspace(-5, 5, 501)
        for run in sorted(runs, key=lambda run: run.ap or 0.0):  # the effective ones on top
            good = run.ap is not None and run.ap > threshold
            look = {"color": BLUE, "linewidth": 1.6} if good else {"color": ORANGE, "linewidth": 1.1, "linestyle": "--"}
            axes.plot(x_t, loss_values(fl_star(run.gamma, run.beta), x_t), **look)
        good = sum(run.ap is not None and run.ap > threshold for run in runs)
        axes.plot([], [], color=BLUE, label=f"AP above {threshold:.1f} ({good})")
        axes.plot([], [], color=ORANGE, linestyle="--", label=f"lower, or diverged ({len(runs) - good})")
        missing = f", {not_run} without a result left out" if not_run else ""
        axes.set_title(f"FL* with {len(runs)} settings of γ and β{missing}", fontsize=10)
        axes.set(xlabel="$x_t = yx$", ylabel="loss", xlim=(-5, 5), ylim=(0, 8))
        axes.legend()
    return figure


def figure2(ours: Sequence[Timed] = (), hardware: str = "", split: str = "val") -> Figure:
    """AP over milliseconds an image: the paper's panel, and with `ours` a second one, since the hardware is another."""
    with mpl.rc_context(LOOK):
        figure, axes = _figure(2 if ours else 1, width=5.8, height=4.0)
        paper = [
            Timed(row.settings[0], f"RetinaNet-{row.settings[0]}", row.settings[1], row.milliseconds, row.scores["AP"])
            for row in TABLE_1E.rows
        ]
        axes[0].plot(*zip(*OTHER_SYSTEMS.values(), strict=True), "s", color=GREY, markersize=5, label="other systems")
        for name, place in OTHER_SYSTEMS.items():
            text = name + (" (time extrapolated)" if name == "R-FCN" else "")
            axes[0].annotate(text, place, (6, -3), textcoords="offset points", fontsize=7.5, color=GREY)
        _speed(axes[0], paper, "Nvidia M40", "COCO test-dev")
        axes[0].set_title("the paper", fontsize=10)
        if ours:
            _speed(axes[1], ours, hardware, split)
            axes[1].set_title("ours", fontsize=10)
    return figure


def _speed(axes: Axes, points: Sequence[Timed], hardware: str, split: str) -> None:
    looks = {"50": ("o", BLUE), "101": ("D", ORANGE)}
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for depth in dict.fromkeys(point.depth for point in points):
        marker, colour = looks.get(depth, ("^", COLOURS[2]))
        line = sorted((p for p in points if p.depth == depth), key=lambda p: p.milliseconds)
        xs, ys = [p.milliseconds for p in line], [p.ap for p in line]
        axes.plot(xs, ys, marker=marker, color=colour, label=line[0].network)
        # Where the two curves cross, labels under the one and over the other keep apart; the first has room below.
        under, over = ((3, -12), "center"), ((-4, 4), "right")
        for place, point in enumerate(line):
            offset, side = ((0, -12), "center") if place == 0 else (over if depth == "101" else under)
            axes.annotate(
                point.scale,
                (point.milliseconds, point.ap),
                offset,
                textcoords="offset points",
                ha=side,
                fontsize=7.5,
                color=colour,
                path_effects=halo,
            )
    hardware, split = map(_no_formula, (hardware, split))
    axes.set(xlabel=f"milliseconds an image ({hardware})", ylabel=f"AP ({split})")
    axes.margins(0.12)
    axes.legend(loc="best")


def _no_formula(text: str) -> str:
    """`text` so that matplotlib shows it as it is."""
    return text.replace("$", r"\$")


def figure4(samples: Mapping[str, Float32[np.ndarray, " N"]], run: str) -> Figure:
    """Cumulative loss of each kind of sample (positives, negatives, as x_t), a curve a gamma; `run` says of what run."""
    with mpl.rc_context(LOOK):
        figure, all_axes = _figure(len(samples), width=4.2, height=3.8)
        # Finer towards the hardest, where the curves of a large gamma rise all at once.
        fraction = np.unique(np.concatenate([np.linspace(0, 1, 501), 1 - np.logspace(-7, -2, 200)]))
        for axes, (kind, x_t) in zip(all_axes, samples.items(), strict=True):
            for gamma, colour in zip(GAMMAS, COLOURS, strict=False):
                cumulative = np.concatenate([[0.0], cumulative_loss(x_t, gamma)])
                drawn = np.interp(fraction, np.arange(len(cumulative)) / len(x_t), cumulative)
                axes.plot(fraction, drawn, color=colour, label=f"γ = {gamma:g}")
            axes.set(xlabel=f"fraction of {kind}", ylabel="cumulative normalised loss", xlim=(0, 1), ylim=(0, 1))
            axes.set_title(f"{len(x_t):,} {kind}", fontsize=10)
            axes.legend(loc="upper left")
        figure.suptitle(_no_formula(run), fontsize=10)
    return figure


def _figure(panels: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure that no display and no global state of pyplot knows of; inches a panel."""
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, panels)))


def save(figure: Figure, out: Path) -> None:
    """Write a PNG, SVG or PDF, as the suffix of `out` says; ConfigError for another suffix or where it cannot be written."""
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--out {out}: its suffix must be one of {', '.join(SUFFIXES)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(LOOK):
            figure.savefig(out)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
