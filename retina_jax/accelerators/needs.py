"""What a config needs on an accelerator: memory, exchanges between devices, and the time of a step between a floor and an
estimate. Nothing here is measured on a device."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.errors import JaxRuntimeError

from retina_jax.accelerators.hlo import Program, parse
from retina_jax.accelerators.lowering import What, lower
from retina_jax.accelerators.targets import Target
from retina_jax.config import Config
from retina_jax.errors import OutOfMemory, out_of_memory
from retina_jax.training.compilation import Memory, memory_of

_FACTOR = re.compile(r"dense<[-+0-9.eE]+> : tensor<b?f\d+>")  # a scalar; an integer may be the trips of a loop
LARGEST = 12  # places in the model that are listed
SPARE = 1.1  # temporaries per image of a large batch, assumed, over those of the compiled batch
UNKNOWN_TRIPS = 3
"""Assumed for loops that end by their data: two blocks of NMS keep 100 boxes, and its rounds settle after two or three."""


@dataclass(frozen=True)
class Needs:
    """What one program needs, per device unless it says otherwise."""

    padded_hw: tuple[int, int]
    images: int  # per device
    memory: Memory | None
    fits: bool | None  # None if the compiler does not report the memory
    largest_batch: int  # images per device that fit, estimated from the memory of this batch; 0 if unknown
    compile_seconds: float
    flops: int
    collectives: dict[str, tuple[int, int]]  # number and bytes by kind and dtype
    host_transfers: int
    cycles: int  # the compiler's estimate; 0 for GPUs
    kernels: dict[str, tuple[int, int]]  # number and bytes moved by kind; empty for TPUs
    floor_seconds: float  # at the peaks of the matrix units and of the memory
    estimate_seconds: float  # TPU: the compiler's cycles; GPU: arithmetic and memory one after the other
    largest: list[tuple[str, int]]  # places in the model with the most cycles or bytes


def needs(
    config: Config,
    num_classes: int,
    target: Target,
    devices: Sequence[Any],
    what: What,
    padded_hw: tuple[int, int],
    known: dict[str, tuple[Needs, str]] | None = None,
) -> tuple[Needs, str]:
    """Compiles a program for `devices` of `target`; returns what it needs, and its text (scheduled HLO).

    A program in `known` is not compiled again; those that differ only in floating-point scalars count as the same.
    """
    lowered, flops = lower(config, num_classes, devices, what, padded_hw)
    key = without_factors(lowered.as_text()) if known is not None else ""
    if known and key in known:
        return known[key]
    images = config.data.batch_size // len(devices)
    started = time.monotonic()
    try:
        compiled = lowered.compile()
    except JaxRuntimeError as error:
        if line := out_of_memory(error, f"the {what} for {padded_hw[0]}x{padded_hw[1]}", None):
            raise OutOfMemory(line) from error
        raise
    seconds = time.monotonic() - started
    text, memory = compiled.as_text(), memory_of(compiled)
    program = parse(text, unknown_trips=UNKNOWN_TRIPS)
    floor, estimate, kernels = _times(program, target, flops // len(devices))
    found = Needs(
        padded_hw=padded_hw,
        images=images,
        memory=memory,
        fits=None if memory is None else sum(memory) <= target.usable,
        largest_batch=_largest_batch(memory, images, target),
        compile_seconds=seconds,
        flops=flops // len(devices),
        collectives=program.collectives(),
        host_transfers=program.host_transfers(),
        cycles=program.cycles(),
        kernels=kernels,
        floor_seconds=floor,
        estimate_seconds=estimate,
        largest=program.largest(LARGEST),
    )
    if known is not None:
        known[key] = found, text
    return found, text


def without_factors(text: str) -> str:
    """Returns the text of a program (StableHLO) without the values of floating-point scalars (alpha, a learning rate)."""
    return _FACTOR.sub("dense<>", text)


def _times(program: Program, target: Target, flops: int) -> tuple[float, float, dict[str, tuple[int, int]]]:
    """Returns the floor and the estimate of the time of a program, seconds, and the kernels of a GPU."""
    arithmetic = flops / target.peak_flops
    if target.clock:
        return arithmetic, program.cycles() / target.clock, {}
    numbers, moved = program.kernels()
    memory = moved.total() / target.bandwidth
    return max(arithmetic, memory), arithmetic + memory, {kind: (numbers[kind], moved[kind]) for kind in numbers}


def _largest_batch(memory: Memory | None, images: int, target: Target) -> int:
    """Estimates how many images per device fit: temporaries grow with them, all else is constant. From 16 to 384 images of
    a step of ResNet-50 they grew by 6 % more."""
    if memory is None or not memory.temporaries:  # small programs live in the cores' own memory
        return 0
    constant = sum(memory) - memory.temporaries
    return max(math.floor((target.usable - constant) / (SPARE * memory.temporaries / images)), 0)
