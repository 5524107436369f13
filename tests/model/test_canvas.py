"""The subnets on one canvas of coarse levels, next to the subnets on each level alone."""

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
from retina_jax.model import canvas
from retina_jax.model.retinanet import Head

HEAD = ModelConfig(fpn_channels=4, head_channels=6, head_convs=2)


def maps_of(sizes: list[tuple[int, int]], channels: int = 4) -> list[Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.uniform(1, 2, (2, *size, channels)), jnp.float32) for size in sizes]


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5))
def test_maps_of_any_size_have_places_of_their_own(sizes: list[tuple[int, int]]) -> None:
    maps = maps_of(sizes)
    painted = canvas.painted(maps)
    jax.tree.map(np.testing.assert_array_equal, canvas.parted(painted, maps), maps)
    cleared = canvas.cleared(jnp.ones_like(painted), maps)
    np.testing.assert_array_equal(cleared, painted != 0)
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
def test_only_programs_for_cpus_share_a_canvas(forms: str, shared: bool, expected: list[int]) -> None:
    levels = maps_of([(8, 8), (4, 4), (2, 2), (1, 1)])
    with cpu.kernels(forms):
        assert [len(maps) for maps in canvas.groups(levels, shared)] == expected
        assert [len(maps) for maps in canvas.groups(levels[:1], shared)] == [1]
