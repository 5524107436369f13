"""Turns `KIND:FILE` into a config and variables: detectors trained by other systems, and backbones to start from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from retina_jax.config import Config, ConfigError, ModelConfig
from retina_jax.config_io import override
from retina_jax.errors import WeightsError, shortened
from retina_jax.model.initialisation import initialise, variable_shapes
from retina_jax.model.retinanet import RetinaNet
from retina_jax.ops.anchors import anchors_per_cell
from retina_jax.weights.converted import Converted, is_detector, report
from retina_jax.weights.detectron import convert_detectron, convert_detectron2
from retina_jax.weights.named import IMAGENET, NAMED, fetch, find_weights
from retina_jax.weights.readers import read_weights
from retina_jax.weights.torchvision import convert_torchvision

KINDS = ("torchvision", "timm", "detectron2", "detectron")  # timm's ResNets have torchvision's names


@dataclass(frozen=True)
class Imported:
    """A detector trained by another system, or in a run of this one, as this package runs it."""

    source: str  # KIND:FILE, or the folder of a run
    config: Config
    """All fields that the weights need; `model.num_classes` is None, so that it can be trained on other classes."""
    variables: dict[str, Any]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    missing: tuple[str, ...]  # paths that were allowed to be missing from the file, with random values


def kind_of(source: str) -> str | None:
    """Returns the KIND of `KIND:FILE`; None if `source` is a path."""
    kind, colon, _ = source.partition(":")
    return kind if colon and kind in KINDS else None


def convert(source: str, *, class_names: Sequence[str] = (), batchnorm_eps: float | None = None) -> Converted:
    """Reads the weights of `KIND:FILE` or `KIND:NAME` (`named.NAMED`, downloaded once) under this package's names.

    Without `class_names`, one per class, they are COCO's if the number fits, else placeholders. `batchnorm_eps` is the
    epsilon of the source's BatchNorms (torchvision only); None: 1e-5, or that of the published file.
    """
    kind = kind_of(source)
    if kind is None:
        known = f"KIND:FILE (KIND is {', '.join(KINDS[:-1])} or {KINDS[-1]}), or the folder of a run"
        raise WeightsError(f"{shortened(source)}: give {known}")
    path, eps = find_weights(kind, source.partition(":")[2], detector=True)
    state = read_weights(path)
    if kind in ("torchvision", "timm"):
        eps = eps if batchnorm_eps is None else batchnorm_eps
        return convert_torchvision(state, source=str(path), eps=eps, class_names=class_names)
    if batchnorm_eps is not None:
        raise WeightsError(f"{source}: batchnorm_eps applies to torchvision weights only")
    convert_state = convert_detectron2 if kind == "detectron2" else convert_detectron
    return convert_state(state, source=str(path), class_names=class_names)


def import_detector(
    source: str,
    *,
    class_names: Sequence[str] = (),
    batchnorm_eps: float | None = None,
    allow_missing: Sequence[str] = (),
) -> Imported:
    """Builds the detector of `KIND:FILE` or `KIND:NAME`; arguments and errors as in `convert` and `fill`."""
    converted = convert(source, class_names=class_names, batchnorm_eps=batchnorm_eps)
    if not is_detector(converted.weights):
        how = "train a detector from it with --model.backbone-weights FILE"
        raise WeightsError(f"{source}: a backbone without heads; {how}")
    config = override(Config(), converted.changes)
    model = RetinaNet(config.model, len(converted.class_names), anchors_per_cell(config.anchors))
    # The file decides the shapes: they are compared before memory is taken for them.
    variables, missing = fill(variable_shapes(model), converted.weights, source=source, allow_missing=allow_missing)
    if missing:
        variables, _ = fill(
            initialise(model, config.seed), converted.weights, source=source, allow_missing=allow_missing
        )
    return Imported(source, config, variables, converted.class_names, converted.category_ids, tuple(missing))


def with_backbone(
    variables: Mapping[str, Any], model: ModelConfig, allow_missing: Sequence[str] = ()
) -> tuple[dict[str, Any], str]:
    """Replaces the backbone in `variables` by `model.backbone_weights`; also returns a log line about it.

    Parts in `allow_missing` may be missing and stay random. Raises ConfigError if the weights need another stride_position,
    input_normalisation or norm than `model` has, and WeightsError if they are not a backbone of this shape.
    """
    if model.backbone_weights == "imagenet":
        key = model.backbone, model.input_normalisation == "imagenet"
        if model.backbone not in {backbone for backbone, _ in IMAGENET}:
            found = f"imagenet, but no ImageNet weights of {model.backbone} are published"
            raise ConfigError(f"model.backbone_weights: {found}; give a file, or leave it empty for random weights")
        if key not in IMAGENET:
            found = f"{model.input_normalisation}, for which no ImageNet weights of {model.backbone} are published"
            raise ConfigError(f"model.input_normalisation: {found}; use imagenet")
        kind, name = IMAGENET[key]
        path, eps = fetch(NAMED[kind, name]), NAMED[kind, name].eps
    else:
        kind = kind_of(model.backbone_weights) or ""
        path, eps = find_weights(kind, model.backbone_weights.removeprefix(f"{kind}:"))
    converted = convert_backbone(read_weights(path), source=str(path), eps=eps, kind=kind)
    weights = {name: array for name, array in converted.weights.items() if name.startswith("backbone/")}
    pixels, stride = (converted.changes[f"model.{name}"] for name in ("input_normalisation", "stride_position"))
    # The means of Detectron and detectron2 differ by less than one grey level, and both start from the same files.
    same_pixels = (model.input_normalisation == "imagenet") == (pixels == "imagenet")
    same_stride = model.stride_position == stride or "backbone/c2/block1/conv3/kernel" not in weights
    checks = (
        ("norm", model.norm != "group", "frozen, frozen_statistics or batch, as they contain BatchNorms"),
        ("input_normalisation", same_pixels, pixels),
        ("stride_position", same_stride, stride),
    )
    for field, agrees, needed in checks:
        if not agrees:
            raise ConfigError(f"model.{field}: {getattr(model, field)}, but the weights in {path} need {needed}")
    others = ("fpn", "class_head", "box_head")
    filled, missing = fill(variables, weights, source=str(path), allow_missing=(*others, *allow_missing))
    missing = [name for name in missing if name.partition("/")[0] not in others]
    random = "; " + report({"missing and left random": missing}) if missing else ""
    return filled, f"backbone: {len(weights)} arrays from {path}{random}"


def convert_backbone(state: Mapping[str, np.ndarray], *, source: str, eps: float = 1e-5, kind: str = "") -> Converted:
    """Converts a backbone, or that of a detector; without `kind`, its names decide which system it is from."""
    if kind == "detectron" or any(name in state for name in ("conv1_w", "res_conv1_bn_s")):
        return convert_detectron(state, source=source)
    if any(name.endswith("stem.conv1.weight") for name in state):
        return convert_detectron2(state, source=source)
    return convert_torchvision(state, source=source, eps=eps)


def fill(
    template: Mapping[str, Any], weights: Mapping[str, np.ndarray], *, source: str, allow_missing: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Replaces every leaf of a network's variables by its weight.

    `template` is {"params": ..., "frozen": ..., "stats": ...}, of arrays or their shapes. `weights` maps a path
    without its collection ("backbone/stem/conv/kernel") to an array of floats, kernels HWIO; errors call them `source`.
    `allow_missing` are parts that may keep the template's value: paths or their first complete components ("backbone/c4").

    Returns variables of the template's structure and dtypes, and the sorted paths of the leaves that kept their value.
    Raises WeightsError, one line that names up to ten of each: missing leaves, weights without a leaf, different shapes,
    weights that are not floats, or an allowed part without a leaf.
    """
    flat = {collection: flatten_dict(tree, sep="/") for collection, tree in template.items()}
    leaves = {path: leaf for tree in flat.values() for path, leaf in tree.items()}
    absent = sorted(leaves.keys() - weights.keys())
    kept = [path for path in absent if any(is_within(path, part) for part in allow_missing)]
    differing = []
    for path in sorted(leaves.keys() & weights.keys()):
        leaf, weight = leaves[path], weights[path]
        if weight.shape != leaf.shape:
            differing.append(f"{path} is {weight.shape}, expected {leaf.shape}")
        elif not np.issubdtype(weight.dtype, np.floating):
            differing.append(f"{path} is {weight.dtype}, expected {leaf.dtype}")
    unknown = [part for part in allow_missing if not any(is_within(path, part) for path in leaves)]
    problems = {
        "missing": sorted(set(absent) - set(kept)),
        "surplus": sorted(weights.keys() - leaves.keys()),
        "of another shape or dtype": differing,
        "allowed to be missing, but not part of the network": unknown,
    }
    if any(problems.values()):
        hint = " (--allow-missing PREFIX keeps random values)" if problems["missing"] else ""
        raise WeightsError(f"{source}: {report(problems)}{hint}")
    for tree in flat.values():
        tree.update({path: np.ascontiguousarray(weights[path], tree[path].dtype) for path in tree if path in weights})
    return {collection: unflatten_dict(tree, sep="/") for collection, tree in flat.items()}, kept


def is_within(path: str, part: str) -> bool:
    """Returns whether `part` is the path or its first components; a trailing slash makes no difference."""
    return f"{path}/".startswith(f"{part.rstrip('/')}/")
