"""Stacked bars over bins, a histogram, as SVG text in the looks of the line charts."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

from retina_jax.pages.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, ticks

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
