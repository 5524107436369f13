"""Sweeps next to the paper's tables: scores, differences, notes and charts as data, which `retina_jax.reports` draws."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from retina_jax.paper import wording
from retina_jax.paper.published import AP, TABLES, Row
from retina_jax.paper.results import Side, SweepResult, sides_of, splits_of
from retina_jax.runs.record import FILE

OWN_TITLES = {"fig7": "Figure 7: FL* over γ and β"}  # Titles of sweeps of the paper for which it prints no numbers


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    bold: bool = False


class Chart(NamedTuple):
    """A line chart."""

    lines: list[tuple[str, Sequence[tuple[float, float]]]]  # label and (x, y) by rising x; equal labels look the same
    x_label: str
    y_label: str
    log_y: bool = False


@dataclass(frozen=True)
class Section:
    """A table of the report and the texts around it."""

    name: str
    title: str
    notes: list[str]
    header: list[str]
    rows: list[list[Cell]]  # a row of one cell is a heading above the rows that follow
    summary: str  # the section in one line
    charts: dict[str, Chart] = field(default_factory=dict)  # by what they show: ap, loss
    footnotes: list[str] = field(default_factory=list)  # notes under the table
    runs: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # title and facts of each run


def build_report(sweeps: Sequence[SweepResult]) -> list[Section]:
    """Returns one section per sweep: the paper's tables in its order, then the user's own sweeps."""
    order = [*TABLES, *OWN_TITLES]
    ranked = sorted(sweeps, key=lambda s: (order.index(s.name) if s.name in order else len(order), s.name))
    return [_Layout(sweep).section() for sweep in ranked]


class _Layout:
    """The table of a sweep: settings, each score on each side, times if the paper has them, seeds."""

    def __init__(self, sweep: SweepResult) -> None:
        self.sweep, self.paper = sweep, TABLES.get(sweep.name)
        self.rows = list(self.paper.rows) if self.paper else []
        known = {row.name for row in self.rows}
        for name in sweep.names:  # points that the paper does not have come last
            if name not in known:
                own = wording.overrides_text(sweep.seeds(name)[0].overrides) or "none"
                rest = ("",) * (len(self.paper.columns) - 1) if self.paper else (own,)
                self.rows.append(Row(name, (name, *rest)))
        self.metrics = self.paper.metrics if self.paper else AP
        self.sides = sides_of(sweep, self.paper, self.metrics)
        # Points without a diverged seed; only these can be the best.
        self.stable = [name for name in sweep.names if not wording.divergence(sweep.seeds(name))]
        self.departures = wording.departures(sweep) if self.paper else []
        self.timed = self.paper is not None and all(row.milliseconds for row in self.paper.rows)

    def section(self) -> Section:
        """Returns the table with its notes and charts."""
        sweep, paper = self.sweep, self.paper
        columns = list(self._columns())
        lines: list[list[Cell]] = []
        for place, row in enumerate(self.rows):
            if row.group != (self.rows[place - 1].group if place else ""):
                lines.append([Cell(row.group)])
            lines.append([cell(row) for _, cell in columns])
        base = sweep.base + (f" with {wording.overrides_text(sweep.overrides)}" if sweep.overrides else "")
        notes = [f"Sweep {sweep.file} over {base}; scores in percent."]
        if self.departures:
            notes.append(
                f"These runs do not use the paper's config (configs/{wording.PAPER_CONFIG}): {'; '.join(self.departures)}. "
                "Absolute values are not comparable with the paper's; compare the differences between rows."
            )
        if paper and paper.split == "test-dev":
            notes.append(
                "The paper's scores are on test-dev, whose labels are not public; our runs were evaluated on "
                f"{splits_of(sweep)}. Scores on different splits are not subtracted. On minival the paper has "
                f"RetinaNet-50-600 (Table 1b) and RetinaNet-101-600 (Table 1d). RUN/{FILE}, with the scores that COCO's "
                "server returned for a run, adds our scores on test-dev."
            )
        return Section(
            name=sweep.name,
            title=paper.title if paper else OWN_TITLES.get(sweep.name, f"Sweep {sweep.name}"),
            notes=notes,
            header=[heading for heading, _ in columns],
            rows=lines,
            summary=self._summary(),
            charts=_charts(sweep),
            footnotes=[*([paper.note] if paper and paper.note else []), *wording.origins(sweep)],
            runs=[wording.facts(point) for point in sweep.points],
        )

    def _columns(self) -> Iterator[tuple[str, Callable[[Row], Cell]]]:
        """Yields the heading of each column and the function that returns its cell in a row."""
        for place, name in enumerate(self.paper.columns if self.paper else ("point", "overrides")):
            yield name, lambda row, place=place: Cell(row.settings[place])
        for m in self.metrics:
            for side in self.sides:
                has_paper = any(m in scores for scores in side.paper.values())
                has_ours = side.from_runs or any(side.means.values())
                if has_paper:
                    yield f"{m}, paper ({side.split})", partial(self._paper_cell, m, side)
                if has_ours:
                    yield f"{m}, ours ({side.ours})", partial(self._our_cell, m, side)
                if m == "AP" and has_paper and has_ours:
                    split = "" if side.from_runs else f" ({side.split})"
                    yield f"Δ AP, ours − paper{split}", partial(_difference, m, side)
            if m == "AP" and self.departures:
                split = "" if self.paper.split == "minival" else f" ({self.paper.split})"
                yield f"Δ AP to {self.paper.reference_label}, paper{split} / ours", self._to_reference
        if self.timed:
            measured = dict.fromkeys(p.result.latency["hardware"] for p in self.sweep.points if p.result.latency)
            yield "ms per image, paper (M40)", lambda row: Cell(f"{row.milliseconds:.0f}" if row.milliseconds else "")
            yield f"ms per image, ours ({', '.join(measured) or 'not measured'})", self._time
        yield "seeds", lambda row: Cell(wording.seeds_of(self.sweep.seeds(row.name)))

    def _paper_cell(self, metric: str, side: Side, row: Row) -> Cell:
        """Returns the paper's score; its first column of AP also has the paper's note on the row."""
        note = row.note if metric == "AP" and side is self.sides[0] else ""
        value = side.of_paper(row, metric)
        if value is None:
            return Cell(note)
        text = f"{'≈ ' if row.derived else ''}{value:.1f}" + (f" ({note})" if note else "")
        return Cell(text, value == side.best_of_paper(self.rows, metric))

    def _our_cell(self, metric: str, side: Side, row: Row) -> Cell:
        """Returns our score: for AP with the state of the seeds, else with the difference to the paper in brackets."""
        points, mean = self.sweep.seeds(row.name), side.of_ours(row, metric)
        text = str(mean) if mean else ""
        if metric == "AP" and side.from_runs and row.name:
            text = "; ".join(filter(None, [text, wording.divergence(points)])) if mean else wording.state_of(points)
        difference = _difference(metric, side, row).text
        if metric != "AP" and difference and not self.departures:
            text += f" ({difference})"
        stable = [round(means[metric].value, 1) for n in self.stable if metric in (means := side.means[n])]
        return Cell(text, mean is not None and row.name in self.stable and round(mean.value, 1) == max(stable))

    def _time(self, row: Row) -> Cell:
        times = [p.result.latency["milliseconds"] for p in self.sweep.seeds(row.name) if p.result.latency]
        return Cell(f"{statistics.fmean(times):.1f}" if times else "")

    def _to_reference(self, row: Row) -> Cell:
        """Returns the difference in AP to the reference row: the paper's / ours, the mean over the seeds of both rows."""
        reference = next(r for r in self.paper.rows if r.name == self.paper.reference)
        of_paper = wording.signed(row.scores["AP"] - reference.scores["AP"]) if "AP" in row.scores else "–"
        scores = ({p.seed: p.result.scores.get("AP") for p in self.sweep.seeds(r.name)} for r in (row, reference))
        a, b = ({seed: ap for seed, ap in aps.items() if ap is not None} for aps in scores)
        both = sorted(a.keys() & b.keys())
        if not both:
            return Cell(f"{of_paper} / –")
        fewer = f" ({len(both)} {'seed' if len(both) == 1 else 'seeds'})" if len(both) < max(len(a), len(b)) else ""
        ours = wording.signed(statistics.fmean(a[seed] - b[seed] for seed in both))
        return Cell(f"{of_paper} / {ours}{fewer}")

    def _summary(self) -> str:
        paper, means = self.paper, self.sides[-1].means
        scored = {name: values["AP"] for name, values in means.items() if "AP" in values}
        names = {row.name for row in self.rows if row.name}
        text = f"{self.sweep.name}: {len(scored)} of {len(names)} rows have an AP"
        if stable := [name for name in self.stable if name in scored]:
            name = max(stable, key=lambda n: scored[n].value)
            text += f"; best {name} {scored[name]}"
        if paper and self.sides[0].best_of_paper(self.rows, "AP") is not None:
            row = max((r for r in paper.rows if r.name), key=lambda r: r.scores.get("AP", -1.0))
            text += f" (paper: {row.name} {row.scores['AP']:.1f} on {paper.split})"
        diverged = sum(p.result.status == "diverged" for p in self.sweep.points)
        return text + (f"; {diverged} diverged" if diverged else "")


def _difference(metric: str, side: Side, row: Row) -> Cell:
    mean, printed = side.of_ours(row, metric), side.of_paper(row, metric)
    return Cell(wording.signed(mean.value - printed) if mean and printed is not None else "")


def _charts(sweep: SweepResult) -> dict[str, Chart]:
    """Returns the AP of runs with several evaluations, and the smoothed classification loss of all runs."""
    runs = {(p.name, p.result.folder): p.result for p in sweep.points}
    ap = [(name, run.ap) for (name, _), run in runs.items() if len(run.ap) > 1]
    loss = [(name, smoothed(run.loss)) for (name, _), run in runs.items() if len(run.loss) > 1]
    charts = {"ap": Chart(ap, "step", f"AP, {splits_of(sweep)}")} if ap else {}
    if any(y > 0 for _, points in loss for _, y in points):
        charts["loss"] = Chart(loss, "step", "classification loss, smoothed", log_y=True)
    return charts


def smoothed(points: Sequence[tuple[float, float]], share: float = 0.05, most: int = 200) -> list[tuple[float, float]]:
    """Returns at most `most` of the points, with the last, each the mean of a symmetric window, of `share` if it fits."""
    half, last = int(len(points) * share / 2), len(points) - 1
    kept = range(last, -1, -math.ceil(len(points) / most))[::-1]
    reach = {i: min(half, i, last - i) for i in kept}
    return [(points[i][0], statistics.fmean(y for _, y in points[i - n : i + n + 1])) for i, n in reach.items()]
