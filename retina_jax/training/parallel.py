"""The step over many devices: jit over a data mesh (the default), or pmap. Both run the same `train_step`.

Under jit the program is written for the whole batch and the compiler splits it: what the code calls a sum over the batch
*is* one. Under pmap it is written for one device's share and sums cross the axis by name. Parameters are replicated,
images are split over the one axis `data`. Inference has no sums over images: each device handles its own, NMS included.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from retina_jax.config import Config, ConfigError
from retina_jax.model.initialisation import initialise
from retina_jax.model.resnet import ARCHITECTURES
from retina_jax.model.retinanet import RetinaNet
from retina_jax.ops.anchors import anchor_grid, anchors_per_cell, level_counts
from retina_jax.ops.postprocess import Detections, detect
from retina_jax.training.optimizer import learning_rate_schedule, make_optimizer
from retina_jax.training.state import TrainState, new_state
from retina_jax.training.step import Inputs, train_step

AXIS = "data"


@dataclass(frozen=True)
class Driver:
    """A network and its devices: places state and batches, runs the compiled steps."""

    config: Config
    num_classes: int

    @cached_property
    def mesh(self) -> Mesh:
        """One axis, `data`, over the devices used, host after host, equally many of each."""
        devices, hosts = jax.devices(), jax.process_count()
        wanted = self.config.devices or len(devices)
        if wanted > len(devices):
            raise ConfigError(f"devices: {wanted} asked for, {len(devices)} found ({devices[0].platform})")
        if wanted % hosts:
            raise ConfigError(
                f"devices: {wanted} cannot be split evenly over {hosts} hosts; take a multiple of {hosts}"
            )
        of_host = [[d for d in devices if d.process_index == host][: wanted // hosts] for host in range(hosts)]
        if {len(own) for own in of_host} != {wanted // hosts}:
            raise ConfigError(
                f"devices: the hosts have {', '.join(str(len(own)) for own in of_host)} devices; they must have equally "
                f"many, or --devices be a multiple of {hosts} that all of them can serve"
            )
        return Mesh(np.array(of_host).reshape(-1), (AXIS,))

    @property
    def shards(self) -> int:
        """Number of devices used, over all hosts."""
        return self.mesh.size

    @property
    def parts(self) -> int:
        """Parts a batch is taken in: by so many devices, so many times."""
        return self.shards * self.config.training.accumulate

    @property
    def by_name(self) -> bool:
        """Whether a step is written for one device's share: under pmap; where the share is taken in parts, so that the
        parts are added up on the device and cross between devices once; and with grouped convolutions, for each of which
        the compiler would gather the whole batch on every device."""
        grouped = ARCHITECTURES[self.config.model.backbone].groups > 1
        return self.config.parallel == "pmap" or self.config.training.accumulate > 1 or grouped

    @cached_property
    def model(self) -> RetinaNet:
        """The network; it knows the axis only where statistics must cross it by name."""
        axis = AXIS if self.by_name else None
        return RetinaNet(self.config.model, self.num_classes, anchors_per_cell(self.config.anchors), axis_name=axis)

    @cached_property
    def schedule(self) -> optax.Schedule:
        """Learning rate by step."""
        return learning_rate_schedule(self.config.optimizer, self.config.data.batch_size)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Gradient transformation."""
        return make_optimizer(self.config.optimizer, self.schedule)

    @cached_property
    def replicated(self) -> NamedSharding:
        """Sharding of everything that is the same on all devices."""
        return NamedSharding(self.mesh, P())

    def check_batch_size(self) -> None:
        """The batch must split evenly over the devices, and on each into its parts."""
        if (batch_size := self.config.data.batch_size) % self.parts:
            times = self.config.training.accumulate
            in_parts = f" in {times} parts each (training.accumulate)" if times > 1 else ""
            raise ConfigError(
                f"data.batch_size: {batch_size} images cannot be split evenly over {self.shards} devices{in_parts}; "
                f"take a multiple of {self.parts}, or fewer devices with --devices"
            )

    def place_state(self, state: PyTree) -> PyTree:
        """`state`, the same on every host, on every device."""
        return jax.tree.map(self._everywhere, state)

    def _everywhere(self, array: Any) -> Array:
        if jax.process_count() == 1:
            return jax.device_put(array, self.replicated)
        own = np.asarray(array)  # not device_put, which would compare the hosts' arrays one by one over the network
        return jax.make_array_from_callback(own.shape, self.replicated, lambda index: own[index])

    def init_state(self) -> TrainState:
        """The state before the first step, by config.seed, on the devices."""
        return self.state_of(initialise(self.model, self.config.seed))

    def state_of(self, variables: dict[str, PyTree]) -> TrainState:
        """The state before the first step from these variables, on the devices."""
        averaged = self.config.optimizer.ema_decay > 0
        return self.place_state(new_state(variables, self.optimizer, averaged=averaged))

    def place(self, inputs: Inputs) -> Inputs:
        """This host's rows of a global batch, split over its devices; pmap takes them as [devices, rows, ...]."""
        if self.config.parallel == "pmap":
            local = self.mesh.local_mesh.size
            return jax.tree.map(lambda x: x.reshape(local, x.shape[0] // local, *x.shape[1:]), inputs)
        split = NamedSharding(self.mesh, P(AXIS))
        return jax.tree.map(partial(jax.make_array_from_process_local_data, split), inputs)

    @cached_property
    def step(self) -> Callable[[TrainState, Inputs], tuple[TrainState, dict[str, Array]]]:
        """The compiled training step; one program per shape of a batch. The state given is consumed (donated)."""
        step = partial(
            train_step,
            model=self.model,
            config=self.config,
            optimizer=self.optimizer,
            schedule=self.schedule,
            shards=self.shards,
            accumulate=self.config.training.accumulate,
            keep_finite=self.config.training.skip_non_finite > 0,
            axis=AXIS if self.by_name else None,
        )
        if self.config.parallel == "pmap":
            return jax.pmap(
                step,
                axis_name=AXIS,
                in_axes=(None, 0),
                out_axes=(None, None),
                devices=list(self.mesh.devices.flat),
                donate_argnums=0,
            )
        images, everywhere = P(AXIS), P()
        on_every_device = partial(jax.shard_map, mesh=self.mesh, check_vma=False)
        if self.by_name:
            step = on_every_device(step, in_specs=(everywhere, images), out_specs=(everywhere, everywhere))
        else:
            own_images = partial(
                on_every_device,
                in_specs=(images, images, everywhere, images, images),  # the arguments of `image_losses`
                out_specs=images,
            )
            step = partial(step, on_own_images=own_images)
        return jax.jit(
            step,
            in_shardings=(self.replicated, NamedSharding(self.mesh, images)),
            out_shardings=(self.replicated, self.replicated),
            donate_argnums=0,
        )

    @cached_property
    def detect(self) -> Callable[[dict[str, PyTree], Inputs], Detections]:
        """The compiled inference step: variables and a placed batch to Detections in canvas pixels, [B, D, ...], of which
        each host holds its own rows."""

        def one_device(variables: dict[str, PyTree], inputs: Inputs) -> Detections:
            canvas = inputs.images.shape[1:3]
            logits, deltas = self.model.apply(variables, inputs.images, inputs.image_sizes, train=False)
            anchors = jax.numpy.asarray(anchor_grid(canvas, self.config.anchors, self.config.model))
            counts = level_counts(canvas, self.config.anchors, self.config.model)
            return detect(logits, deltas, anchors, counts, inputs.image_sizes, self.config.detection)

        if self.config.parallel == "pmap":
            mapped = jax.pmap(one_device, axis_name=AXIS, in_axes=(None, 0), devices=list(self.mesh.devices.flat))
            return lambda variables, inputs: jax.tree.map(
                lambda x: x.reshape(-1, *x.shape[2:]), mapped(variables, inputs)
            )
        return jax.jit(
            jax.shard_map(one_device, mesh=self.mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS), check_vma=False)
        )


def own_rows(batch: PyTree) -> PyTree:
    """This host's rows of arrays that are split over the devices of all hosts, as numpy arrays."""

    def own(array: Array) -> np.ndarray:
        if array.is_fully_addressable:
            return np.asarray(jax.device_get(array))
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards])

    return jax.tree.map(own, batch)


def peak_memory_bytes() -> int:
    """Most memory in use so far: of the fullest local device, or of this process where devices do not tell (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(s["peak_bytes_in_use"] for s in stats)
    try:  # of Linux; ru_maxrss begins there at the peak of the process that started this one
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
