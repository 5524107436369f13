"""The paper's plots: Figures 1, 2, 4, 5, 6 and 7. Losses are curves over x_t = y x (equation 6), without alpha: with a
single class and target 1 the logit is x_t, and with alpha = 1 the weight is 1, so they are the losses that train."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jaxtyping import Array, Float, Float32, Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from retina_jax.config import ConfigError
from retina_jax.losses.focal import ClassificationLoss, cross_entropy, focal, focal_star
from retina_jax.paper.measured import StarRun, Timed
from retina_jax.paper.settings import OTHER_SYSTEMS, TABLES
from retina_jax.runs.files import write_bytes

SUFFIXES = (".png", ".svg", ".pdf")  # of the files that can be written
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's, for colour-blind readers
BLUE, ORANGE, GREEN = COLOURS[:3]
GREY = "#555555"
GAMMAS = (0.0, 0.5, 1.0, 2.0)  # the curves of Figure 4
LOOK = mpl.rc_params_from_file(Path(__file__).with_suffix(".mplstyle"), use_default_template=False)


def fl(gamma: float) -> ClassificationLoss:
    """Returns the focal loss, equation 4."""
    return partial(focal, alpha=1.0, gamma=gamma)


def fl_star(gamma: float, beta: float) -> ClassificationLoss:
    """Returns FL*, equation 8."""
    return partial(focal_star, alpha=1.0, gamma=gamma, beta=beta)


SELECTED: dict[str, ClassificationLoss] = {
    "CE": cross_entropy,
    "FL γ = 2": fl(2.0),
    "FL* γ = 2, β = 1": fl_star(2.0, 1.0),
    "FL* γ = 4, β = 0": fl_star(4.0, 0.0),
}  # the losses of Figures 5 and 6 and of Table 3


def _of_logits(loss: ClassificationLoss, x_t: Float32[Array, " N"]) -> Float32[Array, " N"]:
    return loss(x_t[:, None], jnp.zeros(x_t.shape, jnp.int32))[:, 0]


def loss_values(loss: ClassificationLoss, x_t: Float[np.ndarray, " N"]) -> Float32[np.ndarray, " N"]:
    """Returns the loss at each x_t; x_t > 0 is classified correctly."""
    return np.asarray(_of_logits(loss, jnp.asarray(x_t, jnp.float32)))


def loss_slopes(loss: ClassificationLoss, x_t: Float[np.ndarray, " N"]) -> Float32[np.ndarray, " N"]:
    """Returns the derivative of the loss with respect to x_t: equations 9 to 11 for y = 1."""
    return np.asarray(jax.grad(lambda x: _of_logits(loss, x).sum())(jnp.asarray(x_t, jnp.float32)))


def x_of_p(p_t: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Returns the x_t whose sigmoid is p_t, for 0 < p_t < 1."""
    return np.log(p_t) - np.log1p(-p_t)


def cumulative_loss(x_t: Float32[np.ndarray, " N"], gamma: float) -> Float64[np.ndarray, " N"]:
    """Returns the share of the focal loss of the n + 1 samples with the lowest loss, n = 0 to N - 1; the last is exactly 1.
    Alpha, a common factor, cancels. Raises ValueError without a sample with a loss above 0."""
    losses = np.sort(loss_values(fl(gamma), x_t)).astype(np.float64)
    if losses.sum() == 0:
        raise ValueError(f"x_t: the loss of {len(x_t)} samples is 0 at gamma {gamma}; its distribution is undefined")
    sums = np.cumsum(losses)
    return sums / sums[-1]


def share_of_hardest(cumulative: Float64[np.ndarray, " N"], fraction: float) -> float:
    """Returns the share of the loss of the hardest `fraction` of the samples, 0 to 1; linear between samples."""
    samples = np.arange(len(cumulative) + 1) / len(cumulative)
    return float(1.0 - np.interp(1.0 - fraction, samples, np.concatenate([[0.0], cumulative])))


def shares_table(samples: Mapping[str, Float32[np.ndarray, " N"]]) -> str:
    """Returns a table: the share of the loss of the hardest samples of each kind (x_t), one line per gamma."""
    lines, fractions = ["share of the loss carried by the hardest"], (0.01, 0.05, 0.2)
    for kind, x_t in samples.items():
        heading = f"  of {len(x_t):,} {kind}"
        lines.append(heading + "".join(f"{f:>8.0%}" for f in fractions))
        for gamma in GAMMAS:
            cumulative = cumulative_loss(x_t, gamma)
            shares = "".join(f"{share_of_hardest(cumulative, f):>8.1%}" for f in fractions)
            lines.append(f"gamma {gamma:g}".rjust(len(heading)) + shares)
    return "\n".join(lines)


@mpl.rc_context(LOOK)
def figure1() -> Figure:
    """Draws the focal loss over the probability of the ground-truth class."""
    figure, (axes,) = _figure(1, 4.8, 3.8)
    p_t = np.linspace(0.002, 0.9999, 800)
    for gamma, colour in zip((0.0, 0.5, 1.0, 2.0, 5.0), COLOURS, strict=True):
        name = "γ = 0 (CE)" if gamma == 0 else f"γ = {gamma:g}"
        axes.plot(p_t, loss_values(fl(gamma), x_of_p(p_t)), color=colour, label=name)
    axes.axvspan(0.5, 1, color="#000000", alpha=0.05, lw=0)
    axes.text(0.75, 2.05, "well-classified\nexamples", ha="center", fontsize=9)
    axes.text(0.14, 4.45, r"$\mathrm{FL}(p_t) = -(1 - p_t)^\gamma \log(p_t)$", fontsize=9)
    axes.set(xlabel="probability of the ground-truth class, $p_t$", ylabel="loss", xlim=(0, 1), ylim=(0, 5))
    axes.legend()
    return figure


@mpl.rc_context(LOOK)
def _selected(curve: Callable[..., np.ndarray], label: str, limits: tuple[float, float], legend: str) -> Figure:
    """Draws a curve over x_t for CE, FL and FL*."""
    figure, (axes,) = _figure(1, 4.8, 3.8)
    x_t = np.linspace(-5, 5, 501)
    axes.axvspan(0, 5, color="#000000", alpha=0.05, lw=0)
    for (name, loss), colour in zip(SELECTED.items(), COLOURS, strict=False):
        axes.plot(x_t, curve(loss, x_t), color=colour, label=name)
    axes.set(xlabel="$x_t = yx$", ylabel=label, xlim=(-5, 5), ylim=limits)
    axes.text(4.9, 0.4 * limits[0] + 0.6 * limits[1], "classified correctly", ha="right", fontsize=9)
    axes.legend(loc=legend)
    return figure


figure5 = partial(_selected, loss_values, "loss", (0.0, 5.0), "upper right")
figure6 = partial(_selected, loss_slopes, "derivative of the loss by $x_t$", (-1.5, 0.1), "lower right")


@mpl.rc_context(LOOK)
def figure7(runs: Sequence[StarRun], threshold: float, not_run: int = 0) -> Figure:
    """Draws FL* of each run over x_t: blue if its AP is above `threshold` (percent), else, or if a seed diverged, orange."""
    figure, (axes,) = _figure(1, 5.2, 4.2)
    x_t = np.linspace(-5, 5, 501)
    effective = [run for run in runs if run.ap is not None and run.ap > threshold]
    for run in sorted(runs, key=lambda run: run.ap or 0.0):  # the effective ones on top
        colour, width, style = (BLUE, 1.6, "-") if run in effective else (ORANGE, 1.1, "--")
        axes.plot(x_t, loss_values(fl_star(run.gamma, run.beta), x_t), color=colour, lw=width, ls=style)
    axes.plot([], [], color=BLUE, label=f"AP above {threshold:.1f} ({len(effective)})")
    axes.plot([], [], color=ORANGE, ls="--", label=f"lower, or diverged ({len(runs) - len(effective)})")
    missing = f", {not_run} without a result left out" if not_run else ""
    axes.set_title(f"FL* with {len(runs)} settings of γ and β{missing}", fontsize=10)
    axes.set(xlabel="$x_t = yx$", ylabel="loss", xlim=(-5, 5), ylim=(0, 8))
    axes.legend()
    return figure


@mpl.rc_context(LOOK)
def figure2(ours: Sequence[Timed] = (), hardware: str = "", split: str = "val") -> Figure:
    """Draws AP over milliseconds per image: the paper's panel, and with `ours` a second panel for the other hardware."""
    figure, axes = _figure(2 if ours else 1, 5.8, 4.0)
    rows = ((*row.settings, row.milliseconds, row.scores["AP"]) for row in TABLES["table1e"].rows)
    paper = [Timed(depth, f"RetinaNet-{depth}", scale, time, ap) for depth, scale, time, ap in rows]
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
    """Draws a curve over the image scales for each depth."""
    looks = {"50": ("o", BLUE), "101": ("D", ORANGE)}
    for depth in dict.fromkeys(point.depth for point in points):
        marker, colour = looks.get(depth, ("^", GREEN))
        line = sorted((p for p in points if p.depth == depth), key=lambda p: p.milliseconds)
        xs, ys = [p.milliseconds for p in line], [p.ap for p in line]
        axes.plot(xs, ys, marker=marker, color=colour, label=line[0].network)
        # Where the two curves cross, labels below one and above the other do not overlap. The first has room below.
        below, above = ((3, -12), "center"), ((-4, 4), "right")
        for place, point in enumerate(line):
            offset, side = ((0, -12), "center") if place == 0 else (above if depth == "101" else below)
            label = axes.annotate(point.scale, (xs[place], ys[place]), offset, textcoords="offset points", ha=side)
            label.set(fontsize=7.5, color=colour, path_effects=[withStroke(linewidth=2.5, foreground="white")])
    axes.set(xlabel=f"milliseconds per image ({_escaped(hardware)})", ylabel=f"AP ({_escaped(split)})")
    axes.margins(0.12)
    axes.legend(loc="best")


def _escaped(text: str) -> str:
    return text.replace("$", r"\$")  # else matplotlib takes it for a formula


@mpl.rc_context(LOOK)
def figure4(samples: Mapping[str, Float32[np.ndarray, " N"]], run: str) -> Figure:
    """Draws the cumulative loss of each kind of sample (x_t of positives, of negatives), a curve per gamma; `run`: title."""
    figure, all_axes = _figure(len(samples), 4.2, 3.8)
    # Finer near the hardest samples, where the curves of a large gamma rise steeply.
    fraction = np.unique(np.concatenate([np.linspace(0, 1, 501), 1 - np.logspace(-7, -2, 200)]))
    for axes, (kind, x_t) in zip(all_axes, samples.items(), strict=True):
        for gamma, colour in zip(GAMMAS, COLOURS, strict=False):
            cumulative = np.concatenate([[0.0], cumulative_loss(x_t, gamma)])
            drawn = np.interp(fraction, np.arange(len(cumulative)) / len(x_t), cumulative)
            axes.plot(fraction, drawn, color=colour, label=f"γ = {gamma:g}")
        axes.set(xlabel=f"fraction of {kind}", ylabel="cumulative normalised loss", xlim=(0, 1), ylim=(0, 1))
        axes.set_title(f"{len(x_t):,} {kind}", fontsize=10)
        axes.legend(loc="upper left")
    figure.suptitle(_escaped(run), fontsize=10)
    return figure


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Returns a figure with panels of this size, inches."""
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, panels)))


def save(figure: Figure, out: Path) -> None:
    """Writes a PNG, SVG or PDF, by the suffix of `out`, completely or not at all; ConfigError for another suffix."""
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--out {out}: its suffix must be one of {', '.join(SUFFIXES)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
    drawn = io.BytesIO()
    with mpl.rc_context(LOOK):
        figure.savefig(drawn, format=out.suffix[1:].lower())
    write_bytes(out.resolve() if out.is_symlink() else out, drawn.getvalue())
