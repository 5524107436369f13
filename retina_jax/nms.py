"""Non-maximum suppression (Section 4.1, Inference)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from retina_jax.boxes import iou_matrix


def nms(
    boxes_xyxy: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    labels: Int[Array, " N"],
    *,
    iou_threshold: float,
    max_detections: int,
) -> tuple[Int[Array, " D"], Bool[Array, " D"]]:
    """Exact greedy suppression within each class: (indices of the kept boxes, which of them are real), best first.

    Repeats: keep the box with the best remaining score, the lowest index of equals, and drop every box of its class
    that overlaps it with an IoU above iou_threshold. An IoU of exactly iou_threshold stays. It ends when
    D = max_detections boxes are kept or none remains, so the cost is at most D passes over N boxes and needs no N x N
    matrix and no sort. Entries past the last kept box have index 0 and are not valid.

    A score of -inf (or NaN) marks an absent box: it is neither kept nor suppresses. Classes are compared, not moved
    apart by coordinate offsets, which would cost float32 digits.
    """
    scores = jnp.where(scores > -jnp.inf, scores, -jnp.inf)

    def some_remain(state: tuple[Array, Array, Array, Array]) -> Bool[Array, ""]:
        kept, best, remaining, _ = state
        return (kept < max_detections) & (remaining[best] > -jnp.inf)

    def keep_best(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        kept, best, remaining, indices = state
        overlaps = iou_matrix(boxes_xyxy[best][None], boxes_xyxy)[0] > iou_threshold
        dropped = overlaps & (labels == labels[best])
        # The kept box leaves by name: a box without area does not overlap itself.
        dropped = dropped | (lax.iota(jnp.int32, dropped.shape[0]) == best)
        remaining = jnp.where(dropped, -jnp.inf, remaining)
        return kept + 1, _first_largest(remaining), remaining, indices.at[kept].set(best)

    # zeros_like, not zeros: inside a shard_map the indices must vary over the devices as the labels do.
    indices = jnp.zeros_like(labels, shape=max_detections, dtype=jnp.int32)
    start = (jnp.int32(0), _first_largest(scores), scores, indices)
    kept, _, _, indices = lax.while_loop(some_remain, keep_best, start)
    return indices, lax.iota(jnp.int32, max_detections) < kept


def _first_largest(values: Float[Array, " N"]) -> Int[Array, ""]:
    """`jnp.argmax` as two plain reductions, which XLA vectorises on the CPU: three times as fast, same answer."""
    size = values.shape[0]
    return jnp.min(jnp.where(values == values.max(), lax.iota(jnp.int32, size), size - 1))
