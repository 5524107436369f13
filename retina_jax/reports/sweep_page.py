"""The report on sweeps: an HTML page, and Markdown with its charts as SVG files."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from urllib.parse import quote

from markupsafe import Markup

from retina_jax.paper.comparison import Section
from retina_jax.paper.results import splits_of
from retina_jax.reports import TEMPLATES, render
from retina_jax.reports.charts import line_chart


def charts_of(section: Section) -> dict[str, Markup]:
    """Returns <svg> elements: `ap` of runs with several evaluations, and `loss`, the smoothed classification loss."""
    runs = {(p.name, p.result.folder): p.result for p in section.sweep.points}
    ap = [(name, run.ap) for (name, _), run in runs.items() if len(run.ap) > 1]
    loss = [(name, smoothed(run.loss)) for (name, _), run in runs.items() if len(run.loss) > 1]
    charts = {"ap": line_chart(ap, "step", f"AP, {splits_of(section.sweep)}")} if ap else {}
    if any(y > 0 for _, points in loss for _, y in points):
        charts["loss"] = line_chart(loss, "step", "classification loss, smoothed", log_y=True)
    return charts


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns at most 201 of the points, with the last, each the mean of a symmetric window, of 5 % if it fits."""
    half, last = int(len(points) * 0.05 / 2), len(points) - 1
    kept = range(last, -1, -math.ceil(len(points) / 200))[::-1]
    reach = {i: min(half, i, last - i) for i in kept}
    return [(points[i][0], fmean(y for _, y in points[i - n : i + n + 1])) for i, n in reach.items()]


def to_html(sections: Sequence[Section], title: str) -> str:
    """Returns the page of a report: one section per sweep, with its tables and charts; a single HTML file."""
    tables = [(section, charts_of(section)) for section in sections]
    return str(render("sweep.html", title=title, sections=[section.name for section in sections], tables=tables))


def to_markdown(sections: Sequence[Section], title: str, charts: Mapping[tuple[str, str], str]) -> str:
    """Returns the report in Markdown; `charts` has the file name of each chart by (section, kind)."""
    return str(render("sweep.md", title=title, sections=sections, charts=charts))


def plain(text: str) -> str:
    """Returns `text` on one line, escaped so that Markdown shows it unchanged."""
    return re.sub(r"([\\|*`\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


TEMPLATES.filters |= {"plain": plain, "address": quote}
