"""The values of a config against each other, before anything is done with them."""

from __future__ import annotations

import math
import re

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import flatten, typed


def validate(config: Config) -> Config:
    """`config`, its values of exactly their fields' types and checked against each other.

    The first that cannot be meant raises ConfigError.
    """
    config = typed(config, "config")
    d, m, a, o, t = config.data, config.model, config.anchors, config.optimizer, config.training
    checks: list[tuple[bool, str, str]] = [
        (d.batch_size >= 1, "data.batch_size", "at least 1"),
        (1 <= d.short_side <= d.long_side, "data.short_side", f"from 1 to data.long_side ({d.long_side})"),
        (
            all(1 <= s <= d.long_side for s in d.jitter_short_sides),
            "data.jitter_short_sides",
            "from 1 to data.long_side",
        ),
        (d.pad_multiple > 0 and d.pad_multiple % 32 == 0, "data.pad_multiple", "a positive multiple of 32"),
        (d.resize != "pillow" or d.pixels == "uint8", "data.pixels", "uint8 with data.resize pillow"),
        (d.max_boxes >= 1, "data.max_boxes", "at least 1"),
        (d.workers >= 0, "data.workers", "at least 0"),
        (d.prefetch >= 1, "data.prefetch", "at least 1"),
        (2 <= d.scenes.classes <= 12, "data.scenes.classes", "from 2 to 12"),
        (d.scenes.train_images >= 1, "data.scenes.train_images", "at least 1"),
        (32 <= d.scenes.size <= 4096, "data.scenes.size", "from 32 to 4096"),
        (
            4 <= d.scenes.min_side <= d.scenes.max_side <= 0.75 * d.scenes.size,
            "data.scenes.min_side",
            "4 <= min_side <= max_side <= .75 size",
        ),
        (m.base_width >= 1, "model.base_width", "at least 1"),
        (
            not m.stage_blocks or (len(m.stage_blocks) == 4 and min(m.stage_blocks) >= 1),
            "model.stage_blocks",
            "four numbers, each at least 1",
        ),
        (m.num_classes is None or m.num_classes >= 1, "model.num_classes", "at least 1"),
        (m.norm_groups >= 1, "model.norm_groups", "at least 1"),
        (0 <= m.frozen_stages <= 5, "model.frozen_stages", "from 0 to 5"),
        (2 <= m.min_level <= 5, "model.min_level", "from 2 to 5"),
        (5 <= m.max_level <= 8, "model.max_level", "from 5 to 8"),
        (m.fpn_channels >= 1, "model.fpn_channels", "at least 1"),
        (m.head_convs >= 0, "model.head_convs", "at least 0"),
        (m.head_std > 0, "model.head_std", "above 0"),
        (0 < m.prior < 1, "model.prior", "between 0 and 1"),
        (a.size_factor > 0, "anchors.size_factor", "above 0"),
        (bool(a.scales) and min(a.scales) > 0, "anchors.scales", "at least one, all above 0"),
        (bool(a.ratios) and min(a.ratios) > 0, "anchors.ratios", "at least one, all above 0"),
        (
            0 < config.matching.negative_iou <= config.matching.positive_iou <= 1,
            "matching.positive_iou",
            "0 < negative_iou <= positive_iou <= 1",
        ),
        (0 <= config.loss.alpha <= 1, "loss.alpha", "from 0 to 1"),
        (config.loss.gamma >= 0, "loss.gamma", "at least 0"),
        (config.loss.gamma > 0 or config.loss.kind != "focal_star", "loss.gamma", "above 0 with loss.kind focal_star"),
        (0 < config.loss.hinge_margin <= 1, "loss.hinge_margin", "above 0, at most 1"),
        (
            config.loss.mining_batch >= (4 if config.loss.mining.startswith("ohem_1_3") else 1),
            "loss.mining_batch",
            "at least 1, and 4 with loss.mining ohem_1_3",
        ),
        (
            config.loss.mining == "none"
            or config.loss.mining_normaliser == "assigned"
            or config.loss.normaliser in ("per_image", "per_device"),
            "loss.mining_normaliser",
            f"assigned, since loss.normaliser {config.loss.normaliser} divides both losses by one number (per_image and "
            "per_device do not)",
        ),
        (0 < config.loss.mining_nms_iou <= 1, "loss.mining_nms_iou", "above 0, at most 1"),
        (config.loss.beta >= 0, "loss.beta", "at least 0"),
        (config.loss.box_weight >= 0, "loss.box_weight", "at least 0"),
        (o.learning_rate >= 0, "optimizer.learning_rate", "at least 0"),
        (0 <= o.momentum < 1, "optimizer.momentum", "from 0 up to, not including, 1"),
        (o.weight_decay >= 0, "optimizer.weight_decay", "at least 0"),
        (o.warmup_steps >= 0, "optimizer.warmup_steps", "at least 0"),
        (0 <= o.warmup_factor <= 1, "optimizer.warmup_factor", "from 0 to 1"),
        (
            list(o.boundaries) == sorted(set(o.boundaries)) and all(b > 0 for b in o.boundaries),
            "optimizer.boundaries",
            "rising and positive",
        ),
        (o.clip_norm >= 0, "optimizer.clip_norm", "at least 0"),
        (0 <= o.ema_decay < 1, "optimizer.ema_decay", "from 0 up to, not including, 1"),
        (config.detection.top_k >= 1, "detection.top_k", "at least 1"),
        (config.detection.max_detections >= 1, "detection.max_detections", "at least 1"),
        (0 <= config.detection.score_threshold < 1, "detection.score_threshold", "from 0 up to, not including, 1"),
        (0 < config.detection.nms_iou <= 1, "detection.nms_iou", "above 0, at most 1"),
        (all(s >= 1 for s in config.detection.tta_short_sides), "detection.tta_short_sides", "at least 1"),
        (config.devices >= 0, "devices", "at least 0"),
        (0 <= config.seed < 2**63, "seed", "from 0 to 2^63 - 1"),
        (o.decay_factor > 0, "optimizer.decay_factor", "above 0"),
        (o.bias_learning_rate_factor >= 0, "optimizer.bias_learning_rate_factor", "at least 0"),
        (m.head_channels >= 1, "model.head_channels", "at least 1"),
        (d.scenes.val_images >= 1, "data.scenes.val_images", "at least 1"),
        (t.eval_batch_size >= 0, "training.eval_batch_size", "at least 0"),
        (t.pictures >= 0, "training.pictures", "at least 0"),
        (t.steps >= 0, "training.steps", "at least 0"),
        (t.log_every >= 1, "training.log_every", "at least 1"),
        (t.eval_every >= -1, "training.eval_every", "at least -1"),
        (t.checkpoint_every >= 1, "training.checkpoint_every", "at least 1"),
        (t.keep_checkpoints >= 1, "training.keep_checkpoints", "at least 1"),
        (t.eval_images >= 0, "training.eval_images", "at least 0"),
        (t.accumulate >= 1, "training.accumulate", "at least 1"),
        (t.skip_non_finite >= 0, "training.skip_non_finite", "at least 0"),
    ]
    for holds, name, right in checks:
        if not holds:
            raise ConfigError(f"{name}: {flatten(config)[name]} cannot be; it must be {right}")
    parse_window(t.profile_steps)
    for name, value in flatten(config).items():
        if any(
            isinstance(v, float) and not math.isfinite(v) for v in (value if isinstance(value, tuple) else (value,))
        ):
            raise ConfigError(f"{name}: {value} is not a finite number")
    return config


def parse_window(text: str) -> tuple[int, int] | None:
    """`training.profile_steps` as its first and its last step, both included and counted from 1; None where it is empty.

    "10:10" is the one step 10. Raises ConfigError for anything but FIRST:LAST with 1 <= FIRST <= LAST.
    """
    if not text:
        return None
    match = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(
            f"training.profile_steps: {text!r} cannot be; it must be FIRST:LAST, both steps included, "
            "1 <= FIRST <= LAST, as in 10:15"
        )
    return first, last
