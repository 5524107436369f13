"""The report on sweeps: an HTML page, and Markdown with its charts as SVG files."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from urllib.parse import quote

from markupsafe import Markup

from retina_jax.paper.comparison import Section
from retina_jax.reports import TEMPLATES, render
from retina_jax.reports.charts import line_chart


def charts_of(section: Section) -> dict[str, Markup]:
    """Returns the charts of a table by kind, as <svg> elements."""
    return {kind: line_chart(c.lines, c.x_label, c.y_label, log_y=c.log_y) for kind, c in section.charts.items()}


def to_html(sections: Sequence[Section], title: str) -> str:
    """Returns the page."""
    tables = [(section, charts_of(section)) for section in sections]
    return str(render("sweep.html", title=title, sections=[section.name for section in sections], tables=tables))


def to_markdown(sections: Sequence[Section], title: str, charts: dict[tuple[str, str], str]) -> str:
    """Returns the report in Markdown; `charts` has the file name of each chart by (section, kind)."""
    return str(render("sweep.md", title=title, sections=sections, charts=charts))


def plain(text: str) -> str:
    """Returns `text` on one line, escaped so that Markdown shows it unchanged."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\|*`\[\]])", r"\\\1", html.escape(one_line, quote=False))


TEMPLATES.filters |= {"plain": plain, "address": quote}
