"""What came of a run, or of sweeps: python scripts/report.py --workdir DIR [--out FILE_WITHOUT_SUFFIX]

Of a single run (DIR/config.json) it writes DIR/report.html: what was run, learning curves, COCO figures, classes, errors by
kind, best and worst images. Images and truth are those that the run was evaluated on: start it where the run was started.
Of a folder of sweeps it writes their results beside the paper's tables, DIR/report.md (its charts as SVG files beside it)
and DIR/report.html, from the manifests in DIR/sweeps/ and the runs they name. Every page is one file; runs may be
unfinished.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from retina_jax.cli import one_line_errors, parse_command_line
from retina_jax.config import ConfigError
from retina_jax.paper.comparison import build_report
from retina_jax.paper.results import read_sweeps
from retina_jax.reports.run_page import run_page
from retina_jax.reports.sweep_page import charts_of, to_html, to_markdown


@dataclass(frozen=True)
class Arguments:
    """Options of this script."""

    workdir: Path
    """Folder of a run, or of sweeps: its sweeps/ holds their manifests, beside the runs' own folders."""
    out: Path | None = None
    """Files to write, without a suffix; None: DIR/report."""


def main() -> None:
    """Read the run or the sweeps, write the report, print a line a table."""
    arguments = parse_command_line(Arguments, Arguments(tyro.MISSING), sys.argv[1:], __doc__)
    out = arguments.out or arguments.workdir / "report"
    if (arguments.workdir / "config.json").is_file():
        page, summary = run_page(arguments.workdir)
        files = {out.with_name(out.name + ".html"): page}
    else:
        files, summary = _of_sweeps(arguments.workdir, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            file.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
    print(summary)
    print(f"written: {' and '.join(str(file) for file in files if file.suffix != '.svg')}")


def _of_sweeps(workdir: Path, out: Path) -> tuple[dict[Path, str], str]:
    """The files of the report on all sweeps, and a line for each table."""
    sections = build_report(read_sweeps(workdir))
    title = f"The paper and {workdir.resolve().name}"
    charts = {(s.name, kind): f"{out.name}_{s.name}_{kind}.svg" for s in sections for kind in s.charts}
    files = {out.with_name(charts[s.name, kind]): svg for s in sections for kind, svg in charts_of(s).items()}
    files[out.with_name(out.name + ".md")] = to_markdown(sections, title, charts)
    files[out.with_name(out.name + ".html")] = to_html(sections, title)
    return files, "\n".join(section.summary for section in sections)


if __name__ == "__main__":
    with one_line_errors():
        main()
