"""What a report says of runs in words: how far they came, on what, on which data, and why they are not the paper's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import load_config, override
from retina_jax.paper.results import Point, Result, Sweep
from retina_jax.sweeps.points import ROOT, load_sweep, outcome

PAPER_CONFIG = "paper_ablations.py"
"""Base of sweeps whose absolute values can stand beside the paper's."""
MOST_FIELDS = 4
"""Differing fields of a config that are listed; more are counted."""
HOW_TO_READ = (
    "Our figure of a row is the mean over its finished seeds, whose number is in the last column; ± is the sample standard "
    "deviation over them. A run that several tables need counts in each, with all its seeds. The best of a column is bold; "
    "a row with a diverged seed cannot be. ≈ marks what follows from the paper's text and is not printed there.",
    "“Δ AP, ours − paper” is a row's own difference to the paper on the same split (minival is val2017); runs of the "
    "paper's config have it for the other scores too, in brackets. “Δ AP to a row, paper / ours” is how far a row lies from "
    "that one: in the paper's figures, then in ours, "
    "there the mean over the seeds that both rows have (their number is given where a row has more).",
    "Loss curves show how a run trains. Their heights do not compare: with another α, γ or kind of loss the same mistakes "
    "weigh another amount.",
)
"""Explains all tables."""


def signed(difference: float | None) -> str:
    """+1.5, −0.3, 0.0; empty for None."""
    if difference is None:
        return ""
    text = f"{difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def status(result: Result) -> str:
    """A run in a few words: finished, not run, running or stopped at a step, diverged at a step."""
    if result.status == "diverged":
        return "diverged" if result.step is None else f"diverged at step {result.step}"
    if result.status == "unfinished":
        of = f" of {result.config.training.steps}" if result.config else ""
        return f"running or stopped at step {result.step or 0}{of}"
    if result.status == "finished" and "AP" not in result.scores:
        return "AP undefined" if result.scores else "not evaluated"
    return result.status


def begun(points: Sequence[Point]) -> list[Point]:
    """Those seeds of a point that ran, however far."""
    return [p for p in points if p.result.status != "not run"]


def divergence(points: Sequence[Point]) -> str:
    """ "1 of 3 seeds diverged", of those that ran; empty where none did."""
    diverged = sum(p.result.status == "diverged" for p in points)
    return f"{diverged} of {len(begun(points))} seeds diverged" if diverged else ""


def state_of(points: Sequence[Point]) -> str:
    """What stands in the place of an AP where no seed gave one."""
    ran = begun(points)
    if len(ran) <= 1:
        return status(ran[0].result) if ran else "not run"
    others = dict.fromkeys(status(p.result) for p in ran if p.result.status != "diverged")
    return "; ".join(filter(None, [divergence(ran), *others]))


def seeds_of(points: Sequence[Point]) -> str:
    """How many seeds the mean is of, and what became of the others that ran."""
    ran = begun(points)
    bad = [p for p in ran if "AP" not in p.result.scores]
    if not bad:
        return str(len(ran)) if ran else ""
    told = ", ".join(f"seed {p.seed} {status(p.result)}" for p in bad) if len(ran) > 1 else ""
    return f"{len(ran) - len(bad)} of {len(ran)}" + (f": {told}" if told else "")


def changes_of(point: Point) -> str:
    """What the point overrides of the base."""
    return _list(point.overrides) or "none"


def base_of(sweep: Sweep) -> str:
    """The config file that all points override, and what was overridden of it."""
    return sweep.base + (f" with {_list(sweep.overrides)}" if sweep.overrides else "")


def _list(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in overrides.items())


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_value, value))})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _configs(sweep: Sweep) -> list[Config]:
    return [p.result.config for p in sweep.points if p.result.config is not None]


def departures(sweep: Sweep) -> list[str]:
    """What makes absolute values incomparable with the paper's; empty: nothing known of.

    Each run is held against what its row would be over the paper's base: every field that decides what a run ends in
    counts. Where none has begun, the manifest's base does.
    """
    paper = load_config(ROOT / "configs" / PAPER_CONFIG)
    file = ROOT / "configs" / "sweeps" / f"{sweep.name}.py"
    rows = load_sweep(file).get_sweep(paper) if file.is_file() else {}
    differing: dict[str, dict[Any, None]] = {}
    for point in sweep.points:
        if point.result.config is not None:
            row = _overridden(paper, rows.get(point.name, point.overrides), f"sweep {sweep.name}, point {point.name!r}")
            for name, value in _differences(point.result.config, row).items():
                differing.setdefault(name, {})[value] = None
    another = [] if Path(sweep.base).name == PAPER_CONFIG else [f"the base is {sweep.base}"]
    if _configs(sweep):
        told = _told(differing)
        return [*another, *told] if told else []
    base = _overridden(paper, sweep.overrides, f"sweep {sweep.name}")
    return another or _told({name: {value: None} for name, value in _differences(base, paper).items()})


def _overridden(config: Config, overrides: Mapping[str, Any], where: str) -> Config:
    try:
        return override(config, {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _differences(config: Config, paper: Config) -> dict[str, Any]:
    """Values of `config` for those fields of the outcome in which it is not `paper`, whatever the seed."""
    config, paper = (override(c, {"seed": 0, "model.num_classes": c.model.num_classes or 80}) for c in (config, paper))
    wanted = outcome(paper)
    return {name: value for name, value in outcome(config).items() if value != wanted[name]}


def _told(differing: Mapping[str, Mapping[Any, None]]) -> list[str]:
    """Fields and the values they have instead of the paper's; the telling ones in words and first."""
    left = {name: [_value(value) for value in values] for name, values in differing.items()}
    told = []
    if "data.source" in left:  # which files there are otherwise then says nothing more
        left = {name: values for name, values in left.items() if not name.endswith("_annotations")}
        source = left.pop("data.source")
        told.append("the data are generated scenes" if source == ["scenes"] else f"data.source {', '.join(source)}")
    left = {name: values for name, values in left.items() if not name.startswith("data.scenes.")}
    for name, what in (("model.num_classes", "classes"), ("training.steps", "steps")):
        if name in left:
            told.append(f"{', '.join(left.pop(name))} {what}")
    if "model.backbone_weights" in left:
        told.append(f"backbone from {', '.join(v or 'random weights' for v in left.pop('model.backbone_weights'))}")
    if len(left) > MOST_FIELDS:
        return [*told, f"{len(left)} {'other ' if told else ''}fields of the config"]
    return [*told, *(f"{name} {', '.join(values)}" for name, values in left.items())]


def origins(sweep: Sweep) -> list[str]:
    """Sentences on finished runs not all made of the same code or pretrained weights; empty: no difference known."""
    done = list({p.result.folder: p.result for p in sweep.points if p.result.status == "finished"}.values())
    commits = Counter(_short(run.details.get("commit", "")) or "no commit known" for run in done)
    weights: dict[tuple[str, str], Counter[str]] = {}
    for run in done:
        if run.config is not None and "backbone_sha256" in run.details:  # older runs do not tell
            model = run.config.model
            key = (model.backbone, Path(model.backbone_weights).name)
            weights.setdefault(key, Counter())[run.details["backbone_sha256"][:12]] += 1
    said = []
    if len(commits) > 1 or any("+" in commit for commit in commits):
        note = "; +changes is code that its commit does not have" if any("+" in commit for commit in commits) else ""
        said.append(f"Commits of the finished runs: {_counted(commits)}{note}.")
    for (backbone, file), sums in weights.items():
        if len(sums) > 1:
            said.append(f"The finished runs start from different weights of {backbone} ({file}): {_counted(sums)}.")
    return said


def _short(commit: str) -> str:
    """abc1234+changes."""
    sha, plus, changes = commit.partition("+")
    return sha[:7] + plus + changes


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({number} {'run' if number == 1 else 'runs'})" for name, number in counts.most_common())


def splits_of(sweep: Sweep) -> str:
    """What the runs were evaluated on; val where none has begun."""
    return ", ".join(dict.fromkeys(split_of(config) for config in _configs(sweep))) or "val"


def split_of(config: Config) -> str:
    """val of scenes, the name of the annotation file, or the TFDS name and split."""
    if config.data.source == "scenes":
        return "val of scenes"
    if config.data.source == "tfds":
        return f"{config.data.tfds_name} {config.data.tfds_val_split}"
    return Path(config.data.val_annotations).stem or "val"


def hardware_of(sweep: Sweep) -> str:
    """What the latencies were measured on."""
    return (
        ", ".join(dict.fromkeys(p.result.latency["hardware"] for p in sweep.points if p.result.latency))
        or "not measured"
    )
