"""What became of a sweep: the manifests in DIR/sweeps/ and the folders of the runs they name, read and nothing more.

Nothing more: no lock is touched, so that whether a run that has begun is still running is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import from_dict
from retina_jax.evaluation.coco_scores import SUMMARY
from retina_jax.runs.record import read_json, read_test_dev
from retina_jax.sweeps.manifest import read_manifest

Status = Literal["finished", "diverged", "unfinished", "not run"]


@dataclass(frozen=True)
class Result:
    """A run as far as it came."""

    folder: Path
    status: Status
    scores: dict[str, float] = field(default_factory=dict)
    """Percent, of the last evaluation of a finished run; a score that is undefined is absent."""
    step: int | None = None
    """Last step in metrics.jsonl; of a diverged run, where it did. None: unknown."""
    message: str = ""
    """Why it diverged."""
    config: Config | None = None
    """None: there is no config.json yet."""
    details: dict[str, str] = field(default_factory=dict)
    """Command, commit, devices, facts of the start, seconds, parameters_sha256, as far as they are there."""
    ap: list[tuple[float, float]] = field(default_factory=list)
    """AP in percent at each evaluation, by step."""
    loss: list[tuple[float, float]] = field(default_factory=list)
    """Classification loss of each window of metrics, by step."""
    test_dev: dict[str, float] = field(default_factory=dict)
    """Percent, as COCO's server scored the run on test-dev (`retina_jax.runs.record`); empty: not given."""
    latency: dict[str, Any] | None = None
    """What `figures.py --figure 2` measured: milliseconds, hardware."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    overrides: Mapping[str, Any]
    seed: int
    result: Result


@dataclass(frozen=True)
class Sweep:
    """A manifest with its runs."""

    name: str
    file: str
    base: str
    """Config file that all points override."""
    points: tuple[Point, ...]
    """The manifest's, then those with seeds that other sweeps have run."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Of the base itself, given on the sweep's command line."""

    def seeds(self, name: str) -> list[Point]:
        """The runs of the point called `name`: one a seed, by rising seed."""
        return sorted((point for point in self.points if point.name == name), key=lambda point: point.seed)

    @property
    def names(self) -> tuple[str, ...]:
        """Its points, each once, in the manifest's order."""
        return tuple(dict.fromkeys(point.name for point in self.points))


def read_sweeps(workdir: Path) -> list[Sweep]:
    """All sweeps of `workdir`, by name; a run that several of them name is read once.

    Points of several sweeps that share a run are one point: each sweep has the seeds of all of them.

    Raises ConfigError, one line that names the file, where there is no sweep or a file cannot be what it should.
    """
    if (workdir / "config.json").is_file():
        raise ConfigError(f"--workdir {workdir}: is the folder of a single run; give the folder of a sweep")
    files = sorted((workdir / "sweeps").glob("*.json"))
    if not files:
        raise ConfigError(
            f"--workdir {workdir}: no sweep there ({workdir / 'sweeps'}/*.json); run scripts/sweep.py first"
        )
    known: dict[str, Result] = {}
    return _pooled([_read_sweep(file, workdir, known) for file in files])


def _pooled(sweeps: Sequence[Sweep]) -> list[Sweep]:
    """The sweeps, each point with those seeds that only other sweeps have run it with.

    A folder is named by all that decides the outcome, its seed included: points with one folder in common have the same
    settings, hence all their folders are seeds of one experiment.
    """
    runs = {point.result.folder: point for sweep in sweeps for point in sweep.points}
    equal: dict[Path, set[Path]] = {}
    for sweep in sweeps:
        for name in sweep.names:
            folders = {point.result.folder for point in sweep.seeds(name)}
            together = folders.union(*(equal.get(folder, set()) for folder in folders))
            equal.update(dict.fromkeys(together, together))
    pooled = []
    for sweep in sweeps:
        points = list(sweep.points)
        for name in sweep.names:
            own = sweep.seeds(name)
            by_seed = {runs[folder].seed: runs[folder] for folder in sorted(equal[own[0].result.folder])}
            for seed in sorted(by_seed.keys() - {point.seed for point in own}):
                points.append(replace(by_seed[seed], name=name, overrides=own[0].overrides))
        pooled.append(replace(sweep, points=tuple(points)))
    return pooled


def _read_sweep(file: Path, workdir: Path, known: dict[str, Result]) -> Sweep:
    manifest = read_manifest(file)
    points = []
    for place, point in enumerate(manifest["points"]):
        name, folder = (_field(point, key, str, file, f"points[{place}].") for key in ("name", "folder"))
        if folder in ("", "..") or folder != Path(folder).name:
            raise ConfigError(f"{file}: points[{place}].folder {folder!r} must be the name of a folder in {workdir}")
        if folder not in known:
            known[folder] = read_result(workdir / folder)
        overrides = _field(point, "overrides", dict, file, f"points[{place}].")
        points.append(Point(name, overrides, _field(point, "seed", int, file, f"points[{place}]."), known[folder]))
    name, source, base = (_field(manifest, key, str, file) for key in ("sweep", "file", "base"))
    if name != file.stem:
        raise ConfigError(f"{file}: sweep is {name!r}; it must be the file's own name, {file.stem!r}")
    return Sweep(name, source, base, tuple(points), _field(manifest, "overrides", dict, file))


def read_result(folder: Path) -> Result:
    """The run in `folder`, which may be absent."""
    if not (folder / "config.json").is_file() and not (folder / "metrics.jsonl").is_file():
        if (folder / "diverged.json").is_file():
            return Result(folder, "diverged", **_divergence(folder))
        return Result(folder, "not run")
    config, details = _read_config(folder / "config.json")
    ap, loss, last_step = _read_metrics(folder / "metrics.jsonl")
    common = {"folder": folder, "config": config, "details": details, "ap": ap, "loss": loss}
    if (folder / "latency.json").is_file():
        latency = read_json(folder / "latency.json")
        for key, kind in (("milliseconds", float), ("hardware", str)):
            _field(latency, key, kind, folder / "latency.json")
        common["latency"] = latency
    summary_file = folder / "summary.json"
    if summary_file.is_file():
        summary = read_json(summary_file)
        details["seconds"] = f"{_field(summary, 'seconds', float, summary_file):.0f}"
        details["parameters_sha256"] = _field(summary, "parameters_sha256", str, summary_file)
        scores = _scores(summary, summary_file)
        if config is None or _is_end(summary, config, summary_file):
            test_dev = read_test_dev(folder)
            return Result(status="finished", scores=scores, test_dev=test_dev, step=last_step, **common)
    if (folder / "diverged.json").is_file():
        return Result(status="diverged", **_divergence(folder), **common)
    return Result(status="unfinished", step=last_step, **common)


def _is_end(summary: dict[str, Any], config: Config, file: Path) -> bool:
    """As `sweeps.state` has it: not where the run is resumed for other steps, or its evaluation is still to come."""
    scored = summary.get("evaluation") is not None or config.training.eval_every < 0
    return scored and _field(summary, "steps", int, file) == config.training.steps


def _divergence(folder: Path) -> dict[str, Any]:
    file = folder / "diverged.json"
    told = read_json(file)
    step = told.get("step")
    if step is not None and not _is(step, int):
        raise ConfigError(f"{file}: step {step!r} must be a whole number or null")
    return {"step": step, "message": str(told.get("message", ""))}


def _scores(summary: dict[str, Any], file: Path) -> dict[str, float]:
    evaluation = summary.get("evaluation")
    if evaluation is None:
        return {}
    if not isinstance(evaluation, dict):
        raise ConfigError(f"{file}: evaluation must be an object of scores or null")
    given = {
        name: _field(evaluation, name, float, file, "evaluation.")
        for name in SUMMARY
        if evaluation.get(name) is not None
    }
    return {name: 100 * value for name, value in given.items()}


def _read_config(file: Path) -> tuple[Config | None, dict[str, str]]:
    if not file.is_file():
        return None, {}
    saved = read_json(file)
    command, versions, facts = saved.get("command"), saved.get("versions"), saved.get("facts")
    details = {
        "command": " ".join(map(str, command)) if isinstance(command, list) else None,
        "commit": saved.get("commit"),
        "devices": versions.get("devices") if isinstance(versions, dict) else None,
        **(facts if isinstance(facts, dict) else {}),
    }
    return from_dict(saved.get("config"), str(file)), {key: str(value) for key, value in details.items() if value}


def _read_metrics(file: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]], int | None]:
    """AP in percent by step, classification loss by step, last step."""
    if not file.is_file():
        return [], [], None
    ap, loss, last = [], [], None
    lines = file.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            last = int(values["step"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            if number == len(lines):
                break  # a run that is being written, or was killed, may end in half a line
            raise ConfigError(f"{file}, line {number}: cannot be read: {type(error).__name__}: {error}") from None
        if values.get("event") == "evaluation" and _is(values.get("AP"), float):
            ap.append((float(last), 100.0 * values["AP"]))
        elif _is(values.get("classification_loss"), float):
            loss.append((float(last), float(values["classification_loss"])))
    return ap, loss, last


def _is(value: Any, kind: type) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float) if kind is float else kind)


def _field(values: Mapping[str, Any], key: str, kind: type, file: Path, where: str = "") -> Any:
    if key not in values:
        raise ConfigError(f"{file}: {where}{key} is missing")
    if not _is(values[key], kind):
        raise ConfigError(f"{file}: {where}{key}: {values[key]!r} is not a {kind.__name__}")
    return values[key]
