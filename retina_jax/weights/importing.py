"""From `KIND:FILE` to a config and variables: detectors trained by other systems, and backbones to start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retina_jax.config import Config, ConfigError, ModelConfig
from retina_jax.config_io import override
from retina_jax.errors import WeightsError
from retina_jax.model.initialisation import initialise
from retina_jax.model.retinanet import RetinaNet
from retina_jax.ops.anchors import anchors_per_cell
from retina_jax.weights.converted import Converted, is_detector
from retina_jax.weights.detectron import convert_detectron, convert_detectron2
from retina_jax.weights.filling import fill, report
from retina_jax.weights.named import IMAGENET, NAMED, fetch, find_weights
from retina_jax.weights.readers import read_weights
from retina_jax.weights.torchvision import convert_torchvision

KINDS = ("torchvision", "timm", "detectron2", "detectron")
"""Systems; timm's ResNets have torchvision's names."""


@dataclass(frozen=True)
class Imported:
    """A detector trained by another system, as this package runs it."""

    source: str
    """KIND:FILE."""
    config: Config
    """All fields that the weights need; `model.num_classes` is None, so that it can be trained on other classes."""
    variables: dict[str, Any]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    missing: tuple[str, ...]
    """Paths that were allowed to be missing from the file, with random values."""


def kind_of(source: str) -> str | None:
    """The KIND of `KIND:FILE`; None if `source` is a path."""
    kind, colon, _ = source.partition(":")
    return kind if colon and kind in KINDS else None


def convert(
    source: str, *, class_names: Sequence[str] = (), batchnorm_eps: float | None = None, folder: Path | None = None
) -> Converted:
    """Reads the weights of `KIND:FILE` or `KIND:NAME` (`named.NAMED`, downloaded once) under this package's names.

    Args:
      class_names: one per class; empty: COCO's if the number fits, else placeholders.
      batchnorm_eps: epsilon of the source's BatchNorms (torchvision only); None: 1e-5, or that of the published file.
      folder: cache for downloaded files; None: `named.CACHE`.
    """
    kind = kind_of(source)
    if kind is None:
        raise WeightsError(f"{source}: give KIND:FILE; KIND is one of {', '.join(KINDS)}")
    path, eps = find_weights(kind, source.partition(":")[2], folder)
    state = read_weights(path)
    if kind in ("torchvision", "timm"):
        eps = eps if batchnorm_eps is None else batchnorm_eps
        return convert_torchvision(state, source=str(path), eps=eps, class_names=class_names)
    if batchnorm_eps is not None:
        raise WeightsError(f"{source}: batchnorm_eps applies to torchvision weights only")
    converter = convert_detectron2 if kind == "detectron2" else convert_detectron
    return converter(state, source=str(path), class_names=class_names)


def import_detector(
    source: str,
    *,
    class_names: Sequence[str] = (),
    batchnorm_eps: float | None = None,
    allow_missing: Sequence[str] = (),
    folder: Path | None = None,
) -> Imported:
    """Builds the detector of `KIND:FILE` or `KIND:NAME`; arguments as in `convert` and `filling.fill`.

    Raises WeightsError if the file contains only a backbone, or does not fit the network.
    """
    converted = convert(source, class_names=class_names, batchnorm_eps=batchnorm_eps, folder=folder)
    if not is_detector(converted.weights):
        how = "train a detector from it with --model.backbone-weights FILE"
        raise WeightsError(f"{source}: a backbone without heads; {how}")
    config = override(Config(), converted.changes)
    model = RetinaNet(config.model, len(converted.class_names), anchors_per_cell(config.anchors))
    template = initialise(model, config.seed)
    variables, missing = fill(template, converted.weights, source=source, allow_missing=allow_missing)
    return Imported(source, config, variables, converted.class_names, converted.category_ids, tuple(missing))


def with_backbone(
    variables: Mapping[str, Any], model: ModelConfig, allow_missing: Sequence[str] = (), folder: Path | None = None
) -> tuple[dict[str, Any], str]:
    """Replaces the backbone in `variables` by `model.backbone_weights`; also returns a log line that says so.

    Raises:
      ConfigError: the weights need another stride_position, input_normalisation or norm than `model` has.
      WeightsError: the file is not a backbone of this shape. Parts in `allow_missing` may be missing and stay random.
    """
    if model.backbone_weights == "imagenet":
        key = model.backbone, model.input_normalisation == "imagenet"
        if key not in IMAGENET:
            found = f"{model.input_normalisation}, for which no ImageNet weights of {model.backbone} are published"
            raise ConfigError(f"model.input_normalisation: {found}; use imagenet")
        kind, _ = IMAGENET[key]
        path, eps = fetch(NAMED[IMAGENET[key]], folder), NAMED[IMAGENET[key]].eps
    else:
        kind = kind_of(model.backbone_weights) or ""
        path, eps = find_weights(kind, model.backbone_weights.removeprefix(f"{kind}:"), folder)
    converted = convert_backbone(read_weights(path), source=str(path), eps=eps, kind=kind)
    weights = {name: array for name, array in converted.weights.items() if name.startswith("backbone/")}
    pixels, stride = (converted.changes[f"model.{name}"] for name in ("input_normalisation", "stride_position"))
    # The means of Detectron and detectron2 differ by less than one grey level, and both start from the same files.
    same_pixels = (model.input_normalisation == "imagenet") == (pixels == "imagenet")
    same_stride = model.stride_position == stride or "backbone/c2/block1/conv3/kernel" not in weights
    checks = (
        ("norm", model.norm in ("frozen", "batch"), "frozen or batch, as they contain BatchNorms"),
        ("input_normalisation", same_pixels, pixels),
        ("stride_position", same_stride, stride),
    )
    for field, agrees, needed in checks:
        if not agrees:
            raise ConfigError(f"model.{field}: {getattr(model, field)}, but the weights in {path} need {needed}")
    others = ("fpn", "class_head", "box_head")
    filled, missing = fill(variables, weights, source=str(path), allow_missing=(*others, *allow_missing))
    missing = [name for name in missing if name.partition("/")[0] not in others]
    random = "; " + report("missing and left random", missing) if missing else ""
    return filled, f"backbone: {len(weights)} arrays from {path}{random}"


def convert_backbone(state: Mapping[str, np.ndarray], *, source: str, eps: float = 1e-5, kind: str = "") -> Converted:
    """Converts a backbone, or that of a detector; without `kind`, its names decide which system it is from."""
    if kind == "detectron" or any(name in state for name in ("conv1_w", "res_conv1_bn_s")):
        return convert_detectron(state, source=source)
    if any(name.endswith("stem.conv1.weight") for name in state):
        return convert_detectron2(state, source=source)
    return convert_torchvision(state, source=source, eps=eps)
