"""The training loss of a detector (Section 4.1): sums over an image's anchors, and what the sums are divided by.

The paper's "total focal loss of an image" is a sum over its anchors, "normalized by the number of anchors assigned to a
ground-truth box": normaliser `per_image`, the default. Detectron counts per GPU (`per_device`), detectron2 keeps a running
mean (`ema`), others count over the batch (`global`). All have the form

    loss = sum_i w_i * (classification_i + box_weight * box_i) / D

over the images i of the whole batch, where the weights w_i (`image_weights`) are known to the device that holds the
images, and the denominator D (`denominator`) needs only the number of positive anchors of the whole batch, N. With n_i
the positive anchors of image i, S shards and B images in the whole batch:

    normaliser    w_i                                     D
    global        1                                       max(N, 1)
    per_image     1 / (max(n_i, 1) B)                     1
    per_device    1 / (max(n of i's shard, 1) S)          1
    ema           1                                       S e,   e <- .9 e + .1 max(N / S, 1)

Since D does not depend on any parameter, grad(loss) = grad(sum_i w_i loss_i) / D. A data-parallel step therefore takes
gradients of the weighted sum first, adds gradients, sums and N up over the devices in ONE all-reduce, and divides
afterwards. No mean of per-device ratios can creep in.

With mining (`retina_jax.losses.mining`) the classification loss is summed over the minibatch alone, while N, the n_i and
the box loss remain those of all anchors assigned to a box: the paper names no other divisor, and SSD, whose 1:3 it takes,
divides so. OHEM averages over the minibatch: with `loss.mining_normaliser minibatch` the n_i of the classification loss are
the sizes of the minibatches. global and ema have a single D, and so no `minibatch`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from retina_jax.config import ConfigError, LossConfig, MatchingConfig
from retina_jax.losses.focal import classification_loss
from retina_jax.losses.fused import summed
from retina_jax.losses.mining import mine
from retina_jax.losses.regression import box_loss
from retina_jax.ops.matching import IGNORED, Matches, match

EMA_START = 100.0
"""Positive anchors a shard that the running mean of normaliser `ema` starts from (detectron2)."""
EMA_MOMENTUM = 0.9
"""Share of the old mean that `ema` keeps each step (detectron2)."""


class ImageLosses(NamedTuple):
    """Sums over the anchors (and classes) of each image, before any division."""

    classification: Float32[Array, " B"]
    """Classification loss over all classes and all anchors that are not ignored, or those of them that are mined."""
    box: Float32[Array, " B"]
    """Box loss over the positive anchors and 4 coordinates, not yet multiplied by box_weight."""
    positives: Float32[Array, " B"]
    """Positive anchors, a whole number."""
    averaged_over: Float32[Array, " B"]
    """n_i of the classification loss, a whole number: positive anchors or, with mining, anchors in the minibatch."""


def image_losses(
    logits: Float[Array, "B A K"],
    deltas: Float[Array, "B A 4"],
    anchors: Float[Array | np.ndarray, "A 4"],
    boxes_xyxy: Float[Array, "B G 4"],
    labels: Int[Array, "B G"],
    *,
    matching: MatchingConfig,
    loss: LossConfig,
) -> ImageLosses:
    """Loss sums of each image: matching, classification loss of all anchors (with loss.mining those mined), box loss of the
    positive ones.

    labels is -1 on padded boxes. Images are independent of each other. An image without boxes is all background: its
    box loss and positives are 0. Everything is float32 whatever the dtype of logits and deltas.
    """
    loss_of_logits, loss_of_deltas = classification_loss(loss), box_loss(loss)
    mining = loss.mining != "none"
    anchors = jnp.asarray(anchors)

    def mined(logits: Float[Array, "A K"], labels: Int[Array, " A"]) -> Int[Array, " A"]:
        """The labels with IGNORED for the anchors that are not mined."""
        kept = mine(
            loss_of_logits(logits, labels).sum(axis=-1),
            labels >= 0,
            labels != IGNORED,
            anchors,
            kind=loss.mining,
            batch=loss.mining_batch,
            iou_threshold=loss.mining_nms_iou,
        )
        return jnp.where(kept, labels, IGNORED)

    def of_boxes(deltas: Float[Array, "A 4"], boxes_xyxy: Float[Array, "G 4"], matches: Matches) -> Float32[Array, ""]:
        losses = loss_of_deltas(deltas.astype(jnp.float32), anchors, boxes_xyxy[matches.box_index])
        return jnp.where(matches.labels >= 0, losses, 0.0).sum()

    boxes_xyxy = boxes_xyxy.astype(jnp.float32)
    matches = jax.vmap(partial(match, config=matching), in_axes=(None, 0, 0))(anchors, boxes_xyxy, labels)
    of_classes = jax.vmap(mined)(lax.stop_gradient(logits), matches.labels) if mining else matches.labels
    positives = (matches.labels >= 0).sum(axis=1).astype(jnp.float32)
    by_minibatch = mining and loss.mining_normaliser == "minibatch"
    return ImageLosses(
        classification=summed(loss_of_logits)(logits, of_classes),
        box=jax.vmap(of_boxes)(deltas, boxes_xyxy, matches),
        positives=positives,
        averaged_over=(of_classes != IGNORED).sum(axis=1).astype(jnp.float32) if by_minibatch else positives,
    )


def image_weights(counts: Float32[Array, " B"], scope: str, *, batch_size: int, shards: int) -> Float32[Array, " B"]:
    """w_i of the given images, for normaliser `scope`, from the `counts` n_i of their anchors.

    The images are the complete batch (a global view, B = batch_size) or one or more complete shards of it (a per-device
    view, B = batch_size / shards); images of a shard follow each other. batch_size and shards are always the global ones.
    A shard or image whose count is 0 counts as having one anchor.
    """
    images = counts.shape[0]
    if batch_size % shards or images % (batch_size // shards):
        raise ConfigError(
            f"data.batch_size {batch_size} on {shards} devices with {images} images at hand: the batch must split into "
            "equal whole shards"
        )
    if scope in ("global", "ema"):
        return jnp.ones_like(counts)
    if scope == "per_image":
        return 1.0 / (jnp.maximum(counts, 1.0) * batch_size)
    if scope == "per_device":
        per_shard = batch_size // shards
        of_shard = counts.reshape(-1, per_shard).sum(axis=1)
        return jnp.repeat(1.0 / (jnp.maximum(of_shard, 1.0) * shards), per_shard)
    raise ConfigError(f"loss.normaliser is {scope!r}: it must be global, per_image, per_device or ema")


def denominator(
    total_positives: Float32[Array, ""], scope: str, ema: Float32[Array, ""], *, shards: int
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """(D, new ema) for normaliser `scope`, given the positive anchors of the whole batch over all devices.

    ema is the running mean of positive anchors a shard, EMA_START before the first step; the mean that includes this
    step divides it, as in detectron2 (which keeps one mean a process; this is their common mean). The other scopes
    give it back unchanged. D is never below 1 for global, never 0 for any.
    """
    one = jnp.ones((), jnp.float32)
    if scope == "global":
        return jnp.maximum(total_positives, 1.0), ema
    if scope in ("per_image", "per_device"):
        return one, ema
    if scope == "ema":
        ema = EMA_MOMENTUM * ema + (1.0 - EMA_MOMENTUM) * jnp.maximum(total_positives / shards, 1.0)
        return ema * shards, ema
    raise ConfigError(f"loss.normaliser is {scope!r}: it must be global, per_image, per_device or ema")
