"""Online hard example mining (OHEM, Section 5.1 and Table 1d): the anchors whose classification loss is summed.

"Each example is scored by its loss, non-maximum suppression (nms) is then applied, and a minibatch is constructed with
the highest-loss examples." In the 1:3 variant, "after applying nms to all examples, the minibatch is constructed to
enforce a 1:3 ratio between positives and negatives". The paper leaves the rest open; the choices here are:

- An example is an anchor that is not ignored and whose loss is above 0. Its score is its classification loss summed over
  the classes; of equal scores the lowest index comes first.
- NMS is greedy and class-agnostic, between the anchors themselves (the counterpart of OHEM's proposals). An anchor with an
  IoU of exactly the threshold stays.
- The minibatch is per image. ohem: the `batch` hardest survivors. ohem_1_3: of the survivors the batch // 4 hardest
  positives, or all if there are fewer, and the hardest negatives that fill the minibatch. ohem_1_3_strict: the same
  positives, and 3 of the hardest negatives per positive, or 3 in an image without one (docs/conventions.md).
- An infinite or NaN loss takes no part in NMS and is always in the sum, so that divergence is visible in the loss.

The result equals NMS among all 100k anchors followed by the choice, but only the survivors needed are computed. ohem takes
anchors by falling loss until `batch` have survived. ohem_1_3 also needs positives from the end of that order: an anchor
survives if it is harder than every remaining anchor that it overlaps. So from each positive, hardest first, the search
climbs to the hardest remaining anchor it overlaps, until none is harder. That anchor survives, and those that it overlaps
are removed. Then come the negatives, as for ohem. A step is one row of IoUs and one search for the maximum, without a sort.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from retina_jax.ops.boxes import Sides, iou

NEGATIVES = 3  # negatives per positive in ohem_1_3 and ohem_1_3_strict (SSD)
ROW = 512  # anchors are padded to a multiple of this, for `_hardest`


def mine(
    loss: Float[Array, " A"],
    positive: Bool[Array, " A"],
    taking_part: Bool[Array, " A"],
    anchors: Float[Array | np.ndarray, "A 4"],
    *,
    kind: Literal["ohem", "ohem_1_3", "ohem_1_3_strict"],
    batch: int,
    iou_threshold: float,
) -> Bool[Array, " A"]:
    """Returns the mask of the mined anchors of one image: at most `batch` of them, plus those without a finite loss.

    `loss` is that of each anchor over all classes, >= 0; no gradient passes through the choice. `positive` are the anchors
    assigned to a box, `taking_part` those that are not ignored. `batch` is at least 1, and 4 for the 1:3 kinds.
    """
    loss = lax.stop_gradient(loss)
    finite = jnp.isfinite(loss)
    padding = -loss.shape[0] % ROW
    hardness = jnp.where(taking_part & finite & (loss > 0), loss, -jnp.inf)
    boxes_xyxy = jnp.pad(jnp.asarray(anchors), ((0, padding), (0, 0)))
    examples = _Examples(
        hardness=jnp.pad(hardness, (0, padding), constant_values=-jnp.inf),
        positive=jnp.pad(positive, (0, padding)),
        boxes_xyxy=boxes_xyxy,
        sides=tuple(boxes_xyxy.T),
        iou_threshold=iou_threshold,
    )
    one_to_three = kind != "ohem"
    mined = _one_to_three(examples, batch, kind == "ohem_1_3") if one_to_three else _hardest_survivors(examples, batch)
    return mined[: loss.shape[0]] | (taking_part & ~finite)


class _Examples(NamedTuple):
    hardness: Float[Array, " N"]  # loss, or -inf for an anchor that is no example
    positive: Bool[Array, " N"]
    boxes_xyxy: Float[Array, "N 4"]
    sides: Sides  # the same boxes, one array per side
    iou_threshold: float

    def suppressed_by(self, at: Int[Array, ""]) -> Bool[Array, " N"]:
        """Returns the anchors that overlap anchor `at`, including itself."""
        overlaps = iou(tuple(self.boxes_xyxy[at]), self.sides) > self.iou_threshold
        # Including itself by index, because an anchor without area has IoU 0 with itself. A scatter would not be fused.
        return overlaps | (lax.iota(jnp.int32, overlaps.shape[0]) == at)


def _hardest_survivors(examples: _Examples, batch: int) -> Bool[Array, " N"]:
    """Returns the `batch` hardest survivors. It always takes `batch` steps: if the number of steps depended on the data,
    images would wait for each other under vmap or over a mesh."""

    def take(_: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        remaining, mined = state
        at, found = _hardest(remaining)
        mined = mined.at[at].set(mined[at] | found)
        return jnp.where(examples.suppressed_by(at), -jnp.inf, remaining), mined

    return lax.fori_loop(0, batch, take, (examples.hardness, jnp.zeros_like(examples.positive)))[1]


class _Walk(NamedTuple):
    at: Int[Array, ""]  # current anchor, if `found`
    found: Bool[Array, ""]
    remaining: Float[Array, " N"]
    mined: Bool[Array, " N"]
    taken: Int[Array, ""]  # number of anchors mined by this loop


def _one_to_three(examples: _Examples, batch: int, filled: bool) -> Bool[Array, " N"]:
    """Returns the hardest surviving positives, at most a quarter of `batch`, and the hardest surviving negatives: with
    `filled` as many as fill the batch (ohem_1_3), else 3 per positive (ohem_1_3_strict)."""
    positive = examples.positive
    index = lax.iota(jnp.int32, positive.shape[0])

    def start(remaining: Array, pool: Array | bool, mined: Array) -> _Walk:
        """Starts at the hardest remaining anchor of the pool; none is taken yet."""
        none = jnp.zeros_like(positive, jnp.int32, ())
        return _Walk(*_hardest(jnp.where(pool, remaining, -jnp.inf)), remaining, mined, none)

    def move(walk: _Walk, take: Array, gone: Array, pool: Array | bool) -> _Walk:
        """Mines the anchor if `take`, removes those `gone`, and moves to the hardest remaining anchor of the pool."""
        mined, taken = walk.mined.at[walk.at].set(walk.mined[walk.at] | take), walk.taken + take.astype(jnp.int32)
        return start(jnp.where(gone, -jnp.inf, walk.remaining), pool, mined)._replace(taken=taken)

    def climb(walk: _Walk) -> _Walk:
        """Mines the anchor and moves to the next positive if it survives; else moves to the hardest that suppresses it."""
        at, remaining = walk.at, walk.remaining
        near = examples.suppressed_by(at)
        harder = near & ((remaining > remaining[at]) | ((remaining == remaining[at]) & (index < at)))
        survives = ~harder.any()
        # A surviving negative remains: it is taken among the negatives later.
        gone = survives & near & (positive | (index != at))
        return move(walk, survives & positive[at], gone, jnp.where(survives, positive, harder))

    def step(walk: _Walk) -> _Walk:
        """Mines the anchor, which survives because it is the hardest that remains, and removes those it overlaps."""
        return move(walk, ~positive[walk.at], examples.suppressed_by(walk.at), True)  # the positives are mined already

    # zeros_like instead of zeros: inside a shard_map the state must vary over the devices as the examples do.
    first = start(examples.hardness, positive, jnp.zeros_like(positive))
    positives = lax.while_loop(lambda walk: walk.found & (walk.taken < batch // (1 + NEGATIVES)), climb, first)
    wanted = batch - positives.taken if filled else NEGATIVES * jnp.maximum(positives.taken, 1)
    first = start(positives.remaining, True, positives.mined)
    return lax.while_loop(lambda walk: walk.found & (walk.taken < wanted), step, first).mined


def _hardest(remaining: Float[Array, " N"]) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """Returns (index of the first maximum; whether it is above -inf). Searches by rows, ten times as fast on the CPU."""
    rows = remaining.reshape(-1, ROW)
    row = jnp.argmax(rows.max(axis=1))
    column = jnp.argmax(rows[row])
    return row * ROW + column, rows[row, column] > -jnp.inf
