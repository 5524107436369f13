"""Subnets on coarse levels side by side, compared with subnets on each level alone."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Array

from retina_jax import cpu
from retina_jax.config import ModelConfig
from retina_jax.model import side_by_side
from retina_jax.model.initialisation import initialise
from retina_jax.model.retinanet import Head, RetinaNet

HEAD = ModelConfig(fpn_channels=4, head_channels=6, head_convs=2)


def maps_of(sizes: list[tuple[int, int]], channels: int = 4) -> list[Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.uniform(1, 2, (2, *size, channels)), jnp.float32) for size in sizes]


@settings(max_examples=12)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5))
def test_maps_of_any_size_have_places_of_their_own(sizes: list[tuple[int, int]]) -> None:
    maps = maps_of(sizes)
    joined = side_by_side.joined(maps)
    jax.tree.map(np.testing.assert_array_equal, side_by_side.parted(joined, maps), maps)
    cleared = side_by_side.cleared(jnp.ones_like(joined), maps)
    np.testing.assert_array_equal(cleared, joined != 0)
    assert cleared.sum() == sum(x.size for x in maps)


@settings(max_examples=6)
@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(2, 4))
def test_a_head_gives_each_map_what_it_gets_alone(size: tuple[int, int], levels: int) -> None:
    """Outputs and gradients, by weights and maps, of pyramids of any size."""
    rng, head = np.random.default_rng(0), Head(HEAD, anchors_per_cell=2, outputs=3)
    maps = maps_of([(-(-size[0] // 2**n), -(-size[1] // 2**n)) for n in range(levels)])
    shapes = jax.eval_shape(partial(head.init, level=3), jax.random.key(0), maps)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)
    weights = [jnp.asarray(rng.standard_normal((2, x[0, ..., 0].size * 2, 3)), jnp.float32) for x in maps]

    def loss(params: dict, maps: list[Array], together: bool) -> tuple[Array, list[Array]]:
        parts = [maps] if together else [[x] for x in maps]
        found = [out for part in parts for out in head.apply(params, part, 3)]
        return sum(jnp.vdot(w, out) for w, out in zip(weights, found, strict=True)), found

    run = partial(jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2), params, maps)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), run(True), run(False))


@pytest.mark.parametrize(
    ("forms", "shared", "expected"), [("cpu", True, [1, 3]), ("cpu", False, 4 * [1]), ("exported", True, 4 * [1])]
)
def test_only_programs_for_cpus_join_levels(forms: str, shared: bool, expected: list[int]) -> None:
    levels = maps_of([(8, 8), (4, 4), (2, 2), (1, 1)])
    with cpu.kernels(forms):
        assert [len(maps) for maps in side_by_side.groups(levels, shared)] == expected
        assert [len(maps) for maps in side_by_side.groups(levels[:1], shared)] == [1]


@pytest.mark.parametrize(("head_norm", "parts"), [("none", [1, 4]), ("group", 5 * [1]), ("batch", 5 * [1])])
def test_the_network_joins_levels_unless_a_norm_would_mix_them(
    monkeypatch: pytest.MonkeyPatch, head_norm: str, parts: list[int]
) -> None:
    config = replace(HEAD, base_width=4, stage_blocks=(1, 1, 1, 1), head_norm=head_norm, norm_groups=2)
    model, sizes = RetinaNet(config, 3, 2), []
    variables, rng = initialise(model, 0), np.random.default_rng(0)
    images, image_sizes = jnp.asarray(rng.integers(0, 256, (1, 64, 96, 3), np.uint8)), jnp.array([[64, 90]], jnp.int32)
    real = side_by_side.joined
    monkeypatch.setattr(side_by_side, "joined", lambda maps: sizes.append(len(maps)) or real(maps))
    outputs = []
    for forms in ("cpu", ""):
        with cpu.kernels(forms):
            outputs.append(jax.jit(model.apply)(variables, images, image_sizes))
    assert sizes == [n for n in parts for _ in range(2)] + 10 * [1]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *outputs)
