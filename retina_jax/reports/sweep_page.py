"""A report as one HTML page."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from html import escape
from urllib.parse import quote

from retina_jax.paper.comparison import Cell, Section
from retina_jax.paper.wording import HOW_TO_READ
from retina_jax.reports.charts import Line, line_chart
from retina_jax.reports.page import page, paragraphs


def charts_of(section: Section) -> dict[str, str]:
    """Draws the charts of a section; `line_chart` escapes their texts."""
    drawn = {}
    for kind, chart in section.charts.items():
        lines = [Line(line.label, line.points) for line in chart.lines]
        drawn[kind] = line_chart(lines, chart.x_label, chart.y_label, log_y=chart.log_y)
    return drawn


def to_html(sections: Sequence[Section], title: str) -> str:
    """The page; every text of a sweep is escaped."""
    body = paragraphs(HOW_TO_READ) + "".join(map(_section, sections))
    return page(title, body, [section.name for section in sections])


def _section(section: Section) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in section.header)
    body = "\n".join(_row(row, len(section.header)) for row in section.rows)
    charts = "".join(charts_of(section).values())
    runs = "".join(
        f"<details><summary>{escape(name)}</summary><dl>"
        + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
        + "</dl></details>"
        for name, facts in section.runs
    )
    return (
        f'<section id="{escape(section.name)}"><h2>{escape(section.title)}</h2>{paragraphs(section.notes)}\n'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n'
        f'{paragraphs(section.footnotes)}<div class="charts">{charts}</div>\n'
        f"<details><summary>runs: {len(section.runs)}</summary>{runs}</details></section>\n"
    )


def _row(row: list[Cell], width: int) -> str:
    if len(row) == 1 and width > 1:
        return f'<tr><td class="group" colspan="{width}">{escape(row[0].text)}</td></tr>'
    cells = (f"<td><b>{escape(c.text)}</b></td>" if c.bold else f"<td>{escape(c.text)}</td>" for c in row)
    return f"<tr>{''.join(cells)}</tr>"


# A report as Markdown, with its charts as SVG files beside it.


def to_markdown(sections: Sequence[Section], title: str, charts: dict[tuple[str, str], str]) -> str:
    """The report; `charts` names the file of each chart by (section, kind)."""
    parts = [f"# {plain(title)}", *map(plain, HOW_TO_READ)]
    for section in sections:
        parts.append(f"## {plain(section.title)}")
        parts += [plain(note) for note in section.notes]
        width = len(section.header)
        rows = [[*row, *[Cell("")] * (width - len(row))] for row in section.rows]
        lines = [[plain(name) for name in section.header], ["---"] * width]
        lines += [[f"**{plain(cell.text)}**" if cell.bold else plain(cell.text) for cell in row] for row in rows]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
        parts += [plain(note) for note in section.footnotes]
        parts += [f"![{kind} by step]({quote(charts[section.name, kind])})" for kind in section.charts]
        runs = [f"<details><summary>runs: {len(section.runs)}</summary>", ""]
        for name, facts in section.runs:
            runs.append(f"- {plain(name)}")
            runs += [f"  - {key}: {plain(value)}" for key, value in facts.items()]
        parts.append("\n".join([*runs, "", "</details>"]))
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """`text` so that Markdown shows it as it is, on one line, and takes none of it for markup."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\|*`\[\]])", r"\\\1", html.escape(one_line, quote=False))
