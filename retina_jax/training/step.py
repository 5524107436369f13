"""One training step as a pure function. `parallel.py` compiles it and runs it over many devices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree

from retina_jax.config import Config
from retina_jax.cpu import enabled, platform
from retina_jax.losses.total import denominator, image_losses, image_weights
from retina_jax.model.retinanet import Images, RetinaNet
from retina_jax.ops.anchors import anchor_grid
from retina_jax.training.optimizer import skipped_update
from retina_jax.training.state import AveragedState, TrainState

FINITE = ("classification_loss", "box_loss", "gradient_norm", "parameter_norm")
"""Metrics that must be finite: a non-finite gradient or parameter spoils all later steps, even if the loss is finite."""

Sums = dict[str, Float32[Array, ""]]
"""Sums over the images: weighted "classification" and "box" losses, and "positives", the number of positive anchors."""


class Inputs(NamedTuple):
    """The fields of a batch that are sent to the devices. Boxes are in padded-image pixels; padded rows have label -1."""

    images: Images
    image_sizes: Int[Array, "B 2"]
    boxes_xyxy: Float[Array, "B G 4"]
    labels: Int[Array, "B G"]
    valid: Bool[Array, " B"]
    """False for an image that could not be read: it adds nothing to the loss (its black pixels do enter BatchNorm)."""

    @classmethod
    def of(cls, batch: Any) -> "Inputs":
        """Returns the fields of a `data.pipeline.Batch` that are sent."""
        return cls(*(getattr(batch, name) for name in cls._fields))


def train_step(
    state: TrainState,
    inputs: Inputs,
    *,
    model: RetinaNet,
    config: Config,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    num_devices: int,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Takes one step of synchronous SGD on a global batch; returns the new state and the metrics of the step.

    `inputs` holds the images of one of the `num_devices` devices, and sums go over the axis `axis_name` (shard_map, pmap).
    Without an axis it is the global batch, on one device.

    The normalisers global and ema are sums over the global batch, known only after the forward pass. So gradients are
    taken of the weighted sum of the images' losses and divided afterwards: one all-reduce of gradients, losses and counts.

    With training.skip_non_finite, a step whose loss, gradient or new parameters are not finite changes only the step number
    (also that of the schedule) and `state.skipped`.
    """
    batch_size = inputs.images.shape[0] * num_devices
    scope, num_microbatches = config.loss.normaliser, num_devices * config.training.accumulate
    weights_of = partial(image_weights, scope=scope, batch_size=batch_size, num_microbatches=num_microbatches)
    gradients, sums, stats = _gradients(state, inputs, model, config, weights_of)
    if axis_name is not None:
        gradients, sums = jax.lax.psum((gradients, sums), axis_name)
    if platform() == "gpu":
        # Otherwise XLA updates all parameters in the layout of cuDNN's gradients, and copies them before and after: 319
        # instead of 141 copies per step.
        gradients = jax.tree.map(lambda g: with_layout_constraint(g, Layout(tuple(range(g.ndim)))), gradients)

    divisor, normaliser = denominator(sums["positives"], scope, state.normaliser, num_microbatches=num_microbatches)
    gradients = jax.tree.map(lambda g: g / divisor, gradients)
    gradient_norm = optax.tree.norm(gradients)
    if platform() != "gpu" and (not enabled() or config.model.norm == "frozen_statistics"):
        # This makes every update depend on the last gradient. Otherwise XLA on the CPU copies all parameters before each
        # step, because a layer's kernel may still be read when it is updated. (`cpu.convolution` has dependencies of its
        # own, but trained scales read a kernel once more.) A step whose norm is not finite is of no use anyway. On GPUs
        # nothing is copied, and each gradient would be read twice.
        gradients = jax.tree.map(lambda g: jnp.where(jnp.isfinite(gradient_norm), g, jnp.nan), gradients)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes its int32 count with floats
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, gradient_norm=gradient_norm)
    params = optax.apply_updates(state.params, updates)

    changed = {"params": params, "stats": stats, "opt_state": opt_state, "normaliser": normaliser}
    if isinstance(state, AveragedState):
        decay = ema_decay(state.step - state.skipped, config.optimizer.ema_decay)
        changed["ema"] = ema_update(state.ema, {"params": params, "stats": stats}, decay)
    new_state = state.replace(step=state.step + 1, **changed)
    classification, box = sums["classification"] / divisor, sums["box"] / divisor
    metrics = {
        "loss": classification + config.loss.box_weight * box,
        "classification_loss": classification,
        "box_loss": box,
        "positives_per_image": sums["positives"] / batch_size,
        "learning_rate": schedule(state.step),
        "gradient_norm": gradient_norm,
        "parameter_norm": optax.tree.norm(params),
    }
    if config.training.skip_non_finite:
        new_state = _if_finite(state, new_state, metrics)
    return new_state, {**metrics, "skipped": new_state.skipped}


def _gradients(
    state: TrainState, inputs: Inputs, model: RetinaNet, config: Config, weights_of: Callable
) -> tuple[PyTree, Sums, PyTree]:
    """Returns the gradients of sum_i w_i loss_i (`losses.total`), the sums, and the new BatchNorm statistics.

    They are added up over the micro-batches, one after the other. For the normalisers per_device and ema each of them counts
    as a device. BatchNorm takes its statistics over all devices, in one accumulation step.
    """
    anchors = jnp.asarray(anchor_grid(inputs.images.shape[1:3], config.anchors, config.model))

    def loss_sum(params: PyTree, stats: PyTree, inputs: Inputs) -> tuple[Array, tuple[Sums, PyTree]]:
        variables = {"params": params, "frozen": state.frozen, "stats": stats}
        images = inputs.images, inputs.image_sizes
        levels, updated = model.apply(variables, *images, train=True, mutable=["stats"], method="levels")
        truth = inputs.boxes_xyxy, inputs.labels
        losses = image_losses(*zip(*levels, strict=True), anchors, *truth, matching=config.matching, loss=config.loss)
        positives = jnp.where(inputs.valid, losses.positives, 0.0)

        def weighted(losses: Array, counts: Array) -> Array:
            return jnp.sum(jnp.where(inputs.valid, weights_of(counts), 0.0) * losses)

        sums = {
            "classification": weighted(losses.classification, jnp.where(inputs.valid, losses.averaged_over, 0.0)),
            "box": weighted(losses.box, positives),
            "positives": jnp.sum(positives),
        }
        return sums["classification"] + config.loss.box_weight * sums["box"], (sums, updated.get("stats", {}))

    gradient_of = jax.grad(loss_sum, has_aux=True)
    if config.training.accumulate == 1:
        gradients, (sums, stats) = gradient_of(state.params, state.stats, inputs)
        return gradients, sums, stats

    def add_microbatch(carry: PyTree, inputs: Inputs) -> tuple[PyTree, None]:
        *so_far, stats = carry
        gradients, (sums, stats) = gradient_of(state.params, stats, inputs)
        return (*jax.tree.map(jnp.add, tuple(so_far), (gradients, sums)), stats), None

    no_sums = dict.fromkeys(("classification", "box", "positives"), jnp.zeros((), jnp.float32))
    start = jax.tree.map(jnp.zeros_like, state.params), no_sums, state.stats
    microbatches = jax.tree.map(lambda x: x.reshape(config.training.accumulate, -1, *x.shape[1:]), inputs)
    return jax.lax.scan(add_microbatch, start, microbatches)[0]


def _if_finite(state: TrainState, new_state: TrainState, metrics: dict[str, Array]) -> TrainState:
    """Returns `new_state` if the step is finite, else `state` with another step number and count of skipped steps."""
    finite = jnp.all(jnp.isfinite(jnp.stack([metrics[name] for name in FINITE])))
    opt_state = skipped_update(state.opt_state, new_state.opt_state)
    unchanged = state.replace(step=new_state.step, skipped=state.skipped + 1, opt_state=opt_state)
    return jax.tree.map(partial(jnp.where, finite), new_state, unchanged)


def ema_decay(updates: Int[Array, ""], decay: float) -> Float32[Array, ""]:
    """Returns d of the EMA, min(decay, (1 + t) / (10 + t)) after t `updates`: 0.1 at first, so that the random start fades.

    The warm-up is that of TensorFlow's ExponentialMovingAverage. It reaches 0.999 after 8990 updates, 0.9999 after 89990.
    """
    t = updates.astype(jnp.float32)  # exact up to 2^24
    return jnp.minimum(jnp.float32(decay), (1 + t) / (10 + t))


def ema_update(mean: PyTree, new: PyTree, decay: Float32[Array, ""]) -> PyTree:
    """Returns decay * mean + (1 - decay) * new, leaf by leaf."""
    return jax.tree.map(lambda m, x: decay * m + (1 - decay) * x, mean, new)
