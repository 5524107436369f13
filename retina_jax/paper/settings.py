"""The settings of the paper's tables as overrides of any base config: `configs/sweeps/*.py` are written in these words.

What the paper states of RetinaNet-50-600 is taken relative to the base, so that the same sweep runs at full size on
`configs/paper_ablations.py` and as a miniature on a base of small images: 400 pixels are 400/600 of the base's short side,
ResNet-101 is the deeper one of the base's backbone.
"""

from __future__ import annotations

from typing import Any

from retina_jax.config import Config, ConfigError

Overrides = dict[str, Any]

DEEPER = {"resnet50": "resnet101", "resnet18": "resnet34"}
"""What stands for ResNet-101 where the base has what stands for ResNet-50."""
OTHER_NAMES = {"resnet50": "R-50", "resnet101": "R-101", "resnext101_32x8d": "X-101-32x8d"}
"""What Detectron's files call the backbones."""
PAPER_SHORT_SIDE = 600
"""Pixels that `data.short_side` of the base stands for."""
JITTER = (640, 672, 704, 736, 768, 800)
"""Short sides of Table 2's scale jitter. The paper does not give its own: these are detectron2's."""


def deeper(base: Config) -> Overrides:
    """ResNet-101 for a base of ResNet-50, ResNet-34 for one of ResNet-18.

    Where `model.stage_blocks` is given, C4 gets 23/6 as many blocks, which is what tells ResNet-101 from ResNet-50.
    Raises ConfigError where the base's backbone has no deeper one, or where its weights lie in a file that does not carry
    the backbone's name, so that the deeper one's cannot be found by replacing it.
    """
    backbone = DEEPER.get(base.model.backbone)
    if backbone is None:
        raise ConfigError(
            f"model.backbone: {base.model.backbone} of the base has no deeper one; take a base with {' or '.join(DEEPER)}"
        )
    changes: Overrides = {"model.backbone": backbone, **_weights(base, backbone)}
    if base.model.stage_blocks:
        c2, c3, c4, c5 = base.model.stage_blocks
        changes["model.stage_blocks"] = (c2, c3, round(c4 * 23 / 6), c5)
    return changes


def resnext(base: Config) -> Overrides:
    """ResNeXt-101-32x8d, its stride in the 3x3 (Detectron), at the depth of `deeper`.

    For a base of ResNet-18 it has ResNet-34's blocks, 3 4 6 3.
    """
    backbone = "resnext101_32x8d"
    blocks = deeper(base).get("model.stage_blocks", (3, 4, 6, 3) if base.model.backbone == "resnet18" else ())
    changes: Overrides = {"model.backbone": backbone, "model.stride_position": "3x3", **_weights(base, backbone)}
    return {**changes, "model.stage_blocks": blocks} if blocks else changes


def at_scale(base: Config, short_side: int) -> Overrides:
    """The paper's image scale of `short_side` pixels: both sides of the base, and its jitter, times short_side / 600.

    600 is the base itself; 800 on the paper's base is 800/1333. Halves are rounded to even.
    """
    changes: Overrides = {
        "data.short_side": _scaled(base.data.short_side, short_side),
        "data.long_side": _scaled(base.data.long_side, short_side),
    }
    if base.data.jitter_short_sides:
        changes["data.jitter_short_sides"] = tuple(_scaled(s, short_side) for s in base.data.jitter_short_sides)
    return changes


def jitter(base: Config) -> Overrides:
    """Scale jitter of Table 2: short sides drawn from JITTER, relative to the base."""
    return {"data.jitter_short_sides": tuple(_scaled(base.data.short_side, side) for side in JITTER)}


def longer(base: Config, factor: float | int) -> Overrides:
    """`factor` times the steps, with the schedule's boundaries; the warm-up stays as long as it is."""
    return {
        "training.steps": round(base.training.steps * factor),
        "optimizer.boundaries": tuple(round(step * factor) for step in base.optimizer.boundaries),
    }


def balanced_cross_entropy(alpha: float) -> Overrides:
    """Equation 3: Table 1a, and gamma 0 of Table 1b."""
    return {"loss.kind": "balanced_cross_entropy", "loss.alpha": alpha}


def focal(gamma: float, alpha: float) -> Overrides:
    """Equation 5; gamma 0 is balanced cross entropy and is written so, since the two are one run."""
    if gamma == 0:
        return balanced_cross_entropy(alpha)
    return {"loss.kind": "focal", "loss.gamma": gamma, "loss.alpha": alpha}


def focal_star(gamma: float, beta: float) -> Overrides:
    """Equation 8; "We used alpha = .25 in all experiments for simplicity" (Appendix A)."""
    return {"loss.kind": "focal_star", "loss.gamma": gamma, "loss.star_beta": beta, "loss.alpha": 0.25}


def _scaled(side: int, short_side: int) -> int:
    return round(side * short_side / PAPER_SHORT_SIDE)


def _weights(base: Config, backbone: str) -> Overrides:
    """The weights of `backbone` where the base starts from weights in a file of its own backbone."""
    weights, before = base.model.backbone_weights, base.model.backbone
    if weights in ("", "imagenet"):
        return {}
    folder, slash, file = weights.rpartition("/")
    for old, new in ((before, backbone), (OTHER_NAMES.get(before), OTHER_NAMES.get(backbone))):
        if old and new and old in file:
            return {"model.backbone_weights": folder + slash + file.replace(old, new)}
    raise ConfigError(
        f"model.backbone_weights: {weights} has no {before} in its name to replace by {backbone}, which this sweep trains "
        f"too; name the two files {before}... and {backbone}..., or give imagenet"
    )
