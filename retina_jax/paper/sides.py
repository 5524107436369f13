"""The paper's figures and ours, split by split: a report subtracts only figures on the same split."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retina_jax.paper.published import Row, Table
from retina_jax.paper.results import Sweep
from retina_jax.paper.wording import divergence, splits_of


@dataclass(frozen=True)
class Mean:
    """Mean over the finished seeds of a point, percent."""

    value: float
    deviation: float | None
    """Sample standard deviation; None for a single seed."""

    def __str__(self) -> str:
        return f"{self.value:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


@dataclass(frozen=True)
class Side:
    """Figures on one split."""

    split: str
    """Of the paper's figures: minival or test-dev."""
    ours: str
    """What our figures were evaluated on."""
    printed: Mapping[tuple[str, ...], Mapping[str, float]]
    """The paper's scores, percent, by the settings of the row; a row without any is absent."""
    means: Mapping[str, Mapping[str, Mean]]
    """Ours by point and score."""
    of_run: bool
    """Ours are the run's own evaluation; False: the answers of COCO's server."""

    def is_printed(self, metric: str) -> bool:
        """The paper gives the score of at least one row."""
        return any(metric in scores for scores in self.printed.values())

    def has_ours(self) -> bool:
        """There is a column of our figures."""
        return self.of_run or any(self.means.values())

    def compares(self, metric: str) -> bool:
        """Both columns exist."""
        return self.is_printed(metric) and self.has_ours()

    def of_paper(self, row: Row, metric: str) -> float | None:
        """The paper's score of `row`."""
        return self.printed.get(row.settings, {}).get(metric)

    def of_ours(self, row: Row, metric: str) -> Mean | None:
        """Our score of `row`."""
        return self.means.get(row.name, {}).get(metric) if row.name else None

    def best_of_paper(self, rows: Sequence[Row], metric: str) -> float | None:
        """The highest that the paper prints; None where only a score that it does not print is higher."""
        scored = [row for row in rows if self.of_paper(row, metric) is not None]
        row = max(scored, key=lambda row: self.of_paper(row, metric), default=None)
        return None if row is None or row.derived else self.of_paper(row, metric)

    def best_of_ours(self, names: Sequence[str], metric: str) -> float | None:
        """The highest mean of the points `names`, as it is shown."""
        shown = (self.means.get(name, {}).get(metric) for name in names)
        return max((round(mean.value, 1) for mean in shown if mean), default=None)


def sides_of(sweep: Sweep, paper: Table | None, metrics: Sequence[str]) -> list[Side]:
    """The sides of a sweep's table; the last is that of the runs' own evaluations.

    A table on minival (val2017), or one that the paper does not have, has one side. A table on test-dev has two: test-dev,
    ours from COCO's server, and minival, where the paper gives some of the same models.
    """
    means = {name: _means([p.result.scores for p in sweep.seeds(name)], metrics) for name in sweep.names}
    rows = paper.rows if paper else ()
    if paper is None or paper.split == "minival":
        printed = {row.settings: row.scores for row in rows if row.scores}
        return [Side("minival", splits_of(sweep), printed, means, of_run=True)]
    answers = {name: _means([p.result.test_dev for p in sweep.seeds(name)], metrics) for name in sweep.names}
    on_test_dev = {row.settings: row.scores for row in rows if row.scores}
    on_minival = {row.settings: row.minival for row in rows if row.minival}
    return [
        Side(paper.split, paper.split, on_test_dev, answers, of_run=False),
        Side("minival", splits_of(sweep), on_minival, means, of_run=True),
    ]


def stable_points(sweep: Sweep) -> list[str]:
    """Points without a diverged seed; only these can be the best."""
    return [name for name in sweep.names if not divergence(sweep.seeds(name))]


def _means(runs: Sequence[Mapping[str, float]], metrics: Sequence[str]) -> dict[str, Mean]:
    return {m: _mean([scores[m] for scores in runs if m in scores]) for m in metrics if any(m in r for r in runs)}


def _mean(values: Sequence[float]) -> Mean:
    return Mean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
