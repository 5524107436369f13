"""Texts about runs in a report: their state, their data, and how they differ from the paper's runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import load_config, override
from retina_jax.paper.results import PointResult, Result, SweepResult
from retina_jax.sweeps.points import ROOT, load_sweep, outcome

PAPER_CONFIG = "paper_ablations.py"  # Base of sweeps whose absolute values are comparable with the paper's
MOST_FIELDS = 4  # Maximum number of differing config fields that are listed; more are counted


def signed(difference: float) -> str:
    """Returns +1.5, −0.3 or 0.0."""
    text = f"{difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def status(result: Result) -> str:
    """Describes the state of a run: finished, not run, running or interrupted at a step, diverged at a step."""
    if result.status == "diverged":
        return "diverged" if result.step is None else f"diverged at step {result.step}"
    if result.status == "unfinished":
        return f"running or interrupted at step {result.step} of {result.config.training.steps}"
    if result.status == "finished" and "AP" not in result.scores:
        return "AP undefined" if result.scores else "not evaluated"
    return result.status


def facts(point: PointResult) -> tuple[str, dict[str, str]]:
    """Returns the title of a run and what is known of it."""
    result = point.result
    facts = {"folder": str(result.folder), "overrides": overrides_text(point.overrides) or "none", **result.details}
    message = {"message": result.message} if result.message else {}
    return f"{point.name}, seed {point.seed}: {status(result)}", facts | message


def started(points: Sequence[PointResult]) -> list[PointResult]:
    """Returns the seeds that have started."""
    return [p for p in points if p.result.status != "not run"]


def divergence(points: Sequence[PointResult]) -> str:
    """Returns "1 of 3 seeds diverged", of those that have started, or "" if none diverged."""
    diverged = sum(p.result.status == "diverged" for p in points)
    return f"{diverged} of {len(started(points))} seeds diverged" if diverged else ""


def state_of(points: Sequence[PointResult]) -> str:
    """Describes the state of a row without an AP."""
    ran = started(points)
    if len(ran) <= 1:
        return status(ran[0].result) if ran else "not run"
    others = dict.fromkeys(status(p.result) for p in ran if p.result.status != "diverged")
    return "; ".join(filter(None, [divergence(ran), *others]))


def seeds_of(points: Sequence[PointResult]) -> str:
    """Returns the number of seeds in the mean, and the state of the others that have started."""
    ran = started(points)
    others = [p for p in ran if "AP" not in p.result.scores]
    if not others:
        return str(len(ran)) if ran else ""
    states = ", ".join(f"seed {p.seed} {status(p.result)}" for p in others) if len(ran) > 1 else ""
    return f"{len(ran) - len(others)} of {len(ran)}" + (f": {states}" if states else "")


def overrides_text(overrides: Mapping[str, Any]) -> str:
    """Returns "loss.gamma 2, loss.alpha 0.25"."""
    return ", ".join(f"{name} {_value(value)}" for name, value in overrides.items())


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_value, value))})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def departures(sweep: SweepResult) -> list[str]:
    """Returns the reasons why absolute values are not comparable with the paper's; empty: no reason known.

    Each run is compared with its row over the paper's base, in every field that affects the outcome. If no run has started,
    the manifest's base is compared.
    """
    paper = load_config(ROOT / "configs" / PAPER_CONFIG)
    file = ROOT / "configs" / "sweeps" / f"{sweep.name}.py"
    rows = load_sweep(file).get_sweep(paper) if file.is_file() else {}

    def overridden(overrides: Mapping[str, Any], where: str) -> Config:
        try:
            return override(paper, {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()})
        except ConfigError as error:
            raise ConfigError(f"sweep {sweep.name}{where}: {error}") from None

    other_base = [] if Path(sweep.base).name == PAPER_CONFIG else [f"the base is {sweep.base}"]
    if not sweep.configs:
        return other_base or _described([(overridden(sweep.overrides, ""), paper)])
    described = _described(
        (p.result.config, overridden(rows.get(p.name, p.overrides), f", point {p.name!r}"))
        for p in sweep.points
        if p.result.config is not None
    )
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


def origins(sweep: SweepResult) -> list[str]:
    """Returns a sentence if the finished runs are of different commits, and one if they started from different weights."""
    done = list({p.result.folder: p.result for p in sweep.points if p.result.status == "finished"}.values())
    # "abc1234...+changes" is shortened to "abc1234+changes".
    commits = Counter(re.sub(r"(?<=^\w{7})\w+", "", run.details.get("commit", "no commit known")) for run in done)
    weights: dict[str, Counter[str]] = {}
    for run in done:
        if "backbone_sha256" in run.details:  # older runs do not have it
            backbone = f"{run.config.model.backbone} ({Path(run.config.model.backbone_weights).name})"
            weights.setdefault(backbone, Counter())[run.details["backbone_sha256"][:12]] += 1

    def counted(counts: Counter[str]) -> str:
        return ", ".join(f"{name} ({n} {'run' if n == 1 else 'runs'})" for name, n in counts.most_common())

    changed = any("+" in commit for commit in commits)
    note = "; +changes means uncommitted changes" if changed else ""
    sentences = [f"Commits of the finished runs: {counted(commits)}{note}."] * (changed or len(commits) > 1)
    different = {backbone: sums for backbone, sums in weights.items() if len(sums) > 1}.items()
    return sentences + [
        f"The finished runs start from different weights of {b}: {counted(sums)}." for b, sums in different
    ]
