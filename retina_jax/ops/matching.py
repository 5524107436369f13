"""Assignment of anchors to ground-truth boxes (Section 4, Anchors), and what happens at an IoU of exactly 0.5 or 0.4."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from retina_jax.config import MatchingConfig
from retina_jax.cpu import platform
from retina_jax.ops.boxes import iou

BACKGROUND = -1  # label of a background anchor: all K targets are 0
IGNORED = -2  # label of an anchor that is not trained
BLOCK, BLOCK_ON_GPUS = 4, 20  # boxes compared with all anchors in one pass, which loads and stores the running maximum
LANES = 128  # anchors in a row


class Matches(NamedTuple):
    """The training target of each anchor of an image."""

    labels: Int[Array, " A"]  # class k >= 0 of a positive anchor, or BACKGROUND, or IGNORED
    box_index: Int[Array, " A"]
    """Box with the largest IoU, the first of equal ones. Only valid where labels >= 0."""


def match(
    anchors: Float[Array | np.ndarray, "A 4"],
    boxes_xyxy: Float[Array, "G 4"],
    labels: Int[Array, " G"],
    config: MatchingConfig,
) -> Matches:
    """Assigns each anchor of one image to a box, to the background, or to neither, by its largest IoU with a box.

        IoU >= positive_iou (0.5)    positive: the class of that box
        IoU <  negative_iou (0.4)    BACKGROUND
        otherwise                    IGNORED

    So an IoU of exactly 0.5 is positive and one of exactly 0.4 is not background. Of boxes with equal IoU the first wins.

    low_quality: an anchor below positive_iou is also positive if it is the best anchor of some box (ties included): `none`
    never, `band` (default) if its IoU is at least negative_iou (Detectron), `all` always (detectron2, torchvision). Such an
    anchor takes the box it overlaps most, which may be another box than the one it is best for.

    Boxes and anchors are in the same pixels. labels[g] is the class of box g, -1 if row g is padding. Padded rows match
    nothing, and an image without boxes is all background. A box can only win anchors that it overlaps (IoU > 0).

    Memory is O(A): a running maximum over the boxes. The number of passes does not depend on the data, so images of a batch
    do not wait for each other.
    """
    # Rows of LANES anchors: TPUs would take one row of all anchors apart and put it together in each pass.
    rows = jnp.pad(jnp.asarray(anchors, jnp.float32).T, ((0, 0), (0, -len(anchors) % (8 * LANES)))).reshape(
        4, -1, LANES
    )
    on_gpu = platform() == "gpu"
    size = min(BLOCK_ON_GPUS, max(len(labels), 1)) if on_gpu else BLOCK
    padding = -len(labels) % size if len(labels) else size
    boxes = jnp.pad(boxes_xyxy.astype(jnp.float32), ((0, padding), (0, 0)))
    labels = jnp.pad(labels, (0, padding), constant_values=-1)
    is_box = labels >= 0

    def add_boxes(block: Int[Array, ""], state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, box_index, is_best = state
        numbers = [block * size + i for i in range(size)]

        def ious(rows: Array) -> list[Array]:
            return [jnp.where(is_box[g], iou(tuple(rows), tuple(boxes[g])), -1.0) for g in numbers]

        # An IoU is needed for its maximum and for the comparisons with it. On GPUs it is computed for each of them, which
        # moves 0.2 instead of 3.1 GiB (16 images); it is the same number both times (`boxes.rounded`). Elsewhere the
        # barrier keeps the compiler from computing it twice.
        overlaps = ious(rows) if on_gpu else lax.optimization_barrier(ious(rows))
        maxima = [overlap.max() for overlap in (ious(lax.optimization_barrier(rows)) if on_gpu else overlaps)]
        for g, overlap, largest in zip(numbers, overlaps, maxima, strict=True):
            better = overlap > best
            best, box_index = jnp.where(better, overlap, best), jnp.where(better, g, box_index)
            # A largest IoU of 0 does not count: a box that overlaps no anchor would tie with all of them.
            is_best |= (overlap == largest) & (largest > 0)
        return best, box_index, is_best

    # zeros_like instead of zeros: inside a shard_map the state must vary over the devices as the labels do.
    start = tuple(jnp.zeros_like(labels, dtype, rows.shape[1:]) for dtype in (jnp.float32, jnp.int32, jnp.bool_))
    found = lax.fori_loop(0, len(boxes) // size, add_boxes, start)
    best, box_index, is_best = (part.reshape(-1)[: len(anchors)] for part in found)

    background = best < config.negative_iou
    low_quality_matches = {"none": jnp.zeros_like(is_best), "band": is_best & ~background, "all": is_best}
    positive = (best >= config.positive_iou) | low_quality_matches[config.low_quality]
    unmatched = jnp.where(background, BACKGROUND, IGNORED).astype(labels.dtype)
    return Matches(labels=jnp.where(positive, labels[box_index], unmatched), box_index=box_index)
