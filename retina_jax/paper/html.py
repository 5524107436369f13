"""A report as one HTML page: no script, no other file, light or dark as the reader has it, readable on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from retina_jax.paper.report import Cell, Section
from retina_jax.paper.wording import HOW_TO_READ

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --ground: #fff; --faint: #f3f4f6; --rule: #d4d7dc; --grey: #5f6670 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --ground: #15171a; --faint: #1f2226; --rule: #3a3f46; --grey: #a0a7b0 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--ink); background: var(--ground);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem }
p { max-width: 48rem; color: var(--grey) }
nav a { display: inline-block; margin-right: 1rem; color: inherit }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: bottom }
th { font-weight: 600; min-width: 4.5rem; background: var(--faint) }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); min-width: 3rem }
td.group { font-style: italic; color: var(--grey); text-align: left }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 }
.charts svg { flex: 1 1 20rem; max-width: 34rem; min-width: 0; width: 100%; height: auto; align-self: flex-start }
details { font-size: .85rem; margin: .2rem 0 } dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem }
dt { color: var(--grey) } dd { margin: 0; overflow-wrap: anywhere }
"""


def to_html(sections: Sequence[Section], title: str) -> str:
    """The page; every text of a sweep is escaped."""
    links = "".join(f'<a href="#{escape(section.name)}">{escape(section.name)}</a>' for section in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>{_paragraphs(HOW_TO_READ)}<nav>{links}</nav>\n"
        + "".join(map(_section, sections))
        + "</body></html>\n"
    )


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
        f'<section id="{escape(section.name)}"><h2>{escape(section.title)}</h2>{_paragraphs(section.notes)}\n'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n'
        f'{_paragraphs(section.footnotes)}<div class="charts">{charts}</div>\n'
        f"<details><summary>runs: {len(section.runs)}</summary>{runs}</details></section>\n"
    )


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _row(row: list[Cell], width: int) -> str:
    if len(row) == 1 and width > 1:
        return f'<tr><td class="group" colspan="{width}">{escape(row[0].text)}</td></tr>'
    cells = (f"<td><b>{escape(c.text)}</b></td>" if c.bold else f"<td>{escape(c.text)}</td>" for c in row)
    return f"<tr>{''.join(cells)}</tr>"
