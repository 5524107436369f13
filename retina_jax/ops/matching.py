"""Anchors to ground truth (Section 4, Anchors)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from retina_jax.config import MatchingConfig
from retina_jax.ops.boxes import iou_matrix

BACKGROUND = -1
"""Label of an anchor of no class: all K targets are 0."""
IGNORED = -2
"""Label of an anchor that takes no part in training."""


class Matches(NamedTuple):
    """What each anchor of an image is trained to be."""

    labels: Int[Array, " A"]
    """Class k >= 0 of a positive anchor, or BACKGROUND, or IGNORED."""
    box_index: Int[Array, " A"]
    """Box with the largest IoU, the first of equals; 0 where no box overlaps. It means something where labels >= 0."""


def match(
    anchors: Float[Array | np.ndarray, "A 4"],
    boxes_xyxy: Float[Array, "G 4"],
    labels: Int[Array, " G"],
    config: MatchingConfig,
) -> Matches:
    """Assigns each anchor of one image to a box, to the background, or to neither.

    Boxes and anchors are in the same pixels. labels[g] is the class of box g, -1 where row g is padding; padded rows
    match nothing, wherever they stand, and an image without boxes is all background. Only boxes that overlap an anchor
    (IoU > 0) can win it.

    At the boundaries: an IoU of exactly positive_iou is positive, one of exactly negative_iou is ignored, not
    background. Of boxes with equal IoU the first wins the anchor.

    low_quality rescues the anchors that have the largest IoU any anchor has with some box, all of those that tie for
    it, when their own largest IoU is below positive_iou: `none` does not, `band` does where that IoU is at least
    negative_iou (Detectron, where background is assigned last), `all` always does (detectron2, torchvision). A rescued
    anchor takes the box it overlaps most, which need not be the box it was rescued for.

    Memory is O(A): a running maximum goes over the boxes. It makes all G trips, because a count that depended on the
    data would, in a program over a device mesh, cost a collective in each trip.
    """
    boxes_xyxy = boxes_xyxy.astype(jnp.float32)
    anchors = jnp.asarray(anchors).astype(jnp.float32)

    def look_at(g: Int[Array, ""], state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, box_index, is_best = state
        iou = jnp.where(labels[g] >= 0, iou_matrix(anchors, boxes_xyxy[g][None])[:, 0], -1.0)
        # The barrier keeps the compiler from computing iou twice, for its maximum and for the comparisons with it.
        iou = lax.optimization_barrier(iou)
        largest = iou.max()
        better = iou > best
        return (
            jnp.where(better, iou, best),
            jnp.where(better, g, box_index),
            # An IoU of 0 is no best: a box that overlaps no anchor would tie with all of them.
            is_best | ((iou == largest) & (largest > 0)),
        )

    size = anchors.shape[0]
    # zeros_like, not zeros: inside a shard_map the state must vary over the devices as the labels do.
    start = tuple(jnp.zeros_like(labels, shape=size, dtype=dtype) for dtype in (jnp.float32, jnp.int32, jnp.bool_))
    best, box_index, is_best = lax.fori_loop(0, boxes_xyxy.shape[0], look_at, start)

    background = best < config.negative_iou
    positive = (best >= config.positive_iou) | _rescued(is_best, background, config)
    unmatched = jnp.where(background, BACKGROUND, IGNORED).astype(labels.dtype)
    return Matches(labels=jnp.where(positive, labels[box_index], unmatched), box_index=box_index)


def _rescued(is_best: Bool[Array, " A"], background: Bool[Array, " A"], config: MatchingConfig) -> Bool[Array, " A"]:
    if config.low_quality == "none":
        return jnp.zeros_like(is_best)
    if config.low_quality == "band":
        return is_best & ~background
    return is_best
