"""Line charts and histograms as SVG text that follows the reader's light or dark mode.

matplotlib's SVG backend would need as many lines to change its style, and 30 to 60 ms of CPU time per chart, not 0.2 ms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from retina_jax.reports import render

Line = tuple[str, Sequence[tuple[float, float]]]  # label and points (x, y) by ascending x; equal labels look alike
# Distinct for colour-blind readers too (Okabe and Ito), readable on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("", "7 3", "2 3")  # beyond the colours lines are dashed, then dotted
# Width of the picture and edges of the area for data; `LEFT` grows with the tick labels.
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 520.0, 64.0, 498.0, 12.0, 216.0
CHARACTER, Y_LABEL = 9.0, 28.0  # width of a character of a tick label on a phone; of the y label and the gap next to it
GAP = 2.0  # pixels between two bars


class Mark(NamedTuple):
    """A point of a line chart, with lines to both axes."""

    x: float
    y: float
    label: str


class Stack(NamedTuple):
    """Part of every bar of a bar chart."""

    label: str
    counts: Sequence[float]  # for each bin, 0 or more
    colour: str  # #rrggbb


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
    emphasis: bool = False,
    mark: Mark | None = None,
) -> Markup:
    """Returns an <svg> element with axes, lines and a legend. With `log_y`, points with y <= 0 are left out. With `emphasis`
    the first line is thick and on top of the others, which are thin. Raises ValueError if there is no point to draw."""
    kept = [(label, [(x, y) for x, y in points if not log_y or y > 0]) for label, points in lines]
    xs, ys = ([point[axis] for _, points in kept for point in points] for axis in (0, 1))
    scaled = math.log10 if log_y else float
    low, high = scaled(min(ys)), scaled(max(ys))
    x_ends, y_ends = (
        (first, last) if last > first else (first - 0.5, last + 0.5)  # an empty range is widened
        for first, last in ((min(0.0, *xs), max(xs)), (low if log_y else min(0.0, low), high))
    )
    y_ticks = log_ticks(*y_ends) if log_y else ticks(*y_ends)
    left = max(LEFT, Y_LABEL + CHARACTER * max(len(f"{tick:g}") for tick in y_ticks))
    x_at, y_at = _scale(*x_ends, left, RIGHT), _scale(*y_ends, BOTTOM, TOP)

    labels = list(dict.fromkeys(label for label, _ in kept))
    weights = ["strong", *["quiet"] * len(labels)] if emphasis else [""] * len(labels)
    looks = {
        name: (COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % 3], weight)
        for i, (name, weight) in enumerate(zip(labels, weights, strict=False))
    }
    return _chart(
        x_label=x_label, y_label=y_label, left=left,
        x_ticks=[(x_at(tick), f"{tick:g}") for tick in ticks(*x_ends)],
        y_ticks=[(y_at(scaled(tick)), f"{tick:g}") for tick in y_ticks],
        curves=[
            (*looks[label], " ".join(f"{x_at(x):.1f},{y_at(scaled(y)):.1f}" for x, y in points))
            for label, points in (kept[::-1] if emphasis else kept) if points
        ],
        bars=[], mark=mark and (x_at(mark.x), y_at(scaled(mark.y))),
        legend=[(name, *look) for name, look in looks.items()] + ([(mark.label, "", "", "mark")] if mark else []),
        columns=2 if max(map(len, labels)) <= (22 if emphasis else 34) else 1,
    )  # fmt: skip


def bar_chart(ends: Sequence[str], stacks: Sequence[Stack], x_label: str, y_label: str) -> Markup:
    """Returns an <svg> element: one bar per bin, its parts stacked from the first on, and a legend. `ends` are the labels of
    the ends of the bins, one more than bins. Raises ValueError without bins, or if a stack has another number of them."""
    bins = len(ends) - 1
    if bins < 1 or any(len(stack.counts) != bins for stack in stacks):
        raise ValueError(f"{len(ends)} ends need {bins} counts in each stack, and at least one")
    highest = float(max(map(sum, zip(*(stack.counts for stack in stacks), strict=True)))) or 1.0
    x_at, y_at = _scale(0.0, float(bins), LEFT, RIGHT), _scale(0.0, highest, BOTTOM, TOP)
    bars = []
    for i in range(bins):
        top = 0.0
        for label, counts, colour in stacks:
            if (count := counts[i]) > 0:
                top += count
                size = x_at(1) - x_at(0) - GAP, y_at(0) - y_at(count)
                bars.append((x_at(i) + GAP / 2, y_at(top), *size, colour, f"{label}: {count:g}"))
    return _chart(
        x_label=x_label, y_label=y_label, left=LEFT,
        x_ticks=[(x_at(i), end) for i, end in enumerate(ends)],
        y_ticks=[(y_at(tick), f"{tick:g}") for tick in ticks(0.0, highest)],
        curves=[], bars=bars, mark=None, legend=[(stack.label, stack.colour, "", "") for stack in stacks], columns=2,
    )  # fmt: skip


def _chart(left: float, legend: list[tuple[str, str, str, str]], columns: int, **drawn: Any) -> Markup:
    """Renders the drawing; `legend` has (label, colour, dashes, weight of the line or "mark"), in `columns` columns. A mark
    is the last and has a row of its own, because its label is long."""
    places = []
    for i, entry in enumerate(legend):
        row, column = divmod(i, columns) if entry[3] != "mark" else (-(-i // columns), 0)
        places.append((left + column * (RIGHT - left) / columns, BOTTOM + 56 + 20 * row, *entry))
    edges = {"left": left, "right": RIGHT, "top": TOP, "bottom": BOTTOM, "width": WIDTH, "height": places[-1][1] + 13}
    return render("chart.svg", legend=places, **edges, **drawn)


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """Returns the linear map from [low, high] to [start, stop]."""
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def ticks(low: float, high: float) -> list[float]:
    """Returns about 5 round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high` > `low`, ends included."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns ticks from 10^low to 10^high: 1, 2 and 5 times the powers of ten, the powers alone over 3 decades or more, or
    round numbers as on a linear axis if these are fewer than three."""
    exponents = range(math.floor(low), math.ceil(high) + 1)
    marks = [m * 10.0**e for e in exponents for m in ((1, 2, 5) if high - low < 3 else (1,))]
    inside = [mark for mark in marks if low - 1e-9 <= math.log10(mark) <= high + 1e-9]
    return inside if len(inside) > 2 else ticks(10**low, 10**high)
