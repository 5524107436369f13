"""What every converter makes of a foreign weight file: arrays under this project's names, and the config they need."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retina_jax.config import AnchorConfig
from retina_jax.data.classes import COCO_CATEGORIES
from retina_jax.errors import WeightsError
from retina_jax.model.layers import EPSILON
from retina_jax.model.resnet import ARCHITECTURES
from retina_jax.presets import PRESETS
from retina_jax.weights.filling import report

ANCHORS_PER_CELL = len(AnchorConfig().scales) * len(AnchorConfig().ratios)

Rule = tuple[str, Callable[[re.Match[str]], str] | None]
"""A pattern of foreign names, and the path that each becomes; None for what a detector has no use for."""


@dataclass(frozen=True)
class Converted:
    """A detector, or a backbone alone, from elsewhere."""

    weights: dict[str, np.ndarray]
    """Path without its collection ("backbone/stem/conv/kernel") to array, kernels HWIO."""
    changes: dict[str, Any]
    """Dotted config fields that these weights need, over the defaults."""
    class_names: tuple[str, ...]
    """Name of each column of the class head; none for a backbone."""
    category_ids: tuple[int, ...]
    """COCO category id of each class."""


def renamed(weights: Mapping[str, np.ndarray], rules: Sequence[Rule], source: str) -> dict[str, np.ndarray]:
    """`weights` under the paths that `rules` give, kernels OIHW -> HWIO; the first pattern that is the whole name decides.

    Raises:
      WeightsError: a name that no rule knows, or two that become one path; one line that lists them.
    """
    paths: dict[str, np.ndarray] = {}
    unknown, twice = [], []
    for name, array in weights.items():
        match, path_of = next(
            ((match, path_of) for pattern, path_of in rules if (match := re.fullmatch(pattern, name))), (None, None)
        )
        if match is None:
            unknown.append(name)
        elif path_of is not None:
            path = path_of(match)
            if path in paths:
                twice.append(name)
            paths[path] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    problems = {"of unknown name": sorted(unknown), "that come twice": sorted(twice)}
    if any(problems.values()):
        raise WeightsError(f"{source}: " + "; ".join(report(kind, names) for kind, names in problems.items() if names))
    return paths


def with_epsilon(weights: Mapping[str, np.ndarray], eps: float) -> dict[str, np.ndarray]:
    """`weights` of BatchNorms that add `eps` to their variances, for a network whose norms add EPSILON (1e-5).

    The scale takes the difference: scale' = scale sqrt((var + 1e-5) / (var + eps)), worked out in float64, so that
    scale' / sqrt(var + 1e-5) is the source's gain to float32's rounding, however small the variance. Where eps is 1e-5
    nothing changes. A variance of 0 with eps 0 has no gain: WeightsError.
    """
    made = dict(weights)
    for path, var in weights.items():
        if not path.endswith("/var") or eps == EPSILON:
            continue
        if not (var + eps > 0).all():
            raise WeightsError(f"{path}: has a variance of 0 or less, which with epsilon {eps:g} gives no finite gain")
        scale = path.removesuffix("var") + "scale"
        if scale in weights:
            exact = var.astype(np.float64)
            made[scale] = (weights[scale] * np.sqrt((exact + EPSILON) / (exact + eps))).astype(np.float32)
    return made


def architecture(weights: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
    """The fields `model.*` that the names and shapes of converted `weights` tell.

    Raises:
      WeightsError: there is no stem, or a detector lacks a stage, its pyramid, or heads of nine anchors a cell.
    """
    if "backbone/stem/conv/kernel" not in weights:
        raise WeightsError(f"{source}: has no stem convolution; give a whole backbone or detector")
    blocks = tuple(_count(weights, rf"backbone/c{stage}/block(\d+)/.*") for stage in range(2, 6))
    if min(blocks) == 0 and is_detector(weights):
        raise WeightsError(f"{source}: has {blocks} blocks in C2 to C5; every stage must have one at least")
    bottleneck = "backbone/c2/block1/conv3/kernel" in weights
    second = weights.get("backbone/c2/block1/conv2/kernel", np.zeros((3, 3, 1, 1)))
    grouped = bottleneck and second.shape[2] != second.shape[3]
    # The backbone whose blocks these are, else the smallest of its kind with the blocks written out.
    kin = [
        name for name, a in ARCHITECTURES.items() if a.bottleneck == bottleneck and (a.groups > 1) == grouped
    ]  # fmt: skip
    name = next((name for name in kin if ARCHITECTURES[name].blocks == blocks), kin[0])
    made: dict[str, Any] = {
        "model.backbone": name,
        "model.base_width": weights["backbone/stem/conv/kernel"].shape[-1],
        "model.stage_blocks": () if ARCHITECTURES[name].blocks == blocks else blocks,
    }
    if not is_detector(weights):
        return made
    boxes = _sides(weights, "box_head/output/bias", source)[0]
    if boxes != 4 * ANCHORS_PER_CELL:
        raise WeightsError(f"{source}: its box head has {boxes} outputs a cell, {4 * ANCHORS_PER_CELL} are meant")
    laterals = [level for level in range(2, 6) if f"fpn/lateral{level}/kernel" in weights]
    if not laterals:
        raise WeightsError(f"{source}: has no lateral convolutions of a pyramid")
    pyramid = _sides(weights, "fpn/lateral5/kernel", source)[-1]
    outputs = [level for level in range(2, 9) if f"fpn/output{level}/kernel" in weights]
    from_p5 = 6 in outputs and weights["fpn/output6/kernel"].shape[2] == pyramid
    return made | {
        "model.min_level": laterals[0],
        "model.max_level": max(outputs, default=5),
        "model.p6_from": "p5" if from_p5 else "c5",
        "model.fpn_channels": pyramid,
        "model.head_convs": _count(weights, r"class_head/conv(\d+)/kernel"),
        "model.head_channels": _sides(weights, "class_head/output/kernel", source)[2],
        "model.head_norm": "group" if "class_head/norm1/scale" in weights else "none",
    }


def detector_changes(preset: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a detector of a system needs: its preset without the jitter of its training, and what was `found`."""
    return {**PRESETS[preset], "data.jitter_short_sides": (), **found}


def is_detector(weights: Mapping[str, np.ndarray]) -> bool:
    """Whether there are heads, and not a backbone alone."""
    return any(path.startswith(("class_head/", "box_head/")) for path in weights)


def class_count(weights: Mapping[str, np.ndarray], source: str) -> int:
    """Columns of the class head; WeightsError where its outputs are not those of nine anchors a cell."""
    outputs = _sides(weights, "class_head/output/bias", source)[0]
    if outputs % ANCHORS_PER_CELL:
        raise WeightsError(f"{source}: its class head has {outputs} outputs a cell, no multiple of {ANCHORS_PER_CELL}")
    return outputs // ANCHORS_PER_CELL


def contiguous_classes(count: int, given: Sequence[str], source: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and category ids of `count` classes: those given, COCO's where there are 80, else "class 1" and so on."""
    if given and len(given) != count:
        raise WeightsError(f"{source}: has {count} classes, but {len(given)} class names are given")
    if given:
        return tuple(given), tuple(range(1, count + 1))
    if count == len(COCO_CATEGORIES):
        return tuple(name for _, name in COCO_CATEGORIES), tuple(number for number, _ in COCO_CATEGORIES)
    return tuple(f"class {k + 1}" for k in range(count)), tuple(range(1, count + 1))


def with_statistics(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`weights` whose backbone norms that are a plain affine, scale x + bias, get a mean of 0 and the variance that the
    epsilon makes 1."""
    made = dict(weights)
    for path, scale in weights.items():
        if path.startswith("backbone/") and path.endswith("/scale"):
            norm = path.removesuffix("scale")
            if norm + "mean" not in weights and norm + "var" not in weights:
                made[norm + "mean"] = np.zeros_like(scale)
                made[norm + "var"] = np.full_like(scale, 1 - EPSILON)
    return made


def _count(weights: Mapping[str, np.ndarray], pattern: str) -> int:
    return max((int(match[1]) for path in weights if (match := re.fullmatch(pattern, path))), default=0)


def _sides(weights: Mapping[str, np.ndarray], path: str, source: str) -> tuple[int, ...]:
    if path not in weights:
        raise WeightsError(f"{source}: 1 missing: {path}")
    return weights[path].shape
