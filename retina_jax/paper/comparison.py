"""Sweeps beside the paper's tables: row by row the paper's figure, ours, and the differences; what did not run says so.

`build_report` makes tables of plain text, which `markdown.py` and `html.py` write down.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from retina_jax.paper.published import AP, TABLES, Row
from retina_jax.paper.results import Point, Sweep
from retina_jax.paper.sides import Mean, Side, sides_of, stable_points
from retina_jax.paper.wording import (
    PAPER_CONFIG,
    base_of,
    changes_of,
    departures,
    divergence,
    hardware_of,
    origins,
    seeds_of,
    signed,
    splits_of,
    state_of,
    status,
)
from retina_jax.reports.charts import Line, line_chart
from retina_jax.runs.record import FILE

TEST_DEV = (
    "The paper's figures are on test-dev, whose labels are not public; our runs were evaluated on {ours}. Figures on "
    "different splits are not subtracted. On minival the paper has RetinaNet-50-600 (Table 1b) and RetinaNet-101-600 (Table "
    "1d). RUN/{file}, with the scores that COCO's server returned for a run, adds our figures on test-dev."
)
"""Note on a table that the paper has on test-dev."""
OWN_TITLES = {"fig7": "Figure 7: FL* over γ and β"}
"""Sweeps of the paper for which it prints no numbers."""


@dataclass(frozen=True)
class Cell:
    """A field of a table."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Section:
    """A table of the report, with what belongs to it."""

    name: str
    title: str
    notes: list[str]
    header: list[str]
    rows: list[list[Cell]]
    """A row of one cell is a heading over those that follow."""
    summary: str
    """The section in a line."""
    charts: dict[str, str] = field(default_factory=dict)
    """SVG by what it shows: ap, loss."""
    footnotes: list[str] = field(default_factory=list)
    """What stands under the table."""
    runs: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Title and facts of each run."""


def build_report(sweeps: Sequence[Sweep]) -> list[Section]:
    """A section a sweep: the paper's tables in its order, then a person's own sweeps."""
    order = [*TABLES, *OWN_TITLES]
    ranked = sorted(sweeps, key=lambda s: (order.index(s.name) if s.name in order else len(order), s.name))
    return [_section(sweep) for sweep in ranked]


def _section(sweep: Sweep) -> Section:
    layout = _Layout(sweep)
    paper = layout.paper
    lines: list[list[Cell]] = []
    group = ""
    for row in layout.rows:
        if row.group != group:
            group = row.group
            lines.append([Cell(group)])
        lines.append(layout.line(row))
    notes = [f"Sweep {sweep.file} over {base_of(sweep)}; scores in percent."]
    if layout.apart:
        notes.append(
            f"These runs are not of the paper's config (configs/{PAPER_CONFIG}): {'; '.join(layout.apart)}. Absolute values "
            "are not comparable with the paper's; compare the differences between rows."
        )
    if paper and paper.split == "test-dev":
        notes.append(TEST_DEV.format(ours=splits_of(sweep), file=FILE))
    return Section(
        name=sweep.name,
        title=paper.title if paper else OWN_TITLES.get(sweep.name, f"Sweep {sweep.name}"),
        notes=notes,
        header=layout.header(),
        rows=lines,
        summary=_summary(layout),
        charts=_charts(sweep),
        footnotes=[*([paper.note] if paper and paper.note else []), *origins(sweep)],
        runs=[_facts(point) for point in sweep.points],
    )


class _Layout:
    """The columns of a sweep's table: settings, each score of both sides, times where the paper has them, seeds."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.paper = sweep, TABLES.get(sweep.name)
        self.rows = list(self.paper.rows) if self.paper else []
        known = {row.name for row in self.rows}
        for name in sweep.names:  # points that the paper does not have follow those it has
            if name not in known:
                blank = ("",) * (len(self.paper.columns) - 1) if self.paper else (changes_of(sweep.seeds(name)[0]),)
                self.rows.append(Row(name, (name, *blank)))
        self.metrics = self.paper.metrics if self.paper else AP
        self.sides = sides_of(sweep, self.paper, self.metrics)
        self.stable = stable_points(sweep)
        self.apart = departures(sweep) if self.paper else []
        self.timed = self.paper is not None and all(row.milliseconds for row in self.paper.rows)

    @property
    def means(self) -> Mapping[str, Mapping[str, Mean]]:
        """The runs' own evaluations, by point and score."""
        return self.sides[-1].means

    def header(self) -> list[str]:
        """One heading per column; those of scores name their split."""
        names = list(self.paper.columns) if self.paper else ["point", "overrides"]
        for m in self.metrics:
            for side in self.sides:
                names += [f"{m}, paper ({side.split})"] * side.is_printed(m)
                names += [f"{m}, ours ({side.ours})"] * side.has_ours()
                if m == "AP" and side.compares(m):
                    names.append("Δ AP, ours − paper" + ("" if side.of_run else f" ({side.split})"))
            if m == "AP" and self.apart:
                on = "" if self.paper.split == "minival" else f" ({self.paper.split})"
                names.append(f"Δ AP to {self.paper.reference_label}, paper{on} / ours")
        if self.timed:
            names += ["ms an image, paper (M40)", f"ms an image, ours ({hardware_of(self.sweep)})"]
        return [*names, "seeds"]

    def line(self, row: Row) -> list[Cell]:
        """One cell per column."""
        points = self._points(row)
        cells = [Cell(setting) for setting in row.settings]
        for m in self.metrics:
            for side in self.sides:
                cells += self._scores(row, m, side)
            if m == "AP" and self.apart:
                cells.append(Cell(self._to_reference(row)))
        if self.timed:
            times = [p.result.latency["milliseconds"] for p in points if p.result.latency]
            cells.append(Cell(f"{row.milliseconds:.0f}" if row.milliseconds else ""))
            cells.append(Cell(f"{statistics.fmean(times):.1f}" if times else ""))
        return [*cells, Cell(seeds_of(points))]

    def _scores(self, row: Row, metric: str, side: Side) -> list[Cell]:
        """The cells of a score on one split: the paper's, ours, their difference (in brackets unless it is AP)."""
        points, mean, printed = self._points(row), side.of_ours(row, metric), side.of_paper(row, metric)
        difference = signed(mean.value - printed) if mean and printed is not None else ""
        cells = [self._printed(row, metric, side)] if side.is_printed(metric) else []
        if not side.has_ours():
            return cells
        text = str(mean) if mean else ""
        if metric == "AP" and side.of_run and row.name:
            text = "; ".join(filter(None, [text, divergence(points)])) if mean else state_of(points)
        if metric != "AP" and difference and not self.apart:
            text += f" ({difference})"
        best = mean and row.name in self.stable and round(mean.value, 1) == side.best_of_ours(self.stable, metric)
        cells.append(Cell(text, bool(best)))
        return [*cells, Cell(difference)] if metric == "AP" and side.compares(metric) else cells

    def _printed(self, row: Row, metric: str, side: Side) -> Cell:
        """The paper's figure, in its first column of AP with what it says of the row."""
        note = row.note if metric == "AP" and side is self.sides[0] else ""
        value = side.of_paper(row, metric)
        if value is None:
            return Cell(note)
        text = f"{'≈ ' if row.derived else ''}{value:.1f}" + (f" ({note})" if note else "")
        return Cell(text, value == side.best_of_paper(self.rows, metric))

    def _to_reference(self, row: Row) -> str:
        reference = next(r for r in self.paper.rows if r.name == self.paper.reference)
        of_paper = signed(row.scores["AP"] - reference.scores["AP"]) if "AP" in row.scores else "–"
        return f"{of_paper} / {self._paired(row, reference)}"

    def _paired(self, row: Row, other: Row) -> str:
        """Mean difference in AP of two rows over the seeds that both have; that of their means would mix seeds in."""
        a, b = (
            {p.seed: p.result.scores["AP"] for p in self._points(r) if "AP" in p.result.scores} for r in (row, other)
        )
        both = sorted(a.keys() & b.keys())
        if not both:
            return "–"
        fewer = f" ({len(both)} {'seed' if len(both) == 1 else 'seeds'})" if len(both) < max(len(a), len(b)) else ""
        return signed(statistics.fmean(a[seed] - b[seed] for seed in both)) + fewer

    def _points(self, row: Row) -> list[Point]:
        return self.sweep.seeds(row.name) if row.name else []


def _charts(sweep: Sweep) -> dict[str, str]:
    """AP of the runs that were evaluated more than once, and the smoothed classification loss of all."""
    runs = {(p.name, p.result.folder): p.result for p in sweep.points}
    ap = [Line(name, run.ap) for (name, _), run in runs.items() if len(run.ap) > 1]
    loss = [Line(name, smoothed(run.loss)) for (name, _), run in runs.items() if len(run.loss) > 1]
    charts = {}
    if ap:
        charts["ap"] = line_chart(ap, "step", f"AP, {splits_of(sweep)}")
    if any(y > 0 for line in loss for _, y in line.points):
        charts["loss"] = line_chart(loss, "step", "classification loss, smoothed", log_y=True)
    return charts


def smoothed(points: Sequence[tuple[float, float]], share: float = 0.05, most: int = 200) -> list[tuple[float, float]]:
    """Mean of each window of `share` of the points around a point, cut at both ends alike; at most `most` points."""
    half = int(len(points) * share / 2)
    values = [y for _, y in points]
    means = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)  # even to both sides, so that the ends are not pulled inwards
        means.append((x, statistics.fmean(values[i - reach : i + reach + 1])))
    every = math.ceil(len(means) / most)
    return means[::-every][::-1]  # the last point always stays


def _facts(point: Point) -> tuple[str, dict[str, str]]:
    result = point.result
    facts = {"folder": str(result.folder), "overrides": changes_of(point), **result.details}
    if result.message:
        facts["message"] = result.message
    return f"{point.name}, seed {point.seed}: {status(result)}", facts


def _summary(layout: _Layout) -> str:
    sweep, paper = layout.sweep, layout.paper
    scored = {name: values["AP"] for name, values in layout.means.items() if "AP" in values}
    wanted = [row.name for row in paper.rows if row.name] if paper else []
    rows = list(dict.fromkeys([*wanted, *sweep.names]))
    text = f"{sweep.name}: {len(scored)} of {len(rows)} rows have an AP"
    stable = [name for name in layout.stable if name in scored]
    if stable:
        name = max(stable, key=lambda n: scored[n].value)
        text += f"; best {name} {scored[name]}"
    if paper and layout.sides[0].best_of_paper(layout.rows, "AP") is not None:
        row = max((r for r in paper.rows if r.name), key=lambda r: r.scores.get("AP", -1.0))
        text += f" (paper: {row.name} {row.scores['AP']:.1f} on {paper.split})"
    diverged = sum(p.result.status == "diverged" for p in sweep.points)
    return text + (f"; {diverged} diverged" if diverged else "")
