"""A report as Markdown, with its charts as SVG files beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from urllib.parse import quote

from retina_jax.paper.report import Cell, Section
from retina_jax.paper.wording import HOW_TO_READ


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
