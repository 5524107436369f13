"""Maps cut into patches, the form for TPUs: convolutions, moments and the complete network equal those of uncut maps."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from retina_jax import cpu
from retina_jax.config import ModelConfig
from retina_jax.model import fpn, resnet, retinanet
from retina_jax.model.initialisation import initialise
from retina_jax.model.layers import convolve, group_moments, max_pool
from retina_jax.model.patches import LEAST, MAPS, UNCUT, Patches, cut, join, patches_of, with_edges
from retina_jax.model.retinanet import RetinaNet

TINY = ModelConfig(base_width=8, stage_blocks=(1, 1, 1, 1), fpn_channels=16, head_channels=16, head_convs=1)
OTHERWISE = {"backbone": "resnext50_32x4d", "stride_position": "3x3", "p6_from": "p5"}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@given(batch=st.integers(1, 3), rows=st.integers(1, 3), columns=st.integers(1, 3), size=st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_a_patch_and_its_edges_are_a_window_of_the_padded_map(batch: int, rows: int, columns: int, size: int) -> None:
    h, w, patches = 3, 4, Patches(rows, columns)
    x = draw(batch, rows * h, columns * w, 2)
    np.testing.assert_array_equal(join(cut(jnp.asarray(x), patches), patches), x)
    above, left = size if rows > 1 else 0, size if columns > 1 else 0
    padded = np.pad(x, ((0, 0), (above, above), (left, left), (0, 0)))
    found = np.asarray(with_edges(cut(jnp.asarray(x), patches), patches, size))
    for index, got in enumerate(found):
        image, row, column = index // (rows * columns), index // columns % rows * h, index % columns * w
        np.testing.assert_array_equal(got, padded[image, row : row + h + 2 * above, column : column + w + 2 * left])


@given(
    batch=st.integers(1, 12),
    height=st.integers(1, 200),
    width=st.integers(1, 340),
    level=st.integers(2, 7),
    stride=st.sampled_from([1, 2]),
)
@settings(max_examples=80, deadline=None)
def test_patches_divide_the_map_and_are_no_more_than_needed(
    batch: int, height: int, width: int, level: int, stride: int
) -> None:
    x = jnp.asarray(np.empty((batch, height, width, 0), np.float32))
    assert patches_of(x, level, stride) == UNCUT  # on this machine
    with cpu.kernels("tpu"):
        found = patches_of(x, level, stride)
    for side, parts in zip((height, width), found, strict=True):
        assert parts == 1 or (side % (stride * parts) == 0 and side >= LEAST * stride * parts)
    assert found == UNCUT or batch * found.rows * found.columns < 2 * MAPS


@pytest.mark.parametrize(
    ("batch", "height", "width", "expected"),
    [
        (4, 640, 1024, [(2, 1), (2, 1), (2, 1), (2, 1)]),
        (2, 608, 1024, [(1, 4), (1, 4), (1, 4), (1, 4)]),
        (2, 1024, 608, [(4, 1), (4, 1), (4, 1), (4, 1)]),
        (2, 800, 1344, [(1, 4), (1, 4), (1, 4), (1, 2)]),
        (8, 800, 1344, [(1, 1), (1, 1), (1, 1), (1, 1)]),
    ],
)
def test_maps_of_all_levels_are_cut_alike_if_they_can_be(
    batch: int, height: int, width: int, expected: list[tuple[int, int]]
) -> None:
    with cpu.kernels("tpu"):
        for level, patches in enumerate(expected, start=2):
            x = np.empty((batch, height // 2**level, width // 2**level, 0), np.float32)
            assert patches_of(jnp.asarray(x), level) == patches, level


@pytest.mark.parametrize(
    ("shape", "k", "stride", "groups", "patches"),
    [
        ((1, 16, 32, 8), 3, 1, 1, Patches(4, 2)),
        ((2, 16, 8, 8), 3, 1, 2, Patches(4, 1)),
        ((3, 6, 24, 8), 3, 2, 1, Patches(1, 4)),
        ((4, 8, 8, 128), 1, 2, 1, Patches(2, 1)),
        ((1, 6, 12, 128), 3, 1, 4, Patches(1, 2)),
        ((1, 16, 16, 3), 3, 1, 1, Patches(2, 2)),
    ],
)
def test_convolving_patches_convolves_the_map(
    shape: tuple[int, ...], k: int, stride: int, groups: int, patches: Patches
) -> None:
    features = {128: 128, 3: 64}.get(shape[-1], 12)
    x, kernel = jnp.asarray(draw(*shape)), jnp.asarray(draw(k, k, shape[-1] // groups, features, seed=1))

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolve(x, kernel, stride, groups)

    def in_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
        with cpu.kernels("tpu"):
            return join(convolve(cut(x, patches), kernel, stride, groups, patches), patches)

    expected, pull_back = jax.vjp(plain, x, kernel)
    got, pull_back_patches = jax.vjp(in_patches, x, kernel)
    dy = jnp.asarray(draw(*expected.shape, seed=2))
    for a, b in zip((got, *pull_back_patches(dy)), (expected, *pull_back(dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("height", "width", "stride"), [(15, 12, 2), (9, 6, 1), (8, 10, 2)])
def test_two_columns_at_once_equal_the_convolution_and_the_pooling(height: int, width: int, stride: int) -> None:
    """With small integers, so that sums are exact and many are equal."""
    x, kernel = jnp.asarray(np.round(draw(2, height, width, 3))), jnp.asarray(np.round(draw(7, 7, 3, 64, seed=1)))

    def stem(x: jax.Array, kernel: jax.Array, form: str) -> jax.Array:
        with cpu.kernels(form):
            return max_pool(convolve(x, kernel, stride))

    got, expected = (jax.vjp(lambda x, k: stem(x, k, form), x, kernel) for form in ("tpu", ""))  # noqa: B023
    dy = jnp.asarray(draw(*expected[0].shape, seed=2))
    np.testing.assert_array_equal(got[0], expected[0])
    for a, b in zip(got[1](dy), expected[1](dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 5, 8, 3), (2, 6, 7, 2), (1, 1, 2, 1)])
def test_pooling_pairs_of_columns_gives_values_and_gradients_of_pooling(shape: tuple[int, ...]) -> None:
    x = jnp.asarray(np.round(draw(*shape)) - 5)

    def pooled(x: jax.Array, form: str) -> jax.Array:
        with cpu.kernels(form):
            return max_pool(x)

    got, expected = (jax.vjp(lambda x: pooled(x, form), x) for form in ("tpu", ""))  # noqa: B023
    dy = jnp.asarray(draw(*expected[0].shape, seed=1))
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1](dy)[0], expected[1](dy)[0], rtol=1e-6)


def test_a_symbolic_batch_is_not_cut() -> None:
    (batch,) = export.symbolic_shape("b")
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, 8, 8, 128), (3, 3, 128, 4)))

    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        with cpu.kernels("tpu"):
            return convolve(x, kernel, patches=patches_of(x, 5))

    assert export.export(jax.jit(forward))(x, kernel).out_avals[0].shape == (batch, 8, 8, 4)


def test_moments_of_a_group_are_those_of_the_complete_map() -> None:
    x, patches = jnp.asarray(draw(2, 8, 6, 4)), Patches(2, 3)
    expected = [jnp.repeat(moment, 6, axis=0) for moment in group_moments(x, 2)]
    for a, b in zip(group_moments(cut(x, patches), 2, patches), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (replace(TINY, backbone="resnet18", norm="batch", head_norm="batch", remat=True, max_level=8), (3, 64, 128)),
        (replace(TINY, backbone="resnet18", max_level=5), (1, 64, 128)),
        pytest.param(
            replace(TINY, **OTHERWISE, norm="group", head_norm="group", frozen_stages=0, min_level=2),
            (1, 96, 128),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_network_in_patches_equals_the_network(
    config: ModelConfig, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((resnet, "relu"), (resnet, "stored_relu"), (fpn, "relu"), (retinanet, "relu")):
        monkeypatch.setattr(module, name, jax.nn.silu)  # smooth: rounding near zero cannot turn a gradient on or off
    model, (batch, height, width) = RetinaNet(config, 2, 3), shape
    variables = jax.tree.map(lambda x: x + 0.05 * np.abs(draw(*x.shape)), initialise(model, 0))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
    sizes = jnp.broadcast_to(jnp.array([height, width - 7])[None], (batch, 2))

    def outputs(params: dict, form: str) -> tuple[jax.Array, object]:
        with cpu.kernels(form):
            found, stats = model.apply({**variables, "params": params}, images, sizes, True, mutable=["stats"])
        return sum((x * draw(*x.shape, seed=i)).sum() for i, x in enumerate(found)), (found, stats)

    got, expected = (
        jax.jit(jax.value_and_grad(lambda params: outputs(params, form), has_aux=True))(variables["params"])  # noqa: B023
        for form in ("tpu", "")
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-3, atol=1e-8 + 2e-4 * float(jnp.abs(b).max()))
