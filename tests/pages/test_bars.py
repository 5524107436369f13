"""Histograms: every count is a rectangle of proportional height, and every text is escaped."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from retina_jax.reports.charts import Stack, bar_chart

SVG = "{http://www.w3.org/2000/svg}"
STACKS = [Stack("good", [4, 0, 2], "#009e73"), Stack("<bad> & worse", [2, 1, 0], "#d55e00")]


def rectangles(text: str) -> list[tuple[str, float, float, str]]:
    """Returns colour, top, height and title of every bar."""
    found = []
    for rect in ElementTree.fromstring(text).iter(f"{SVG}rect"):
        if (title := rect.find(f"{SVG}title")) is not None:
            found.append((rect.get("fill"), float(rect.get("y")), float(rect.get("height")), title.text))
    return found


def test_parts_are_stacked_in_proportion() -> None:
    bars = rectangles(bar_chart(["0", "8", "16", "∞"], STACKS, "pixels", "boxes"))
    assert [(colour, title) for colour, _, _, title in bars] == [
        ("#009e73", "good: 4"),
        ("#d55e00", "<bad> & worse: 2"),
        ("#d55e00", "<bad> & worse: 1"),
        ("#009e73", "good: 2"),
    ]
    heights = [height for _, _, height, _ in bars]
    assert [height / heights[2] for height in heights] == pytest.approx([4, 2, 1, 2], rel=0.01)
    first, second = bars[:2]
    assert second[1] + second[2] == pytest.approx(first[1], abs=0.11)


def test_empty_bars_are_not_drawn() -> None:
    assert rectangles(bar_chart(["0", "1"], [Stack("none", [0], "#000000")], "x", "y")) == []


def test_ends_and_counts_must_fit() -> None:
    for ends, counts in ((["0"], []), (["0", "1"], [1, 2])):
        with pytest.raises(ValueError, match="ends need"):
            bar_chart(ends, [Stack("a", counts, "#000000")], "x", "y")
