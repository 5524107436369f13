"""Presets: config fields that make this project behave like another public RetinaNet.

    config = override(config, PRESETS["detectron2"])

All presets set the same fields, so that one can replace another. They hold the conventions and the optimizer; data, backbone
and number of classes stay as they are, and the length of the schedule is in `configs/*_r50_800.py`. Weights that come from
one of these systems select its preset (`retina_jax.weights`). docs/conventions.md lists the differences that remain.
"""

from collections.abc import Mapping
from typing import Any

from retina_jax.config import Config
from retina_jax.config_io import flatten

_SIDES = {"data.short_side": 800, "data.long_side": 1333, "data.buckets": 0}
_NEWER = {
    "matching.low_quality": "all",
    "loss.box": "l1",
    "optimizer.bias_learning_rate_factor": 1.0,
    "optimizer.decay_biases": True,
    "optimizer.warmup_steps": 1000,
    "optimizer.warmup_factor": 0.001,
}
_TORCHVISION_V1 = {
    **_SIDES,
    **_NEWER,
    "data.size_rounding": "floor",
    "data.pixels": "float32",
    "model.stride_position": "3x3",
    "model.p6_from": "p5",
    "model.input_normalisation": "imagenet",
    "anchors.style": "torchvision",
    "loss.normaliser": "per_image",
    "detection.max_detections": 300,
}
_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "detectron": {
        **_SIDES,
        "data.pad_multiple": 128,
        "data.pixels": "float32",
        "data.box_ends": "inclusive",
        "anchors.style": "detectron",
        "loss.normaliser": "per_device",
        "detection.threshold_coarsest": False,
    },
    "detectron2": {
        **_SIDES,
        **_NEWER,
        "data.jitter_short_sides": (640, 672, 704, 736, 768, 800),
        "data.resize": "pillow",
        "model.input_normalisation": "detectron2",
        "anchors.style": "detectron2",
        "loss.normaliser": "ema",
        "detection.clip": "after_nms",
    },
    "torchvision_v1": _TORCHVISION_V1,
    "torchvision_v2": {
        **_TORCHVISION_V1,
        "data.jitter_short_sides": (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        "model.p6_from": "c5",
        "model.norm": "batch",
        "model.head_norm": "group",
        "loss.box": "giou",
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 1e-4,
        "optimizer.weight_decay": 0.05,
    },
}

FIELDS = tuple(name for name in flatten(Config()) if any(name in preset for preset in _CHANGES.values()))
"""Dotted names of the fields that any preset sets."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    name: {field: (flatten(Config()) | dict(preset))[field] for field in FIELDS} for name, preset in _CHANGES.items()
}
"""Dotted config fields and values of each preset; `paper` has the defaults of `Config`."""
