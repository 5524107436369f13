"""The paper's tables (Lin et al. 2017): every number, and their settings as overrides of any base config.

Scores are in percent, as printed (tables.txt), under the names of `configs/sweeps/`. Settings are relative to the base,
which stands for RetinaNet-50-600: 400 pixels are 400/600 of the base's short side, and ResNet-101 is the next deeper
backbone. The same sweep therefore runs at full size (`configs/paper_ablations.py`) and as a miniature (`configs/mini.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retina_jax.config import Config, ConfigError

Overrides = dict[str, Any]

DEEPER = {"resnet50": "resnet101", "resnet18": "resnet34"}  # the roles of ResNet-50 and ResNet-101
OTHER_NAMES = {"resnet50": "R-50", "resnet101": "R-101", "resnext101_32x8d": "X-101-32x8d"}  # in Detectron's files
PAPER_SHORT_SIDE = 600  # the paper's image scale that `data.short_side` of the base corresponds to
JITTER = (640, 672, 704, 736, 768, 800)  # detectron2's short sides of scale jitter; the paper states none
AP = ("AP", "AP50", "AP75")  # scores of the ablations


@dataclass(frozen=True)
class Row:
    """Row of a table."""

    name: str | None  # point of the sweep that trains it; None: another system
    settings: tuple[str, ...]  # as printed, one for each of the table's `columns`
    scores: dict[str, float] = field(default_factory=dict)  # percent; only those that the paper gives
    minival: dict[str, float] = field(default_factory=dict)  # for a table on test-dev: the paper's on minival
    milliseconds: float | None = None  # time per image on an Nvidia M40 (Table 1e)
    group: str = ""  # heading above the row
    note: str = ""  # what the paper says about the row besides its numbers
    derived: bool = False  # the scores follow from the text and are not printed in the paper


@dataclass(frozen=True)
class Table:
    """Table of the paper."""

    name: str  # name of its sweep
    title: str
    split: str  # minival (val2017), or test-dev, whose labels are not public
    reference: str  # point that the other rows are compared with
    reference_label: str  # name of the reference in a heading
    note: str  # remark about its rows, or empty
    columns: tuple[str, ...]  # headings of the rows' settings
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]


EFFECTIVE_AP = 33.5  # AP in percent above which Figure 7 calls a setting of FL* effective; it must also have converged

# Two models of Table 1e are also in ablations, on minival: the default of Table 1b and the focal loss of Table 1d.
_ON_MINIVAL = {
    "depth_50_scale_600": {"AP": 34.0, "AP50": 52.5, "AP75": 36.5},
    "depth_101_scale_600": {"AP": 36.0, "AP50": 54.9, "AP75": 38.7},
}


def _table(text: str) -> Table:
    """Reads a table in the format that tables.txt explains."""
    heading, reference, *lines = text.strip().splitlines()
    name, split, title = heading.removeprefix("# ").split(" | ")
    compared, label = reference.removeprefix("reference: ").split(" | ")
    note = lines.pop(0).removeprefix("note: ") if lines[0].startswith("note: ") else ""
    _, *columns, last = (part.strip() for part in lines[0].split("|"))
    metrics, rows, group = last.split(), [], ""
    for line in lines[1:]:
        if line.startswith("["):
            group = line.strip("[]")
            continue
        point, *settings, results = (part.strip() for part in line.split("|"))
        derived, numbers, remark = re.fullmatch(r"(≈?) ?((?:\d+\.?\d* ?)*)(.*)", results).groups()
        scores = dict(zip(metrics, map(float, numbers.split()), strict=bool(numbers)))
        time, minival = scores.pop("milliseconds", None), _ON_MINIVAL.get(point, {})
        named = None if point == "-" else point
        rows.append(Row(named, tuple(settings), scores, minival, time, group, remark, bool(derived)))
    shown = tuple(name for name in metrics if name != "milliseconds")
    return Table(name, title, split, compared, label, note, tuple(columns), shown, tuple(rows))


_, *_TABLES, _SYSTEMS = Path(__file__).with_name("tables.txt").read_text(encoding="utf-8").split("\n\n")
TABLES = {table.name: table for table in map(_table, _TABLES)}  # in the paper's order
# Figure 2's other systems: milliseconds per image, and AP on test-dev.
_CELLS = [line.split("|") for line in _SYSTEMS.splitlines()[2:]]
OTHER_SYSTEMS = {name.strip(): (float(time), float(ap)) for name, time, ap in _CELLS}


def deeper(base: Config) -> Overrides:
    """Returns ResNet-101 for a base with ResNet-50, ResNet-34 for one with ResNet-18.

    If `model.stage_blocks` is given, C4 gets 23/6 as many blocks, as in ResNet-101. Raises ConfigError if there is no deeper
    backbone, or if the name of the base's file of weights does not contain the backbone's.
    """
    backbone = DEEPER.get(base.model.backbone)
    if backbone is None:
        raise ConfigError(f"model.backbone: {base.model.backbone} has no deeper one; use {' or '.join(DEEPER)}")
    changes: Overrides = {"model.backbone": backbone, **_weights(base, backbone)}
    if base.model.stage_blocks:
        c2, c3, c4, c5 = base.model.stage_blocks
        changes["model.stage_blocks"] = (c2, c3, round(c4 * 23 / 6), c5)
    return changes


def resnext(base: Config) -> Overrides:
    """Returns ResNeXt-101-32x8d, stride in the 3x3 convolution (Detectron), with the blocks of `deeper` or ResNet-34's."""
    backbone = "resnext101_32x8d"
    blocks = deeper(base).get("model.stage_blocks", (3, 4, 6, 3) if base.model.backbone == "resnet18" else ())
    changes: Overrides = {"model.backbone": backbone, "model.stride_position": "3x3", **_weights(base, backbone)}
    return {**changes, "model.stage_blocks": blocks} if blocks else changes


def at_scale(base: Config, short_side: int) -> Overrides:
    """Returns both sides of the base and its jitter times short_side / 600 (the paper's scale), halves rounded to even."""
    sides = {f"data.{name}": _scaled(getattr(base.data, name), short_side) for name in ("short_side", "long_side")}
    jittered = tuple(_scaled(side, short_side) for side in base.data.jitter_short_sides)
    return sides | ({"data.jitter_short_sides": jittered} if jittered else {})


def jitter(base: Config) -> Overrides:
    """Returns the scale jitter of Table 2: short sides drawn from JITTER, relative to the base."""
    return {"data.jitter_short_sides": tuple(_scaled(base.data.short_side, side) for side in JITTER)}


def longer(base: Config, factor: float | int) -> Overrides:
    """Returns `factor` times the steps and the boundaries of the schedule, and the epochs if the base has them; the warm-up
    keeps its length."""
    changes: Overrides = {
        "training.steps": round(base.training.steps * factor),
        "optimizer.boundaries": tuple(round(step * factor) for step in base.optimizer.boundaries),
    }
    if epochs := base.training.epochs:
        changes["training.epochs"] = epochs * factor
    if boundaries := base.optimizer.boundary_epochs:
        changes["optimizer.boundary_epochs"] = tuple(boundary * factor for boundary in boundaries)
    return changes


def balanced_cross_entropy(alpha: float) -> Overrides:
    """Returns equation 3: Table 1a, and gamma 0 of Table 1b."""
    return {"loss.kind": "balanced_cross_entropy", "loss.alpha": alpha}


def focal(gamma: float, alpha: float) -> Overrides:
    """Returns equation 5; for gamma 0 balanced cross entropy, since the two are the same run."""
    if gamma == 0:
        return balanced_cross_entropy(alpha)
    return {"loss.kind": "focal", "loss.gamma": gamma, "loss.alpha": alpha}


def focal_star(gamma: float, beta: float) -> Overrides:
    """Returns equation 8; "We used alpha = .25 in all experiments for simplicity" (Appendix A)."""
    return {"loss.kind": "focal_star", "loss.gamma": gamma, "loss.star_beta": beta, "loss.alpha": 0.25}


def _scaled(side: int, short_side: int) -> int:
    return round(side * short_side / PAPER_SHORT_SIDE)


def _weights(base: Config, backbone: str) -> Overrides:
    """Returns the weights of `backbone`, if the base starts from a file of weights."""
    weights, before = base.model.backbone_weights, base.model.backbone
    if weights in ("", "imagenet"):
        return {}
    folder, slash, file = weights.rpartition("/")
    for old, new in ((before, backbone), (OTHER_NAMES.get(before), OTHER_NAMES.get(backbone))):
        if old and new and old in file:
            return {"model.backbone_weights": folder + slash + file.replace(old, new)}
    raise ConfigError(
        f"model.backbone_weights: {weights} has no {before} in its name, which this sweep replaces by {backbone}; name the "
        f"two files {before}... and {backbone}..., or give imagenet"
    )
