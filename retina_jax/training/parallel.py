"""The step over many devices: jit over a data mesh (the default), or pmap. Both run the same `train_step`.

It is written for the images of one device, and sums go over the named axis `data`. So devices exchange exactly what is
summed: gradients and losses once, in float32, and the statistics of norm "batch". Parameters are replicated, images are
split over the axis.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from retina_jax import cpu
from retina_jax.config import Config, ConfigError
from retina_jax.losses.total import ImageLosses, image_losses
from retina_jax.model.initialisation import initialise, variable_shapes
from retina_jax.model.preparation import prepare
from retina_jax.model.retinanet import RetinaNet
from retina_jax.ops.anchors import anchor_grid, anchors_per_cell
from retina_jax.ops.postprocess import Detections, detect
from retina_jax.training.optimizer import learning_rate_schedule, make_optimizer
from retina_jax.training.state import TrainState, state_from
from retina_jax.training.step import Inputs, train_step

AXIS = "data"
LONG_RUN = 500  # steps from which on blocks save more time than the compilation cache does
BLOCK = 31 * 2**20  # bytes of temporaries on CPUs; glibc keeps freed blocks below 32 MiB (`cli.limit_heaps`)


@dataclass(frozen=True)
class Driver:
    """A network on its devices, which distributes state and batches, and compiles the steps."""

    config: Config
    num_classes: int
    topology: tuple[Any, ...] = ()
    """Described devices, in place of those of JAX, for programs that are only compiled (`accelerators.targets`)."""

    @cached_property
    def mesh(self) -> Mesh:
        """One axis, `data`, over the devices used, host by host, the same number on each."""
        if self.topology:
            return Mesh(np.array(self.topology), (AXIS,))
        devices, hosts = jax.devices(), jax.process_count()
        wanted = self.config.devices or len(devices)
        if wanted > len(devices):
            found = f"{wanted} requested, {len(devices)} found ({devices[0].platform})"
            raise ConfigError(f"devices: {found}; use --devices 1, or 0 for all")
        if wanted % hosts:
            raise ConfigError(f"devices: {wanted} is not divisible by {hosts} hosts; use a multiple of {hosts}")
        of_host = [[d for d in devices if d.process_index == host][: wanted // hosts] for host in range(hosts)]
        counts = [len(own) for own in of_host]
        if set(counts) != {wanted // hosts}:
            raise ConfigError(f"devices: the hosts have {counts} devices; use a number (--devices) that each host has")
        return Mesh(np.array(of_host).reshape(-1), (AXIS,))

    @property
    def platform(self) -> str:
        """Platform of the devices: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def num_devices(self) -> int:
        """Number of devices used, over all hosts."""
        return self.mesh.size

    @property
    def num_microbatches(self) -> int:
        """Number of micro-batches of a global batch: devices times training.accumulate."""
        return self.num_devices * self.config.training.accumulate

    @property
    def axis_name(self) -> str | None:
        """Named axis of the sums over devices; None for one device, where XLA on the CPU would copy what it sums."""
        return AXIS if self.num_devices > 1 else None

    @cached_property
    def model(self) -> RetinaNet:
        """The network, as part of a step."""
        per_cell = anchors_per_cell(self.config.anchors)
        return RetinaNet(self.config.model, self.num_classes, per_cell, axis_name=self.axis_name)

    @cached_property
    def schedule(self) -> optax.Schedule:
        """Learning rate as a function of the step, from 0; for the batch over all devices and hosts."""
        return learning_rate_schedule(self.config.optimizer, self.config.data.batch_size, self.config.training.steps)

    @cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """The gradient transformation of `make_optimizer`, with `schedule`."""
        return make_optimizer(self.config.optimizer, self.schedule)

    @cached_property
    def replicated(self) -> NamedSharding:
        """Sharding of everything that is the same on all devices."""
        return NamedSharding(self.mesh, P())

    def check_batch_size(self) -> None:
        """Raises ConfigError if the batch does not divide evenly into micro-batches."""
        if (batch_size := self.config.data.batch_size) % self.num_microbatches:
            accumulate = self.config.training.accumulate
            each = f" with {accumulate} micro-batches each (training.accumulate)" if accumulate > 1 else ""
            found = f"{batch_size} is not divisible by {self.num_devices} devices{each}"
            other = "" if self.topology else " or --devices"
            raise ConfigError(f"data.batch_size: {found}; use a multiple of {self.num_microbatches}{other}")

    def replicate(self, state: PyTree) -> PyTree:
        """Copies `state`, equal on all hosts, to every device."""
        if jax.process_count() == 1:
            return jax.device_put(state, self.replicated)
        # device_put would compare the hosts' arrays one by one over the network.
        arrays = jax.tree.map(np.asarray, state)
        return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, self.replicated, a.__getitem__), arrays)

    def init_state(self, variables: dict[str, PyTree] | None = None) -> TrainState:
        """Returns the state before the first step, on the devices: from `variables`, or random ones by config.seed."""
        if variables is None:
            variables = initialise(self.model, self.config.seed)
        return self.replicate(state_from(variables, self.optimizer, averaged=self.config.optimizer.ema_decay > 0))

    def shard_batch(self, inputs: Inputs) -> Inputs:
        """Splits this host's rows of a global batch over its devices; for pmap as [devices, rows, ...]."""
        if self.config.parallel == "pmap":
            local = self.mesh.local_mesh.size
            return jax.tree.map(lambda x: x.reshape(local, x.shape[0] // local, *x.shape[1:]), inputs)
        split = NamedSharding(self.mesh, P(AXIS))
        return jax.tree.map(partial(jax.make_array_from_process_local_data, split), inputs)

    def _traced(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `function`, traced in the forms for the platform: on CPUs only with config.cpu_kernels."""
        plain = self.platform == "cpu" and not self.config.cpu_kernels
        forms = "" if plain else self.platform

        def traced(*arguments: Any) -> Any:
            with cpu.kernels(forms):
                return function(*arguments)

        traced.__name__ = getattr(getattr(function, "func", function), "__name__", "traced")  # names the program
        return traced

    @cached_property
    def step(self) -> Callable[[TrainState, Inputs], tuple[TrainState, dict[str, Array]]]:
        """The compiled training step; one program per padded shape. Its argument `state` is consumed (donated). On CPUs that
        of a long run cannot be called in another `jit` or `scan`, because it has compiler options; `train_step` can."""
        parts = {"model": self.model, "config": self.config, "optimizer": self.optimizer, "schedule": self.schedule}
        step = partial(train_step, **parts, num_devices=self.num_devices, axis_name=self.axis_name)
        if self.config.parallel == "pmap":
            devices = list(self.mesh.devices.flat)
            axes = {"axis_name": AXIS, "in_axes": (None, 0), "out_axes": (None, None)}
            return jax.pmap(self._traced(step), **axes, devices=devices, donate_argnums=0)
        specs = {"in_specs": (P(), P(AXIS)), "out_specs": P()}
        mapped = jax.shard_map(self._traced(step), mesh=self.mesh, **specs, check_vma=False)
        shardings = self.replicated, NamedSharding(self.mesh, P(AXIS))
        options = None
        if self.platform == "cpu" and self.config.training.steps >= LONG_RUN:
            # A larger block is mapped anew in each step, with a page fault per 4 KiB: 4 to 25 % of a step. But JAX cannot
            # cache a program with several blocks (`cli.set_up_jax`).
            options = {"xla_multiheap_size_constraint_per_heap": BLOCK}
        arguments = {"in_shardings": shardings, "out_shardings": self.replicated, "donate_argnums": 0}
        return jax.jit(mapped, **arguments, compiler_options=options)

    def for_inference(self, variables: dict[str, PyTree]) -> dict[str, PyTree]:
        """Returns what `detect` and `losses` take in place of variables: those of `prepare` where this saves time. On TPUs,
        by XLA's estimate, detection with them takes as long on a v5e, 1.07 times as long on a v6e. CPUs multiply outputs by
        the gains of frozen norms in a pass that is needed anyway, so only other gains matter there."""
        kinds = {self.config.model.norm, self.config.model.head_norm}
        saves = self.platform == "gpu" or (self.platform == "cpu" and kinds & {"frozen_statistics", "batch"})
        return self.prepare(variables) if saves else variables

    @cached_property
    def prepare(self) -> Callable[[dict[str, PyTree]], dict[str, PyTree]]:
        """The compiled `model.preparation.prepare`; the results are on all devices."""
        function = partial(prepare, self.model)
        shapes = jax.eval_shape(function, variable_shapes(self.model))
        return jax.jit(function, out_shardings=jax.tree.map(self.stored, shapes))

    def stored(self, weight: jax.ShapeDtypeStruct) -> Format | NamedSharding:
        """Returns how a weight of inference is stored: on GPUs kernels in the order of cuDNN, output channels first."""
        if self.platform != "gpu" or weight.ndim != 4:
            return self.replicated
        return Format(Layout((3, 0, 1, 2)), self.replicated)

    @cached_property
    def detect(self) -> Callable[[dict[str, PyTree], Inputs], Detections]:
        """The compiled inference step: (variables, batch split over the devices) -> Detections in pixels of the padded
        images, [B, D, ...]; each host holds its own rows."""

        def one_device(variables: dict[str, PyTree], inputs: Inputs) -> Detections:
            levels = self.model.apply(variables, inputs.images, inputs.image_sizes, train=False, method="levels")
            anchors = anchor_grid(inputs.images.shape[1:3], self.config.anchors, self.config.model)
            logits, deltas = zip(*levels, strict=True)
            sizes, per_cell = inputs.image_sizes, self.model.anchors_per_cell
            return detect(logits, deltas, anchors, sizes, self.config.detection, anchors_per_cell=per_cell)

        return self._by_rows(one_device)

    @cached_property
    def losses(self) -> Callable[[dict[str, PyTree], Inputs], ImageLosses]:
        """The compiled loss sums without gradients, of a network in inference: (variables, batch split over the devices) ->
        ImageLosses; each host holds its own rows."""

        def losses(variables: dict[str, PyTree], inputs: Inputs) -> ImageLosses:
            levels = self.model.apply(variables, inputs.images, inputs.image_sizes, train=False, method="levels")
            anchors = jnp.asarray(anchor_grid(inputs.images.shape[1:3], self.config.anchors, self.config.model))
            rules = {"matching": self.config.matching, "loss": self.config.loss}
            return image_losses(*zip(*levels, strict=True), anchors, inputs.boxes_xyxy, inputs.labels, **rules)

        return self._by_rows(losses)

    def _by_rows(self, one_device: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """Compiles a function of (variables, rows of a batch) without gradients, whose results have one row per image."""
        one_device = self._traced(one_device)
        if self.config.parallel == "pmap":
            mapped = jax.pmap(one_device, axis_name=AXIS, in_axes=(None, 0), devices=list(self.mesh.devices.flat))

            def by_rows(*arguments: Any) -> PyTree:
                return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), mapped(*arguments))

            by_rows.lower = mapped.lower  # as that of a jitted function
            return by_rows
        specs = {"in_specs": (P(), P(AXIS)), "out_specs": P(AXIS)}
        return jax.jit(jax.shard_map(one_device, mesh=self.mesh, **specs, check_vma=False))


def local_rows(batch: PyTree) -> PyTree:
    """Returns this host's rows of arrays that are split over the devices of all hosts, as numpy arrays."""

    def own(array: Array) -> np.ndarray:
        if array.is_fully_addressable:
            return np.asarray(jax.device_get(array))
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards])

    return jax.tree.map(own, batch)


def peak_memory_bytes() -> int:
    """Returns the peak memory so far: of the fullest local device, or of this process if devices do not report it (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(s["peak_bytes_in_use"] for s in stats)
    try:  # on Linux ru_maxrss starts at the peak of the parent process
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
