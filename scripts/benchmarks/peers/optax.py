"""optax's sigmoid focal loss, jitted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from benchmarks.inputs import class_outputs
from benchmarks.parts import on_logits
from benchmarks.work import BenchmarkError, Task, Work


def make(task: Task) -> Work:
    """Prepares the focal loss of precomputed one-hot targets, and its gradient."""
    if task.name != "loss":
        raise BenchmarkError(f"optax has no benchmark {task.name}; use --peer torchvision")
    logits, labels = class_outputs(task.rows, task.classes, task.seed)
    taking_part = labels != -2
    logits = jnp.asarray(logits[taking_part], task.dtype)
    targets = jax.nn.one_hot(jnp.asarray(labels[taking_part]), task.classes, dtype=logits.dtype)
    loss = jax.value_and_grad(lambda x, y: optax.sigmoid_focal_loss(x, y, alpha=0.25, gamma=2.0).sum())
    work = on_logits(loss, logits, targets, task.keep_logits)
    return work._replace(facts=work.facts | {"version": f"optax {optax.__version__}, jax {jax.__version__}"})
