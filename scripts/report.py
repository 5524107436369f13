"""Sweeps beside the paper's tables: python scripts/report.py --workdir DIR [--out FILE_WITHOUT_SUFFIX]

Writes DIR/report.md (its charts as SVG files beside it) and DIR/report.html (one file) from the manifests in DIR/sweeps/
and the runs they name, finished or not.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from retina_jax.command_line import one_line_errors, parse_command_line
from retina_jax.config import ConfigError
from retina_jax.paper.html import to_html
from retina_jax.paper.markdown import to_markdown
from retina_jax.paper.report import build_report
from retina_jax.paper.results import read_sweeps


@dataclass(frozen=True)
class Arguments:
    """Options of this script."""

    workdir: Path
    """Folder of the sweeps: its sweeps/ holds their manifests, beside the runs' own folders."""
    out: Path | None = None
    """Files to write, without a suffix; None: DIR/report."""


def main() -> None:
    """Read the sweeps, write the report, print a line a table."""
    arguments = parse_command_line(Arguments, Arguments(tyro.MISSING), sys.argv[1:], __doc__)
    sections = build_report(read_sweeps(arguments.workdir))
    out = arguments.out or arguments.workdir / "report"
    title = f"The paper and {arguments.workdir.resolve().name}"
    charts = {(s.name, kind): f"{out.name}_{s.name}_{kind}.svg" for s in sections for kind in s.charts}
    files = {out.with_name(charts[s.name, kind]): svg for s in sections for kind, svg in s.charts.items()}
    files[out.with_name(out.name + ".html")] = to_html(sections, title)
    files[out.with_name(out.name + ".md")] = to_markdown(sections, title, charts)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
    print("\n".join(section.summary for section in sections))
    print(f"written: {out}.md and {out}.html")


if __name__ == "__main__":
    with one_line_errors():
        main()
