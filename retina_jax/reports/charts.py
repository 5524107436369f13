"""Small line charts as SVG text that follows the reader's light or dark mode; no script, no font, no picture file."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Told apart by colour-blind readers too (Okabe and Ito), readable on white and on black."""
DASHES = ("", "7 3", "2 3")
"""Lines beyond the colours begin again dashed, then dotted."""
WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 22, 12, 44
"""Margins; in `line_chart` the left one grows with the labels of its ticks."""
DIGIT, Y_LABEL = 7, 26
"""Widths of a character of a tick's label, and of the axis's own label with what keeps it apart."""


@dataclass(frozen=True)
class Line:
    """A curve. Lines of one label look alike and stand once in the legend."""

    label: str
    points: Sequence[tuple[float, float]]
    """(x, y), by rising x; at least two."""


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, *, log_y: bool = False) -> str:
    """An <svg> element with axes, ticks, lines and a legend under them.

    With `log_y`, points whose y is not above 0 are left out.

    Raises:
      ValueError: there is nothing to draw.
    """
    kept = [Line(line.label, [p for p in line.points if not log_y or p[1] > 0]) for line in lines]
    points = [p for line in kept for p in line.points]
    if not points:
        raise ValueError("lines hold no point to draw")
    xs, ys = [x for x, _ in points], [math.log10(y) if log_y else y for _, y in points]
    x_low, x_high = _widened(min(0.0, *xs), max(xs))
    y_low, y_high = _widened(min(ys) if log_y else min(0.0, *ys), max(ys))

    y_ticks = log_ticks(y_low, y_high) if log_y else ticks(y_low, y_high)
    left = max(LEFT, Y_LABEL + DIGIT * max(len(f"{tick:g}") for tick in y_ticks))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = ((math.log10(y) if log_y else y) - y_low) / (y_high - y_low)
        return left + across * (WIDTH - left - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    labels = list(dict.fromkeys(line.label for line in kept))
    columns = 2 if max(len(label) for label in labels) <= 34 else 1
    height = HEIGHT + 17 * math.ceil(len(labels) / columns) + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(y_label)} by {html.escape(x_label)}" font-family="sans-serif" font-size="12">',
        "<style>.ink{fill:#222}.rule{stroke:#8886}.line{fill:none;stroke-width:1.8;stroke-linejoin:round}"
        "@media (prefers-color-scheme:dark){.ink{fill:#ddd}}</style>",
    ]
    for tick in ticks(x_low, x_high):
        x, _ = place(tick, 10**y_low if log_y else y_low)
        parts.append(f'<text class="ink" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="rule" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="ink" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="ink" x="{(left + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{html.escape(x_label)}'
        f'</text><text class="ink" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>"
    )
    for line in kept:
        if line.points:
            drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in line.points))
            parts.append(f'<polyline class="line" {_look(labels.index(line.label))} points="{drawn}"/>')
    for i, label in enumerate(labels):
        x = left + (i % columns) * (WIDTH - left - RIGHT) / columns
        y = HEIGHT + 10 + 17 * (i // columns)
        parts.append(
            f'<line class="line" {_look(i)} x1="{x:.0f}" x2="{x + 22:.0f}" y1="{y - 4}" y2="{y - 4}"/>'
            f'<text class="ink" x="{x + 28:.0f}" y="{y}">{html.escape(label)}</text>'
        )
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, ends included; low < high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Marks from 10^low to 10^high: 1, 2 and 5 times the powers of ten, powers alone over 3 decades or more, and round
    numbers as on a linear axis where these are fewer than three."""
    exponents = range(math.floor(low), math.ceil(high) + 1)
    marks = [m * 10.0**e for e in exponents for m in ((1, 2, 5) if high - low < 3 else (1,))]
    inside = [mark for mark in marks if low - 1e-9 <= math.log10(mark) <= high + 1e-9]
    return inside if len(inside) > 2 else ticks(10**low, 10**high)


def _look(place: int) -> str:
    dash = DASHES[place // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[place % len(COLOURS)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


# Stacked bars over bins, a histogram, as SVG text in the looks of the line charts.

GAP = 2
"""Pixels between two bars."""


class Stack(NamedTuple):
    """One part of every bar."""

    label: str
    counts: Sequence[float]
    """Of each bin, 0 or more."""
    colour: str
    """#rrggbb."""


def bar_chart(ends: Sequence[str], stacks: Sequence[Stack], x_label: str, y_label: str) -> str:
    """An <svg> element: a bar a bin, its parts on each other from the first, with a legend under them. Every part says its
    number where a pointer rests on it.

    Args:
      ends: what stands at the ends of the bins, one more than bins; "" where nothing does.

    Raises:
      ValueError: there is no bin, or a stack has another number of them.
    """
    bins = len(ends) - 1
    if bins < 1 or any(len(stack.counts) != bins for stack in stacks):
        raise ValueError(f"{len(ends)} ends need {bins} counts in each stack, and one at least")
    highest = float(max(map(sum, zip(*(stack.counts for stack in stacks), strict=True)))) or 1.0
    step, floor = (WIDTH - LEFT - RIGHT) / bins, HEIGHT - BOTTOM
    a_unit = (floor - TOP) / highest
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 24}" role="img" '
        f'aria-label="{html.escape(y_label)} by {html.escape(x_label)}" font-family="sans-serif" font-size="12">',
        "<style>.ink{fill:#222}.rule{stroke:#8886}@media (prefers-color-scheme:dark){.ink{fill:#ddd}}</style>",
    ]
    for tick in ticks(0.0, highest):
        y = floor - tick * a_unit
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="ink" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for i, end in enumerate(ends):
        x = LEFT + i * step
        parts.append(f'<text class="ink" x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{html.escape(end)}</text>')
    for i in range(bins):
        top = float(floor)
        for stack in stacks:
            height = stack.counts[i] * a_unit
            top -= height
            if height > 0:
                said = html.escape(f"{stack.label}: {stack.counts[i]:g}")
                parts.append(
                    f'<rect x="{LEFT + i * step + GAP / 2:.1f}" y="{top:.1f}" width="{step - GAP:.1f}" '
                    f'height="{height:.1f}" fill="{stack.colour}"><title>{said}</title></rect>'
                )
    middle = (TOP + floor) / 2
    parts.append(
        f'<text class="ink" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{html.escape(x_label)}'
        f'</text><text class="ink" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>"
    )
    for i, stack in enumerate(stacks):
        x = LEFT + i * (WIDTH - LEFT - RIGHT) / len(stacks)
        parts.append(
            f'<rect x="{x:.0f}" y="{HEIGHT + 4}" width="12" height="12" fill="{stack.colour}"/>'
            f'<text class="ink" x="{x + 17:.0f}" y="{HEIGHT + 14}">{html.escape(stack.label)}</text>'
        )
    return "".join([*parts, "</svg>"])
