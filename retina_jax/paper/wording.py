"""What a report says of runs in words: how far they came, on what, on which data, and why they are not the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retina_jax.config import Config
from retina_jax.config_files import FREE_TO_CHANGE
from retina_jax.paper.results import Point, Result, Sweep

PAPER_CONFIG = "paper_r50_600.py"
"""Base of sweeps whose absolute values can stand beside the paper's."""


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


def state_of(points: Sequence[Point]) -> str:
    """What stands in the place of an AP where no seed gave one."""
    return "; ".join(dict.fromkeys(status(p.result) for p in points)) or "not run"


def seeds_of(points: Sequence[Point]) -> str:
    """How many seeds the mean is of, and what became of the others."""
    good = [p for p in points if "AP" in p.result.scores]
    if len(good) == len(points):
        return str(len(good)) if good else ""
    bad = [p for p in points if p not in good]
    told = ", ".join(f"seed {p.seed} {status(p.result)}" for p in bad) if len(points) > 1 else ""
    return f"{len(good)} of {len(points)}" + (f": {told}" if told else "")


def changes_of(point: Point) -> str:
    """What the point overrides of the base."""
    return _list(point.overrides) or "none"


def base_of(sweep: Sweep) -> str:
    """The config file that all points override, and what was overridden of it."""
    return sweep.base + (f" with {_list(sweep.overrides)}" if sweep.overrides else "")


def _list(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in overrides.items())


def _configs(sweep: Sweep) -> list[Config]:
    return [p.result.config for p in sweep.points if p.result.config is not None]


def departures(sweep: Sweep) -> list[str]:
    """What makes absolute values incomparable with the paper's; empty: nothing known of."""
    found = [] if Path(sweep.base).name == PAPER_CONFIG else [f"the base is {sweep.base}"]
    changes = {k: v for k, v in sweep.overrides.items() if k not in (*FREE_TO_CHANGE, "model.backbone_weights")}
    if changes and not found:
        found.append(f"the base has {_list(changes)}")
    configs = _configs(sweep)
    if any(c.data.source == "scenes" for c in configs):
        found.append("the data are generated scenes")
    classes = {c.model.num_classes for c in configs} - {80, None}
    if classes:
        found.append(f"{', '.join(map(str, sorted(classes)))} classes")
    steps = min((c.training.steps for c in configs), default=90_000)
    return [*found, f"{steps} steps"] if steps < 90_000 else found


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
    return (
        ", ".join(dict.fromkeys(p.result.latency["hardware"] for p in sweep.points if p.result.latency))
        or "not measured"
    )
