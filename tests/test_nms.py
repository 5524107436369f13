"""NMS equals the textbook loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_jax.ops.boxes import iou_matrix
from retina_jax.ops.nms import nms

N, D = 24, 10


@functools.cache
def compiled(iou_threshold: float = 0.5, max_detections: int = D) -> jax.stages.Wrapped:
    return jax.jit(functools.partial(nms, iou_threshold=iou_threshold, max_detections=max_detections))


def textbook(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, threshold: float, limit: int) -> list[int]:
    ious = np.asarray(jax.jit(iou_matrix)(boxes, boxes))
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        if np.isneginf(scores[i]) or len(kept) == limit:
            break
        if all(labels[i] != labels[j] or ious[j, i] <= np.float32(threshold) for j in kept):
            kept.append(int(i))
    return kept


def kept_by(boxes: list, scores: list, labels: list, **options: float) -> list[int]:
    indices, valid = compiled(**options)(
        jnp.array(boxes, jnp.float32), jnp.array(scores, jnp.float32), jnp.array(labels, jnp.int32)
    )
    assert (np.asarray(indices)[~np.asarray(valid)] == 0).all()
    return np.asarray(indices)[np.asarray(valid)].tolist()


def test_iou_of_exactly_the_threshold_stays() -> None:
    boxes = [[0, 0, 10, 1], [0, 0, 5, 1], [0, 0, 5.1, 1]]
    assert kept_by(boxes, [0.9, 0.8, 0.7], [0, 0, 0]) == [0, 1]


def test_lowest_index_of_equal_scores_is_kept() -> None:
    assert kept_by([[0, 0, 8, 8]] * 3, [0.5, 0.5, 0.5], [0, 0, 0]) == [0]


def test_classes_do_not_suppress_each_other() -> None:
    assert kept_by([[0, 0, 8, 8]] * 3, [0.5, 0.9, 0.7], [0, 1, 1]) == [1, 0]


def test_suppressed_box_does_not_suppress() -> None:
    # The second is dropped by the first, and the third, which only the second overlaps enough, stays.
    boxes = [[0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10]]
    assert kept_by(boxes, [0.9, 0.8, 0.7], [0, 0, 0]) == [0, 2]


def test_absent_boxes_are_neither_kept_nor_suppress() -> None:
    boxes = [[0, 0, 8, 8], [0, 0, 8, 8], [20, 0, 28, 8]]
    assert kept_by(boxes, [-np.inf, 0.1, np.nan], [0, 0, 0]) == [1]
    assert kept_by(boxes, [-np.inf] * 3, [0, 0, 0]) == []


def test_box_without_area_is_kept_once() -> None:
    assert kept_by([[5, 5, 5, 5], [0, 0, 4, 4]], [0.9, 0.8], [0, 0]) == [0, 1]


@pytest.mark.parametrize("limit", [1, 3, 9])
def test_it_stops_when_full_and_pads_when_short(limit: int) -> None:
    boxes = [[10 * i, 0, 10 * i + 5, 5] for i in range(4)]
    expected = [2, 0, 3, 1][:limit]
    assert kept_by(boxes, [0.8, 0.1, 0.9, 0.5], [0] * 4, max_detections=limit) == expected


def test_far_away_boxes_keep_their_digits() -> None:
    # A class offset added to coordinates would round these away in float32.
    boxes = [[1.0, 1.0, 1.01, 1.01], [1.012, 1.0, 1.022, 1.01], [1.0, 1.0, 1.0101, 1.01]]
    assert kept_by(boxes, [0.9, 0.8, 0.7], [79, 79, 79]) == [0, 1]


@functools.cache
def many(number: int, limit: int) -> jax.stages.Wrapped:
    return jax.jit(functools.partial(nms, iou_threshold=0.5, max_detections=limit))


@pytest.mark.parametrize(
    ("number", "limit", "classes", "spread"),
    [
        (63, 100, 1, 200),
        (64, 64, 2, 300),
        (65, 3, 80, 400),
        (1024, 100, 1, 100),
        (1500, 2000, 3, 900),
        (3000, 300, 80, 300),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_many_boxes_over_several_blocks_and_chunks(
    number: int, limit: int, classes: int, spread: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, spread, (number, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 80, (number, 2))], axis=1).astype(np.float32)
    scores = np.round(rng.random(number), 2).astype(np.float32)  # many equal scores, also across the bounds of chunks
    scores[rng.random(number) < 0.1] = -np.inf
    labels = rng.integers(0, classes, number).astype(np.int32)
    indices, valid = many(number, limit)(jnp.asarray(boxes), jnp.asarray(scores), jnp.asarray(labels))
    assert np.asarray(indices)[np.asarray(valid)].tolist() == textbook(boxes, scores, labels, 0.5, limit)


def test_a_long_chain_of_suppression_within_a_block() -> None:
    # Each overlaps only its neighbours: the first drops the second, which spares the third, and so on to the end.
    boxes = [[4 * i, 0, 4 * i + 10, 10] for i in range(60)]
    overlaps = np.asarray(iou_matrix(np.array(boxes, np.float32), np.array(boxes, np.float32)))
    assert (overlaps[np.arange(59), np.arange(1, 60)] > 0.4).all() and (
        overlaps[np.arange(58), np.arange(2, 60)] < 0.4
    ).all()
    scores = [1 - i / 100 for i in range(60)]
    assert kept_by(boxes, scores, [0] * 60, iou_threshold=0.4, max_detections=60) == list(range(0, 60, 2))


def test_no_boxes_and_no_output_rows() -> None:
    nothing = jnp.zeros((0, 4)), jnp.zeros(0), jnp.zeros(0, jnp.int32)
    indices, valid = nms(*nothing, iou_threshold=0.5, max_detections=3)
    assert indices.tolist() == [0, 0, 0] and not valid.any()
    one = jnp.array([[0.0, 0, 4, 4]]), jnp.ones(1), jnp.zeros(1, jnp.int32)
    assert nms(*one, iou_threshold=0.5, max_detections=0)[0].shape == (0,)


@pytest.mark.usefixtures("optimised")  # numerics, as users' programs compute them, from here on
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), threshold=st.sampled_from([0.3, 0.5]), classes=st.integers(1, 4))
def test_nms_equals_the_textbook_loop(seed: int, threshold: float, classes: int) -> None:
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 10, (N, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 9, (N, 2))], axis=1).astype(np.float32)
    scores = (rng.integers(1, 9, N) / 8).astype(np.float32)  # many equal scores
    scores[rng.random(N) < 0.2] = -np.inf
    labels = rng.integers(0, classes, N).astype(np.int32)
    indices, valid = compiled(threshold)(jnp.asarray(boxes), jnp.asarray(scores), jnp.asarray(labels))
    expected = textbook(boxes, scores, labels, threshold, D)
    assert int(valid.sum()) == len(expected)
    assert indices[: len(expected)].tolist() == expected
    assert not np.asarray(valid[len(expected) :]).any()


@pytest.mark.usefixtures("optimised")
def test_nms_under_vmap_equals_nms_of_each_image() -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 40, (3, N, 2))
    boxes = jnp.asarray(np.concatenate([corner, corner + rng.uniform(5, 30, (3, N, 2))], axis=-1), jnp.float32)
    scores = jnp.asarray(rng.uniform(size=(3, N)), jnp.float32)
    scores = scores.at[1, 4:].set(-jnp.inf)  # images of different lengths
    labels = jnp.asarray(rng.integers(0, 2, (3, N)), jnp.int32)
    indices, valid = jax.jit(jax.vmap(compiled()))(boxes, scores, labels)
    for i in range(3):
        one = compiled()(boxes[i], scores[i], labels[i])
        np.testing.assert_array_equal(indices[i], one[0])
        np.testing.assert_array_equal(valid[i], one[1])
