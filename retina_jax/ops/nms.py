"""Non-maximum suppression (Section 4.1, Inference)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from retina_jax.ops.boxes import iou_matrix

CHUNK = 1024
"""Boxes sorted at once. Sorting all would cost more than everything else, and is seldom needed."""
BLOCK = 64  # boxes compared with the kept ones at once


class _Kept(NamedTuple):
    number: Int[Array, ""]  # may exceed D in the last block; boxes beyond D are dropped
    index: Int[Array, " D"]
    boxes_xyxy: Float[Array, "D 4"]
    labels: Int[Array, " D"]


def nms(
    boxes_xyxy: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    labels: Int[Array, " N"],
    *,
    iou_threshold: float,
    max_detections: int,
) -> tuple[Int[Array, " D"], Bool[Array, " D"]]:
    """Suppresses boxes within each class, exactly and greedily; returns (indices of the kept boxes, valid), best first.

    Repeat: keep the box with the best remaining score (the lowest index of equal ones), and drop every box of its class
    whose IoU with it is above iou_threshold. A box with an IoU of exactly iou_threshold stays. It ends when
    D = max_detections boxes are kept or none remains. Entries past the last kept box have index 0 and are not valid.

    The boxes are processed in order of their scores, BLOCK at a time, against the boxes kept so far, until D are kept. So
    there is no N x N matrix, and usually only some of the N boxes are compared.

    A score of -inf (or NaN) marks an absent box, which is neither kept nor suppresses others. Classes are compared by
    label: offsets added to the coordinates would cost float32 digits.
    """
    size = scores.shape[0]
    if size == 0 or max_detections == 0:
        return jnp.zeros(max_detections, jnp.int32), jnp.zeros(max_detections, jnp.bool_)
    chunk = min(CHUNK, size)
    padding = 0, -chunk % min(BLOCK, chunk)

    def add_chunk(state: tuple[Array, _Kept]) -> tuple[Array, _Kept]:
        """Processes the best `chunk` of the remaining boxes."""
        remaining, kept = state
        best, at = lax.top_k(remaining, chunk)  # equal scores: lowest index first
        real, ranked = jnp.pad(best > -jnp.inf, padding), jnp.pad(at, padding)
        count = real.sum()
        _, kept = lax.while_loop(
            lambda state: (state[0] < count) & (state[1].number < max_detections),
            lambda state: _add_block(state, ranked, real, boxes_xyxy, labels, iou_threshold, min(BLOCK, chunk)),
            (jnp.zeros_like(count), kept),
        )
        return remaining.at[at].set(-jnp.inf), kept

    # zeros_like instead of zeros: inside a shard_map the state must vary over the devices as the boxes do.
    none = _Kept(
        number=jnp.zeros_like(labels, jnp.int32, ()),
        index=jnp.zeros_like(labels, jnp.int32, max_detections),
        boxes_xyxy=jnp.zeros_like(boxes_xyxy, shape=(max_detections, 4)),
        labels=jnp.zeros_like(labels, shape=max_detections),
    )
    _, kept = lax.while_loop(
        lambda state: (state[0] > -jnp.inf).any() & (state[1].number < max_detections),
        add_chunk,
        (jnp.where(scores > -jnp.inf, scores, -jnp.inf), none),
    )
    return kept.index, lax.iota(jnp.int32, max_detections) < kept.number


def _add_block(
    state: tuple[Array, _Kept], ranked: Array, real: Array, boxes: Array, labels: Array, threshold: float, block: int
) -> tuple[Array, _Kept]:
    """Adds those of the next `block` boxes, by rank, that neither a kept box nor a better one of the block suppresses."""
    start, kept = state
    at = lax.dynamic_slice_in_dim(ranked, start, block)
    boxes, labels = boxes[at], labels[at]
    is_kept = lax.iota(jnp.int32, kept.labels.shape[0]) < kept.number
    of_class = (kept.labels[:, None] == labels[None]) & is_kept[:, None]
    suppressed = ((iou_matrix(kept.boxes_xyxy, boxes) > threshold) & of_class).any(axis=0)
    overlaps = (iou_matrix(boxes, boxes) > threshold) & (labels[:, None] == labels[None])
    stays = _survivors(lax.dynamic_slice_in_dim(real, start, block) & ~suppressed, overlaps)
    place = jnp.where(stays, kept.number + jnp.cumsum(stays) - 1, kept.labels.shape[0])
    added = (old.at[place].set(new, mode="drop") for old, new in zip(kept[1:], (at, boxes, labels), strict=True))
    return start + block, _Kept(kept.number + stays.sum(), *added)


def _survivors(candidate: Bool[Array, " b"], overlaps: Bool[Array, "b b"]) -> Bool[Array, " b"]:
    """Returns which of these boxes, in order of their scores, are not overlapped by an earlier survivor.

    Iterates to the fixed point. After i rounds the first i + 1 boxes are correct; without long chains of overlaps, all
    are correct after two or three.
    """
    place = lax.iota(jnp.int32, candidate.shape[0])
    earlier = overlaps & (place[:, None] < place[None])

    def next_round(survive: Bool[Array, " b"]) -> Bool[Array, " b"]:
        return candidate & ~(earlier & survive[:, None]).any(axis=0)

    survive, _ = lax.while_loop(
        lambda state: (state[0] != state[1]).any(),
        lambda state: (next_round(state[0]), state[0]),
        (next_round(candidate), candidate),
    )
    return survive
