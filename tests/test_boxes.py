"""Box operations equal float64 NumPy, values by hand, and their own inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_jax.ops.boxes import MAX_LOG_SCALE, clip, decode, encode, giou, iou_matrix

DEGENERATE = [
    [0.0, 0.0, 0.0, 0.0],  # padding
    [5.0, 5.0, 5.0, 9.0],  # no width
    [5.0, 5.0, 9.0, 5.0],  # no height
    [9.0, 9.0, 5.0, 5.0],  # corners swapped
    [-1e4, -1e4, -1e4, -1e4],
]


def array(*boxes: list[float]) -> jax.Array:
    return jnp.array(boxes, jnp.float32)


@st.composite
def proper_boxes(draw: st.DrawFn) -> np.ndarray:
    seed, count = draw(st.integers(0, 2**32 - 1)), 16
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-200, 1500, (count, 2))
    sides = np.exp(rng.uniform(np.log(2), np.log(1000), (count, 2)))
    return np.concatenate([centres - sides / 2, centres + sides / 2], axis=1).astype(np.float32)


def brute_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.zeros((len(a), len(b)))
    for i, p in enumerate(a.astype(np.float64)):
        for j, q in enumerate(b.astype(np.float64)):
            overlap = max(min(p[2], q[2]) - max(p[0], q[0]), 0) * max(min(p[3], q[3]) - max(p[1], q[1]), 0)
            union = (p[2] - p[0]) * (p[3] - p[1]) + (q[2] - q[0]) * (q[3] - q[1]) - overlap
            out[i, j] = overlap / union
    return out


def test_iou_of_hand_values() -> None:
    a = array([0, 0, 2, 2])
    b = array([0, 0, 2, 2], [1, 0, 3, 2], [2, 0, 4, 2], [0, 0, 1, 1], [5, 5, 6, 6])
    np.testing.assert_allclose(iou_matrix(a, b), [[1, 1 / 3, 0, 1 / 4, 0]], rtol=1e-7)


def test_iou_without_area_is_zero_not_nan() -> None:
    degenerate = array(*DEGENERATE)
    np.testing.assert_array_equal(iou_matrix(degenerate, degenerate), np.zeros((5, 5)))
    np.testing.assert_array_equal(iou_matrix(array([0, 0, 8, 8]), degenerate), np.zeros((1, 5)))


@settings(max_examples=20, deadline=None)
@given(proper_boxes(), st.integers(0, 2**32 - 1))
def test_encode_inverts_decode(anchors: np.ndarray, seed: int) -> None:
    deltas = np.random.default_rng(seed).uniform(-2, 2, anchors.shape).astype(np.float32)
    anchors = anchors - np.tile(anchors[:, :2], 2)  # at the origin, where float32 keeps the digits of small boxes
    np.testing.assert_allclose(jax.jit(encode)(jax.jit(decode)(deltas, anchors), anchors), deltas, atol=1e-4)


def test_encode_of_hand_values() -> None:
    deltas = encode(array([10, 20, 50, 40]), array([0, 0, 20, 20]))
    np.testing.assert_allclose(deltas, [[(30 - 10) / 20, (30 - 10) / 20, np.log(2), 0]], rtol=1e-6)


def test_decode_clips_growth_at_a_thousand_sixteenths() -> None:
    anchors = array([0, 0, 16, 16])
    at, above = (decode(array([0, 0, size, -size]), anchors) for size in (MAX_LOG_SCALE, 100.0))
    assert float(at[0, 2] - at[0, 0]) == pytest.approx(1000, rel=1e-5)
    assert float(above[0, 2] - above[0, 0]) == pytest.approx(1000, rel=1e-5)
    assert float(above[0, 3] - above[0, 1]) == pytest.approx(0, abs=1e-5)  # no bound below
    gradient = jax.jit(jax.grad(lambda d: decode(d, anchors)[0, 2]))(array([0, 0, 100.0, 0]))
    np.testing.assert_array_equal(gradient, [[16, 0, 0, 0]])


def test_encode_is_finite_for_padding() -> None:
    boxes, anchors = array(*DEGENERATE), array(*[[0, 0, 32, 32]] * 5)
    value, gradients = jax.jit(jax.value_and_grad(lambda b, a: encode(b, a).sum(), (0, 1)))(boxes, anchors)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients)


def test_encode_and_decode_take_leading_dimensions() -> None:
    anchors = np.array([[0, 0, 8, 8], [4, 4, 20, 12]], np.float32)
    boxes = anchors + np.float32(3)
    batch, batch_anchors = np.stack([boxes, boxes]), np.stack([anchors, anchors])
    np.testing.assert_array_equal(encode(batch, batch_anchors)[1], encode(boxes, anchors))
    np.testing.assert_array_equal(decode(batch, batch_anchors)[1], decode(boxes, anchors))


def test_giou_of_hand_values() -> None:
    a = array([0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 1, 1])
    b = array([0, 0, 2, 2], [1, 0, 3, 2], [2, 0, 4, 2], [2, 2, 3, 3])
    # identical; half over (hull = union); touching (hull = union); apart: 0 - (9 - 2) / 9
    np.testing.assert_allclose(giou(a, b), [1, 1 / 3, 0, -7 / 9], rtol=1e-6)


def test_giou_is_finite_on_degenerate_boxes() -> None:
    pairs = [(p, q) for p in [*DEGENERATE, [0.0, 0.0, 8.0, 8.0]] for q in DEGENERATE]
    a, b = array(*(p for p, _ in pairs)), array(*(q for _, q in pairs))
    value = np.asarray(jax.jit(giou)(a, b))
    assert np.isfinite(value).all()
    assert (np.abs(value) <= 1).all()
    assert float(value[0]) == 0  # two equal points
    assert all(np.isfinite(g).all() for g in jax.jit(jax.grad(lambda a, b: giou(a, b).sum(), (0, 1)))(a, b))


def test_giou_of_disjoint_boxes_pulls_them_together() -> None:
    gradient = jax.jit(jax.grad(lambda a: giou(a, array([20, 0, 30, 10])).sum()))(array([0, 0, 10, 10]))
    assert float(gradient[0, 2]) > 0  # x2 grows towards the other box, where plain IoU has no gradient


def test_clip_keeps_both_borders_of_a_tall_image() -> None:
    boxes = array([-5, -5, 700, 900], [0, 0, 600, 800], [10, 20, 30, 40], [650, 10, 690, 20])
    clipped = clip(boxes, jnp.array([800, 600], jnp.int32))
    expected = [[0, 0, 600, 800], [0, 0, 600, 800], [10, 20, 30, 40], [600, 10, 600, 20]]
    np.testing.assert_array_equal(clipped, expected)


@pytest.mark.usefixtures("optimised")  # numerics, as users' programs compute them, from here on
@settings(max_examples=20, deadline=None)
@given(proper_boxes(), proper_boxes())
def test_iou_matrix_is_brute_force(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(jax.jit(iou_matrix)(a, b[:7]), brute_iou(a, b[:7]), atol=2e-6)


@pytest.mark.usefixtures("optimised")
@settings(max_examples=20, deadline=None)
@given(proper_boxes(), proper_boxes())
def test_decode_inverts_encode(boxes: np.ndarray, anchors: np.ndarray) -> None:
    # An anchor more than 62.5 times smaller than its box is clipped by design: see the next test.
    grown = (boxes[:, 2:] - boxes[:, :2]) / (anchors[:, 2:] - anchors[:, :2])
    keep = grown.max(axis=1) < 62
    recovered = np.asarray(jax.jit(decode)(jax.jit(encode)(boxes, anchors), anchors))
    np.testing.assert_allclose(recovered[keep], boxes[keep], atol=2e-2)
