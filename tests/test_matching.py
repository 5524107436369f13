"""Matching equals brute force in every mode; every boundary is tested by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_jax import cpu
from retina_jax.config import MatchingConfig
from retina_jax.ops import matching
from retina_jax.ops.boxes import iou_matrix
from retina_jax.ops.matching import BACKGROUND, BLOCK, IGNORED, Matches, match

MODES = ("none", "band", "all")
A, G = 60, 6


def brute_force(ious: np.ndarray, labels: np.ndarray, config: MatchingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Applies the rule with the complete [A, G] matrix."""
    ious = np.where(labels[None] >= 0, ious, -1)
    best, box_index = np.maximum(ious.max(axis=1), 0), ious.argmax(axis=1)
    tied = (ious == ious.max(axis=0)) & (ious > 0)
    positive, background = best >= np.float32(config.positive_iou), best < np.float32(config.negative_iou)
    if config.low_quality == "band":
        positive |= tied.any(axis=1) & ~background
    if config.low_quality == "all":
        positive |= tied.any(axis=1)
    unmatched = np.where(background, BACKGROUND, IGNORED)
    return np.where(positive, labels[box_index], unmatched), np.where(best > 0, box_index, 0)


@functools.cache
def compiled(mode: str) -> jax.stages.Wrapped:
    return jax.jit(functools.partial(match, config=MatchingConfig(low_quality=mode)))


def strip(width: float, x: float = 0.0) -> list[float]:
    """Returns a box of height 1: its IoU with a box that contains it is the ratio of the widths."""
    return [x, 0.0, x + width, 1.0]


def labels_of(anchors: list, boxes: list, classes: list[int], mode: str = "none") -> list[int]:
    anchors, boxes = np.array(anchors, np.float32), jnp.array(boxes, jnp.float32)
    return compiled(mode)(anchors, boxes, jnp.array(classes, jnp.int32)).labels.tolist()


def test_iou_of_exactly_half_is_positive_and_exactly_four_tenths_ignored() -> None:
    box = strip(10)
    anchors = [strip(10), strip(5), strip(4.999), strip(4), strip(3.999), strip(1)]
    assert labels_of(anchors, [box], [7]) == [7, 7, IGNORED, IGNORED, BACKGROUND, BACKGROUND]


@pytest.mark.parametrize(
    ("best_iou", "expected"),
    [
        (0.45, {"none": IGNORED, "band": 3, "all": 3}),
        (0.4, {"none": IGNORED, "band": 3, "all": 3}),
        (0.3, {"none": BACKGROUND, "band": BACKGROUND, "all": 3}),
    ],
)
def test_low_quality_modes_differ_on_a_weak_best_anchor(best_iou: float, expected: dict[str, int]) -> None:
    for mode in MODES:
        assert labels_of([strip(10 * best_iou), strip(1)], [strip(10)], [3], mode) == [expected[mode], BACKGROUND]


def test_every_anchor_tied_for_the_best_is_positive() -> None:
    anchors = [strip(4, x=0), strip(4, x=6), strip(3.9, x=3)]
    assert labels_of(anchors, [strip(10)], [3], "band") == [3, 3, BACKGROUND]


def test_a_low_quality_match_keeps_the_box_it_overlaps_most() -> None:
    # The only anchor is the best of both boxes, and the second overlaps it more.
    matches = match(
        np.array([strip(10)], np.float32),
        jnp.array([strip(3), strip(4.5)], jnp.float32),
        jnp.array([1, 2], jnp.int32),
        MatchingConfig(low_quality="all"),
    )
    assert matches.labels.tolist() == [2]
    assert matches.box_index.tolist() == [1]


def test_first_box_wins_a_tie() -> None:
    anchors = [strip(10)]
    assert labels_of(anchors, [strip(10), strip(10)], [5, 6]) == [5]
    assert labels_of(anchors, [strip(10, x=99), strip(10), strip(10)], [4, 5, 6]) == [5]


@pytest.mark.parametrize("mode", MODES)
def test_image_without_boxes_is_all_background(mode: str) -> None:
    anchors = [strip(10), [0.0, 0.0, 0.0, 0.0]]
    # Row values of padding must not matter: zeros, and a copy of the anchor itself.
    assert labels_of(anchors, [[0.0] * 4, strip(10)], [-1, -1], mode) == [BACKGROUND, BACKGROUND]


@pytest.mark.parametrize("mode", MODES)
def test_box_that_overlaps_no_anchor_makes_nothing_positive(mode: str) -> None:
    assert labels_of([strip(10), strip(10, x=20)], [strip(5, x=1000)], [3], mode) == [BACKGROUND, BACKGROUND]


def test_iou_is_computed_once_in_float32_and_memory_does_not_grow_with_boxes() -> None:
    anchors = jax.ShapeDtypeStruct((20_000, 4), jnp.float32)
    programs = [
        compiled("all").lower(anchors, jax.ShapeDtypeStruct((g, 4), jnp.float32), jax.ShapeDtypeStruct((g,), jnp.int32))
        for g in (10, 100)
    ]
    few, many = (program.compile() for program in programs)
    assert many.as_text().count(" divide(") == BLOCK
    assert "bf16" not in many.as_text()
    assert many.memory_analysis().temp_size_in_bytes < few.memory_analysis().temp_size_in_bytes + 20_000


def test_matches_are_integers() -> None:
    matches = compiled("none")(np.zeros((A, 4), np.float32), jnp.zeros((G, 4)), jnp.full(G, -1, jnp.int32))
    assert isinstance(matches, Matches)
    assert matches.labels.dtype == matches.box_index.dtype == jnp.int32


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_an_image_without_rows_of_boxes_is_background(platform: str) -> None:
    with cpu.kernels(platform):
        matches = match(np.ones((A, 4), np.float32), jnp.zeros((0, 4)), jnp.zeros(0, jnp.int32), MatchingConfig())
    assert (matches.labels == BACKGROUND).all()


@pytest.mark.usefixtures("optimised")  # numerics, as users' programs compute them, from here on
@pytest.mark.parametrize(("mode", "platform"), [*((mode, "cpu") for mode in MODES), ("all", "gpu")])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), real=st.integers(0, G), coarse=st.booleans())
def test_match_equals_brute_force(mode: str, platform: str, seed: int, real: int, coarse: bool) -> None:
    rng = np.random.default_rng(seed)
    # Integer coordinates in a small image give ties between anchors, between boxes, and at the thresholds.
    corner = rng.uniform(0, 12, (A + G, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 8, (A + G, 2))], axis=1)
    boxes = np.round(boxes).astype(np.float32) if coarse else boxes.astype(np.float32)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    anchors, boxes = boxes[:A], boxes[A:]
    labels = np.full(G, -1, np.int32)
    labels[rng.permutation(G)[:real]] = rng.integers(0, 80, real)  # padding may be in any row
    with cpu.kernels(platform), pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "BLOCK_ON_GPUS", 4)  # two passes for G boxes
        matches = compiled(mode)(anchors, jnp.asarray(boxes), jnp.asarray(labels))
    ious = np.asarray(jax.jit(iou_matrix)(anchors, boxes))
    expected_labels, expected_index = brute_force(ious, labels, MatchingConfig(low_quality=mode))
    np.testing.assert_array_equal(matches.labels, expected_labels)
    np.testing.assert_array_equal(matches.box_index, expected_index)


@pytest.mark.usefixtures("optimised")
def test_match_under_vmap_equals_match_of_each_image() -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 50, (A + 3 * G, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 30, corner.shape)], axis=1).astype(np.float32)
    anchors, boxes = boxes[:A], jnp.asarray(boxes[A:].reshape(3, G, 4))
    labels = jnp.asarray(rng.integers(-1, 5, (3, G)), jnp.int32)
    batched = jax.jit(jax.vmap(compiled("band"), in_axes=(None, 0, 0)))(anchors, boxes, labels)
    for i in range(3):
        one = compiled("band")(anchors, boxes[i], labels[i])
        np.testing.assert_array_equal(batched.labels[i], one.labels)
        np.testing.assert_array_equal(batched.box_index[i], one.box_index)
