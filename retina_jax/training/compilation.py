"""What compiling a step says: how long, how much memory, whether it should have been; and running out of memory."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import jax
from jax.errors import JaxRuntimeError
from jaxtyping import PyTree

from retina_jax.console import tell
from retina_jax.errors import PlainError

COMPILED = "/jax/core/compile/backend_compile_duration"
CACHE_HIT = "/jax/compilation_cache/cache_hits"

SETTLED_AFTER = 3
"""Calls after which the arrays that the first state came in, from numpy or a checkpoint, are gone: the first step gives them
back, the second one gives back what optax's start was made of."""

# The code RESOURCE_EXHAUSTED alone will not do: a message too long for the network has it too.
OUT_OF_MEMORY = re.compile(
    r"out of memory|CUDA_ERROR_OUT_OF_MEMORY|failed to allocate|attempting to (allocate|reserve)", re.IGNORECASE
)


class OutOfMemory(PlainError, RuntimeError):
    """A device has less memory than the step needs; the message is one line with both and what would help."""


class Memory(NamedTuple):
    """What a program occupies on each device while it runs, bytes, by XLA's own account."""

    arguments: int
    results: int
    """Those not written in the place of an argument (donated)."""
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """All of it together."""
        return sum(self)

    def __str__(self) -> str:
        unit, name = _unit(self.total)
        parts = ", ".join(f"{part} {size / unit:.2f}" for part, size in self._asdict().items())
        return f"{self.total / unit:.2f} {name} on each device ({parts})"


class CompiledStep:
    """The step of a driver, called as it is; what it compiles is announced, one line a program.

    Canvas shapes given as `ahead` are compiled with the first one, so that a shape seldom met does not hold up a run that is
    under way; not beside its steps, which would disturb the measurements by which XLA chooses programs on GPUs.

    A program a canvas shape is what there should be. A warning follows the line of one that was compiled for another reason
    (a data type, a batch size, a sharding: it names what differs) or beyond the number of canvas shapes expected. Another
    description of the same arrays, for which nothing is compiled, is not worth a line.

    Raises OutOfMemory, in compiling and in running. Where the device reports that late, the error comes out of whoever
    waits for the results: `out_of_memory` is for those.
    """

    def __init__(
        self,
        step: Any,
        canvases: int,
        announce: Callable[[str], None] = tell,
        ahead: Sequence[tuple[int, int]] = (),
    ) -> None:
        """`step` is of jax.jit or jax.pmap, (state, inputs) to (state, metrics); `canvases` how many shapes are expected."""
        self._step, self._expected, self._announce = step, canvases, announce
        self._ahead = ahead
        self._signatures: dict[tuple[int, int], list[Any]] = {}
        """Latest of each canvas shape."""
        self._memory: dict[tuple[int, int], Memory | None] = {}
        self._named: dict[str, tuple[Any, Any]] = {}
        """The latest signature of all, by the arrays' names."""
        self._settles_in = 0
        """Calls until the memory that the first steps freed is given back."""

    def __call__(self, state: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """One step; `state` has the field `step`, the number of steps taken, and `inputs` has `images`, [..., H, W, 3]."""
        canvas = inputs.images.shape[-3], inputs.images.shape[-2]
        # 0.15 ms for the 500 arrays of a ResNet-50, spent while the device is at the step before.
        signature = [_kind(leaf) for leaf in jax.tree.leaves((state, inputs))]
        if self._signatures.get(canvas) != signature:
            self._compile(canvas, state, inputs)
            self._signatures[canvas] = signature
            self._compile_ahead(state, inputs, signature)
            self._settles_in = SETTLED_AFTER
        if self._settles_in:
            self._settles_in -= 1
            if not self._settles_in:
                give_back_freed_memory()
        with _told(canvas, self._memory.get(canvas)):
            return self._step(state, inputs)

    def _compile_ahead(self, state: PyTree, inputs: PyTree, signature: list[Any]) -> None:
        """The programs of the other canvas shapes, for which the same arrays do but for the images' sides."""
        images = next(i for i, leaf in enumerate(jax.tree.leaves((state, inputs))) if leaf is inputs.images)
        aval, sharding = signature[images]
        described = jax.tree.map(_description, inputs)
        for canvas in self._ahead:
            if canvas not in self._signatures:
                shape = (*aval.shape[:-3], *canvas, aval.shape[-1])
                changed = jax.ShapeDtypeStruct(shape, aval.dtype, sharding=sharding)
                self._make(canvas, state, described._replace(images=changed))
                own = (aval.update(shape=shape), sharding)
                self._signatures[canvas] = [*signature[:images], own, *signature[images + 1 :]]
        self._ahead = ()

    def _compile(self, canvas: tuple[int, int], state: PyTree, inputs: PyTree) -> None:
        """Compile for the call, and warn where that should not have been needed."""
        before, self._named = self._named, _named_kinds(state, inputs)
        if not self._make(canvas, state, inputs):
            return
        shape = f"{canvas[0]}x{canvas[1]}"
        if before and (differing := _differences(before, self._named)):
            self._announce(f"warning: step {int(state.step) + 1} recompiled: {differing}")
        if canvas not in self._signatures and (number := len(self._signatures) + 1) > self._expected:
            self._announce(
                f"warning: step {int(state.step) + 1} has canvas shape {number}, {shape}, of {self._expected} expected: "
                f"so far {', '.join(f'{height}x{width}' for height, width in self._signatures)}"
            )

    def _make(self, canvas: tuple[int, int], state: PyTree, inputs: PyTree) -> bool:
        """Make the program that a call will find: it is made once, and not slower to call. False where there was one."""
        started = time.monotonic()
        with _told(canvas):
            lowered = self._step.lower(state, inputs)
            with compile_events() as events:
                program = lowered.compile()
        elapsed = time.monotonic() - started
        give_back_freed_memory()
        self._memory[canvas] = memory = memory_of(program)
        if not events[COMPILED]:
            return False
        done = "found in the compilation cache" if events[CACHE_HIT] else "compiled"
        self._announce(
            f"step for {canvas[0]}x{canvas[1]} {done} in {elapsed:.1f} s"
            + (f": {memory}{_share(memory)}" if memory else "")
        )
        return True


@contextmanager
def _told(canvas: tuple[int, int], memory: Memory | None = None) -> Iterator[None]:
    """OutOfMemory with the canvas that the memory was for."""
    try:
        yield
    except JaxRuntimeError as error:
        line = out_of_memory(error, memory, canvas)
        if line is None:
            raise
        raise OutOfMemory(line) from error


def memory_of(program: jax.stages.Compiled) -> Memory | None:
    """What `program` needs on each device; None where XLA's backend does not tell."""
    sizes = program.memory_analysis()
    if sizes is None:
        return None
    return Memory(
        arguments=sizes.argument_size_in_bytes,
        results=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
    )


def device_memory() -> int | None:
    """Bytes that JAX may use of the smallest local device; None where devices do not tell (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    limits = [s["bytes_limit"] for s in stats if s and "bytes_limit" in s]
    return min(limits, default=None)


def out_of_memory(
    error: BaseException, memory: Memory | None = None, canvas: tuple[int, int] | None = None
) -> str | None:
    """One line about an error that means a device's memory is full; None for any other error.

    Args:
      memory: what the step needs, where that is known.
      canvas: height and width of its images, pixels.
    """
    if not OUT_OF_MEMORY.search(str(error)):
        return None
    limit = device_memory()
    what = f"the step for {canvas[0]}x{canvas[1]}" if canvas else "a program"
    needs = f"{what} needs {memory or 'more than there is'}"
    has = f" of a device's {_size(limit)}" if limit else ""
    said = re.sub(r"^.*?RESOURCE_EXHAUSTED: ", "", str(error).strip().splitlines()[0])
    said = re.sub(r"\b([0-9]{7,}) bytes", lambda match: _size(int(match[1])), said).rstrip(".: ")
    helps = (
        "take a smaller data.batch_size, or keep it with training.accumulate, model.remat True, model.dtype bfloat16"
    )
    if jax.default_backend() == "gpu":
        helps += ", or, where nothing else runs on it, XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"
    return f"out of memory: {needs}{has} ({said}); {helps}"


def _share(memory: Memory) -> str:
    limit = device_memory()
    return f", {100 * memory.total / limit:.0f}% of its {_size(limit)}" if limit else ""


def _unit(size: int) -> tuple[int, str]:
    return (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")


def _size(size: int) -> str:
    unit, name = _unit(size)
    return f"{size / unit:.1f} {name}"


def give_back_freed_memory() -> None:
    """To the operating system: glibc would keep what compiling took, about a gigabyte for a ResNet-50's step, and what
    the first state was made of."""
    gc.collect()  # arrays among what refers to itself
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library, or a Python without one of its own
            ctypes.CDLL(None).malloc_trim(0)


def seconds(event: str) -> str:
    """Name of the time that `event` took, all of it together."""
    return f"{event} seconds"


@contextmanager
def compile_events() -> Iterator[Counter[str]]:
    """Counts what JAX reports of compilations meanwhile, and under `seconds(event)` how long it took."""
    events: Counter[str] = Counter()

    def hear(event: str, *duration: float, **kwargs: str | int) -> None:
        events[event] += 1
        events[seconds(event)] += sum(duration)

    jax.monitoring.register_event_listener(hear)
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_listener(hear)
        jax.monitoring.unregister_event_duration_listener(hear)


def _kind(leaf: Any) -> tuple[Any, Any]:
    """What the choice of a program can depend on: shape, data type and weak type; sharding."""
    return getattr(leaf, "aval", None) or jax.typeof(leaf), getattr(leaf, "sharding", None)


def _description(leaf: Any) -> jax.ShapeDtypeStruct:
    """What a program can be made for in the place of an array."""
    weak = getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None), weak_type=weak)


def _named_kinds(state: PyTree, inputs: PyTree) -> dict[str, tuple[Any, Any]]:
    """By name, state.params.… and inputs.…, the canvas left out of the shape of the images."""
    leaves = jax.tree_util.tree_leaves_with_path({"inputs": inputs, "state": state})
    kinds = {jax.tree_util.keystr(path, simple=True, separator="."): _kind(leaf) for path, leaf in leaves}
    aval, sharding = kinds["inputs.images"]
    return {**kinds, "inputs.images": (aval.update(shape=(*aval.shape[:-3], aval.shape[-1])), sharding)}


def _differences(old: dict[str, tuple[Any, Any]], new: dict[str, tuple[Any, Any]], most: int = 3) -> str:
    """The first arrays that differ and in what, on one line; empty where none does."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    told = [f"{name} {_difference(old.get(name), new.get(name))}" for name in names[:most]]
    return ", ".join(told) + (f", and {len(names) - most} more" if len(names) > most else "")


def _difference(old: tuple[Any, Any] | None, new: tuple[Any, Any] | None) -> str:
    if old is None or new is None:
        return "is new" if old is None else "is gone"
    for facet in ("dtype", "shape", "weak_type"):
        before, after = getattr(old[0], facet), getattr(new[0], facet)
        if before != after:
            return f"{'weak type ' if facet == 'weak_type' else ''}{before} -> {after}"
    return f"sharding {old[1]} -> {new[1]}"
