"""Logits to detections (Section 4.1, Inference)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from retina_jax.config import DetectionConfig
from retina_jax.ops.boxes import clip, decode
from retina_jax.ops.nms import nms

PADDING = -1  # label of the empty rows of `Detections`


class Detections(NamedTuple):
    """Detected objects of each image, best first; the rows after the last one are padding."""

    boxes_xyxy: Float32[Array, "B D 4"]  # pixels of the padded image, inside the image; 0 on padding
    scores: Float32[Array, "B D"]  # probability of the class, above the threshold; 0 on padding
    labels: Int[Array, "B D"]  # class 0 to K - 1; PADDING (-1) on padding


def detect(
    logits: Float[Array, "B A K"],
    deltas: Float[Array, "B A 4"],
    anchors: Float[Array | np.ndarray, "A 4"],
    level_counts: tuple[int, ...],
    image_sizes: Int[Array, "B 2"],
    config: DetectionConfig,
) -> Detections:
    """Detects the objects of each image: at most D = config.max_detections.

    On each pyramid level: take the top_k best scores over all anchors and classes, drop those at or below score_threshold,
    decode the boxes and clip them to the image. Then merge the levels and suppress class by class (`nms`). An anchor can
    give several classes. Boxes that clipping leaves without area are kept. All computations are in float32.

    Without config.threshold_coarsest the coarsest level keeps every score above 0. With config.clip "after_nms" unclipped
    boxes are suppressed, then clipped, and those without area are dropped, so there may be fewer than D.

    level_counts are the anchors of each level; image_sizes is (height, width) of each image without its padding.
    """
    if (total := sum(level_counts)) != logits.shape[1]:
        raise ValueError(f"level_counts {level_counts} add up to {total}, but there are {logits.shape[1]} anchors")
    anchors = jnp.asarray(anchors)
    thresholds = [config.score_threshold] * len(level_counts)
    if not config.threshold_coarsest:
        thresholds[-1] = 0.0

    def of_image(logits: Float[Array, "A K"], deltas: Float[Array, "A 4"], size_hw: Int[Array, "2"]) -> tuple:
        found, start = [], 0  # per level
        for count, threshold in zip(level_counts, thresholds, strict=True):
            values, anchor, label = best_logits(logits[start : start + count], config.top_k)
            found.append((values, anchor + start, label, jnp.full(values.shape, threshold, jnp.float32)))
            start += count
        best, anchor, label, threshold = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
        scores = jax.nn.sigmoid(best.astype(jnp.float32))
        boxes_xyxy = decode(deltas[anchor].astype(jnp.float32), anchors[anchor])
        if config.clip == "before_nms":
            boxes_xyxy = clip(boxes_xyxy, size_hw)
        limits = {"iou_threshold": config.nms_iou, "max_detections": config.max_detections}
        kept, valid = nms(boxes_xyxy, jnp.where(scores > threshold, scores, -jnp.inf), label, **limits)
        if config.clip == "after_nms":
            boxes_xyxy = clip(boxes_xyxy, size_hw)
            valid = valid & (boxes_xyxy[kept, 2:] > boxes_xyxy[kept, :2]).all(axis=1)
            in_front = jnp.argsort(~valid, stable=True)
            kept, valid = kept[in_front], valid[in_front]
        return (
            jnp.where(valid[:, None], boxes_xyxy[kept], 0.0),
            jnp.where(valid, scores[kept], 0.0),
            jnp.where(valid, label[kept], PADDING),
        )

    return Detections(*jax.vmap(of_image)(logits, deltas, image_sizes))


def best_logits(
    logits: Float[Array, "A K"], top_k: int
) -> tuple[Float[Array, " k"], Int[Array, " k"], Int[Array, " k"]]:
    """Returns (logits, anchors, classes) of the k = min(top_k, A * K) largest logits of a level, largest first.

    Equals `lax.top_k` of the flattened logits, including the order of equal ones (by anchor, then class), without sorting
    all A * K: sort the A anchors by their best class, keep the first k anchors, and sort their k * K logits.

    Nothing is lost: the best logits of the k kept anchors come before every logit of another anchor. Kept anchors are sorted
    by index so that equal logits stay in order. Logits have the order of their scores, and differ where those saturate.
    """
    anchors, classes = logits.shape
    _, kept = lax.top_k(logits.max(axis=1), min(top_k, anchors))
    kept = jnp.sort(kept)
    values, place = lax.top_k(logits[kept].reshape(-1), min(top_k, kept.shape[0] * classes))
    return values, kept[place // classes], place % classes
