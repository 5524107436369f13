"""Results of sweeps: the manifests in DIR/sweeps/ and the runs that they name. Locks are ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from retina_jax.config import Config, ConfigError
from retina_jax.console import log
from retina_jax.evaluation.coco_scores import SUMMARY
from retina_jax.paper.settings import Row, Table
from retina_jax.runs.files import read_json
from retina_jax.runs.record import is_score, read_record, read_test_dev
from retina_jax.sweeps.points import read_manifest
from retina_jax.sweeps.status import ended


@dataclass(frozen=True)
class Result:
    """Known state, scores and curves of a run."""

    folder: Path
    status: Literal["finished", "diverged", "unfinished", "not run"]
    scores: dict[str, float] = field(default_factory=dict)  # percent, of a finished run; only defined ones
    step: int | None = None  # last recorded step, or the step at which the run diverged; None: unknown
    message: str = ""  # why it diverged
    config: Config | None = None  # none: not run
    details: dict[str, str] = field(default_factory=dict)  # command, commit, devices, seconds, ... if known
    ap: list[tuple[float, float]] = field(default_factory=list)  # (step, AP in percent) of each evaluation
    loss: list[tuple[float, float]] = field(default_factory=list)  # (step, classification loss) of each metrics window
    test_dev: dict[str, float] = field(default_factory=dict)  # percent, from COCO's server
    latency: dict[str, Any] | None = None  # measurement of `figures.py --figure 2`: milliseconds, hardware

    def __str__(self) -> str:
        """Describes the state: finished, not run, running or interrupted at a step, diverged at a step."""
        if self.status == "diverged":
            return "diverged" if self.step is None else f"diverged at step {self.step}"
        if self.status == "unfinished":
            return f"running or interrupted at step {self.step} of {self.config.training.steps}"
        if self.status == "finished" and "AP" not in self.scores:
            return "AP undefined" if self.scores else "not evaluated"
        return self.status


@dataclass(frozen=True)
class PointResult:
    """A point of a sweep with one seed, and what its run has measured."""

    name: str
    overrides: Mapping[str, Any]
    seed: int
    result: Result


@dataclass(frozen=True)
class SweepResult:
    """Manifest with its runs."""

    name: str
    file: str
    base: str  # config file that all points override
    points: tuple[PointResult, ...]  # the manifest's, then those with seeds of other sweeps
    overrides: Mapping[str, Any] = field(default_factory=dict)  # overrides of the base on the sweep's command line

    def seeds(self, name: str | None) -> list[PointResult]:
        """Returns the runs of the point `name`, by rising seed; none for a row of another system (None)."""
        return sorted((point for point in self.points if point.name == name), key=lambda point: point.seed)

    @property
    def names(self) -> list[str]:
        """Names of the points, in the manifest's order."""
        return list(dict.fromkeys(point.name for point in self.points))


def read_sweeps(workdir: Path) -> list[SweepResult]:
    """Returns all sweeps of `workdir`, sorted by name; ConfigError, with the file, if there is none or a file is invalid.

    Points of several sweeps with a run in common are the same experiment: each sweep gets the seeds of all of them.
    """
    if (workdir / "config.json").is_file():
        raise ConfigError(f"--workdir {workdir}: is the folder of a single run; give the folder of a sweep")
    files = sorted((workdir / "sweeps").glob("*.json"))
    if not files:
        raise ConfigError(f"--workdir {workdir}: no sweep there (sweeps/*.json), and no run (config.json)")
    log(f"reading the runs of {len(files)} {'sweep' if len(files) == 1 else 'sweeps'} in {workdir} ...")
    known: dict[str, Result] = {}
    sweeps = [_read_sweep(file, workdir, known) for file in files]
    # A folder's name covers all that decides the outcome, with the seed: points with a folder in common have the same
    # settings, so all their folders are seeds of one experiment.
    runs = {point.result.folder: point for sweep in sweeps for point in sweep.points}
    experiment: dict[Path, set[Path]] = {}
    for sweep in sweeps:
        for name in sweep.names:
            folders = {point.result.folder for point in sweep.seeds(name)}
            joined = folders.union(*(experiment.get(folder, set()) for folder in folders))
            experiment.update(dict.fromkeys(joined, joined))

    def with_all_seeds(sweep: SweepResult) -> SweepResult:
        points = list(sweep.points)
        for name in sweep.names:
            own = sweep.seeds(name)
            by_seed = {runs[folder].seed: runs[folder] for folder in sorted(experiment[own[0].result.folder])}
            for seed in sorted(by_seed.keys() - {point.seed for point in own}):
                points.append(replace(by_seed[seed], name=name, overrides=own[0].overrides))
        return replace(sweep, points=tuple(points))

    return [with_all_seeds(sweep) for sweep in sweeps]


def _read_sweep(file: Path, workdir: Path, known: dict[str, Result]) -> SweepResult:
    manifest = read_manifest(file)
    if manifest["sweep"] != file.stem:
        raise ConfigError(f"{file}: sweep is {manifest['sweep']!r}; must be the name of the file, {file.stem!r}")
    points = []
    for place, point in enumerate(manifest["points"]):
        folder = point["folder"]
        if folder in ("", "..") or folder != Path(folder).name:
            raise ConfigError(f"{file}: points[{place}].folder: {folder!r} must be the name of a folder in {workdir}")
        if folder not in known:
            known[folder] = read_result(workdir / folder)
        points.append(PointResult(point["name"], point["overrides"], point["seed"], known[folder]))
    return SweepResult(file.stem, manifest["file"], manifest["base"], tuple(points), manifest["overrides"])


def read_result(folder: Path) -> Result:
    """Returns the result of the run in `folder`, which may not exist."""
    if not (folder / "config.json").is_file():
        return Result(folder, "not run")
    record = read_record(folder)
    saved, summary = record.saved, record.summary or {}
    seconds = summary.get("seconds")
    details = {
        "command": " ".join(map(str, saved.get("command") or ())),
        "commit": saved.get("commit"),
        "devices": (saved.get("versions") or {}).get("devices"),
        **(saved.get("facts") or {}),
        "seconds": f"{seconds:.0f}" if isinstance(seconds, int | float) else seconds,
        "parameters_sha256": summary.get("parameters_sha256"),
    }
    result = Result(
        folder,
        "unfinished",
        step=record.step,
        config=record.config,
        details={key: str(value) for key, value in details.items() if value},
        ap=[(float(n), 100 * scores["AP"]) for n, scores in record.evaluations.items() if scores["AP"] is not None],
        loss=[
            (float(w["step"]), w["classification_loss"])
            for w in record.windows
            if isinstance(w.get("classification_loss"), int | float)
        ],
        latency=read_latency(folder),
    )
    end = ended(folder, record.config)
    if end is None:
        return result
    if end.kind == "diverged":
        return replace(result, status="diverged", step=end.step, message=end.message)
    evaluation = summary["evaluation"] or {}
    fractions = {name: evaluation[name] for name in SUMMARY if evaluation.get(name) is not None}
    if invalid := [name for name, value in fractions.items() if not is_score(value)]:
        raise ConfigError(f"{folder / 'summary.json'}: evaluation.{invalid[0]}: must be a number from 0 to 1, or null")
    scores = {name: 100 * value for name, value in fractions.items()}
    return replace(result, status="finished", scores=scores, test_dev=read_test_dev(folder))


def read_latency(folder: Path) -> dict[str, Any] | None:
    """Returns RUN/latency.json, or None if it does not exist."""
    file = folder / "latency.json"
    if not file.is_file():
        return None
    latency = read_json(file)
    if not isinstance(latency.get("milliseconds"), int | float) or not isinstance(latency.get("hardware"), str):
        raise ConfigError(f"{file}: must have milliseconds, a number, and hardware, a text; delete it to measure again")
    return latency


def started(points: Sequence[PointResult]) -> list[PointResult]:
    """Returns the seeds that have started."""
    return [p for p in points if p.result.status != "not run"]


def divergence(points: Sequence[PointResult]) -> str:
    """Returns "1 of 3 seeds diverged", of those that have started, or "" if none diverged."""
    diverged = sum(p.result.status == "diverged" for p in points)
    return f"{diverged} of {len(started(points))} seeds diverged" if diverged else ""


def splits_of(sweep: SweepResult) -> str:
    """Returns what the runs were evaluated on; val if none has started."""
    return ", ".join(dict.fromkeys(split_of(p.result.config) for p in sweep.points if p.result.config)) or "val"


def split_of(config: Config) -> str:
    """Returns val of scenes, the name of the annotation file, or the TFDS name and split."""
    if config.data.source == "scenes":
        return "val of scenes"
    if config.data.source == "tfds":
        return f"{config.data.tfds_name} {config.data.tfds_val_split}"
    return Path(config.data.val_annotations).stem or "val"


class Mean(NamedTuple):
    """Mean over the finished seeds of a point, percent."""

    value: float
    deviation: float | None  # sample standard deviation; None for a single seed

    def __str__(self) -> str:
        return f"{self.value:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


class Side(NamedTuple):
    """Scores of the paper and ours on one split; only scores on the same split are subtracted."""

    split: str  # split of the paper's scores: minival or test-dev
    ours: str  # data that our scores were evaluated on
    paper: Mapping[tuple[str, ...], Mapping[str, float]]  # the paper's scores, percent, by the settings of the row
    means: Mapping[str | None, Mapping[str, Mean]]  # our scores by point and metric
    from_runs: bool  # our scores are the runs' own evaluations; False: results of COCO's server

    def of(self, row: Row, metric: str) -> tuple[float | None, Mean | None]:
        """Returns the paper's score of `row` and ours."""
        return self.paper.get(row.settings, {}).get(metric), self.means.get(row.name, {}).get(metric)

    def best_of_paper(self, rows: Sequence[Row], metric: str) -> float | None:
        """Returns the paper's highest score; None if there is none or a derived score is higher."""
        scored = [(value, row.derived) for row in rows if (value := self.of(row, metric)[0]) is not None]
        best, derived = max(scored, default=(None, False))
        return None if derived else best


def sides_of(sweep: SweepResult, paper: Table | None, metrics: Sequence[str]) -> list[Side]:
    """Returns minival for a table on it and for a user's own sweep; test-dev and minival for a table on test-dev."""

    def means(name: str, kind: Literal["scores", "test_dev"]) -> dict[str, Mean]:
        runs = [getattr(point.result, kind) for point in sweep.seeds(name)]
        values = {m: [scores[m] for scores in runs if m in scores] for m in metrics}
        return {m: Mean(fmean(v), stdev(v) if len(v) > 1 else None) for m, v in values.items() if v}

    printed = {row.settings: row.scores for row in paper.rows} if paper else {}
    own = Side("minival", splits_of(sweep), printed, {n: means(n, "scores") for n in sweep.names}, from_runs=True)
    if paper is None or paper.split == "minival":
        return [own]
    server = {name: means(name, "test_dev") for name in sweep.names}
    on_minival = {row.settings: row.minival for row in paper.rows}
    return [Side(paper.split, paper.split, printed, server, from_runs=False), own._replace(paper=on_minival)]
