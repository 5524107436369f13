"""Compilation: one log line per program, a warning for an unexpected program, one line if the memory does not
suffice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from jax.experimental.compilation_cache import compilation_cache

from retina_jax import errors
from retina_jax.config import Config
from retina_jax.config_io import override
from retina_jax.errors import OutOfMemory, out_of_memory
from retina_jax.training import compilation
from retina_jax.training.compilation import CompiledStep, Memory, compile_events, compile_seconds, memory_of
from retina_jax.training.parallel import Driver
from retina_jax.training.step import Inputs

GIB = 2**30


class Pixels(NamedTuple):
    images: jax.Array | np.ndarray
    sizes: jax.Array | np.ndarray


@flax.struct.dataclass
class State:
    step: jax.Array
    weights: dict[str, jax.Array]


def fresh(**options: object) -> Callable[[State, Pixels], tuple[State, dict[str, jax.Array]]]:
    """Returns a jitted step that no earlier test has compiled."""

    def function(state: State, inputs: Pixels) -> tuple[State, dict[str, jax.Array]]:
        scale = inputs.images.astype(jnp.float32).mean() + inputs.sizes.sum().astype(jnp.float32)
        weights = {"w": state.weights["w"] + scale * state.weights["w"].sum()}
        return State(state.step + 1, weights), {"loss": scale}

    return jax.jit(function, **options)


def pixels(batch: int = 2, canvas: tuple[int, int] = (32, 48), dtype: type = np.int32) -> Pixels:
    return Pixels(np.ones((batch, *canvas, 3), np.uint8), np.ones((batch, 2), dtype))


def new_state() -> State:
    return State(jnp.zeros((), jnp.int32), {"w": jnp.ones((4,), jnp.float32)})


@pytest.fixture
def uncached() -> Iterator[None]:
    """Switches off the tests' compilation cache on disk, in which the second run of a test would find its programs."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def take(step: CompiledStep, state: State, *batches: Pixels) -> State:
    for inputs in batches:
        state, _ = step(state, inputs)
    return state


CACHED = """
from pathlib import Path
import jax, numpy as np
from retina_jax.cli import set_up_jax
from retina_jax.config import Config
from retina_jax.config_io import override
from retina_jax.training.compilation import CACHE_HIT, compile_events
from retina_jax.training.parallel import Driver
from retina_jax.training.step import Inputs

set_up_jax()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
small = {
    "model.backbone": "resnet18", "model.base_width": 8, "model.fpn_channels": 16, "model.head_channels": 16,
    "model.stage_blocks": (1, 1, 1, 1), "model.head_convs": 1, "model.frozen_stages": 0, "devices": 1,
}
inputs = Inputs(
    images=np.zeros((8, 256, 256, 3), np.uint8), image_sizes=np.full((8, 2), 256, np.int32),
    boxes_xyxy=np.ones((8, 1, 4), np.float32), labels=np.zeros((8, 1), np.int32), valid=np.ones(8, bool),
)

def step_of(steps):
    jax.clear_caches()
    driver = Driver(override(Config(), {**small, "training.steps": steps}), 2)
    state, batch = driver.init_state(), driver.shard_batch(inputs)
    with compile_events() as events:
        program = driver.step.lower(state, batch).compile()
    return events[CACHE_HIT], program.memory_analysis().temp_size_in_bytes

def other(size):
    jax.clear_caches()
    with compile_events() as events:
        jax.jit(lambda x: x + 1).lower(np.ones(size, np.float32)).compile()
    return events[CACHE_HIT]

(_, size), (again, _), (of_long, _) = step_of(499), step_of(499), step_of(500)
assert size > 2**25 and again == 1 and of_long == 0, (size, again, of_long)
assert [other(2), other(2)] == [0, 1]
(entry,) = Path(jax.config.jax_compilation_cache_dir).glob("jit__lambda*-cache")
assert other(3) == 0
entry.write_bytes(entry.read_bytes()[:-20])
assert [other(2), other(2), other(3)] == [0, 1, 1]
assert step_of(499)[0] == 1
"""


def test_steps_of_short_runs_are_cached_and_damaged_entries_are_replaced(tmp_path: Path) -> None:
    """A step of a long run is in several blocks of memory, which JAX cannot cache; nobody is warned of that."""
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "1"}
    done = subprocess.run([sys.executable, "-c", CACHED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(
        "warning: the compilation cache has no readable entry of jit__lambda, which is compiled again ("
    )
    assert done.stderr == ""


def test_two_hundred_batches_of_four_shapes_are_four_programs_and_four_lines(uncached: None) -> None:
    jitted, said = fresh(donate_argnums=0), []
    step = CompiledStep(jitted, num_shapes=4, announce=said.append)
    rng = np.random.default_rng(0)
    canvases = [(32, 48), (48, 32), (32, 64), (64, 32)]
    batches = [pixels(canvas=canvases[i]) for i in [0, 1, 2, 3, *rng.integers(4, size=196)]]
    state = take(step, new_state(), *batches)
    assert int(state.step) == 200 and jitted._cache_size() == 4
    assert [re.search(r"\b\d+x\d+\b", line)[0] for line in said] == [f"{h}x{w}" for h, w in canvases for _ in range(2)]
    assert said[4].startswith("compiling program 3 of 3 (32x64)"), "before it is compiled"
    sizes = ", ".join(rf"{name} \d+\.\d\d" for name in ("arguments", "results", "temporaries", "code"))
    assert re.search(rf"32x48 .*\d+\.\d s: \d+\.\d\d MiB .*\({sizes}\)$", said[1])


def test_without_eager_a_program_is_compiled_before_its_first_step(uncached: None) -> None:
    jitted, said = fresh(), []
    step = CompiledStep(jitted, 2, said.append, ahead=[(32, 48), (48, 32)], eager=False)
    state = take(step, new_state(), pixels(), pixels())
    assert jitted._cache_size() == 1 and said[0].startswith("compiling program 1 of 2 (32x48)")
    take(step, state, pixels(canvas=(48, 32)))
    assert jitted._cache_size() == 2 and said[2].startswith("compiling program 2 of 2 (48x32)")


def test_the_announced_program_is_the_one_that_runs(uncached: None) -> None:
    """It is compiled once, ahead of the call; the call compiles nothing."""
    heard: list[str] = []

    def hear(event: str, seconds: float, **_: str | int) -> None:
        if event == compilation.COMPILED:
            heard.append(event)

    step, state, inputs = CompiledStep(fresh(), 1, lambda line: None), new_state(), pixels()
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        take(step, state, inputs, inputs)
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
    assert len(heard) == 1


def test_the_seconds_of_a_program_count_each_phase_once(uncached: None) -> None:
    """Functions that it calls are jitted too; the second call compiles nothing."""
    inner = jax.jit(lambda x: jnp.where(x > 0, x, 0.0))
    outer, x = jax.jit(lambda x: inner(inner(x) + 1.0)), np.ones(3, np.float32)
    with compile_events() as events:
        outer(x)
    phases = (compilation.TRACED, compilation.LOWERED, compilation.COMPILED)
    assert [events[phase] for phase in phases] == [1, 1, 1]
    assert compile_seconds(events) == sum(events[f"{phase} seconds"] for phase in phases) > 0
    with compile_events() as events:
        outer(x)
    assert compile_seconds(events) == 0


def test_results_and_donation_equal_those_of_the_plain_step() -> None:
    state, inputs = new_state(), pixels()
    expected, measured = fresh()(state, inputs)
    step = CompiledStep(fresh(donate_argnums=0), 1, lambda line: None)
    got, metrics = step(state, inputs)
    np.testing.assert_array_equal(got.weights["w"], expected.weights["w"])
    np.testing.assert_array_equal(metrics["loss"], measured["loss"])
    assert state.weights["w"].is_deleted()


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (lambda state: (state, pixels(dtype=np.int16)), "inputs.sizes int32 -> int16"),
        (
            lambda state: (state, pixels(batch=3)),
            "inputs.images (2, 3) -> (3, 3), inputs.sizes (2, 2) -> (3, 2)",
        ),
        (
            lambda state: (State(state.step, {"w": jax.lax.full((4,), 1.0)}), pixels()),
            "state.weights.w weak type False -> True",
        ),
        (
            lambda state: (jax.device_put(state, jax.devices()[1]), pixels()),
            r"state.step sharding .* -> .*, state.weights.w sharding .* -> .*",
        ),
        (
            lambda state: (State(state.step, {**state.weights, "v": jnp.ones(())}), pixels()),
            "state.weights.v is new",
        ),
    ],
    ids=["dtype", "batch size", "weak type", "sharding", "structure"],
)
def test_the_warning_for_a_recompilation_names_the_difference(
    uncached: None, other: Callable[[State], tuple[State, Pixels]], differing: str
) -> None:
    said: list[str] = []
    step = CompiledStep(fresh(), num_shapes=1, announce=said.append)
    state = take(step, new_state(), *[pixels()] * 6)
    assert len(said) == 2
    step(*other(state))
    assert "32x48" in said[2]
    pattern = differing if ".*" in differing else re.escape(differing)
    assert re.fullmatch(rf"warning: step 7\b.*: {pattern}", said[3])
    take(step, state, pixels())  # back to the first program, which is still there
    assert len(said) == 4


def test_a_difference_together_with_a_new_padded_shape_is_named_too(uncached: None) -> None:
    said: list[str] = []
    step = CompiledStep(fresh(), num_shapes=2, announce=said.append)
    take(step, new_state(), pixels(), pixels(canvas=(48, 32), dtype=np.int16))
    assert re.fullmatch(r"warning: step 2\b.*: inputs\.sizes int32 -> int16", said[-1])


def test_a_padded_shape_beyond_the_expected_number_is_a_warning(uncached: None) -> None:
    said: list[str] = []
    step = CompiledStep(fresh(), num_shapes=2, announce=said.append)
    take(step, new_state(), pixels(), pixels(canvas=(48, 32)), pixels(), pixels(canvas=(64, 64)))
    assert len(said) == 7
    assert re.fullmatch(r"warning: step 4\b.*\b64x64\b.*\b3\b.*\b2\b.* 32x48, 48x32", said[-1])


def test_a_program_from_the_cache_is_reported_as_such(tmp_path: object) -> None:
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        said: list[str] = []
        for _ in range(2):
            jax.clear_caches()
            take(CompiledStep(fresh(), 1, said.append), new_state(), pixels())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert "32x48" in said[1] and "cache" not in said[1]
    assert "32x48" in said[3] and "cache" in said[3]


@pytest.mark.parametrize("parallel", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_a_driver_compiles_all_padded_shapes_at_the_first_one(
    tiny: Config, make_inputs: Callable[..., Inputs], parallel: str, uncached: None
) -> None:
    """This includes the second step, whose state is the output of the first one: nothing else is compiled or logged."""
    driver = Driver(override(tiny, {"parallel": parallel, "devices": 2}), 3)
    said: list[str] = []
    canvases = [(64, 64), (64, 96)]
    step, state = CompiledStep(driver.step, 2, said.append, ahead=canvases), driver.init_state()
    state, _ = step(state, driver.shard_batch(make_inputs(0, canvas=(64, 96))))
    assert [re.search(r"\b\d+x\d+\b", line)[0] for line in said] == ["64x96", "64x96", "64x64", "64x64"]
    assert said[0].startswith("compiling program 1 of 2") and said[2].startswith("compiling program 2 of 2")
    assert all(re.search(r" MiB .*\(arguments ", line) for line in said[1::2])
    with compilation.compile_events() as events:
        for number, canvas in enumerate([*canvases, (64, 64), (64, 96)], start=1):
            before = state
            state, measured = step(state, driver.shard_batch(make_inputs(number, canvas=canvas)))
            jax.block_until_ready(measured)
            assert all(array.is_deleted() for array in jax.tree.leaves(before)), "its memory is the new state's"
    assert events[compilation.COMPILED] == 0 and len(said) == 4
    assert int(state.step) == 5


def test_memory_is_counted_per_device_and_donated_memory_once() -> None:
    x = jnp.ones((256, 256), jnp.float32)
    mib = x.nbytes
    plain = memory_of(jax.jit(lambda x: x + 1).lower(x).compile())
    donated = memory_of(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
    assert plain is not None and donated is not None
    assert (plain.arguments, plain.results) == (mib, mib)
    assert (donated.arguments, donated.results) == (mib, 0)
    assert sum(plain) == 2 * mib + plain.temporaries + plain.code
    over = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
    split = memory_of(jax.jit(lambda x: x + 1).lower(jax.device_put(x, over)).compile())
    assert split is not None and split.arguments == mib // 8


def test_the_share_of_the_devices_memory_is_reported_if_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "device_memory", lambda: 80 * GIB)
    assert compilation._share(Memory(10 * GIB, 0, 10 * GIB, 0)) == ", 25% of its 80.0 GiB"
    monkeypatch.setattr(compilation, "device_memory", lambda: None)
    assert compilation._share(Memory(10 * GIB, 0, 10 * GIB, 0)) == ""


# XLA's messages: GPU at run time, older and newer; with its list of buffers; one allocation; TPU compiling, loading a
# program, allocating; CPU.
MESSAGES = {
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.\nBufferAssignment OOM Debugging.\n"
    "BufferAssignment stats:\n   parameter allocation:  372.76MiB": "Out of memory while trying to allocate 4.4 GiB",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 60.91GiB": "Out of memory while trying to allocate 60.91GiB",
    "RESOURCE_EXHAUSTED: Failed to allocate request for 2.99GiB (3206250496B) on device ordinal 0": (
        "Failed to allocate request for 2.99GiB (3206250496B) on device ordinal 0"
    ),
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.95G of 15.48G hbm. "
    "Exceeded hbm capacity by 6.47G.\n\nTotal hbm usage >= 22.47G:\n    reserved        530.00M": (
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.95G of 15.48G hbm. "
        "Exceeded hbm capacity by 6.47G"
    ),
    "RESOURCE_EXHAUSTED: Error loading program 'jit_train_step': Attempting to reserve 9.62G at the bottom of memory. That "
    "was not possible. There are 7.14G free, 0B reserved, and 7.14G reservable.": (
        "Error loading program 'jit_train_step': Attempting to reserve 9.62G at the bottom of memory. "
        "That was not possible. There are 7.14G free, 0B reserved, and 7.14G reservable"
    ),
    "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 50.00M. That was not possible. There are "
    "27.86M free.; (0x0x0_HBM0)": (
        "Error allocating device buffer: Attempting to allocate 50.00M. That was not possible. There are 27.86M free.; "
        "(0x0x0_HBM0)"
    ),
    "RESOURCE_EXHAUSTED: Out of memory allocating 70368744177664 bytes.": "Out of memory allocating 65536.0 GiB",
    "INTERNAL: Failed to launch CUDA kernel: CUDA_ERROR_OUT_OF_MEMORY: out of memory": (
        "INTERNAL: Failed to launch CUDA kernel: CUDA_ERROR_OUT_OF_MEMORY: out of memory"
    ),
}


@pytest.mark.parametrize(("message", "kept"), MESSAGES.items(), ids=range(len(MESSAGES)))
def test_out_of_memory_is_one_line_with_advice(message: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "device_memory", lambda: 16 * GIB)
    line = out_of_memory(JaxRuntimeError(message), "the step for 640x1024", Memory(GIB, 0, 20 * GIB, 0))
    named = (
        "640x1024",
        "21.00 GiB",
        "arguments 1.00",
        "results 0.00",
        "temporaries 20.00",
        "code 0.00",
        "16.0 GiB",
        f"({kept})",
    )
    options = ("data.batch_size", "training.accumulate", "model.remat", "model.dtype bfloat16")
    assert line is not None and "\n" not in line
    assert [name for name in (*named, *options) if name not in line] == []
    of_inference = out_of_memory(JaxRuntimeError(message))
    assert "--short-side" in of_inference and not any(option in of_inference for option in options)


@pytest.mark.parametrize(
    "message",
    [
        "INTERNAL: cuDNN launch failure",
        "RESOURCE_EXHAUSTED: Received message larger than max (5242880 vs. 4194304)",
        "DEADLINE_EXCEEDED: Barrier timed out",
    ],
)
def test_other_errors_of_the_runtime_are_unchanged(message: str) -> None:
    def fail(state: State, inputs: Pixels) -> None:
        raise JaxRuntimeError(message)

    assert out_of_memory(JaxRuntimeError(message)) is None
    with pytest.raises(JaxRuntimeError, match=re.escape(message)):
        step_that_calls(fail)(new_state(), pixels())


def step_that_calls(call: Callable[..., object]) -> CompiledStep:
    """Returns a step that compiles as `fresh` does, and does something else if it is called."""

    class Step:
        lower = staticmethod(fresh().lower)
        __call__ = staticmethod(call)

    return CompiledStep(Step(), 1, lambda line: None)


def test_a_real_out_of_memory_error_names_what_the_step_needed() -> None:
    """The step needs 64 TiB, so XLA itself raises the error."""

    def huge(state: State, inputs: Pixels) -> jax.Array:
        return jnp.ones((2**44,), jnp.float32)

    with pytest.raises(OutOfMemory) as caught:
        step_that_calls(huge)(new_state(), pixels())
    assert isinstance(caught.value.__cause__, JaxRuntimeError)
    named = r"32x48 .* MiB .*\(Out of memory allocating 65536\.0 GiB\).*data\.batch_size.*training\.accumulate"
    assert re.search(named, str(caught.value))


def test_out_of_memory_in_compiling_is_named() -> None:
    def fail(*_: object) -> None:
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.95G of 15.48G hbm.")

    step = partial(fresh())
    step.lower = fail
    with pytest.raises(OutOfMemory, match=r"32x48 .*\(Ran out of memory in memory space hbm"):
        CompiledStep(step, 1)(new_state(), pixels())


def test_out_of_memory_in_compiling_ahead_names_the_padded_shape(uncached: None) -> None:
    whole = fresh()

    def lower(state: State, inputs: Pixels) -> jax.stages.Lowered:
        if inputs.images.shape[1:3] == (64, 32):
            raise JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.95G of 15.48G hbm."
            )
        return whole.lower(state, inputs)

    step = partial(whole)
    step.lower = lower
    with pytest.raises(OutOfMemory, match=r"\b64x32\b"):
        CompiledStep(step, 2, announce=lambda line: None, ahead=((64, 32),))(new_state(), pixels())


@pytest.mark.skipif(sys.platform != "linux", reason="what glibc keeps is read off /proc")
def test_freed_memory_between_used_memory_is_returned_to_the_system() -> None:
    blocks = [bytearray(100_000) for _ in range(2000)]  # 200 MB, each too small for a mapping of its own
    last = blocks.pop()
    blocks.clear()
    kept = resident_mib()
    compilation.release_freed_memory()
    assert len(last) == 100_000
    assert kept - resident_mib() > 100


def test_memory_is_returned_after_compiling_and_once_the_initial_state_is_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given_back = []
    monkeypatch.setattr(compilation, "release_freed_memory", lambda: given_back.append(steps))
    step, state, steps = CompiledStep(fresh(), num_shapes=1, announce=lambda line: None), new_state(), 0
    for steps in range(6):  # noqa: B007  what the list above gets
        state, _ = step(state, pixels())
    assert given_back == [0, compilation.STEPS_UNTIL_FREED - 1]


def resident_mib() -> float:
    """Returns the resident memory of this process."""
    return int(re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
