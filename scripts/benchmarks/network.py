"""Benchmarks of the network: step, forward, detect and compile, by the programs that training and inference run."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.inputs import scene
from benchmarks.work import Task, Work
from retina_jax.cli import limit_heaps
from retina_jax.config import Config
from retina_jax.config_io import override
from retina_jax.model.summary import forward_flops, jaxpr_flops
from retina_jax.training.compilation import COMPILED, CompiledStep, compile_events, memory_of
from retina_jax.training.parallel import Driver
from retina_jax.training.state import TrainState
from retina_jax.training.step import Inputs

SCORES_ABOVE, LOGIT_STD = 1000, 1.5
"""For `detect`: scores above the threshold per image, and standard deviation of logits. Random weights give none or all."""


def make(task: Task) -> Work:
    """Returns the work of `task`."""
    driver = Driver(config_of(task), task.classes)
    inputs = driver.shard_batch(inputs_of(task))
    return {"step": step, "forward": forward, "detect": detect, "compile": compile_step}[task.name](
        task, driver, inputs
    )


def config_of(task: Task) -> Config:
    """Returns the paper's recipe on one device, with a learning rate too small to change the weights. Strides are in
    the 3x3, as in the peers, which costs 2 % more."""
    return override(
        Config(),
        {
            "model.backbone": task.backbone,
            "model.dtype": task.dtype,
            "model.stride_position": "3x3",
            "data.batch_size": task.batch,
            "optimizer.learning_rate": 1e-8,
            "devices": 1,
        },
    )


def inputs_of(task: Task) -> Inputs:
    """Returns a batch of `task`, with boxes padded as in training."""
    made = scene(task.batch, task.padded_hw, task.boxes, task.classes, task.seed)
    padding = ((0, 0), (0, Config().data.max_boxes - task.boxes))
    return Inputs(
        images=made.images,
        image_sizes=np.tile(np.array(task.padded_hw, np.int32), (task.batch, 1)),
        boxes_xyxy=np.pad(made.boxes_xyxy, (*padding, (0, 0))),
        labels=np.pad(made.labels, padding, constant_values=-1),
        valid=np.ones(task.batch, bool),
    )


def step_flops(driver: Driver, state: TrainState, inputs: Inputs) -> int:
    """Returns the operations of a step with plain convolutions; Winograd's method needs fewer."""
    plain = Driver(override(driver.config, {"cpu_kernels": False}), driver.num_classes)
    return jaxpr_flops(plain.step.trace(state, inputs).jaxpr.jaxpr)


def step(task: Task, driver: Driver, inputs: Inputs) -> Work:
    """Prepares a training step with a donated state, as in training."""
    limit_heaps()  # as scripts/train.py does
    state = driver.init_state()
    flops = step_flops(driver, state, inputs)
    jax.clear_caches()  # of programs that training does not trace
    compiled = CompiledStep(driver.step, num_shapes=1, announce=lambda line: None)
    facts = memory_facts(driver.step.lower(state, inputs).compile())

    def run() -> None:
        nonlocal state
        state, metrics = compiled(state, inputs)
        jax.block_until_ready((state, metrics))

    return Work(run, task.batch, flops, facts | peak_of(task))


def forward(task: Task, driver: Driver, inputs: Inputs) -> Work:
    """Prepares the forward pass of the network alone."""
    variables = driver.for_inference(driver.init_state().variables)
    program = jax.jit(partial(driver.model.apply, train=False))
    flops = task.batch * forward_flops(driver.config, task.classes, task.padded_hw)
    return Work(
        lambda: jax.block_until_ready(program(variables, inputs.images, inputs.image_sizes)),
        task.batch,
        flops,
        peak_of(task),
    )


def detect(task: Task, driver: Driver, inputs: Inputs) -> Work:
    """Prepares detection, from pixels to detections."""
    variables = driver.for_inference(variables_with_scores(driver, inputs, task.batch))
    flops = task.batch * forward_flops(driver.config, task.classes, task.padded_hw)
    facts = memory_facts(driver.detect.lower(variables, inputs).compile()) | peak_of(task)
    return Work(lambda: jax.block_until_ready(driver.detect(variables, inputs)), task.batch, flops, facts)


def variables_with_scores(driver: Driver, inputs: Inputs, batch: int) -> dict[str, Any]:
    """Returns random weights. The class output is scaled so that logits have the standard deviation of a trained
    network's, and shifted so that SCORES_ABOVE scores per image are above the threshold."""
    variables = driver.init_state().variables
    output = variables["params"]["class_head"]["output"]
    logits, _ = jax.jit(driver.model.apply)(variables, inputs.images, inputs.image_sizes)
    logits = np.asarray(logits, np.float32).reshape(-1) - output["bias"].mean()
    scale, last = LOGIT_STD / logits.std(), logits.size - min(SCORES_ABOVE * batch, logits.size)
    lowest = scale * np.partition(logits, last)[last]
    threshold = driver.config.detection.score_threshold
    output["kernel"] = output["kernel"] * scale
    output["bias"] = jnp.full_like(output["bias"], np.log(threshold / (1 - threshold)) - lowest)
    return variables


def compile_step(task: Task, driver: Driver, inputs: Inputs) -> Work:
    """Prepares the compilation of the training step; the facts include the time with a warm compilation cache. The step is
    that of a short run, which is cached on CPUs too."""
    state, config = driver.init_state(), override(driver.config, {"training.steps": 1})

    def compiled() -> Any:
        jax.clear_caches()
        return Driver(config, driver.num_classes).step.lower(state, inputs).compile()

    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        with compile_events() as events:
            compiled()
        cached_cpu, cached_wall = _timed(compiled)
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()  # else it would write to the deleted folder
    facts = {"programs": events[COMPILED], "cached_cpu_ms": cached_cpu, "cached_wall_ms": cached_wall}
    return Work(compiled, facts=facts | memory_facts(compiled()))


def memory_facts(program: jax.stages.Compiled) -> dict[str, Any]:
    """Returns the memory that `program` needs on the device, by XLA's account; None if its backend gives none."""
    memory = memory_of(program)
    return {"program_mib": sum(memory) / 2**20 if memory else None}


def _timed(function: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return 1000 * (time.process_time() - cpu), 1000 * (time.perf_counter() - wall)


def peak_of(task: Task) -> dict[str, Any]:
    """Measures the TFLOP/s of a product of two large matrices on this device in this precision, the best of five."""
    jax.block_until_ready(jax.live_arrays())  # wait for other work
    side = 8192 if task.device == "gpu" else 1536
    matrix = jnp.full((side, side), 1.0, task.dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(matrix, matrix))
    best = min(_timed(lambda: jax.block_until_ready(product(matrix, matrix)))[1] for _ in itertools.repeat(None, 5))
    return {"matmul_tflops": 2 * side**3 / best / 1e9}
