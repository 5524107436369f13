"""One training step as a pure function; the drivers in parallel.py run it over many devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree, UInt8

from retina_jax.config import Config
from retina_jax.losses.total import denominator, image_losses, image_weights
from retina_jax.model.retinanet import RetinaNet
from retina_jax.ops.anchors import anchor_grid
from retina_jax.training.state import AveragedState, TrainState

# What must be numbers after a step: a gradient or parameters that are not poison every step after, at a finite loss too.
FINITE = ("classification_loss", "box_loss", "gradient_norm", "parameter_norm")
SUMS = ("classification", "box", "positives")

F = TypeVar("F", bound=Callable[..., Any])


class Inputs(NamedTuple):
    """What travels to the devices. Boxes are in canvas pixels, padded rows have label -1."""

    images: UInt8[Array, "B H W 3"] | Float32[Array, "B H W 3"]
    image_sizes: Int[Array, "B 2"]
    boxes_xyxy: Float[Array, "B G 4"]
    labels: Int[Array, "B G"]
    valid: Bool[Array, " B"]
    """False for an image that could not be read: no loss comes of it (its black pixels do enter batch statistics)."""

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """Those fields of a `data.pipeline.Batch` that travel."""
        return cls(*(getattr(batch, name) for name in cls._fields))


def train_step(
    state: TrainState,
    inputs: Inputs,
    *,
    model: RetinaNet,
    config: Config,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shards: int,
    accumulate: int = 1,
    keep_finite: bool = False,
    axis: str | None = None,
    on_own_images: Callable[[F], F] = lambda function: function,
) -> tuple[TrainState, dict[str, Array]]:
    """`state` after one step of synchronous SGD on a global batch, and the step's metrics.

    With `axis` None the view is global: `inputs` is the whole batch and whoever compiles the step splits it (jit). With
    an axis name the view is one device's: `inputs` is its share and sums cross the axis (pmap). `shards` is the number
    of devices either way. `on_own_images` makes a function of images one that every device runs on its own: the loops of
    the losses would otherwise wait for all devices at each turn.

    Normalisers global and ema are sums over the global batch, known only after the forward pass. Gradients are therefore
    taken of the weighted *sum* of the images' losses and divided afterwards, so that gradients, losses and counts meet in
    one all-reduce. For the same reason a device can take its images in `accumulate` parts, one after the other, and add
    up: to normalisers `per_device` and `ema` each part then stands for a device of its own, and BatchNorm takes its
    statistics of one part of every device.

    `keep_finite`: a step whose loss, gradient or new parameters are not finite leaves everything as it was but its
    number, for the schedule too, and `state.skipped`.
    """
    height, width = inputs.images.shape[1:3]
    anchors = jnp.asarray(anchor_grid((height, width), config.anchors, config.model))
    batch_size = inputs.images.shape[0] * (shards if axis else 1)
    parts = shards * accumulate

    def summed_loss(params: PyTree, stats: PyTree, inputs: Inputs) -> tuple[Array, tuple[dict[str, Array], PyTree]]:
        variables = {"params": params, "frozen": state.frozen, "stats": stats}
        (logits, deltas), updated = model.apply(
            variables, inputs.images, inputs.image_sizes, train=True, mutable=["stats"]
        )
        losses_of = on_own_images(partial(image_losses, matching=config.matching, loss=config.loss))
        losses = losses_of(logits, deltas, anchors, inputs.boxes_xyxy, inputs.labels)
        positives = jnp.where(inputs.valid, losses.positives, 0.0)

        def weighted(losses: Array, counts: Array) -> Array:
            weights = image_weights(counts, config.loss.normaliser, batch_size=batch_size, shards=parts)
            return jnp.sum(jnp.where(inputs.valid, weights, 0.0) * losses)

        sums = {
            "classification": weighted(losses.classification, jnp.where(inputs.valid, losses.averaged_over, 0.0)),
            "box": weighted(losses.box, positives),
            "positives": jnp.sum(positives),
        }
        total = sums["classification"] + config.loss.box_weight * sums["box"]
        return total, (sums, updated.get("stats", {}))

    gradient_of = jax.grad(summed_loss, has_aux=True)
    if accumulate == 1:
        gradients, (sums, stats) = gradient_of(state.params, state.stats, inputs)
    else:

        def add_part(carry: PyTree, part: Inputs) -> tuple[PyTree, None]:
            *so_far, stats = carry
            gradients, (sums, stats) = gradient_of(state.params, stats, part)
            return (*jax.tree.map(jnp.add, tuple(so_far), (gradients, sums)), stats), None

        zeros = jax.tree.map(jnp.zeros_like, state.params), dict.fromkeys(SUMS, jnp.zeros((), jnp.float32))
        of_parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), inputs)
        (gradients, sums, stats), _ = jax.lax.scan(add_part, (*zeros, state.stats), of_parts)
    if axis is not None:
        gradients, sums = jax.lax.psum((gradients, sums), axis)
    divisor, normaliser = denominator(sums["positives"], config.loss.normaliser, state.normaliser, shards=parts)
    gradients = jax.tree.map(lambda g: g / divisor, gradients)
    gradient_norm = optax.tree.norm(gradients)
    # So that no update comes before the last gradient: else XLA on the CPU, for which a layer's kernel may still be read
    # by then, copies all parameters before each step. A step whose norm is not finite ends the run or is skipped anyway.
    gradients = jax.tree.map(lambda g: jnp.where(jnp.isfinite(gradient_norm), g, jnp.nan), gradients)

    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes its int32 count with floats
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    classification, box = sums["classification"] / divisor, sums["box"] / divisor
    new_state = state.replace(
        step=state.step + 1,
        params=params,
        stats=stats,
        opt_state=opt_state,
        normaliser=normaliser,
    )
    if isinstance(state, AveragedState):
        learnt = {"params": params, "stats": stats}
        updates_before = state.step - state.skipped
        new_state = new_state.replace(ema=average(state.ema, learnt, updates_before, config.optimizer.ema_decay))
    metrics = {
        "loss": classification + config.loss.box_weight * box,
        "classification_loss": classification,
        "box_loss": box,
        "positives_per_image": sums["positives"] / batch_size,
        "learning_rate": schedule(state.step),
        "gradient_norm": gradient_norm,
        "parameter_norm": optax.tree.norm(params),
    }
    if keep_finite:
        finite = jnp.all(jnp.isfinite(jnp.stack([metrics[name] for name in FINITE])))
        # The optimizer's last part counts the steps of the schedule, whose boundaries are steps of the run.
        kept = (*state.opt_state[:-1], opt_state[-1])
        unchanged = state.replace(step=new_state.step, skipped=state.skipped + 1, opt_state=kept)
        new_state = jax.tree.map(partial(jnp.where, finite), new_state, unchanged)
    return new_state, {**metrics, "skipped": new_state.skipped}


# Running mean of the parameters (EMA): what a run is judged by once its own parameters still jump about.


def averaging_decay(updates: Int[Array, ""], decay: float) -> Float32[Array, ""]:
    """min(decay, (1 + t) / (10 + t)) after t `updates`: .1 at the first, so that the random start is soon forgotten.

    The warm-up is that of TensorFlow's ExponentialMovingAverage. It meets .999 after 8990 updates, .9999 after 89990.
    """
    t = updates.astype(jnp.float32)  # exact up to 2^24
    return jnp.minimum(jnp.float32(decay), (1 + t) / (10 + t))


def average(mean: PyTree, new: PyTree, updates: Int[Array, ""], decay: float) -> PyTree:
    """The mean after one more update: d mean + (1 - d) new, d as `averaging_decay` of the updates before gives it."""
    d = averaging_decay(updates, decay)
    return jax.tree.map(lambda m, x: d * m + (1 - d) * x, mean, new)
