"""Test-time augmentation: an image asked at several sizes and mirrored, its answers merged.

Merged as in detectron2's GeneralizedRCNNWithTTA: each version is detected for itself, with its own suppression and its own
max_detections; the boxes are mapped back to pixels of the original image and put together; those of a class suppress one
another at detection.nms_iou, and the best detection.max_detections remain. Scores are neither averaged nor counted.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jaxtyping import Float, Int

from retina_jax.config import Config, DataConfig, DetectionConfig
from retina_jax.data.pipeline import Batch
from retina_jax.nms import nms

_nms = jax.jit(nms, static_argnames=("iou_threshold", "max_detections"))


def sizes(config: Config) -> tuple[DataConfig, ...]:
    """`config.data` at each size that an image is asked at: its own, then those of detection.tta_short_sides, none twice.

    The long side grows in proportion, so that an image of any shape grows by the same factor. Each size has canvases of its
    own, and as many programs are compiled as they have; a mirrored image takes those of the plain one.
    """
    data = config.data
    others = dict.fromkeys(side for side in config.detection.tta_short_sides if side != data.short_side)
    longs = {side: max(side, round(data.long_side * side / data.short_side)) for side in others}
    return data, *(dataclasses.replace(data, short_side=s, long_side=longs[s], jitter_short_sides=()) for s in others)


def versions(config: Config) -> int:
    """Times that an image is asked; 1 without augmentation."""
    return len(sizes(config)) * (1 + config.detection.tta_flip)


def mirrored(batch: Batch) -> Batch:
    """Each image mirrored left to right where it is, at the upper left of its canvas. For detection: boxes stay."""
    images = batch.images.copy()
    for row, (height, width) in enumerate(batch.image_sizes):
        images[row, :height, :width] = batch.images[row, :height, width - 1 :: -1]
    return batch._replace(images=images)


def merge(
    boxes_xyxy: Float[np.ndarray, "N 4"],
    scores: Float[np.ndarray, " N"],
    labels: Int[np.ndarray, " N"],
    config: DetectionConfig,
    most: int,
) -> Int[np.ndarray, " M"]:
    """Which of the detections of all versions remain, best first: M <= config.max_detections.

    `most` is the largest N there can be: arrays are padded to it, so that one program serves all images.
    """
    room = most - len(scores)
    kept, real = _nms(
        np.pad(boxes_xyxy.astype(np.float32), ((0, room), (0, 0))),
        np.pad(scores.astype(np.float32), (0, room), constant_values=-np.inf),
        np.pad(labels.astype(np.int32), (0, room)),
        iou_threshold=config.nms_iou,
        max_detections=config.max_detections,
    )
    return np.asarray(kept)[np.asarray(real)]
