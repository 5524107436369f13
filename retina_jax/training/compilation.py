"""Compiles the training step: reports time and memory of each program, and warns of programs that should not be needed."""

import ctypes
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import jax
from jax.errors import JaxRuntimeError
from jaxtyping import PyTree

from retina_jax.console import log
from retina_jax.data.source import paused_collector
from retina_jax.errors import OutOfMemory, device_memory, out_of_memory, size

COMPILED = "/jax/core/compile/backend_compile_duration"
TRACED, LOWERED = "/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration"
CACHE_HIT = "/jax/compilation_cache/cache_hits"
STEPS_UNTIL_FREED = 3  # steps after which the buffers of the initial state have been freed
Shape = tuple[int, int]  # padded shape of a batch's images: height and width, pixels
Kinds = dict[str, tuple[Any, Any]]  # what a program depends on, by array: shape, dtype and weak type; sharding


class Memory(NamedTuple):
    """The bytes that a program occupies on each device while it runs, as XLA reports them."""

    arguments: int
    results: int  # without those in the buffer of an argument (donated)
    temporaries: int
    code: int

    def __str__(self) -> str:
        unit, name = (2**30, "GiB") if sum(self) >= 2**30 else (2**20, "MiB")
        parts = ", ".join(f"{part} {number / unit:.2f}" for part, number in self._asdict().items())
        return f"{sum(self) / unit:.2f} {name} on each device ({parts})"


class CompiledStep:
    """The step of a driver, with log lines before and after the compilation of each program, with time and memory.

    A warning names what differs if a program was compiled for another reason than a new padded shape (a dtype, a batch size,
    a sharding), and one is logged for each padded shape beyond the expected number. The shapes in `ahead` are compiled with
    the first one if `eager`, else each before its first step. Raises OutOfMemory in compiling and in running.
    """

    def __init__(
        self,
        step: Any,
        num_shapes: int,
        announce: Callable[[str], None] = log,
        ahead: Sequence[Shape] = (),
        eager: bool = True,
    ) -> None:
        """Takes a jax.jit or jax.pmap of (state, inputs) to (state, metrics), and the expected number of padded shapes."""
        self._step, self._expected, self._announce, self._ahead, self._eager = step, num_shapes, announce, ahead, eager
        self._signatures: dict[Shape, list[Any]] = {}  # the latest of each padded shape
        self._memory: dict[Shape, Memory | None] = {}
        self._kinds: Kinds = {}  # of the latest program
        self._steps_until_freed = 0

    def __call__(self, state: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """Runs a step; `state` has the field `step`, the number of steps taken, and `inputs` has `images` [..., H, W, 3]."""
        shape = inputs.images.shape[-3:-1]
        # 0.15 ms for the 500 arrays of a ResNet-50, while the device computes the step before.
        signature = [_kind(leaf) for leaf in jax.tree.leaves((state, inputs))]
        if self._signatures.get(shape) != signature:
            self._compile(shape, state, inputs)
            self._signatures[shape] = signature
            if self._eager:
                self._compile_ahead(state, inputs, signature)
            self._steps_until_freed = STEPS_UNTIL_FREED
        self._steps_until_freed -= 1
        if self._steps_until_freed == 0:
            release_freed_memory()
        with _named_shape(shape, self._memory.get(shape)):
            return self._step(state, inputs)

    def _compile_ahead(self, state: PyTree, inputs: PyTree, signature: list[Any]) -> None:
        """Compiles the programs of the other padded shapes, whose arrays differ only in the sides of the images."""
        images = next(i for i, leaf in enumerate(jax.tree.leaves((state, inputs))) if leaf is inputs.images)
        aval, sharding = signature[images]
        for shape in self._ahead:
            if shape not in self._signatures:
                full = aval.update(shape=(*aval.shape[:-3], *shape, aval.shape[-1]))
                changed = jax.ShapeDtypeStruct(full.shape, full.dtype, sharding=sharding)
                self._make(shape, state, inputs._replace(images=changed))
                self._signatures[shape] = [*signature[:images], (full, sharding), *signature[images + 1 :]]

    def _compile(self, shape: Shape, state: PyTree, inputs: PyTree) -> None:
        """Compiles for this call, and warns if that should not have been needed."""
        before, self._kinds = self._kinds, _kinds(state, inputs)
        if not self._make(shape, state, inputs):
            return
        step = int(state.step) + 1
        if before and (differing := _differences(before, self._kinds)):
            self._announce(f"warning: step {step} recompiled: {differing}")
        if shape not in self._signatures and (number := len(self._signatures) + 1) > self._expected:
            known = ", ".join(f"{height}x{width}" for height, width in self._signatures)
            found = f"unexpected padded shape {shape[0]}x{shape[1]} (number {number}; {self._expected} expected)"
            self._announce(f"warning: step {step}: {found}; earlier: {known}")

    def _make(self, shape: Shape, state: PyTree, inputs: PyTree) -> bool:
        """Makes the program that a later call finds; returns whether there was none before."""
        if shape not in self._memory:
            total = len({*self._ahead, *self._memory, shape})
            self._announce(f"compiling program {len(self._memory) + 1} of {total} ({shape[0]}x{shape[1]}) ...")
        started = time.monotonic()
        with _named_shape(shape), compile_events() as events, paused_collector():
            program = self._step.lower(state, inputs).compile()
        elapsed = time.monotonic() - started
        release_freed_memory()
        self._memory[shape] = memory = memory_of(program)
        if events[COMPILED]:
            done = "found in the compilation cache" if events[CACHE_HIT] else "compiled"
            needed = f": {memory}{_share(memory)}" if memory else ""
            self._announce(f"step for {shape[0]}x{shape[1]} {done} in {elapsed:.1f} s{needed}")
        return events[COMPILED] > 0


@contextmanager
def _named_shape(shape: Shape, memory: Memory | None = None) -> Iterator[None]:
    """Turns an error that means a full memory into OutOfMemory with the padded shape."""
    try:
        yield
    except JaxRuntimeError as error:
        if line := out_of_memory(error, f"the step for {shape[0]}x{shape[1]}", memory):
            raise OutOfMemory(line) from error
        raise


def memory_of(program: jax.stages.Compiled) -> Memory | None:
    """Returns what `program` needs on each device; None if XLA's backend does not report it."""
    if (sizes := program.memory_analysis()) is None:
        return None
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return Memory(sizes.argument_size_in_bytes, results, sizes.temp_size_in_bytes, sizes.generated_code_size_in_bytes)


def _share(memory: Memory) -> str:
    limit = device_memory()
    return f", {100 * sum(memory) / limit:.0f}% of its {size(limit)}" if limit else ""


def release_freed_memory() -> None:
    """Returns freed memory to the operating system: glibc would keep what compiling took, about a gigabyte for the step of a
    ResNet-50, and the buffers of the initial state."""
    gc.collect()  # arrays in reference cycles
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def compile_events() -> Iterator[Counter[str]]:
    """Counts JAX's compilation events in the `with` block, and adds up their times as "EVENT seconds"."""
    events: Counter[str] = Counter()

    def count(event: str, *duration: float, **kwargs: str | int) -> None:
        events[event] += 1
        events[f"{event} seconds"] += sum(duration)

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_listener(count)
        jax.monitoring.unregister_event_duration_listener(count)


def compile_seconds(events: Counter[str]) -> float:
    """Returns the seconds in which the programs of `compile_events` were traced, lowered and compiled."""
    return float(sum(events[f"{event} seconds"] for event in (TRACED, LOWERED, COMPILED)))


def _kind(leaf: Any) -> tuple[Any, Any]:
    """Returns what the choice of a program depends on: shape, dtype and weak type; sharding."""
    return getattr(leaf, "aval", None) or jax.typeof(leaf), getattr(leaf, "sharding", None)


def _kinds(state: PyTree, inputs: PyTree) -> Kinds:
    """Returns the kind of each array by name, state.params... and inputs...; of the images without height and width."""
    leaves = jax.tree.leaves_with_path({"inputs": inputs, "state": state})
    kinds = {jax.tree_util.keystr(path, simple=True, separator="."): _kind(leaf) for path, leaf in leaves}
    aval, sharding = kinds["inputs.images"]
    return {**kinds, "inputs.images": (aval.update(shape=(*aval.shape[:-3], aval.shape[-1])), sharding)}


def _differences(old: Kinds, new: Kinds, most: int = 3) -> str:
    """Returns the first arrays that differ and how, on one line; empty if none does."""
    names = [name for name in old | new if old.get(name) != new.get(name)]
    shown = [f"{name} {_difference(old.get(name), new.get(name))}" for name in names[:most]]
    return ", ".join(shown) + (f", and {len(names) - most} more" if len(names) > most else "")


def _difference(old: tuple[Any, Any] | None, new: tuple[Any, Any] | None) -> str:
    if old is None or new is None:
        return "is new" if old is None else "is gone"
    for facet in ("dtype", "shape", "weak_type"):
        before, after = getattr(old[0], facet), getattr(new[0], facet)
        if before != after:
            return f"{'weak type ' if facet == 'weak_type' else ''}{before} -> {after}"
    return f"sharding {old[1]} -> {new[1]}"
