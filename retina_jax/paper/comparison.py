"""Sweeps next to the paper's tables: scores, differences, notes and charts as data, which `retina_jax.reports` draws."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import load_config, override
from retina_jax.installation import HOME
from retina_jax.paper.results import PointResult, Side, SweepResult, divergence, sides_of, splits_of, started
from retina_jax.paper.settings import AP, TABLES, Row
from retina_jax.runs.record import TEST_DEV_FILE
from retina_jax.sweeps.points import load_sweep, outcome

OWN_TITLES = {"fig7": "Figure 7: FL* over γ and β"}  # titles of sweeps of the paper for which it prints no numbers
PAPER_CONFIG = "paper_ablations.py"  # base of sweeps whose absolute values are comparable with the paper's
MOST_FIELDS = 4  # maximum number of differing config fields that are listed; more are counted


class Cell(NamedTuple):
    """Text of a table."""

    text: str
    bold: bool = False


def build_report(sweeps: Sequence[SweepResult]) -> list[Section]:
    """Returns one section per sweep: the paper's tables in its order, then the user's own sweeps."""
    place = {name: number for number, name in enumerate([*TABLES, *OWN_TITLES])}
    return [Section(s) for s in sorted(sweeps, key=lambda s: (place.get(s.name, len(place)), s.name))]


class Section:
    """Table of a sweep with the texts around it: settings, each score on each side, times if the paper has them, seeds."""

    def __init__(self, sweep: SweepResult) -> None:
        self.sweep, self.name, self.paper = sweep, sweep.name, TABLES.get(sweep.name)
        self.title = self.paper.title if self.paper else OWN_TITLES.get(sweep.name, f"Sweep {sweep.name}")
        self._rows = list(self.paper.rows) if self.paper else []
        known = {row.name for row in self._rows}
        for name in sweep.names:  # points that the paper does not have come last
            if name not in known:
                own = _overrides_text(sweep.seeds(name)[0].overrides) or "none"
                rest = ("",) * (len(self.paper.columns) - 1) if self.paper else (own,)
                self._rows.append(Row(name, (name, *rest)))
        self._metrics = self.paper.metrics if self.paper else AP
        self._sides = sides_of(sweep, self.paper, self._metrics)
        # Points without a diverged seed; only these can be the best.
        self._stable = [name for name in sweep.names if not divergence(sweep.seeds(name))]
        self._departures = departures(sweep) if self.paper else []
        columns = list(self._columns())
        self.header = [heading for heading, _ in columns]
        self.rows: list[list[Cell]] = []  # a row of one cell is a heading above the rows that follow
        for place, row in enumerate(self._rows):
            if row.group != (self._rows[place - 1].group if place else ""):
                self.rows.append([Cell(row.group)])
            self.rows.append([cell(row) for _, cell in columns])
        self.notes = self._notes()
        self.footnotes = [*([self.paper.note] if self.paper and self.paper.note else []), *_origins(sweep)]
        self.runs = [(f"{p.name}, seed {p.seed}: {p.result}", _facts(p)) for p in sweep.points]  # titles and facts
        self.summary = self._summary()  # the section in one line

    def _notes(self) -> list[str]:
        sweep = self.sweep
        base = sweep.base + (f" with {_overrides_text(sweep.overrides)}" if sweep.overrides else "")
        notes = [f"Sweep {sweep.file} over {base}; scores in percent."]
        if self._departures:
            notes.append(
                f"These runs do not use the paper's config (configs/{PAPER_CONFIG}): {'; '.join(self._departures)}. "
                "Absolute values are not comparable with the paper's; compare the differences between rows."
            )
        if self.paper and self.paper.split == "test-dev":
            notes.append(
                "The paper's scores are on test-dev, whose labels are not public; our runs were evaluated on "
                f"{splits_of(sweep)}. Scores on different splits are not subtracted. On minival the paper has "
                f"RetinaNet-50-600 (Table 1b) and RetinaNet-101-600 (Table 1d). RUN/{TEST_DEV_FILE}, with the scores that "
                "COCO's server returned for a run, adds our scores on test-dev."
            )
        return notes

    def _columns(self) -> Iterator[tuple[str, Callable[[Row], Cell]]]:
        """Yields the heading of each column and the function that returns its cell in a row."""
        paper = self.paper
        for place, name in enumerate(paper.columns if paper else ("point", "overrides")):
            yield name, lambda row, place=place: Cell(row.settings[place])
        for m in self._metrics:
            for side in self._sides:
                has_paper = any(m in scores for scores in side.paper.values())
                has_ours = side.from_runs or any(side.means.values())
                if has_paper:
                    yield f"{m}, paper ({side.split})", partial(self._paper_cell, m, side)
                if has_ours:
                    yield f"{m}, ours ({side.ours})", partial(self._our_cell, m, side)
                if m == "AP" and has_paper and has_ours:
                    split = "" if side.from_runs else f" ({side.split})"
                    yield f"Δ AP, ours − paper{split}", lambda row, side=side: Cell(_difference("AP", side, row))
            if m == "AP" and self._departures:
                split = "" if paper.split == "minival" else f" ({paper.split})"
                yield f"Δ AP to {paper.reference_label}, paper{split} / ours", self._to_reference
        if paper and all(row.milliseconds for row in paper.rows):
            measured = dict.fromkeys(p.result.latency["hardware"] for p in self.sweep.points if p.result.latency)
            yield "ms per image, paper (M40)", lambda row: Cell(f"{row.milliseconds:.0f}" if row.milliseconds else "")
            yield f"ms per image, ours ({', '.join(measured) or 'not measured'})", self._time
        yield "seeds", self._seeds

    def _paper_cell(self, metric: str, side: Side, row: Row) -> Cell:
        """Returns the paper's score; its first column of AP also has the paper's note on the row."""
        note = row.note if metric == "AP" and side is self._sides[0] else ""
        value, _ = side.of(row, metric)
        if value is None:
            return Cell(note)
        text = f"{'≈ ' if row.derived else ''}{value:.1f}" + (f" ({note})" if note else "")
        return Cell(text, value == side.best_of_paper(self._rows, metric))

    def _our_cell(self, metric: str, side: Side, row: Row) -> Cell:
        """Returns our score: for AP with the state of the seeds, else with the difference to the paper in brackets."""
        ran, (_, mean) = started(self.sweep.seeds(row.name)), side.of(row, metric)
        text = str(mean) if mean else ""
        if metric == "AP" and side.from_runs and row.name:
            others = [] if mean else dict.fromkeys(str(p.result) for p in ran if p.result.status != "diverged")
            text = "; ".join(filter(None, [text, divergence(ran), *others]))
            if not mean and len(ran) <= 1:
                text = str(ran[0].result) if ran else "not run"
        difference = _difference(metric, side, row)
        if metric != "AP" and difference and not self._departures:
            text += f" ({difference})"
        stable = [round(means[metric].value, 1) for n in self._stable if metric in (means := side.means[n])]
        return Cell(text, mean is not None and row.name in self._stable and round(mean.value, 1) == max(stable))

    def _time(self, row: Row) -> Cell:
        times = [p.result.latency["milliseconds"] for p in self.sweep.seeds(row.name) if p.result.latency]
        return Cell(f"{statistics.fmean(times):.1f}" if times else "")

    def _seeds(self, row: Row) -> Cell:
        """Returns the number of seeds in the mean, and the state of the others that have started."""
        ran = started(self.sweep.seeds(row.name))
        others = [f"seed {p.seed} {p.result}" for p in ran if "AP" not in p.result.scores]
        if not others:
            return Cell(str(len(ran) or ""))
        states = f": {', '.join(others)}" if len(ran) > 1 else ""
        return Cell(f"{len(ran) - len(others)} of {len(ran)}{states}")

    def _to_reference(self, row: Row) -> Cell:
        """Returns the difference in AP to the reference row: the paper's / ours, the mean over the seeds of both rows."""
        reference = next(r for r in self.paper.rows if r.name == self.paper.reference)
        of_paper = signed(row.scores["AP"] - reference.scores["AP"]) if "AP" in row.scores else "–"
        a, b = (
            {p.seed: p.result.scores["AP"] for p in self.sweep.seeds(r.name) if "AP" in p.result.scores}
            for r in (row, reference)
        )
        both = sorted(a.keys() & b.keys())
        if not both:
            return Cell(f"{of_paper} / –")
        fewer = f" ({len(both)} {'seed' if len(both) == 1 else 'seeds'})" if len(both) < max(len(a), len(b)) else ""
        return Cell(f"{of_paper} / {signed(statistics.fmean(a[seed] - b[seed] for seed in both))}{fewer}")

    def _summary(self) -> str:
        paper, means = self.paper, self._sides[-1].means
        scored = {name: values["AP"] for name, values in means.items() if "AP" in values}
        names = {row.name for row in self._rows if row.name}
        text = f"{self.sweep.name}: {len(scored)} of {len(names)} rows have an AP"
        if stable := [name for name in self._stable if name in scored]:
            name = max(stable, key=lambda n: scored[n].value)
            text += f"; best {name} {scored[name]}"
        if paper and self._sides[0].best_of_paper(self._rows, "AP") is not None:
            row = max((r for r in paper.rows if r.name), key=lambda r: r.scores.get("AP", -1.0))
            text += f" (paper: {row.name} {row.scores['AP']:.1f} on {paper.split})"
        diverged = sum(p.result.status == "diverged" for p in self.sweep.points)
        return text + (f"; {diverged} diverged" if diverged else "")


def _difference(metric: str, side: Side, row: Row) -> str:
    printed, mean = side.of(row, metric)
    return signed(mean.value - printed) if mean and printed is not None else ""


def signed(difference: float) -> str:
    """Returns +1.5, −0.3 or 0.0."""
    text = f"{difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _facts(point: PointResult) -> dict[str, str]:
    facts = {"folder": str(point.result.folder), "overrides": _overrides_text(point.overrides) or "none"}
    return facts | point.result.details | ({"message": point.result.message} if point.result.message else {})


def _overrides_text(overrides: Mapping[str, Any]) -> str:
    """Returns "loss.gamma 2, loss.alpha 0.25"."""
    return ", ".join(f"{name} {_value(value)}" for name, value in overrides.items())


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_value, value))})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def departures(sweep: SweepResult) -> list[str]:
    """Returns the reasons why absolute values are not comparable with the paper's; empty: no reason known. Each run is
    compared with its row over the paper's base, in every field that affects the outcome; before the first run, the base."""
    paper = load_config(HOME / "configs" / PAPER_CONFIG)
    file = HOME / "configs" / "sweeps" / f"{sweep.name}.py"
    rows = load_sweep(file).get_sweep(paper) if file.is_file() else {}

    def overridden(overrides: Mapping[str, Any], where: str) -> Config:
        try:
            return override(paper, {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()})
        except ConfigError as error:
            raise ConfigError(f"sweep {sweep.name}{where}: {error}") from None

    other_base = [] if Path(sweep.base).name == PAPER_CONFIG else [f"the base is {sweep.base}"]
    ran = [point for point in sweep.points if point.result.config is not None]
    if not ran:
        return other_base or _described([(overridden(sweep.overrides, ""), paper)])
    rows_of_paper = (overridden(rows.get(p.name, p.overrides), f", point {p.name!r}") for p in ran)
    described = _described(zip((p.result.config for p in ran), rows_of_paper, strict=True))
    return [*other_base, *described] if described else []


def _described(pairs: Iterable[tuple[Config, Config]]) -> list[str]:
    """Describes how ours and the paper's configs differ in what affects the outcome, except the seed; in words first."""
    left: dict[str, list[str]] = {}
    for pair in pairs:
        ours, paper = (outcome(override(c, {"seed": 0, "model.num_classes": c.model.num_classes or 80})) for c in pair)
        for name in ours:
            if ours[name] != paper[name] and (value := _value(ours[name])) not in left.setdefault(name, []):
                left[name].append(value)
    words = []
    if "data.source" in left:  # makes the names of the annotation files irrelevant
        left = {name: values for name, values in left.items() if not name.endswith("_annotations")}
        source = left.pop("data.source")
        words.append("the data are generated scenes" if source == ["scenes"] else f"data.source {', '.join(source)}")
    left = {name: values for name, values in left.items() if not name.startswith("data.scenes.")}
    for name, what in (("model.num_classes", "classes"), ("training.steps", "steps")):
        if name in left:
            words.append(f"{', '.join(left.pop(name))} {what}")
    if "model.backbone_weights" in left:
        words.append(f"backbone from {', '.join(v or 'random weights' for v in left.pop('model.backbone_weights'))}")
    if len(left) > MOST_FIELDS:
        return [*words, f"{len(left)} {'other ' if words else ''}fields of the config"]
    return [*words, *(f"{name} {', '.join(values)}" for name, values in left.items())]


def _origins(sweep: SweepResult) -> list[str]:
    """Returns a sentence if the finished runs are of different commits, and one if they started from different weights."""
    done = list({p.result.folder: p.result for p in sweep.points if p.result.status == "finished"}.values())
    # "abc1234...+changes" is shortened to "abc1234+changes".
    commits = Counter(re.sub(r"(?<=^\w{7})\w+", "", run.details.get("commit", "no commit known")) for run in done)
    weights: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for run in done:
        if "backbone_sha256" in run.details:  # older runs do not have it
            backbone = f"{run.config.model.backbone} ({Path(run.config.model.backbone_weights).name})"
            weights[backbone][run.details["backbone_sha256"][:12]] += 1

    def counted(counts: Counter[str]) -> str:
        return ", ".join(f"{name} ({n} {'run' if n == 1 else 'runs'})" for name, n in counts.most_common())

    changed = any("+" in commit for commit in commits)
    note = "; +changes means uncommitted changes" if changed else ""
    sentences = [f"Commits of the finished runs: {counted(commits)}{note}."] * (changed or len(commits) > 1)
    start = "The finished runs start from different weights of"
    return sentences + [f"{start} {b}: {counted(sums)}." for b, sums in weights.items() if len(sums) > 1]
