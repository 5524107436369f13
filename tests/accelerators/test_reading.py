"""What is read from a compiled program, compared with programs whose contents are known; targets and shapes from text."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compile_for import padded_shapes, report, schedule
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from retina_jax.accelerators import targets
from retina_jax.accelerators.hlo import parse
from retina_jax.accelerators.lowering import What, lower
from retina_jax.accelerators.needs import Needs, _largest_batch, without_factors
from retina_jax.accelerators.targets import TARGETS, TPU_TOPOLOGIES, parse_target, topology_devices
from retina_jax.config import Config, ConfigError
from retina_jax.config_io import override
from retina_jax.training.compilation import Memory

TPU_TEXT = """\
HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %g = f32[8]{0} get-tuple-element(%p), index=1
  ROOT %fusion.1 = (s32[], f32[8]{0}) fusion(%g), kind=kLoop, calls=%inside, backend_config={"estimated_cycles":"40"}
}

%cond (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %lt = pred[] fusion(%p.1), kind=kLoop, calls=%compare, backend_config={"estimated_cycles":"2"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %start = (s32[], f32[8]{0}) tuple(%a, %a)
  %while.1 = (s32[], f32[8]{0}) while(%start), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %all-reduce-start = f32[8]{0} all-reduce-start(%a), to_apply=%add
  %all-reduce-done = f32[8]{0} all-reduce-done(%all-reduce-start)
  ROOT %fusion.2 = f32[8]{0} fusion(%all-reduce-done), kind=kLoop, calls=%x, \
metadata={op_name="jit(f)/transpose(jvp(RetinaNet))/class_head/conv0/add"}, backend_config={"estimated_cycles":"100"}
}
"""


def test_cycles_count_loops_with_their_trips() -> None:
    program = parse(TPU_TEXT)
    assert program.cycles() == 5 * (40 + 2) + 100
    assert (
        parse(re.sub(", backend_config=.*trip_count.*", "", TPU_TEXT), unknown_trips=3).cycles() == 3 * (40 + 2) + 100
    )
    limited = TPU_TEXT.replace(
        "ROOT %lt = pred[] fusion(%p.1), kind=kLoop, calls=%compare",
        """%n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT""",
    )
    assert parse(re.sub(", backend_config=.*trip_count.*", "", limited)).cycles() == 7 * (40 + 2) + 100
    by_data = limited.replace(
        "ROOT %lt = pred[] compare(%i, %n), direction=LT",
        """%lt = pred[] compare(%i, %n), direction=LT
  ROOT %both = pred[] and(%lt, %p.1), metadata={}""",
    )
    assert parse(re.sub(", backend_config=.*trip_count.*", "", by_data), unknown_trips=3).cycles() == 3 * (40 + 2) + 100
    assert program.collectives() == {"all-reduce f32": (1, 32)}
    assert program.largest(2) == [("forward fusion", 210), ("backward class_head/conv0/add", 100)]


def test_collectives_and_loops_of_a_program_of_this_machine() -> None:
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def inside(x: jax.Array) -> jax.Array:
        x = lax.fori_loop(0, 7, lambda _, x: jnp.sin(x), x)
        return lax.psum(x, "data"), lax.all_gather(x, "data")

    f = jax.shard_map(inside, mesh=mesh, in_specs=P("data"), out_specs=(P(), P()), check_vma=False)
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    program = parse(jax.jit(f).lower(x).compile().as_text())
    assert program.collectives() == {"all-reduce f32": (1, 128 * 4), "all-gather f32": (1, 8 * 128 * 4)}
    assert program.host_transfers() == 0 and program.cycles() == 0
    assert max(times for _, times in program.walk()) == 7


def test_kernels_move_their_operands_and_results() -> None:
    def f(a: jax.Array, b: jax.Array) -> jax.Array:
        return a @ b

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 256), (256, 384))]
    numbers, moved = parse(jax.jit(f).lower(*shapes).compile().as_text()).kernels()
    assert numbers["convolutions and products"] == 1
    assert moved["convolutions and products"] == 4 * (512 * 256 + 256 * 384 + 512 * 384)


def test_of_a_sliced_operand_the_slices_are_read() -> None:
    text = """\
HloModule m

%part (p: f32[1024], i: s32[]) -> f32[8] {
  %p = f32[1024]{0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[32,32]{1,0} bitcast(%p)
  %s = f32[1,4]{1,0} slice(%b), slice={[0:1], [0:4]}
  %d = f32[4]{0} dynamic-slice(%p, %i), dynamic_slice_sizes={4}
  ROOT %c = f32[8]{0} concatenate(%s, %d), dimensions={0}
}

%same (q: f32[1024]) -> f32[1024] {
  ROOT %q = f32[1024]{0} parameter(0)
}

ENTRY %main (a: f32[1024], n: s32[]) -> (f32[8], f32[2], f32[1024]) {
  %a = f32[1024]{0} parameter(0)
  %n = s32[] parameter(1)
  %fusion.1 = f32[8]{0} fusion(%a, %n), kind=kLoop, calls=%part
  %fusion.2 = f32[1024]{0} fusion(%a), kind=kLoop, calls=%same
  %slice.1 = f32[2]{0} slice(%a), slice={[0:2]}
  ROOT %add.1 = f32[1024]{0} add(%a, %a)
}
"""
    program = parse(text)
    moved = {operation.name: program.moved(operation) for operation, _ in program.walk()}
    assert moved["fusion.1"] == 4 * (8 + 4 + 4 + 1)
    assert moved["fusion.2"] == 4 * (1024 + 1024)
    assert moved["slice.1"] == 4 * (2 + 2)
    assert moved["add.1"] == 4 * (1024 + 1024)


@pytest.mark.parametrize("text", ["v5e-8", "tpu:v5e", "tpu:v5e-7", "gpu:h100-0", "gpu:v5e-8", "tpu:v9-8", ""])
def test_an_unknown_target_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--target {re.escape(text)}"):
        parse_target(text)


def test_targets_are_consistent() -> None:
    for (platform, kind), target in TARGETS.items():
        assert target.source.startswith("https://") and target.source.endswith(kind)
        assert (target.platform, target.kind) == (platform, kind)
        assert (target.clock > 0) == (platform == "tpu") and (target.cores > 0) == (platform == "gpu")
    for kind, shapes in TPU_TOPOLOGIES.items():
        assert ("tpu", kind) in TARGETS
        for number, shape in shapes.items():
            chips = 1
            for side in shape.split("x"):
                chips *= int(side)
            assert chips == number or number == 1


@pytest.mark.parametrize("target", ["tpu:v5e-8", "gpu:h100-8"])
def test_a_missing_compiler_names_the_extra(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    extra = targets.EXTRAS[target[:3]][1]
    with pytest.raises(ConfigError, match=rf"pip install 'retina-jax\[{extra}\]'"):
        topology_devices(*parse_target(target))


@pytest.mark.parametrize("what", ["step", "detect"])
def test_each_driver_has_its_own_programs(what: What) -> None:
    """pmap takes the images of each device as rows of an axis of their own."""
    small = {"model.backbone": "resnet18", "model.base_width": 8, "model.stage_blocks": (1, 1, 1, 1)}
    small |= {"model.fpn_channels": 8, "model.head_channels": 8, "model.head_convs": 0, "model.max_level": 5}
    for parallel, images in (("jit", (4, 64, 64, 3)), ("pmap", (2, 2, 64, 64, 3))):
        config = override(Config(), {**small, "data.batch_size": 4, "parallel": parallel})
        lowered, flops = lower(config, 3, jax.devices()[:2], what, (64, 64))
        assert flops > 0 and images in {array.shape for array in jax.tree.leaves(lowered.in_avals)}
    with pytest.raises(ConfigError, match=r"use a multiple of 2$"):
        lower(override(Config(), {"data.batch_size": 3}), 3, jax.devices()[:2], what, (64, 64))


def test_shapes_are_those_of_training_or_given() -> None:
    assert (608, 1024) in padded_shapes("", Config()) and len(padded_shapes("", Config())) == 6
    assert padded_shapes("64x96", Config()) == [(64, 96)]
    for text in ("64", "64x", "64x95", "0x64", "64x96x3", "-64x96"):
        with pytest.raises(ConfigError, match=f"--shape {text}"):
            padded_shapes(text, Config())


def test_programs_are_equal_up_to_factors_but_not_up_to_trips_or_arrays() -> None:
    def text(trips: int = 8, factor: float = 0.5, row: tuple[float, ...] = (1.0, 2.0, 3.0)) -> str:
        def repeated(x: jax.Array) -> jax.Array:
            return lax.fori_loop(0, trips, lambda _, y: factor * y + np.array(row, np.float32), x)

        return without_factors(jax.jit(repeated).lower(jnp.ones(3)).as_text())

    assert text() == text(factor=0.25) == text(factor=1e-30)
    assert text() != text(trips=16) and text() != text(row=(1.0, 2.0, 4.0))


def test_the_report_shows_what_fits_into_the_memory_that_jax_reserves() -> None:
    """60 of the 80 GiB of an H100; 2.2 GiB per image with the tenth to spare, after 1 GiB that does not grow."""
    target = TARGETS["gpu", "h100"]
    memory = Memory(2**30, 0, 16 * 2**30, 0)
    assert _largest_batch(memory, 8, target) == 26 and _largest_batch(memory, 8, TARGETS["tpu", "v4"]) == 14
    assert _largest_batch(None, 8, target) == _largest_batch(Memory(1, 1, 0, 0), 8, target) == 0
    kernels = {"elementwise": (2, 2 * 10**12), "copies": (1, 1350 * 10**9)}
    found = Needs((640, 1024), 8, memory, True, 26, 1.0, 989 * 10**11, {}, 0, 0, kernels, 1.0, 1.1, [("c3", 2**30)])
    text = report(found, target)
    assert "fits in 60 GiB, three quarters" in text and "about 26 images" in text
    assert "100.0 ms of arithmetic, 1000.0 ms of memory" in text and "1.00  c3" in text
    assert "does NOT fit in 60 GiB" in report(replace(found, fits=False), target)
    assert "unknown whether it fits" in report(replace(found, memory=None, fits=None), target)
    assert "in 16 GiB\n" in report(replace(found, kernels={}, cycles=5), TARGETS["tpu", "v5e"])
    hours = schedule([found, replace(found, floor_seconds=0.5)], Config(), 8, "step")
    assert hours == "90000 steps: 12.5 to 27.5 hours on 8 devices (not measured)"
    assert schedule([found], Config(), 8, "detect").startswith("detection: 15 to 16 images/s")
