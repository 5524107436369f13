"""A report as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from retina_jax.pages.page import page, paragraphs
from retina_jax.paper.report import Cell, Section
from retina_jax.paper.wording import HOW_TO_READ


def to_html(sections: Sequence[Section], title: str) -> str:
    """The page; every text of a sweep is escaped."""
    body = paragraphs(HOW_TO_READ) + "".join(map(_section, sections))
    return page(title, body, [section.name for section in sections])


def _section(section: Section) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in section.header)
    body = "\n".join(_row(row, len(section.header)) for row in section.rows)
    charts = "".join(section.charts.values())  # made by `line_chart`, which escapes
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
