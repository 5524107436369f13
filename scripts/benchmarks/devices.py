"""Compares an accelerator with the CPU of its machine: outputs, losses and gradients of the same network on the same images.

The facts of the work are the rows; a repetition does nothing. Without an accelerator, the two are the CPU's faster kernels
and XLA's plain programs.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from benchmarks.network import config_of, inputs_of
from benchmarks.work import Task, Work
from retina_jax import cpu
from retina_jax.config import Config
from retina_jax.config_io import override
from retina_jax.model.initialisation import initialise
from retina_jax.training.parallel import Driver

TINY = {
    "model.backbone": "resnet18", "model.base_width": 8, "model.stage_blocks": (1, 1, 1, 1), "model.max_level": 5,
    "model.fpn_channels": 32, "model.head_channels": 32, "model.head_convs": 1,
}  # fmt: skip
PRECISIONS = {
    "float32": ("float32", None),  # as users run it: products may round their factors (TF32)
    "float32 highest": ("float32", "highest"),
    "bfloat16": ("bfloat16", None),
}
"""Name: model.dtype, and JAX's precision of products."""


def make(task: Task) -> Work:
    """Returns the comparison of a tiny network and, on an accelerator, of `task.backbone` in each precision."""
    device, host = jax.devices()[0], jax.devices("cpu")[0]
    networks = {"tiny": TINY} | ({} if device.platform == "cpu" else {task.backbone: {}})
    config = override(config_of(task), {"optimizer.weight_decay": 0.0})
    runs = [(name, precision, place) for name, precision in product(networks, PRECISIONS) for place in (device, "host")]

    def run(name: str, precision: str, place: Any) -> dict[str, Any]:
        dtype, products = PRECISIONS[precision]
        changed = override(config, {**networks[name], "model.dtype": dtype})
        if place == "host":
            return results(replace(changed, cpu_kernels=False), task, host, "highest")
        return results(changed, task, place, products)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # they are compiled at the same time
        found = dict(zip(runs, pool.map(lambda key: run(*key), runs), strict=True))
    rows = []
    for name, precision in product(networks, PRECISIONS):
        on_host = found[name, precision, "host"]
        row = {"network": name, "precision": precision, **differences(found[name, precision, device], on_host)}
        if precision == "bfloat16":  # how much the rounding itself changes
            rounding = differences(on_host, found[name, "float32", "host"])
            row |= {f"{key}_of_rounding": value for key, value in rounding.items()}
        rows.append(row)
    stats = device.memory_stats() or {}
    about = {
        "kind": device.device_kind,
        "platform": device.client.platform_version,
        "memory_bytes": stats.get("bytes_limit"),
    }
    return Work(lambda: None, facts={"rows": rows, "device": about})


def results(config: Config, task: Task, device: Any, products: str | None) -> dict[str, PyTree]:
    """Returns outputs, positive anchors, losses and gradients on `device`; the step is that of training."""
    driver = Driver(config, task.classes, (device,))
    variables, inputs = initialise(driver.model, task.seed), driver.shard_batch(inputs_of(task))

    @jax.jit
    def forward(variables: PyTree, images: PyTree, sizes: PyTree) -> PyTree:
        with cpu.kernels(None if config.cpu_kernels else ""):
            return driver.model.apply(variables, images, sizes, train=False)

    with jax.default_matmul_precision(products):
        outputs = forward(driver.replicate(variables), inputs.images, inputs.image_sizes)
        state, metrics = driver.step(driver.init_state(variables), inputs)
    (momentum,) = [part.trace for part in state.opt_state if isinstance(part, optax.TraceState)]
    losses = {name: metrics[name] for name in ("classification_loss", "box_loss")}
    # After the first step, without decay, the momentum is the gradient.
    matches = metrics["positives_per_image"]  # exactly equal, or IoUs are rounded otherwise
    return jax.device_get({"outputs": outputs, "matches": matches, "losses": losses, "gradients": momentum})


def differences(one: dict[str, PyTree], other: dict[str, PyTree]) -> dict[str, Any]:
    """Returns |one - other| / |other| of each part of the results, and of the gradient with the largest."""
    each = {
        jax.tree_util.keystr(path, simple=True, separator="/"): relative([leaf], [expected])
        for (path, leaf), expected in zip(
            jax.tree.leaves_with_path(one["gradients"]), jax.tree.leaves(other["gradients"]), strict=True
        )
    }
    worst = max(each, key=each.__getitem__)
    parts = {part: relative(*map(jax.tree.leaves, (one[part], other[part]))) for part in one}
    return {**parts, "worst_gradient": each[worst], "worst_gradient_name": worst}


def relative(arrays: list[Any], expected: list[Any]) -> float:
    """Returns the norm of the difference of the arrays, divided by the norm of the expected ones."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(arrays, expected, strict=True)]
    norm = float(np.sqrt(sum(np.square(b).sum() for _, b in pairs)))
    return float(np.sqrt(sum(np.square(a - b).sum() for a, b in pairs))) / norm if norm else 0.0
