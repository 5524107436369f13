"""Classification losses against equations 1, 3, 5, 9 and 10 in float64, and against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_jax.config import ConfigError, LossConfig
from retina_jax.losses.classification import balanced_cross_entropy, classification_loss, cross_entropy, focal
from retina_jax.matching import BACKGROUND, IGNORED

GAMMAS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LOGITS = np.array([0.0, -0.0, 1e-3, -1e-3, 0.5, -0.5, 3.0, -3.0, 20.0, -20.0, 60.0, -60.0, 100.0, -100.0])
SATURATED = np.array([20.0, -20.0, 100.0, -100.0, 1e4, -1e4, 0.0, -0.0])


def reference(x_t: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """FL and dFL/dx_t (equations 4 and 10) in float64, with 1 - p_t = sigmoid(-x_t)."""
    x_t = x_t.astype(np.float64)
    minus_log_p, minus_log_q = np.logaddexp(0, -x_t), np.logaddexp(0, x_t)
    p, q, modulator = np.exp(-minus_log_p), np.exp(-minus_log_q), np.exp(-gamma * minus_log_q)
    return modulator * minus_log_p, modulator * (-gamma * p * minus_log_p - q)


def one_class(logits: np.ndarray, target: int) -> tuple[jax.Array, jax.Array]:
    """Each logit as its own anchor with K = 1."""
    return jnp.asarray(logits, jnp.float32)[:, None], jnp.full(len(logits), 0 if target else BACKGROUND, jnp.int32)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("target", [0, 1])
def test_focal_is_equation_5_and_its_gradient_equation_10(gamma: float, target: int) -> None:
    logits, labels = one_class(LOGITS, target)
    y, alpha_t = (1, 0.25) if target else (-1, 0.75)
    value, slope = reference(y * LOGITS, gamma)
    loss = focal(logits, labels, alpha=0.25, gamma=gamma)
    gradient = jax.grad(lambda x: focal(x, labels, alpha=0.25, gamma=gamma).sum())(logits)
    np.testing.assert_allclose(loss[:, 0], alpha_t * value, rtol=2e-5, atol=1e-36)
    np.testing.assert_allclose(gradient[:, 0], alpha_t * y * slope, rtol=2e-5, atol=1e-36)


@pytest.mark.parametrize("target", [0, 1])
def test_cross_entropy_is_equation_1_and_its_gradient_equation_9(target: int) -> None:
    logits, labels = one_class(LOGITS, target)
    y = 1 if target else -1
    p_t = 1 / (1 + np.exp(-y * LOGITS))
    gradient = jax.grad(lambda x: cross_entropy(x, labels).sum())(logits)
    np.testing.assert_allclose(cross_entropy(logits, labels)[:, 0], np.logaddexp(0, -y * LOGITS), rtol=1e-6)
    np.testing.assert_allclose(gradient[:, 0], y * (p_t - 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_value_and_gradients_are_finite_where_the_sigmoid_saturates(gamma: float, dtype: jnp.dtype) -> None:
    logits = jnp.asarray(SATURATED, dtype)[:, None]
    for label in (0, BACKGROUND):
        labels = jnp.full(len(SATURATED), label, jnp.int32)

        def total(x: jax.Array, labels: jax.Array = labels) -> jax.Array:
            return focal(x, labels, alpha=0.25, gamma=gamma).sum()

        value, gradient = focal(logits, labels, alpha=0.25, gamma=gamma), jax.grad(total)(logits)
        curvature = jax.grad(lambda x: jax.grad(total)(x).astype(jnp.float32).sum())(logits)
        assert value.dtype == jnp.float32
        assert gradient.dtype == dtype
        for array in (value, gradient, curvature):
            assert np.isfinite(np.asarray(array, np.float32)).all()
        assert (np.asarray(value) >= 0).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), alpha=st.floats(0.01, 0.99), gamma=st.sampled_from(GAMMAS))
def test_focal_is_that_of_optax(seed: int, alpha: float, gamma: float) -> None:
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(0, 3, (2, 5, 4)), jnp.float32)
    labels = jnp.asarray(rng.integers(-1, 4, (2, 5)), jnp.int32)
    targets = jax.nn.one_hot(labels, 4)
    np.testing.assert_allclose(
        focal(logits, labels, alpha=alpha, gamma=gamma),
        optax.sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma),
        rtol=2e-4,
        atol=1e-7,
    )


def test_gamma_zero_is_balanced_cross_entropy() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 4, (20, 3)), jnp.float32)
    labels = jnp.asarray(np.arange(20) % 5 - 2, jnp.int32)
    balanced = balanced_cross_entropy(logits, labels, alpha=0.75)
    np.testing.assert_array_equal(focal(logits, labels, alpha=0.75, gamma=0.0), balanced)
    half = 2 * balanced_cross_entropy(logits, labels, alpha=0.5)
    np.testing.assert_array_equal(half, cross_entropy(logits, labels))


def test_gamma_two_lowers_the_loss_a_hundredfold_at_p_09_and_a_thousandfold_at_p_0968() -> None:
    p_t = np.array([0.9, 0.968, 0.5])
    logits, labels = one_class(np.log(p_t / (1 - p_t)), target=1)
    lowered = cross_entropy(logits, labels) / (4 * focal(logits, labels, alpha=0.25, gamma=2.0))
    assert float(lowered[0, 0]) == pytest.approx(100, rel=1e-4)
    assert float(lowered[1, 0]) == pytest.approx(1000, rel=0.03)
    assert float(lowered[2, 0]) == pytest.approx(4, rel=1e-5)  # "at most 4x for p_t <= .5"


def test_alpha_weighs_targets_and_one_minus_alpha_the_rest() -> None:
    loss = balanced_cross_entropy(jnp.zeros((2, 3)), jnp.array([1, BACKGROUND], jnp.int32), alpha=0.9)
    np.testing.assert_allclose(loss / np.log(2), [[0.1, 0.9, 0.1], [0.1, 0.1, 0.1]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["cross_entropy", "balanced_cross_entropy", "focal"])
def test_ignored_anchors_have_no_loss_and_no_gradient(kind: str) -> None:
    loss = classification_loss(LossConfig(kind=kind))
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 9, (3, 4)), jnp.float32)
    labels = jnp.array([IGNORED, BACKGROUND, 2], jnp.int32)
    value, gradient = loss(logits, labels), jax.grad(lambda x: loss(x, labels).sum())(logits)
    np.testing.assert_array_equal(value[0], np.zeros(4))
    np.testing.assert_array_equal(gradient[0], np.zeros(4))
    assert (np.asarray(gradient[1]) > 0).all()  # background pushes every class down
    np.testing.assert_array_equal(np.sign(gradient[2]), [1, 1, -1, 1])


@pytest.mark.parametrize("gamma", GAMMAS)
def test_second_derivative_is_that_of_equation_10_at_zero_too(gamma: float) -> None:
    x = np.array([-2.0, -0.5, 0.0, 0.5, 2.0])
    step = 1e-5
    expected = (reference(x + step, gamma)[1] - reference(x - step, gamma)[1]) / (2 * step)
    label = jnp.zeros((), jnp.int32)

    def loss(x: jax.Array) -> jax.Array:
        return focal(x[None], label, alpha=1.0, gamma=gamma)[0]

    logits = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(jax.vmap(jax.grad(jax.grad(loss)))(logits), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.jacfwd(jax.jacrev(loss)))(logits), expected, rtol=1e-4, atol=1e-6)


def test_loss_is_the_same_under_jit_and_vmap() -> None:
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 3, (4, 6, 5)), jnp.bfloat16)
    labels = jnp.asarray(np.random.default_rng(2).integers(-2, 5, (4, 6)), jnp.int32)
    loss = classification_loss(LossConfig())
    expected = loss(logits, labels)
    assert expected.shape == (4, 6, 5)
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(logits, labels), expected, rtol=1e-5, atol=1e-9)


def test_unknown_loss_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"loss\.kind"):
        classification_loss(LossConfig(kind="hinge"))
