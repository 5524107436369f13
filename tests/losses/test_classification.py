"""Classification losses equal equations 1, 3, 5 and 8 to 11 in float64, and optax."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_jax.config import LossConfig
from retina_jax.losses.focal import balanced_cross_entropy, classification_loss, cross_entropy, focal, focal_star, hinge
from retina_jax.ops.matching import BACKGROUND, IGNORED

GAMMAS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LOGITS = np.array([0.0, -0.0, 1e-3, -1e-3, 0.5, -0.5, 2.0, -2.0, 20.0, -20.0, 60.0, -60.0, 100.0, -100.0, 1e4, -1e4])
# Each logit occurs twice, as an anchor with K = 1: labelled with the class, and as background.
X = np.concatenate([LOGITS, LOGITS])
Y = np.repeat([1, -1], len(LOGITS))
LABELS = jnp.asarray(np.where(Y > 0, 0, BACKGROUND), jnp.int32)
ALPHA_T = np.where(Y > 0, 0.25, 0.75)


def reference(x_t: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns FL and dFL/dx_t (equations 4 and 10) in float64, with 1 - p_t = sigmoid(-x_t)."""
    minus_log_p, minus_log_q = np.logaddexp(0, -x_t), np.logaddexp(0, x_t)
    p, q, modulator = np.exp(-minus_log_p), np.exp(-minus_log_q), np.exp(-gamma * minus_log_q)
    return modulator * minus_log_p, modulator * (-gamma * p * minus_log_p - q)


@functools.cache
def derivatives(gamma: float, dtype: jnp.dtype = jnp.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns value, first and second derivative of the focal loss at every X; the loss does not mix its elements."""

    def value(x: jax.Array) -> jax.Array:
        return focal(x[:, None], LABELS, alpha=0.25, gamma=gamma)[:, 0]

    slope = jax.grad(lambda x: value(x).sum())
    curvature = jax.grad(lambda x: slope(x).astype(jnp.float32).sum())
    found = jax.jit(lambda x: (value(x), slope(x), curvature(x)))(jnp.asarray(X, dtype))
    assert [array.dtype for array in found] == [jnp.float32, dtype, dtype]
    return tuple(np.asarray(array, np.float32) for array in found)


def test_cross_entropy_is_equation_1_and_its_gradient_equation_9() -> None:
    def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss = cross_entropy(x[:, None], LABELS)[:, 0]
        return loss.sum(), loss

    gradient, value = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(X, jnp.float32))
    p_t_minus_1 = -np.exp(-np.logaddexp(0, Y * X))
    np.testing.assert_allclose(value, np.logaddexp(0, -Y * X), rtol=1e-6, atol=1e-36)
    np.testing.assert_allclose(gradient, Y * p_t_minus_1, rtol=1e-5, atol=1e-36)


def test_forward_mode_equals_reverse_mode() -> None:
    x, label = jnp.linspace(-3.0, 3.0, 7), jnp.zeros((), jnp.int32)

    def loss(x: jax.Array) -> jax.Array:
        return focal(x[None], label, alpha=1.0, gamma=0.5)[0]

    forward, reverse = jax.jit(lambda x: (jax.vmap(jax.jacfwd(loss))(x), jax.vmap(jax.jacrev(loss))(x)))(x)
    np.testing.assert_allclose(forward, reverse, rtol=1e-6)
    mixed, twice = jax.jit(
        lambda x: (jax.vmap(jax.jacfwd(jax.jacrev(loss)))(x), jax.vmap(jax.grad(jax.grad(loss)))(x))
    )(x)
    np.testing.assert_allclose(mixed, twice, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_focal_equals_optax(gamma: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, 3, (2, 5, 4)).astype(np.float32), rng.integers(-1, 4, (2, 5)).astype(np.int32)
    ours, theirs = ours_and_optaxs(gamma)(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-7)


@functools.cache
def ours_and_optaxs(gamma: float, alpha: float = 0.3) -> jax.stages.Wrapped:
    return jax.jit(
        lambda logits, labels: (
            focal(logits, labels, alpha=alpha, gamma=gamma),
            optax.sigmoid_focal_loss(logits, jax.nn.one_hot(labels, 4), alpha=alpha, gamma=gamma),
        )
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
    logits, labels = jnp.asarray(np.log(p_t / (1 - p_t)), jnp.float32)[:, None], jnp.zeros(3, jnp.int32)
    lowered = cross_entropy(logits, labels) / (4 * focal(logits, labels, alpha=0.25, gamma=2.0))
    assert float(lowered[0, 0]) == pytest.approx(100, rel=1e-4)
    assert float(lowered[1, 0]) == pytest.approx(1000, rel=0.03)
    assert float(lowered[2, 0]) == pytest.approx(4, rel=1e-5)  # "at most 4x for p_t <= 0.5"


def test_alpha_weights_targets_and_one_minus_alpha_the_rest() -> None:
    loss = balanced_cross_entropy(jnp.zeros((2, 3)), jnp.array([1, BACKGROUND], jnp.int32), alpha=0.9)
    np.testing.assert_allclose(loss / np.log(2), [[0.1, 0.9, 0.1], [0.1, 0.1, 0.1]], rtol=1e-6)


# (gamma, beta): Table 3's two, cross entropy, and corners of Figure 7.
STARS = ((2.0, 1.0), (4.0, 0.0), (1.0, 0.0), (0.5, -1.0), (3.7, 2.5))


def value_and_slope(
    loss: Callable[[jax.Array, jax.Array], jax.Array], x: np.ndarray, y: np.ndarray, dtype: jnp.dtype = jnp.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Returns value and derivative of a loss at each logit x, as an anchor with K = 1 of the class (y = 1) or
    background (y = -1)."""
    labels = jnp.asarray(np.where(y > 0, 0, BACKGROUND), jnp.int32)

    def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_x = loss(x[:, None], labels)[:, 0]
        return of_x.sum(), of_x

    slope, value = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(x, dtype))
    assert (value.dtype, slope.dtype) == (jnp.float32, dtype)
    return np.asarray(value), np.asarray(slope, np.float32)


@pytest.mark.parametrize(("gamma", "beta"), STARS)
def test_focal_star_is_equation_8_and_its_gradient_equation_11(gamma: float, beta: float) -> None:
    value, slope = value_and_slope(functools.partial(focal_star, alpha=0.25, gamma=gamma, beta=beta), X, Y)
    z = gamma * Y * X + beta
    # gamma x_t + beta is rounded: if it is large, exp makes its error large.
    rtol = 1e-5 + 2e-7 * np.where(np.abs(z) < 100, np.abs(z), 0)
    p_star_minus_1 = -np.exp(-np.logaddexp(0, z))
    expected = (ALPHA_T * np.logaddexp(0, -z) / gamma, ALPHA_T * Y * p_star_minus_1)
    for got, exact in zip((value, slope), expected, strict=True):
        assert (np.abs(got - exact) <= rtol * np.abs(exact) + 1e-36).all()


@functools.cache
def plain_definitions() -> list[tuple[Callable, Callable]]:
    def compiled(of_x: Callable) -> Callable:
        return jax.jit(lambda x, y: (of_x(x, y), jax.grad(lambda x: of_x(x, y).sum())(x)))

    def ours(loss: Callable) -> Callable:
        return compiled(lambda x, y: loss(x[:, None], jnp.where(y > 0, 0, BACKGROUND))[:, 0])

    def plain(of_x_t: Callable) -> Callable:
        return compiled(lambda x, y: jnp.where(y > 0, 0.3, 0.7) * of_x_t(y.astype(jnp.float32) * x))

    star = functools.partial(focal_star, alpha=0.3, gamma=2.0, beta=1.0)
    return [
        (
            ours(functools.partial(balanced_cross_entropy, alpha=0.3)),
            plain(lambda x_t: -jnp.log(1 / (1 + jnp.exp(-x_t)))),
        ),
        (
            ours(functools.partial(focal, alpha=0.3, gamma=2.0)),
            plain(lambda x_t: -((1 - 1 / (1 + jnp.exp(-x_t))) ** 2) * jnp.log(1 / (1 + jnp.exp(-x_t)))),
        ),
        (ours(star), plain(lambda x_t: -jnp.log(1 / (1 + jnp.exp(-(2 * x_t + 1)))) / 2)),
        (
            ours(functools.partial(hinge, alpha=0.3, margin=0.6)),
            plain(lambda x_t: jnp.maximum(0.0, 0.6 - 1 / (1 + jnp.exp(-x_t)))),
        ),
    ]


def test_focal_star_of_gamma_one_and_beta_zero_is_balanced_cross_entropy() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 6, (20, 3)), jnp.float32)
    labels = jnp.asarray(np.arange(20) % 5 - 2, jnp.int32)
    star = focal_star(logits, labels, alpha=0.25, gamma=1.0, beta=0.0)
    np.testing.assert_array_equal(star, balanced_cross_entropy(logits, labels, alpha=0.25))


@pytest.mark.parametrize(("gamma", "beta"), STARS)
def test_focal_star_tends_to_a_line_of_slope_minus_one_and_to_zero(gamma: float, beta: float) -> None:
    """FL* approaches -x_t - beta / gamma as p_t* -> 0, with the derivative of cross entropy, and 0 as p_t* -> 1."""
    value, slope = value_and_slope(
        functools.partial(focal_star, alpha=1.0, gamma=gamma, beta=beta), np.array([-80.0, 80.0]), np.array([1, 1])
    )
    np.testing.assert_allclose(value, [80 - beta / gamma, 0], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(slope, [-1, 0], rtol=1e-6, atol=1e-12)


def test_steep_focal_star_is_the_relu_of_minus_x_t() -> None:
    x = np.array([-3.0, -0.5, 0.5, 3.0])
    value, slope = value_and_slope(functools.partial(focal_star, alpha=1.0, gamma=1e4, beta=0.0), x, np.ones(4))
    np.testing.assert_allclose(value, [3, 0.5, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(slope, [-1, -1, 0, 0])


@pytest.mark.parametrize("margin", [0.1, 0.5, 0.9, 1.0])
def test_hinge_falls_in_p_t_to_zero_at_the_margin_and_stays_there(margin: float) -> None:
    value, slope = value_and_slope(functools.partial(hinge, alpha=0.25, margin=margin), X, Y)
    p_t, q_t = np.exp(-np.logaddexp(0, -Y * X)), np.exp(-np.logaddexp(0, Y * X))
    below = p_t < margin
    np.testing.assert_allclose(value, ALPHA_T * np.where(below, margin - p_t, 0), atol=1e-7)
    np.testing.assert_allclose(slope, ALPHA_T * -Y * np.where(below, p_t * q_t, 0), rtol=1e-5, atol=1e-8)
    above = p_t > margin + 1e-6
    assert margin == 1 or above.any()
    assert not value[above].any() and not slope[above].any()


def test_hinge_at_the_margin_has_no_loss_and_no_derivative() -> None:
    """sigmoid(0) is exactly 0.5; just below the margin the derivative is -1/4."""
    x = np.array([0.0, -0.0, -1e-3, 1e-3])
    value, slope = value_and_slope(functools.partial(hinge, alpha=1.0, margin=0.5), x, np.ones(4))
    np.testing.assert_array_equal(value[[0, 1, 3]], np.zeros(3))
    np.testing.assert_array_equal(slope[[0, 1, 3]], np.zeros(3))
    assert value[2] == pytest.approx(2.5e-4, rel=1e-3)
    assert slope[2] == pytest.approx(-0.25, rel=1e-5)


@pytest.mark.parametrize("kind", ["cross_entropy", "balanced_cross_entropy", "focal", "focal_star", "hinge"])
def test_ignored_anchors_have_no_loss_and_no_gradient(kind: str) -> None:
    loss = classification_loss(LossConfig(kind=kind, hinge_margin=1.0))
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 4, (3, 4)), jnp.float32)
    labels = jnp.array([IGNORED, BACKGROUND, 2], jnp.int32)
    value, gradient = jax.jit(lambda x: (loss(x, labels), jax.grad(lambda x: loss(x, labels).sum())(x)))(logits)
    np.testing.assert_array_equal(value[0], np.zeros(4))
    np.testing.assert_array_equal(gradient[0], np.zeros(4))
    assert (np.asarray(gradient[1]) > 0).all()  # background lowers the logit of every class
    np.testing.assert_array_equal(np.sign(gradient[2]), [1, 1, -1, 1])


def test_each_kind_uses_its_parameters() -> None:
    logits, labels = jnp.linspace(-3.0, 3.0, 12).reshape(4, 3), jnp.array([0, BACKGROUND, 2, IGNORED], jnp.int32)
    config = {"alpha": 0.3, "gamma": 1.5, "star_beta": 0.7, "hinge_margin": 0.8}
    expected = {
        "cross_entropy": cross_entropy(logits, labels),
        "balanced_cross_entropy": balanced_cross_entropy(logits, labels, alpha=0.3),
        "focal": focal(logits, labels, alpha=0.3, gamma=1.5),
        "focal_star": focal_star(logits, labels, alpha=0.3, gamma=1.5, beta=0.7),
        "hinge": hinge(logits, labels, alpha=0.3, margin=0.8),
    }
    for kind, value in expected.items():
        np.testing.assert_array_equal(classification_loss(LossConfig(kind=kind, **config))(logits, labels), value)


def test_loss_is_the_same_under_jit_and_vmap() -> None:
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 3, (4, 6, 5)), jnp.bfloat16)
    labels = jnp.asarray(np.random.default_rng(2).integers(-2, 5, (4, 6)), jnp.int32)
    loss = classification_loss(LossConfig())
    expected = loss(logits, labels)
    assert expected.shape == (4, 6, 5)
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(logits, labels), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.usefixtures("optimised")  # numerics, as users' programs compute them, from here on
@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_is_equation_5_and_its_gradient_equation_10(gamma: float) -> None:
    value, slope = reference(Y * X, gamma)
    np.testing.assert_allclose(derivatives(gamma)[0], ALPHA_T * value, rtol=2e-5, atol=1e-36)
    np.testing.assert_allclose(derivatives(gamma)[1], ALPHA_T * Y * slope, rtol=2e-5, atol=1e-36)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("gamma", GAMMAS)
def test_second_derivative_is_that_of_equation_10_at_zero_too(gamma: float) -> None:
    step = 1e-5
    expected = (reference(Y * X + step, gamma)[1] - reference(Y * X - step, gamma)[1]) / (2 * step)
    np.testing.assert_allclose(derivatives(gamma)[2], ALPHA_T * expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_value_and_gradients_are_finite_where_the_sigmoid_saturates(gamma: float, dtype: jnp.dtype) -> None:
    for array in derivatives(gamma, dtype):
        assert np.isfinite(array).all()
    assert (derivatives(gamma, dtype)[0] >= 0).all()


@pytest.mark.usefixtures("optimised")
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_losses_equal_the_printed_definitions_and_their_autodiff(seed: int) -> None:
    """If sigmoid and logarithm are in their normal range, the definitions as printed in the paper give the same
    values."""
    x = np.random.default_rng(seed).uniform(-4, 4, 16).astype(np.float32)
    y = np.random.default_rng(seed + 1).choice([-1, 1], 16)
    for ours, plain in plain_definitions():
        (value, slope), (expected, expected_slope) = ours(x, y), plain(x, y)
        np.testing.assert_allclose(value, expected, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(slope, expected_slope, rtol=2e-4, atol=2e-6)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "loss",
    [functools.partial(focal_star, alpha=0.25, gamma=g, beta=b) for g, b in STARS]
    + [functools.partial(hinge, alpha=0.25, margin=m) for m in (0.5, 1.0)],
)
def test_focal_star_and_hinge_are_finite_at_extreme_logits(loss: Callable, dtype: jnp.dtype) -> None:
    value, slope = value_and_slope(loss, X, Y, dtype)
    assert np.isfinite(value).all() and np.isfinite(slope).all()
    assert (value >= 0).all()
