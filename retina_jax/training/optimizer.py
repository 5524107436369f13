"""The paper's optimizer (Section 4.1, Optimization) in optax."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from retina_jax.config import Config, OptimizerConfig

PAPER_RATE, PAPER_BATCH_SIZE = 0.01, 16
MOST_OFF = 4  # factor between the learning rate and that of the linear scaling rule above which a warning is given


def learning_rate_schedule(config: OptimizerConfig, batch_size: int, steps: int) -> optax.Schedule:
    """Returns the learning rate by step, counted from 0, of a run of `steps` steps.

    piecewise: the peak, multiplied by `decay_factor` at each boundary: step 59999 still has the first rate, step 60000 the
    second. cosine: peak (1 + cos(pi step / steps)) / 2. The warm-up multiplies the first `warmup_steps` steps by a linear
    factor, from `warmup_factor` at step 0 to 1 at step `warmup_steps`; it does not shift the schedule.
    """
    peak = config.learning_rate * (batch_size / PAPER_BATCH_SIZE if config.scale_learning_rate else 1.0)
    pieces = {
        "piecewise": optax.piecewise_constant_schedule(peak, dict.fromkeys(config.boundaries, config.decay_factor)),
        "cosine": optax.cosine_decay_schedule(peak, max(steps, 1)),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    first = config.warmup_factor if config.warmup_steps else 1.0
    warmup = optax.linear_schedule(first, 1.0, max(config.warmup_steps, 1))

    def schedule(step: Any) -> Array:
        exact = jnp.asarray(step, jnp.float32)  # optax's schedules need float32; exact up to 2^24 steps
        return jnp.asarray(pieces(exact) * warmup(exact), jnp.float32)

    return schedule


def schedule_warning(config: Config) -> str | None:
    """Returns one line that names the boundaries, and the end of the warm-up, that are not reached; None if all are."""
    steps, optimizer = config.training.steps, config.optimizer
    boundaries = optimizer.boundaries if optimizer.schedule == "piecewise" else ()
    late = [boundary for boundary in boundaries if boundary >= steps]
    named = [f"optimizer.boundaries {' '.join(map(str, late))}"] if late else []
    if optimizer.warmup_steps and optimizer.warmup_steps >= steps:
        named.append(f"optimizer.warmup_steps {optimizer.warmup_steps}")
    usual = f"{steps * 2 // 3} {steps * 8 // 9} (2/3 and 8/9, as in the paper)"
    advice = f"; set --optimizer.boundaries {usual}" if late and steps > 3 else ""  # fewer steps have no two boundaries
    return f"{' and '.join(named)}: not reached in training.steps {steps}{advice}" if named else None


def rate_warning(config: Config) -> str | None:
    """Returns one line if the learning rate of sgd is more than MOST_OFF times that of the linear scaling rule, 0.01 for 16
    images, or less than a MOST_OFF-th of it; else None. AdamW's rate has no such rule."""
    optimizer, batch_size = config.optimizer, config.data.batch_size
    fitting = PAPER_RATE * batch_size / PAPER_BATCH_SIZE
    ratio = optimizer.learning_rate / fitting
    if optimizer.name != "sgd" or optimizer.scale_learning_rate or 1 / MOST_OFF <= ratio <= MOST_OFF or ratio == 0:
        return None
    found = f"optimizer.learning_rate {optimizer.learning_rate:g} does not fit data.batch_size {batch_size}"
    rule = f"the linear scaling rule from {PAPER_RATE:g} for {PAPER_BATCH_SIZE} images gives {fitting:.3g}"
    automatic = f" (or --optimizer.scale-learning-rate with {PAPER_RATE:g})"
    return f"{found}: {rule}; set --optimizer.learning-rate {fitting:.3g}{automatic}"


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Returns the gradient transformation, which applies the learning rate of `schedule` last. Its `update` needs
    `gradient_norm`, the global norm of the gradients.

    sgd: g <- clip(g) + decay * w;  v <- momentum * v + g;  w <- w - rate * v. The decay is not decoupled, and a lower rate
    takes effect at once. Every leaf not named `kernel` (biases, normalisation) takes `bias_learning_rate_factor` times the
    rate. Normalisation parameters do not decay; biases of convolutions do with `decay_biases`.
    """
    decay = optax.add_decayed_weights(config.weight_decay, partial(_decayed, biases=config.decay_biases))
    if config.name == "sgd":
        parts = [decay, optax.trace(decay=config.momentum)]
    else:
        parts = [optax.scale_by_adam(b1=config.momentum), decay]
    if config.clip_norm > 0:
        parts.insert(0, clip_by_norm(config.clip_norm))
    if config.bias_learning_rate_factor != 1.0:
        others = partial(jax.tree.map_with_path, lambda path, _: path[-1].key != "kernel")
        parts.append(optax.masked(optax.scale(config.bias_learning_rate_factor), others))
    return optax.with_extra_args_support(optax.chain(*parts, optax.scale_by_learning_rate(schedule)))


def clip_by_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """Returns optax's `clip_by_global_norm`, but `update` takes the norm, `gradient_norm`, which a step computes anyway."""

    def update(gradients: PyTree, state: optax.EmptyState, params: PyTree = None, *, gradient_norm: Array) -> tuple:
        scaled = partial(jax.tree.map, lambda g: jnp.where(gradient_norm < largest, g, g / gradient_norm * largest))
        return scaled(gradients), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def skipped_update(before: optax.OptState, after: optax.OptState) -> optax.OptState:
    """Returns the optimizer state after a skipped update: `before`, with the step count of the schedule of `after`. The
    schedule is the last part of `make_optimizer`; its boundaries are steps of the run."""
    return (*before[:-1], after[-1])


def _decayed(tree: PyTree, *, biases: bool) -> PyTree[bool]:
    """Returns the mask of the kernels and, with `biases`, of the biases of modules without a `scale` (convolutions)."""
    norms = {path[:-1] for path, _ in jax.tree.leaves_with_path(tree) if path[-1].key == "scale"}
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel" or (biases and path[:-1] not in norms), tree)
