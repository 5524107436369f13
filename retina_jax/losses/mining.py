"""Online hard example mining (OHEM, Section 5.1 and Table 1d): which anchors of an image its classification loss is of.

"Each example is scored by its loss, non-maximum suppression (nms) is then applied, and a minibatch is constructed with
the highest-loss examples." In the 1:3 variant, "after applying nms to all examples, the minibatch is constructed to
enforce a 1:3 ratio between positives and negatives". The rest the paper leaves open, and is decided here:

- An example is an anchor, foreground or background, that is not ignored and whose loss is above 0. One whose loss is 0
  has nothing to teach: it is not mined, suppresses nothing and earns no negatives.
- Its score is its classification loss summed over the classes; the lowest index comes first among equals.
- The suppression is greedy, between the anchors themselves (to a one-stage detector they are what the proposals, before
  regression, are to OHEM's), blind to classes, foreground and background alike. An IoU of exactly the threshold stays.
- A minibatch belongs to an image. ohem: its `batch` hardest survivors. ohem_1_3: of the survivors, the batch // 4 hardest
  positives, or all where there are fewer, and the hardest negatives that fill the minibatch. ohem_1_3_strict: the same
  positives, and 3 of the hardest negatives per positive taken, or 3 in an image where none is.
  An image rarely has batch // 4 positives left after NMS. Then the strict ratio alone sets the number of negatives, and the
  batch size changes nothing, while the paper's rows of 1:3 fall with it (31.1, 28.3, 24.0).
- The loss is the sum over the minibatch, by default divided by the anchors assigned to a box, mined or not
  (`retina_jax.losses.total`).
- A loss that is infinite or NaN is kept out of all this and always in the sum: a diverged network must show.

The result is exactly that of suppressing among all 100k anchors and then choosing. But the whole suppression has
thousands of survivors, of which few are wanted:

- ohem walks in the order of the loss and stops when `batch` have survived.
- ohem_1_3 needs positives that may be at the very end of that walk. But an anchor that is harder than every remaining
  one it overlaps survives, whatever happens elsewhere. So each positive, hardest first, is decided by climbing: from it
  to the hardest remaining anchor it overlaps, and on from there, until none is harder. That one survives, what it
  overlaps is gone, and the next positive is looked at. The negatives are then found by the walk.

Each step of a walk or a climb is one row of IoUs and one search for the largest: no A x A matrix, no sort. A positive is
rarely easier than what it overlaps, so most climbs are no step at all. The longest are up losses that are equal, or rise
steadily, over the whole image to positives at their foot: thousands of steps.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from retina_jax.config import ConfigError
from retina_jax.ops.boxes import iou_matrix

NEGATIVES = 3
"""Negatives for each positive in ohem_1_3 and ohem_1_3_strict (SSD)."""
ROW = 512
"""Anchors are padded to a multiple of this; the largest of them is looked for in rows (`_hardest`)."""


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
    """The mined anchors of one image: at most `batch`, fewer where fewer survive, beside those without a finite loss.

    loss is each anchor's over all classes, at least 0; no gradient passes through the choice. positive says which anchors
    are assigned to a box, taking_part which are not ignored. Raises ConfigError where batch is below 1, or for the 1:3 kinds
    below 4, which cannot hold a positive and its negatives.
    """
    least = {"ohem": 1, "ohem_1_3": 1 + NEGATIVES, "ohem_1_3_strict": 1 + NEGATIVES}
    if kind not in least:
        raise ConfigError(f"loss.mining is {kind!r}: it must be none, {', '.join(least)}")
    if batch < least[kind]:
        raise ConfigError(f"loss.mining_batch is {batch}: it must be at least {least[kind]} with loss.mining {kind}")

    loss = lax.stop_gradient(loss)
    finite = jnp.isfinite(loss)
    padding = -loss.shape[0] % ROW
    examples = _Examples(
        hardness=jnp.pad(
            jnp.where(taking_part & finite & (loss > 0), loss, -jnp.inf), (0, padding), constant_values=-jnp.inf
        ),
        positive=jnp.pad(positive, (0, padding)),
        boxes_xyxy=jnp.pad(jnp.asarray(anchors), ((0, padding), (0, 0))),
        iou_threshold=iou_threshold,
    )
    if kind == "ohem":
        mined = _hardest_survivors(examples, batch)
    else:
        mined = _one_to_three(examples, batch, filled=kind == "ohem_1_3")
    return mined[: loss.shape[0]] | (taking_part & ~finite)


class _Examples(NamedTuple):
    hardness: Float[Array, " N"]
    """Loss, or -inf where there is no example."""
    positive: Bool[Array, " N"]
    boxes_xyxy: Float[Array, "N 4"]
    iou_threshold: float

    def suppressed_by(self, at: Int[Array, ""]) -> Bool[Array, " N"]:
        """The anchors that overlap anchor `at`, itself among them."""
        overlaps = iou_matrix(self.boxes_xyxy[at][None], self.boxes_xyxy)[0] > self.iou_threshold
        # By name, since an anchor without area does not overlap itself; a scatter would break up the fused loop.
        return overlaps | (_index(overlaps) == at)


def _hardest_survivors(examples: _Examples, batch: int) -> Bool[Array, " N"]:
    """The first `batch` of the walk. It takes `batch` steps, those after the last survivor idle: with a number of steps that
    does not depend on the data no image waits for another's, under vmap or over a mesh."""

    def take(_: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        remaining, mined = state
        at, found = _hardest(remaining)
        mined = mined.at[at].set(mined[at] | found)
        return jnp.where(examples.suppressed_by(at), -jnp.inf, remaining), mined

    return lax.fori_loop(0, batch, take, (examples.hardness, jnp.zeros_like(examples.positive)))[1]


class _Walk(NamedTuple):
    at: Int[Array, ""]
    """Anchor that the walk or climb stands on."""
    found: Bool[Array, ""]
    """Whether there was one to go to."""
    remaining: Float[Array, " N"]
    mined: Bool[Array, " N"]
    taken: Int[Array, ""]
    """Anchors mined by this walk."""


def _one_to_three(examples: _Examples, batch: int, *, filled: bool) -> Bool[Array, " N"]:
    positive = examples.positive
    index = _index(positive)

    def go(remaining: Array, pool: Array | bool, mined: Array, taken: Array) -> _Walk:
        """To the hardest remaining anchor of the pool."""
        return _Walk(*_hardest(jnp.where(pool, remaining, -jnp.inf)), remaining, mined, taken)

    def climb(walk: _Walk) -> _Walk:
        at, remaining = walk.at, walk.remaining
        near = examples.suppressed_by(at)
        harder = near & ((remaining > remaining[at]) | ((remaining == remaining[at]) & (index < at)))
        survives = ~harder.any()
        take = survives & positive[at]
        # A negative that survives stays where it is: its turn comes among the negatives.
        gone = survives & near & (positive | (index != at))
        return go(
            jnp.where(gone, -jnp.inf, remaining),
            jnp.where(survives, positive, harder),
            walk.mined.at[at].set(walk.mined[at] | take),
            walk.taken + take.astype(jnp.int32),
        )

    def step(walk: _Walk) -> _Walk:
        at = walk.at
        take = ~positive[at]  # a positive here is one too many
        return go(
            jnp.where(examples.suppressed_by(at), -jnp.inf, walk.remaining),
            True,
            walk.mined.at[at].set(walk.mined[at] | take),
            walk.taken + take.astype(jnp.int32),
        )

    # zeros_like, not zeros: inside a shard_map the state must vary over the devices as the examples do.
    start = go(examples.hardness, positive, jnp.zeros_like(positive), jnp.zeros_like(positive, jnp.int32, ()))
    positives = lax.while_loop(lambda walk: walk.found & (walk.taken < batch // (1 + NEGATIVES)), climb, start)
    wanted = batch - positives.taken if filled else NEGATIVES * jnp.maximum(positives.taken, 1)
    start = go(positives.remaining, True, positives.mined, jnp.zeros_like(positives.taken))
    return lax.while_loop(lambda walk: walk.found & (walk.taken < wanted), step, start).mined


def _hardest(remaining: Float[Array, " N"]) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """(index of the largest, the first of equals; whether it is above -inf).

    The first row whose largest is the largest of all, and the first place in it: `jnp.argmax`, in one pass that XLA
    vectorises on the CPU: over ten times as fast over 100k anchors.
    """
    rows = remaining.reshape(-1, ROW)
    row = jnp.argmax(rows.max(axis=1))
    column = jnp.argmax(rows[row])
    return row * ROW + column, rows[row, column] > -jnp.inf


def _index(of: Array) -> Int[Array, " N"]:
    return lax.iota(jnp.int32, of.shape[0])
