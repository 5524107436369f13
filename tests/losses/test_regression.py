"""Box losses equal values computed by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retina_jax.config import LossConfig
from retina_jax.losses.regression import box_loss, l1, smooth_l1
from retina_jax.ops.boxes import encode

pytestmark = pytest.mark.usefixtures("optimised")  # numerics, as users' programs compute them

ANCHORS = jnp.array([[0, 0, 10, 10], [0, 0, 20, 10], [5, 5, 9, 25]], jnp.float32)


def test_smooth_l1_of_known_values() -> None:
    error = jnp.array([0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -3.0])
    np.testing.assert_allclose(smooth_l1(error, beta=1.0), [0, 0.125, 0.125, 0.5, 0.5, 1.5, 2.5], rtol=1e-6)
    np.testing.assert_allclose(smooth_l1(jnp.array([0.05, 1.0]), beta=0.11), [0.05**2 / 0.22, 0.945], rtol=1e-6)


@pytest.mark.parametrize("beta", [0.11, 0.5, 1.0])
def test_the_pieces_of_smooth_l1_meet_at_beta_in_value_and_slope(beta: float) -> None:
    around = jnp.array([beta * (1 - 1e-6), beta, beta * (1 + 1e-6)], jnp.float32)
    np.testing.assert_allclose(smooth_l1(around, beta=beta), [beta / 2] * 3, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(jax.grad(lambda e: smooth_l1(e, beta=beta)))(around), np.ones(3), rtol=1e-5)


def test_beta_zero_is_l1_with_gradient_zero_at_zero() -> None:
    error = jnp.array([-2.0, -1e-6, 0.0, 1e-6, 2.0])
    np.testing.assert_array_equal(smooth_l1(error, beta=0.0), l1(error))
    np.testing.assert_array_equal(jax.grad(lambda e: smooth_l1(e, beta=0.0).sum())(error), [-1, -1, 0, 1, 1])


@pytest.mark.parametrize("kind", ["smooth_l1", "l1", "giou"])
def test_exact_deltas_have_no_loss(kind: str) -> None:
    targets = jnp.array([[1, 2, 9, 8], [0, 0, 20, 10], [4, 0, 11, 30]], jnp.float32)
    loss = box_loss(encode(targets, ANCHORS), ANCHORS, targets, config=LossConfig(box=kind))
    np.testing.assert_allclose(loss, np.zeros(3), atol=1e-6)


def test_coordinates_are_summed() -> None:
    deltas = encode(ANCHORS, ANCHORS) + jnp.array([[1.0, 1.0, -1.0, 2.0]])
    l1_loss = box_loss(deltas, ANCHORS, ANCHORS, config=LossConfig(box="l1"))
    np.testing.assert_allclose(l1_loss, [5, 5, 5], rtol=1e-6)
    smooth = box_loss(deltas, ANCHORS, ANCHORS, config=LossConfig(box="smooth_l1", beta=0.11))
    np.testing.assert_allclose(smooth, [5 - 4 * 0.055] * 3, rtol=1e-6)


def test_giou_loss_is_one_minus_giou_of_the_decoded_box() -> None:
    # Zero deltas decode to the anchors; the first target covers half of its anchor, the second is apart from it.
    targets = jnp.array([[5, 0, 15, 10], [30, 0, 40, 10], [5, 5, 9, 25]], jnp.float32)
    loss = box_loss(jnp.zeros((3, 4)), ANCHORS, targets, config=LossConfig(box="giou"))
    np.testing.assert_allclose(loss, [1 - 1 / 3, 1 + (400 - 300) / 400, 0], atol=1e-6)


@pytest.mark.parametrize("kind", ["smooth_l1", "l1", "giou"])
def test_padded_targets_give_finite_values_and_gradients(kind: str) -> None:
    loss = partial(box_loss, config=LossConfig(box=kind))
    deltas = jnp.array([[0.0, 0, 0, 0], [9, 9, 100, 100], [0, 0, -100, -100]])
    value, gradient = jax.jit(jax.value_and_grad(lambda d: loss(d, ANCHORS, jnp.zeros((3, 4))).sum()))(deltas)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
