"""The fast form of the losses, in tiles and in one pass, equals the sum of the formulas and JAX's derivative of
them."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_jax import cpu
from retina_jax.config import LossConfig
from retina_jax.losses import fused
from retina_jax.losses.focal import classification_loss
from retina_jax.losses.fused import summed, sums_and_gradient, value_and_gradient
from retina_jax.ops.matching import BACKGROUND, IGNORED

KINDS = {
    "cross_entropy": LossConfig(kind="cross_entropy"),
    "balanced": LossConfig(kind="balanced_cross_entropy", alpha=0.75),
    "focal": LossConfig(),
    "focal .5": LossConfig(gamma=0.5),
    "star": LossConfig(kind="focal_star", gamma=2.0, star_beta=1.0),
    "hinge": LossConfig(kind="hinge"),
}


def case(images: int, anchors: int, classes: int, seed: int = 0, dtype: str = "float32") -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(-1, 4, (images, anchors, classes)), dtype)
    labels = rng.choice([BACKGROUND, IGNORED, *range(classes)], (images, anchors))
    return logits, jnp.asarray(labels, jnp.int32)


def by_formula(
    loss: LossConfig, logits: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def total(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        sums = classification_loss(loss)(logits, labels).sum(axis=(1, 2))
        return (weights * sums).sum(), sums

    (_, sums), gradient = jax.value_and_grad(total, has_aux=True)(logits)
    return sums, gradient


def assert_same_gradient(found: jax.Array, expected: jax.Array, logits: jax.Array) -> None:
    """Equal but for rounding: within 6 ulps times 1 + |x| for a logit x.

    The fast form takes p_t as 1 - q_t, which for p_t near 0 is off by half an ulp of 1, times gamma times a loss that grows
    with |x|; the formula takes exponentials of numbers as large as x. 3 ulps were measured over 72,000 logits of each kind.
    """
    bound = 6 * np.finfo(np.float32).eps * (1 + np.abs(logits)) * np.abs(expected)
    assert (np.abs(found - expected) <= bound).all()


@pytest.mark.parametrize(
    ("kind", "shape"),
    [*((kind, (3, 100, 4)) for kind in KINDS), *(("focal", shape) for shape in [(1, 7, 5), (2, 33, 1), (40, 3, 2)])],
)
def test_every_order_of_passes_gives_the_plain_sum_and_gradient(
    kind: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "TILE", 64)  # tiles of a few anchors, the last one mostly incomplete
    logits, labels = case(*shape)
    sums, gradient = by_formula(KINDS[kind], logits, labels, jnp.ones(shape[0]))

    def in_the_backward_pass(_: object, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        with cpu.kernels("gpu"):
            sums, pull_back = jax.vjp(lambda logits: summed(KINDS[kind])(logits, labels), logits)
        return sums, pull_back(jnp.ones_like(sums))[0]

    for form in (cpu.in_tiles, sums_and_gradient.__wrapped__, in_the_backward_pass):
        found = jax.jit(functools.partial(form, value_and_gradient(KINDS[kind])))(logits, labels)
        np.testing.assert_allclose(found[0], sums, rtol=1e-5)
        assert_same_gradient(found[1], gradient, logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0])
def test_the_fast_focal_loss_equals_the_formula_at_extreme_logits(gamma: float, dtype: str) -> None:
    assert_formula(LossConfig(gamma=gamma), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_every_fast_form_equals_its_formula_at_extreme_logits(kind: str) -> None:
    assert_formula(KINDS[kind], "float32")


def assert_formula(config: LossConfig, dtype: str) -> None:
    """Compares value and gradient of every logit with `focal.py` and JAX's derivative, for a class, background and
    ignored."""
    sizes = np.array([0.0, 1e-3, 0.5, 2.0, 20.0, 60.0, 100.0, 1e4])
    row = jnp.asarray(np.concatenate([sizes, -sizes]), dtype)
    logits, labels = jnp.stack([row] * 4), jnp.array([BACKGROUND, IGNORED, 3, 12], jnp.int32)
    plain = classification_loss(config)
    value, gradient = jax.jit(value_and_gradient(config))(logits, labels)
    assert (value.dtype, gradient.dtype) == (jnp.float32, logits.dtype)
    assert np.isfinite(value).all() and np.isfinite(gradient.astype(jnp.float32)).all()
    expected = jax.grad(lambda logits: plain(logits, labels).sum())(logits)
    atol = 1e-7 if config.kind == "hinge" else 1e-30  # margin - p_t is a difference of numbers near 1
    np.testing.assert_allclose(value, plain(logits, labels), rtol=5e-5, atol=atol)
    gradient, expected = gradient.astype(jnp.float32), expected.astype(jnp.float32)
    np.testing.assert_allclose(gradient, expected, rtol=5e-5 if dtype == "float32" else 2**-7, atol=atol)


def test_a_kind_without_a_fast_form_uses_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_curve", lambda config: None)
    logits, labels = case(1, 30, 4)
    sums, gradient = by_formula(LossConfig(), logits, labels, jnp.ones(1))
    value, pull_back = jax.vjp(lambda logits: summed(LossConfig())(logits, labels), logits)
    np.testing.assert_allclose(value, sums, rtol=1e-6)
    np.testing.assert_allclose(pull_back(jnp.ones(1))[0], gradient, rtol=1e-6)


@settings(max_examples=5, deadline=None)
@given(
    images=st.integers(1, 3),
    anchors=st.integers(1, 50),
    classes=st.integers(1, 9),
    tile=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_every_anchor_counts_once_with_any_tile(images: int, anchors: int, classes: int, tile: int, seed: int) -> None:
    logits, labels = case(images, anchors, classes, seed)
    weights = jnp.arange(1.0, images + 1)
    sums, gradient = by_formula(LossConfig(), logits, labels, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TILE", tile)
        of_images = summed(LossConfig())
        value, pull_back = jax.vjp(lambda logits: of_images(logits, labels), logits)
    np.testing.assert_allclose(value, sums, rtol=1e-5)
    assert_same_gradient(pull_back(weights)[0], gradient, logits)


def test_without_a_gradient_the_sum_is_the_same() -> None:
    logits, labels = case(2, 1000, 80)
    of_images = summed(LossConfig())
    with_gradient, _ = jax.vjp(lambda logits: of_images(logits, labels), logits)
    np.testing.assert_allclose(of_images(logits, labels), with_gradient, rtol=1e-5)


def test_the_gradient_keeps_the_logits_precision_and_sums_are_float32() -> None:
    logits, labels = case(2, 500, 80, dtype="bfloat16")
    of_images = summed(LossConfig())
    sums, pull_back = jax.vjp(lambda logits: of_images(logits, labels), logits)
    (gradient,) = pull_back(jnp.full(2, 1 / 3))
    exact_sums, exact = by_formula(LossConfig(), logits.astype(jnp.float32), labels, jnp.full(2, 1 / 3))
    assert sums.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(sums, exact_sums, rtol=1e-5)
    np.testing.assert_allclose(gradient.astype(jnp.float32), exact, rtol=2**-7, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_have_finite_gradients(kind: str) -> None:
    logits = jnp.array([[[-1e4, -90, -20, 0.0, 20, 90, 1e4]]] * 2)
    labels = jnp.array([[BACKGROUND], [3]], jnp.int32)
    of_images = summed(KINDS[kind])
    sums, pull_back = jax.vjp(lambda logits: of_images(logits, labels), logits)
    assert np.isfinite(sums).all() and np.isfinite(pull_back(jnp.ones(2))[0]).all()


def test_a_nan_logit_makes_only_the_loss_of_its_image_nan() -> None:
    logits, labels = case(3, 200, 7)
    sums = summed(LossConfig())(logits.at[1, 0, 0].set(jnp.nan), labels.at[1, 0].set(BACKGROUND))
    assert np.isnan(sums).tolist() == [False, True, False]


def test_on_the_cpu_the_gradient_overwrites_donated_logits() -> None:
    """The program makes no copy of the logits and no second array of their size; the last tile of an image is shorter
    here."""
    logits, labels = case(2, 1000, 80)
    of_images = summed(LossConfig())
    program = jax.jit(jax.value_and_grad(lambda x, y: of_images(x, y).sum()), donate_argnums=0)
    compiled = program.lower(logits, labels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < logits.nbytes
    assert not re.findall(r"= f32\[(?:2,1000|2000),80\]\S* (?:copy|broadcast)\(", compiled.as_text())
    expected = jax.grad(lambda x: of_images(x, labels).sum())(logits)
    np.testing.assert_array_equal(compiled(logits, labels)[1], expected)


def test_under_vmap_and_with_no_anchors() -> None:
    logits, labels = case(4, 30, 5)
    of_images = summed(LossConfig())
    gradient = jax.grad(lambda logits: of_images(logits, labels).sum())(logits)
    one = jax.vmap(jax.grad(lambda logits, labels: of_images(logits[None], labels[None])[0]))(logits, labels)
    np.testing.assert_allclose(one, gradient, rtol=1e-6, atol=1e-9)
    none = jax.value_and_grad(lambda logits: of_images(logits, labels[:, :0]).sum())(logits[:, :0])
    assert none[0] == 0 and none[1].shape == (4, 0, 5)
