"""The training loss (Section 4.1): matching, loss sums of each image, and what the sums are divided by.

The "total focal loss of an image" is "normalized by the number of anchors assigned to a ground-truth box" (normaliser
`per_image`). Detectron counts per GPU (`per_device`), detectron2 keeps a running mean (`ema`), others count over the batch
(`global`). All have the form

    loss = sum_i w_i * (classification_i + box_weight * box_i) / D

over the images i of the global batch. The device of image i knows its weight w_i (`image_weights`); D (`denominator`) needs
N, the number of positive anchors of the global batch. With n_i of them in image i, M micro-batches (devices times
training.accumulate) and B images in the global batch:

    normaliser    w_i                                     D
    global        1                                       max(N, 1)
    per_image     1 / (max(n_i, 1) B)                     1
    per_device    1 / (max(n of i's micro-batch, 1) M)    1
    ema           1                                       M e,   e <- 0.9 e + 0.1 max(N / M, 1)

D depends on no parameter, so grad(loss) = grad(sum_i w_i loss_i) / D: gradients, sums and N are added over the devices in
one all-reduce, and divided afterwards.

With mining (`retina_jax.losses.mining`) only the classification loss is that of the minibatch: N, n_i and the box loss count
all anchors assigned to a box. With `loss.mining_normaliser minibatch` its n_i are the sizes of the minibatches.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from retina_jax.config import ConfigError, LossConfig, MatchingConfig
from retina_jax.losses.fused import summed, value_and_gradient
from retina_jax.losses.mining import mine
from retina_jax.losses.regression import box_loss
from retina_jax.ops.matching import IGNORED, match

Normaliser = Literal["per_image", "per_device", "global", "ema"]

EMA_START, EMA_MOMENTUM = 100.0, 0.9
"""Of normaliser `ema` (detectron2): first running mean, in positive anchors per micro-batch, and weight of the old mean."""


class ImageLosses(NamedTuple):
    """The sums over the anchors (and classes) of each image, before any division."""

    classification: Float32[Array, " B"]
    """Classification loss, over all classes and all anchors that are not ignored; with mining, over the mined anchors."""
    box: Float32[Array, " B"]  # box loss over the positive anchors and 4 coordinates, not yet multiplied by box_weight
    positives: Float32[Array, " B"]  # number of positive anchors
    averaged_over: Float32[Array, " B"]
    """n_i of the classification loss: number of positive anchors or, with mining_normaliser minibatch, of mined anchors."""


def image_losses(
    logits: Sequence[Float[Array, "B _ K"]],
    deltas: Sequence[Float[Array, "B _ 4"]],
    anchors: Float[Array | np.ndarray, "A 4"],
    boxes_xyxy: Float[Array, "B G 4"],
    labels: Int[Array, "B G"],
    *,
    matching: MatchingConfig,
    loss: LossConfig,
) -> ImageLosses:
    """Matches the anchors of each image and sums the classification loss of all (or the mined) anchors, and the box loss.

    logits and deltas are those of each pyramid level; the anchors of all levels follow each other. labels is -1 on padded
    boxes. An image without boxes is all background: its box loss and positives are 0. The sums are float32 in any dtype of
    logits and deltas.
    """
    boxes_xyxy = boxes_xyxy.astype(jnp.float32)
    ends = np.cumsum([part.shape[1] for part in logits])

    def by_level(rows: Array | np.ndarray, axis: int) -> list[Array]:
        return jnp.split(rows, ends[:-1], axis)

    matches = jax.vmap(partial(match, config=matching), in_axes=(None, 0, 0))(anchors, boxes_xyxy, labels)
    positives = (matches.labels >= 0).sum(axis=1).astype(jnp.float32)
    averaged_over, trained_labels = positives, matches.labels
    if loss.mining != "none":
        of_logits, outputs = value_and_gradient(loss), lax.stop_gradient(tuple(logits))
        sums = [of_logits(*level)[0].sum(axis=-1) for level in zip(outputs, by_level(matches.labels, 1), strict=True)]
        trained_labels = jax.vmap(partial(_mined_labels, anchors=anchors, config=loss))(
            jnp.concatenate(sums, axis=1), matches.labels
        )
        if loss.mining_normaliser == "minibatch":
            averaged_over = (trained_labels != IGNORED).sum(axis=1).astype(jnp.float32)

    def box_sum(
        deltas: Float[Array, "A 4"], anchors: Array, labels: Array, box_index: Array, boxes_xyxy: Float[Array, "G 4"]
    ) -> Float32[Array, ""]:
        losses = box_loss(deltas.astype(jnp.float32), anchors, boxes_xyxy[box_index], config=loss)
        return jnp.where(labels >= 0, losses, 0.0).sum()

    targets = by_level(anchors, 0), by_level(matches.labels, 1), by_level(matches.box_index, 1)
    box_sums = jax.vmap(box_sum, in_axes=(0, None, 0, 0, 0))
    return ImageLosses(
        classification=sum(map(summed(loss), logits, by_level(trained_labels, 1))),
        box=sum(box_sums(*level, boxes_xyxy) for level in zip(deltas, *targets, strict=True)),
        positives=positives,
        averaged_over=averaged_over,
    )


def _mined_labels(
    losses: Float32[Array, " A"],
    labels: Int[Array, " A"],
    *,
    anchors: Float[Array | np.ndarray, "A 4"],
    config: LossConfig,
) -> Int[Array, " A"]:
    """Returns `labels`, with IGNORED for the anchors that are not mined, by their `losses`."""
    settings = {"kind": config.mining, "batch": config.mining_batch, "iou_threshold": config.mining_nms_iou}
    mined = mine(losses, labels >= 0, labels != IGNORED, anchors, **settings)
    return jnp.where(mined, labels, IGNORED)


def image_weights(
    counts: Float32[Array, " B"], scope: Normaliser, *, batch_size: int, num_microbatches: int
) -> Float32[Array, " B"]:
    """Returns w_i of the given images for normaliser `scope`, from their `counts` n_i.

    The images are the global batch or some complete micro-batches of it, whose images are consecutive. batch_size and
    num_microbatches are always the global numbers. A count of 0, of an image or a micro-batch, is replaced by 1.
    ConfigError: the batch or the images do not divide evenly into micro-batches.
    """
    images = counts.shape[0]
    if batch_size % num_microbatches or images % (batch_size // num_microbatches):
        found = f"{batch_size} ({images} images here) does not divide evenly into {num_microbatches} micro-batches"
        raise ConfigError(f"data.batch_size: {found}")
    if scope == "per_image":
        return 1.0 / (jnp.maximum(counts, 1.0) * batch_size)
    if scope == "per_device":
        size = batch_size // num_microbatches
        of_microbatch = counts.reshape(-1, size).sum(axis=1)
        return jnp.repeat(1.0 / (jnp.maximum(of_microbatch, 1.0) * num_microbatches), size)
    return jnp.ones_like(counts)


def denominator(
    total_positives: Float32[Array, ""], scope: Normaliser, ema: Float32[Array, ""], *, num_microbatches: int
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Returns (D, new ema) for normaliser `scope`, from the positive anchors of the global batch over all devices.

    ema is the running mean of positive anchors per micro-batch, EMA_START before the first step. The loss of a step is
    divided by the mean that already includes that step, as in detectron2 (which has one mean per process; here there is
    one). The other scopes return it unchanged. D is at least 1 for global, and never 0.
    """
    if scope == "global":
        return jnp.maximum(total_positives, 1.0), ema
    if scope == "ema":
        ema = EMA_MOMENTUM * ema + (1.0 - EMA_MOMENTUM) * jnp.maximum(total_positives / num_microbatches, 1.0)
        return ema * num_microbatches, ema
    return jnp.ones((), jnp.float32), ema


def mean_losses(losses: ImageLosses, config: LossConfig, ema_per_image: float) -> dict[str, float]:
    """Returns the loss of B images, as numpy arrays, as if they were one batch on one device, by the names of the metrics.
    For normaliser `ema` the divisor is B times `ema_per_image`, the running mean in positive anchors per image."""
    number = max(len(losses.positives), 1)

    def mean(values: np.ndarray, counts: np.ndarray) -> float:
        if config.normaliser == "per_image":
            return float((values / np.maximum(counts, 1)).sum() / number)
        return float(values.sum() / (number * ema_per_image if config.normaliser == "ema" else max(counts.sum(), 1)))

    classification, box = mean(losses.classification, losses.averaged_over), mean(losses.box, losses.positives)
    return {"loss": classification + config.box_weight * box, "classification_loss": classification, "box_loss": box}
