"""Writes the report on a run or on sweeps: python scripts/report.py --workdir DIR [--out FILE_WITHOUT_SUFFIX]

For a single run (DIR/config.json) it writes DIR/report.html: AP, learning curves, precision over recall, confused
classes, worst images, kinds of error, COCO scores, settings. Images and ground truth are those of the run's evaluation:
run this script in the folder in which training was started. With --watch the page is written again whenever there is
something new, and an open page reloads itself, until the run is finished or Ctrl-C; the run may start later.

For a folder of sweeps it compares their results with the paper's tables and writes DIR/report.md (its charts as SVG
files) and DIR/report.html, from the manifests in DIR/sweeps/ and the runs they name. Each page is a single file. Runs
may be unfinished.
"""

from __future__ import annotations

import retina_jax.interrupts  # noqa: F401  handles signals during the imports below

# isort: split

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro

from retina_jax.cli import one_line_errors, parse_command_line
from retina_jax.config import ConfigError
from retina_jax.console import log
from retina_jax.paper.comparison import build_report
from retina_jax.paper.results import read_sweeps
from retina_jax.reports.follow import follow
from retina_jax.reports.run_page import run_page
from retina_jax.reports.sweep_page import charts_of, to_html, to_markdown
from retina_jax.runs.files import write_bytes


@dataclass(frozen=True)
class Arguments:
    """Options of this script."""

    workdir: Path
    """Folder of a run, or of sweeps (with the manifests in sweeps/, next to the folders of the runs)."""
    out: Path | None = None
    """Files to write, without a suffix; None: DIR/report."""
    watch: bool = False
    """Follow a run: write its page again whenever its files change."""


def main() -> None:
    """Reads the run or the sweeps, writes the report, prints one line per table."""
    arguments = parse_command_line(Arguments, Arguments(tyro.MISSING), sys.argv[1:], __doc__)
    out = arguments.out or arguments.workdir / "report"
    page = out.with_name(f"{out.name}.html")
    if arguments.watch:
        follow(arguments.workdir, lambda text: write({page: text}))
        return
    if (arguments.workdir / "config.json").is_file():
        text, summary = run_page(arguments.workdir)
        files = {page: text}
    else:
        sections = build_report(read_sweeps(arguments.workdir))
        title = f"The paper and {arguments.workdir.resolve().name}"
        drawn = {(s.name, kind): chart for s in sections for kind, chart in charts_of(s).items()}
        names = {(table, kind): f"{out.name}_{table}_{kind}.svg" for table, kind in drawn}
        files = {out.with_name(name): drawn[key] for key, name in names.items()}
        files |= {out.with_name(f"{out.name}.md"): to_markdown(sections, title, names), page: to_html(sections, title)}
        summary = "\n".join(section.summary for section in sections)
    write(files)
    log(summary)
    log(f"written: {' and '.join(str(file) for file in files if file.suffix != '.svg')}")


def write(files: Mapping[Path, str]) -> None:
    """Writes texts by their paths, which are in one folder; it is made if it is missing."""
    for file, text in files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {file.with_suffix('')}: cannot be written: {error.strerror}") from None
        write_bytes(file.resolve() if file.is_symlink() else file, text.encode(errors="backslashreplace"))


if __name__ == "__main__":
    with one_line_errors():
        main()
