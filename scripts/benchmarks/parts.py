"""Benchmarks of loss, match and nms, by the functions that training and inference call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks.inputs import boxes_in, candidates, class_outputs
from benchmarks.work import Task, Work
from retina_jax.config import LossConfig, MatchingConfig
from retina_jax.losses.fused import summed
from retina_jax.ops.matching import match
from retina_jax.ops.nms import nms


def make(task: Task) -> Work:
    """Returns the work of `task`."""
    return {"loss": loss, "match": matching, "nms": suppression}[task.name](task)


def loss(task: Task) -> Work:
    """Prepares the summed focal loss and its gradient."""
    logits, labels = class_outputs(task.rows, task.classes, task.seed)
    of_image = summed(LossConfig())
    function = jax.value_and_grad(lambda logits, labels: of_image(logits, labels).sum())
    return on_logits(function, jnp.asarray(logits, task.dtype)[None], jnp.asarray(labels)[None], task.keep_logits)


def on_logits(function: Callable[[Array, Array], Any], logits: Array, targets: Array, keep: bool) -> Work:
    """Prepares `function`, jitted. The logits are donated, as in a training step, and copied before each repetition. With
    `keep` they are not donated."""
    facts = {"keep_logits": keep}
    if keep:
        program = jax.jit(function)
        return Work(run=lambda: jax.block_until_ready(program(logits, targets)), facts=facts)
    consuming = jax.jit(function, donate_argnums=0)
    copies: list[Array] = []
    return Work(
        run=lambda: jax.block_until_ready(consuming(copies.pop(), targets)),
        before=lambda: copies.append(jax.block_until_ready(jnp.copy(logits))),
        facts=facts,
    )


def matching(task: Task) -> Work:
    """Prepares the matching of anchors of random positions and sizes with random boxes."""
    rng = np.random.default_rng(task.seed)
    anchors = jnp.asarray(boxes_in(rng, (task.rows,), (800, 1333)))
    boxes = jnp.asarray(boxes_in(rng, (task.boxes,), (800, 1333)))
    labels = jnp.zeros(task.boxes, jnp.int32)
    program = jax.jit(partial(match, config=MatchingConfig()))
    return Work(lambda: jax.block_until_ready(program(anchors, boxes, labels)))


def suppression(task: Task) -> Work:
    """Prepares NMS of candidates in clusters."""
    made = [jnp.asarray(part) for part in candidates(task.rows, task.classes, task.seed)]
    program = jax.jit(partial(nms, iou_threshold=0.5, max_detections=task.kept))
    kept = int(program(*made)[1].sum())
    return Work(lambda: jax.block_until_ready(program(*made)), facts={"kept": kept})
