"""What the converters share: renaming, BatchNorms, and the config that a network's tensors imply."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retina_jax.config import AnchorConfig
from retina_jax.errors import WeightsError, shortened
from retina_jax.model.layers import EPSILON, largest_divisor
from retina_jax.model.resnet import ARCHITECTURES

ANCHORS_PER_CELL = len(AnchorConfig().scales) * len(AnchorConfig().ratios)

Rule = tuple[str, Callable[[re.Match[str]], str] | None]
"""A regular expression for names, and a function from its match to this package's path; None: the array is left out."""
CONV = {"weight": "kernel", "bias": "bias"}
NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
LEAF = r"(?P<leaf>weight|bias)"
STATISTIC = r"(?P<leaf>weight|bias|running_mean|running_var)"
MOST_NAMES = 10  # largest number of names per kind in an error; the others are counted


@dataclass(frozen=True)
class Converted:
    """A detector or a backbone with this package's names."""

    weights: dict[str, np.ndarray]
    """Path without its collection ("backbone/stem/conv/kernel") to array; kernels are HWIO."""
    changes: dict[str, Any]  # dotted config fields that the weights need, relative to the defaults
    class_names: tuple[str, ...]  # one per column of the class head; empty for a backbone
    category_ids: tuple[int, ...]  # COCO category id of each class


def renamed(weights: Mapping[str, np.ndarray], rules: Sequence[Rule], source: str) -> dict[str, np.ndarray]:
    """Renames the arrays by the first rule whose expression matches the full name; kernels OIHW become HWIO. Raises
    WeightsError for names that no rule matches, and for several that get the same path."""
    paths: dict[str, np.ndarray] = {}
    unknown, duplicate = [], []
    for name, array in sorted(weights.items()):
        matches = ((re.fullmatch(pattern, name), path_of) for pattern, path_of in rules)
        match, path_of = next(((match, path_of) for match, path_of in matches if match), (None, None))
        if match is None:
            unknown.append(name)
        elif path_of is not None:
            path = path_of(match)
            if path in paths:
                duplicate.append(name)
            paths[path] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    if unknown or duplicate:
        raise WeightsError(f"{source}: {report({'of unknown name': unknown, 'duplicate': duplicate})}")
    return paths


def report(problems: Mapping[str, Sequence[str]]) -> str:
    """Returns "2 missing: a, b; 1 duplicate: c" for the names of each problem, at most MOST_NAMES of each."""
    parts = []
    for problem, names in problems.items():
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        if names:
            parts.append(f"{len(names)} {problem}: {', '.join(map(shortened, names[:MOST_NAMES]))}{more}")
    return "; ".join(parts)


def with_epsilon(weights: Mapping[str, np.ndarray], eps: float) -> dict[str, np.ndarray]:
    """Adapts BatchNorms with epsilon `eps` to a network whose norms have EPSILON (1e-5).

    scale' = scale sqrt((var + 1e-5) / (var + eps)) in float64, so that scale' / sqrt(var + 1e-5) is the source's gain.
    Raises WeightsError if var + eps is not positive.
    """
    made = dict(weights)
    for path, var in weights.items():
        if not path.endswith("/var") or eps == EPSILON:
            continue
        if not (var + eps > 0).all():
            raise WeightsError(f"{path}: a variance of 0 or less has no finite gain with epsilon {eps:g}")
        scale = path.removesuffix("var") + "scale"
        if scale in weights:
            exact = var.astype(np.float64)
            made[scale] = (weights[scale] * np.sqrt((exact + EPSILON) / (exact + eps))).astype(np.float32)
    return made


def with_statistics(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds statistics to backbone norms that are an affine (scale x + bias): mean 0, variance 1 - EPSILON."""
    made = dict(weights)
    for path, scale in weights.items():
        norm = path.removesuffix("scale")
        if re.fullmatch("backbone/.*/scale", path) and norm + "mean" not in weights and norm + "var" not in weights:
            made |= {norm + "mean": np.zeros_like(scale), norm + "var": np.full_like(scale, 1 - EPSILON)}
    return made


def architecture(weights: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
    """Returns the fields `model.*` implied by the names and shapes of converted `weights`. Raises WeightsError if there is
    no stem, or a detector lacks a stage, its FPN, or heads with nine anchors per cell."""
    if "backbone/stem/conv/kernel" not in weights:
        raise WeightsError(f"{source}: has no stem convolution; give a complete backbone or detector")
    blocks = tuple(_count(weights, rf"backbone/c{stage}/(block\d+)/.*") for stage in range(2, 6))
    if min(blocks) == 0 and is_detector(weights):
        raise WeightsError(f"{source}: has {blocks} blocks in C2 to C5; every stage must have at least one")
    bottleneck = "backbone/c2/block1/conv3/kernel" in weights
    width = weights["backbone/stem/conv/kernel"].shape[-1]
    second = weights.get("backbone/c2/block1/conv2/kernel")
    of_group, inner = (width, width) if second is None else second.shape[2:]
    # The backbone with these blocks; if there is none, the smallest of its kind with `stage_blocks` set.
    alike = [
        name
        for name, a in ARCHITECTURES.items()
        if (a.bottleneck, a.inner * width) == (bottleneck, inner)
        and largest_divisor(inner, a.groups) == inner // max(of_group, 1)
    ]
    if not alike:
        found = f"3x3 convolutions of {inner} channels in groups of {of_group} after a stem of {width}"
        raise WeightsError(f"{source}: {found}, as no backbone here has; there are {', '.join(ARCHITECTURES)}")
    name = next((name for name in alike if ARCHITECTURES[name].blocks == blocks), alike[0])
    made: dict[str, Any] = {
        "model.backbone": name,
        "model.base_width": width,
        "model.stage_blocks": () if ARCHITECTURES[name].blocks == blocks else blocks,
    }
    if not is_detector(weights):
        return made
    boxes = _shape(weights, "box_head/output/bias", source)[0]
    if boxes != 4 * ANCHORS_PER_CELL:
        raise WeightsError(f"{source}: its box head has {boxes} outputs per cell; expected {4 * ANCHORS_PER_CELL}")
    laterals = [level for level in range(2, 6) if f"fpn/lateral{level}/kernel" in weights]
    if not laterals:
        raise WeightsError(f"{source}: has no lateral convolutions of an FPN")
    channels = _shape(weights, "fpn/lateral5/kernel", source)[-1]
    outputs = [level for level in range(2, 9) if f"fpn/output{level}/kernel" in weights]
    from_p5 = 6 in outputs and weights["fpn/output6/kernel"].shape[2] == channels
    return made | {
        "model.min_level": laterals[0],
        "model.max_level": max(outputs, default=5),
        "model.p6_from": "p5" if from_p5 else "c5",
        "model.fpn_channels": channels,
        "model.head_convs": _count(weights, r"class_head/(conv\d+)/kernel"),
        "model.head_channels": _shape(weights, "class_head/output/kernel", source)[2],
        "model.head_norm": "group" if "class_head/norm1/scale" in weights else "none",
    }


def is_detector(weights: Mapping[str, np.ndarray]) -> bool:
    """Returns whether converted `weights` have heads."""
    return any(path.startswith(("class_head/", "box_head/")) for path in weights)


def class_count(weights: Mapping[str, np.ndarray], source: str) -> int:
    """Returns the number of columns of the class head. Raises WeightsError without nine anchors per cell."""
    outputs, cell = _shape(weights, "class_head/output/bias", source)[0], ANCHORS_PER_CELL
    if outputs % cell:
        raise WeightsError(f"{source}: its class head has {outputs} outputs per cell; expected a multiple of {cell}")
    return outputs // cell


def _count(weights: Mapping[str, np.ndarray], pattern: str) -> int:
    return len({match[1] for path in weights if (match := re.fullmatch(pattern, path))})


def _shape(weights: Mapping[str, np.ndarray], path: str, source: str) -> tuple[int, ...]:
    if path not in weights:
        raise WeightsError(f"{source}: 1 missing: {path}")
    return weights[path].shape
