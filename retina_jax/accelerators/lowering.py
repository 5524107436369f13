"""The programs that training and inference run, lowered for described devices: no arrays are made on them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from retina_jax.config import Config, ConfigError
from retina_jax.model.initialisation import initialise
from retina_jax.model.summary import jaxpr_flops
from retina_jax.training.parallel import AXIS, Driver
from retina_jax.training.state import state_from
from retina_jax.training.step import Inputs

What = Literal["step", "detect"]


def lower(
    config: Config, num_classes: int, devices: Sequence[Any], what: What, padded_hw: tuple[int, int]
) -> tuple[jax.stages.Lowered, int]:
    """Lowers `Driver.step` or `Driver.detect` for a global batch of `config.data.batch_size` images of shape `padded_hw`.

    Returns the program, which `.compile()` makes for the devices, and its operations over all devices in the plain form
    (`summary.jaxpr_flops`), without the zeros between joined groups. Raises ConfigError if the batch does not divide evenly
    over the devices.
    """
    driver = Driver(config, num_classes, tuple(devices))
    driver.check_batch_size()
    plain = Driver(replace(config, parallel="jit", devices=1, cpu_kernels=False), num_classes)
    variables = initialise(driver.model, config.seed)
    sharding = None if config.parallel == "pmap" else driver.replicated
    if what == "detect":
        prepared = jax.eval_shape(driver.for_inference, variables)
        counted = plain.detect.trace(_shapes(prepared, plain.replicated), _inputs(plain, padded_hw))
        lowered = driver.detect.lower(_shapes(prepared, sharding and driver.stored), _inputs(driver, padded_hw))
        return lowered, jaxpr_flops(counted.jaxpr.jaxpr)
    state = state_from(variables, driver.optimizer, averaged=config.optimizer.ema_decay > 0)
    counted = plain.step.trace(_shapes(state, plain.replicated), _inputs(plain, padded_hw))
    lowered = driver.step.lower(_shapes(state, sharding), _inputs(driver, padded_hw))
    return lowered, jaxpr_flops(counted.jaxpr.jaxpr)


def _shapes(tree: PyTree, sharding: NamedSharding | Callable[[Any], Any] | None) -> PyTree:
    of = sharding if callable(sharding) else lambda leaf: sharding
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=of(leaf)), tree)


def _inputs(driver: Driver, padded_hw: tuple[int, int]) -> Inputs:
    """Returns the shapes of a global batch, split over the devices."""
    data, images = driver.config.data, driver.config.data.batch_size
    if data.max_boxes == "auto":
        raise ConfigError("data.max_boxes: auto needs the data; give a number, such as --data.max-boxes 100")
    split = NamedSharding(driver.mesh, P(AXIS))

    def of(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        if driver.config.parallel == "pmap":  # as `Driver.shard_batch` arranges them
            return jax.ShapeDtypeStruct((driver.num_devices, images // driver.num_devices, *shape), dtype)
        return jax.ShapeDtypeStruct((images, *shape), dtype, sharding=split)

    return Inputs(
        images=of(*padded_hw, 3, dtype=np.dtype(data.pixels)),
        image_sizes=of(2, dtype=np.int32),
        boxes_xyxy=of(data.max_boxes, 4, dtype=np.float32),
        labels=of(data.max_boxes, dtype=np.int32),
        valid=of(dtype=np.bool_),
    )
