"""One training step as a pure function; the drivers in parallel.py run it over many devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree, UInt8

from retina_jax.anchors import anchor_grid
from retina_jax.config import Config
from retina_jax.losses.detection import denominator, image_losses, image_weights
from retina_jax.model.retinanet import RetinaNet
from retina_jax.training.state import TrainState

F = TypeVar("F", bound=Callable[..., Any])


class Inputs(NamedTuple):
    """What travels to the devices. Boxes are in canvas pixels, padded rows have label -1."""

    images: UInt8[Array, "B H W 3"] | Float32[Array, "B H W 3"]
    image_sizes: Int[Array, "B 2"]
    boxes_xyxy: Float[Array, "B G 4"]
    labels: Int[Array, "B G"]
    valid: Bool[Array, " B"]
    """False for an image that could not be read: no loss comes of it (its black pixels do enter batch statistics)."""


def train_step(
    state: TrainState,
    inputs: Inputs,
    *,
    model: RetinaNet,
    config: Config,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shards: int,
    axis: str | None = None,
    on_own_images: Callable[[F], F] = lambda function: function,
) -> tuple[TrainState, dict[str, Array]]:
    """`state` after one step of synchronous SGD on a global batch, and the step's metrics.

    With `axis` None the view is global: `inputs` is the whole batch and whoever compiles the step splits it (jit). With
    an axis name the view is one device's: `inputs` is its share and sums cross the axis (pmap). `shards` is the number
    of devices either way. `on_own_images` makes a function of images one that every device runs on its own: the loops of
    mining, whose length depends on the data, would otherwise wait for all devices at each turn.

    The normaliser of the loss is a sum over the whole batch, known only after the forward pass. Gradients are therefore
    taken of the weighted *sum* of the images' losses and divided afterwards, so that gradients, losses and counts meet in
    one all-reduce.
    """
    height, width = inputs.images.shape[1:3]
    anchors = jnp.asarray(anchor_grid((height, width), config.anchors, config.model))
    local_batch = inputs.images.shape[0]
    batch_size = local_batch * (shards if axis else 1)

    def summed_loss(params: PyTree) -> tuple[Array, tuple[dict[str, Array], PyTree]]:
        variables = {"params": params, "frozen": state.frozen, "stats": state.stats}
        (logits, deltas), updated = model.apply(
            variables, inputs.images, inputs.image_sizes, train=True, mutable=["stats"]
        )
        losses_of = partial(image_losses, matching=config.matching, loss=config.loss)
        if config.loss.mining != "none":
            losses_of = on_own_images(losses_of)
        losses = losses_of(logits, deltas, anchors, inputs.boxes_xyxy, inputs.labels)
        positives = jnp.where(inputs.valid, losses.positives, 0.0)
        weights = image_weights(positives, config.loss.normaliser, batch_size=batch_size, shards=shards)
        weights = jnp.where(inputs.valid, weights, 0.0)
        sums = {
            "classification": jnp.sum(weights * losses.classification),
            "box": jnp.sum(weights * losses.box),
            "positives": jnp.sum(positives),
        }
        total = sums["classification"] + config.loss.box_weight * sums["box"]
        return total, (sums, updated.get("stats", {}))

    gradients, (sums, stats) = jax.grad(summed_loss, has_aux=True)(state.params)
    if axis is not None:
        gradients, sums = jax.lax.psum((gradients, sums), axis)
    divisor, normaliser = denominator(sums["positives"], config.loss.normaliser, state.normaliser, shards=shards)
    gradients = jax.tree.map(lambda g: g / divisor, gradients)

    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes its int32 count with floats
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new_state = state.replace(
        step=state.step + 1,
        params=params,
        stats=stats,
        opt_state=opt_state,
        normaliser=normaliser,
    )
    classification, box = sums["classification"] / divisor, sums["box"] / divisor
    metrics = {
        "loss": classification + config.loss.box_weight * box,
        "classification_loss": classification,
        "box_loss": box,
        "positives_per_image": sums["positives"] / batch_size,
        "learning_rate": schedule(state.step),
        "gradient_norm": optax.tree.norm(gradients),
        "parameter_norm": optax.tree.norm(params),
    }
    return new_state, metrics
