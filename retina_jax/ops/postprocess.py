"""Logits to detections (Section 4.1, Inference)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from retina_jax.config import DetectionConfig
from retina_jax.cpu import platform
from retina_jax.ops.boxes import clip, decode
from retina_jax.ops.nms import nms

PADDING = -1  # label of the empty rows of `Detections`


class Detections(NamedTuple):
    """Detected objects of each image, best first; the rows after the last one are padding."""

    boxes_xyxy: Float32[Array, "B D 4"]  # pixels of the padded image, inside the image; 0 on padding
    scores: Float32[Array, "B D"]  # probability of the class, above the threshold; 0 on padding
    labels: Int[Array, "B D"]  # class 0 to K - 1; PADDING (-1) on padding


def detect(
    logits: Sequence[Float[Array, "B _ K"]],
    deltas: Sequence[Float[Array, "B _ 4"]],
    anchors: Float[Array | np.ndarray, "A 4"],
    image_sizes: Int[Array, "B 2"],
    config: DetectionConfig,
    *,
    anchors_per_cell: int = 1,
) -> Detections:
    """Detects the objects of each image: at most D = config.max_detections.

    On each pyramid level: take the top_k best scores over all anchors and classes, drop those at or below score_threshold,
    decode the boxes and clip them to the image. Then merge the levels and suppress class by class (`nms`), or all classes
    together with config.class_agnostic_nms. An anchor can give several classes. Boxes that clipping leaves without area are
    kept. All computations are in float32.

    Without config.threshold_coarsest the coarsest level keeps every score above 0. With config.clip "after_nms" unclipped
    boxes are suppressed, then clipped, and those without area are dropped, so there may be fewer than D.

    logits and deltas are those of each level, finest first; the anchors of all levels follow each other. image_sizes is
    (height, width) of each image without its padding. anchors_per_cell divides the anchors of each level; it changes the
    speed only.
    """
    ends = np.cumsum([part.shape[1] for part in logits])
    if ends[-1] != len(anchors):
        raise ValueError(f"the levels have {ends[-1]} logits per class, but there are {len(anchors)} anchors")
    thresholds = [config.score_threshold] * len(logits)
    if not config.threshold_coarsest:
        thresholds[-1] = 0.0
    of_levels = jnp.split(jnp.asarray(anchors), ends[:-1])

    def of_image(logits: tuple[Array, ...], deltas: tuple[Array, ...], size_hw: Int[Array, "2"]) -> tuple:
        found = []  # per level
        for level, anchors, of_anchors, threshold in zip(logits, of_levels, deltas, thresholds, strict=True):
            values, anchor, label = best_logits(level, config.top_k, anchors_per_cell)
            boxes_xyxy = decode(of_anchors[anchor].astype(jnp.float32), anchors[anchor])
            found.append((values, boxes_xyxy, label, jnp.full(values.shape, threshold, jnp.float32)))
        best, boxes_xyxy, label, threshold = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
        scores = jax.nn.sigmoid(best.astype(jnp.float32))
        if config.clip == "before_nms":
            boxes_xyxy = clip(boxes_xyxy, size_hw)
        limits = {"iou_threshold": config.nms_iou, "max_detections": config.max_detections}
        group = jnp.zeros_like(label) if config.class_agnostic_nms else label
        kept, valid = nms(boxes_xyxy, jnp.where(scores > threshold, scores, -jnp.inf), group, **limits)
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

    return Detections(*jax.vmap(of_image)(tuple(logits), tuple(deltas), image_sizes))


def best_logits(
    logits: Float[Array, "A K"], top_k: int, anchors_per_cell: int = 1
) -> tuple[Float[Array, " k"], Int[Array, " k"], Int[Array, " k"]]:
    """Returns (logits, anchors, classes) of the k = min(top_k, A * K) largest logits of a level, largest first.

    Equals `lax.top_k` of the flattened logits, including the order of equal ones (by anchor, then class), without sorting
    all A * K: keep the cells with the k best logits, of these the anchors with the k best logits, and sort their k * K
    logits. Logits have the order of their scores, and differ where those saturate. A maximum of each cell takes a tenth of
    the cycles on a TPU (estimated) that one of each of its 9 anchors takes.
    """
    classes, size = logits.shape[1], anchors_per_cell * logits.shape[1]
    rows = logits.reshape(-1, size)
    if platform() == "gpu":  # the logits are read once
        of_anchors = logits.max(axis=1).reshape(-1, anchors_per_cell)
        cells = _best(of_anchors.max(axis=1), top_k)
        of_anchors, rows = of_anchors[cells], rows[cells]
    else:
        cells = _best(rows.max(axis=1), top_k)
        rows = rows[cells]
        # Slices, because TPUs are slow at reducing rows of K numbers.
        of_anchors = jnp.stack([part.max(axis=1) for part in jnp.split(rows, anchors_per_cell, axis=1)], axis=1)
    kept = _best(of_anchors.reshape(-1), top_k)
    values, place = lax.top_k(rows.reshape(-1, classes)[kept].reshape(-1), min(top_k, len(kept) * classes))
    anchor = kept[place // classes]
    return values, cells[anchor // anchors_per_cell] * anchors_per_cell + anchor % anchors_per_cell, place % classes


def _best(maxima: Float[Array, " R"], top_k: int) -> Int[Array, " r"]:
    """Returns the rows that have the top_k largest numbers of all rows, in order, from the maximum of each row.

    They are the min(top_k, R) rows with the largest maxima, because these maxima come before every number of another row.
    The rows are sorted by index so that equal numbers stay in order.
    """
    return jnp.sort(lax.top_k(maxima, min(top_k, len(maxima)))[1])
