"""Detection equals brute force, and planted objects are found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from retina_jax import cpu
from retina_jax.config import AnchorConfig, DetectionConfig, ModelConfig
from retina_jax.ops.anchors import anchor_grid, level_counts
from retina_jax.ops.boxes import decode, encode, iou_matrix
from retina_jax.ops.postprocess import PADDING, Detections, best_logits, detect

PADDED_HW, MODEL, ANCHORS, K = (64, 96), ModelConfig(), AnchorConfig(), 3
GRID, COUNTS = anchor_grid(PADDED_HW, ANCHORS, MODEL), level_counts(PADDED_HW, ANCHORS, MODEL)
A = len(GRID)


@functools.cache
def compiled(config: DetectionConfig) -> jax.stages.Wrapped:
    return jax.jit(lambda logits, deltas, sizes: detect(levels(logits), levels(deltas), GRID, sizes, config))


def levels(outputs: jax.Array) -> list[jax.Array]:
    return jnp.split(outputs, np.cumsum(COUNTS)[:-1], axis=1)


def run(logits: np.ndarray, deltas: np.ndarray, sizes: list[tuple[int, int]], **options: float) -> Detections:
    config = DetectionConfig(**options)
    return compiled(config)(
        jnp.asarray(logits, jnp.float32), jnp.asarray(deltas, jnp.float32), jnp.array(sizes, jnp.int32)
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(["gpu", ""]),
    shape=st.sampled_from([(7, 1, 3, 5), (6, 3, 3, 5), (20, 5, 4, 9), (4, 2, 2, 50), (60, 2, 5, 3)]),
)
def test_the_best_logits_are_the_top_k_of_all_with_ties(seed: int, form: str, shape: tuple[int, int, int, int]) -> None:
    anchors, per_cell, classes, top_k = shape
    logits = jnp.asarray(np.random.default_rng(seed).integers(-3, 4, (anchors, classes)), jnp.float32)
    with cpu.kernels(form):
        values, anchor, label = best_logits(logits, top_k, per_cell)
    expected, place = jax.lax.top_k(logits.reshape(-1), min(top_k, anchors * classes))
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(anchor * classes + label, place)


def planted() -> tuple[np.ndarray, np.ndarray, list[tuple[list[float], int, float]]]:
    """Returns an image with three objects, each written into the outputs of the anchor that overlaps it most."""
    logits, deltas = np.full((1, A, K), -8.0, np.float32), np.zeros((1, A, 4), np.float32)
    objects = [([4, 6, 40, 38], 2, 3.0), ([50, 10, 92, 60], 0, 2.0), ([5, 7, 41, 39], 1, 1.0)]
    for box, label, logit in objects:
        box = np.array([box], np.float32)
        anchor = int(np.asarray(iou_matrix(GRID, box)).argmax())
        logits[0, anchor, label] = logit
        deltas[0, anchor] = encode(box, GRID[anchor : anchor + 1])[0]
    return logits, deltas, objects


def test_planted_objects_are_found_best_first() -> None:
    logits, deltas, objects = planted()
    # The first and third share an anchor: the deltas are those of the third, one pixel off for the first.
    found = run(logits, deltas, [PADDED_HW], max_detections=5)
    assert found.labels[0].tolist() == [2, 0, 1, PADDING, PADDING]
    np.testing.assert_allclose(found.scores[0, :3], 1 / (1 + np.exp([-3.0, -2.0, -1.0])), rtol=1e-6)
    for row, (box, _, _) in enumerate(objects):
        np.testing.assert_allclose(found.boxes_xyxy[0, row], box, atol=1.001)
    np.testing.assert_allclose(found.boxes_xyxy[0, 1], objects[1][0], atol=1e-3)
    np.testing.assert_array_equal(found.boxes_xyxy[0, 3:], np.zeros((2, 4)))
    np.testing.assert_array_equal(found.scores[0, 3:], np.zeros(2))


def test_boxes_are_clipped_to_the_image_not_to_the_padded_image() -> None:
    logits, deltas, _ = planted()
    found = run(logits, deltas, [(50, 80)], max_detections=5)
    np.testing.assert_allclose(found.boxes_xyxy[0, 1], [50, 10, 80, 50], atol=1e-3)


def test_score_of_exactly_the_threshold_is_dropped() -> None:
    logits, deltas = np.full((1, A, K), -50.0, np.float32), np.zeros((1, A, 4), np.float32)
    logits[0, 10, 1], logits[0, 400, 2] = 0.0, 0.001  # sigmoid(0) is exactly 0.5
    found = run(logits, deltas, [PADDED_HW], score_threshold=0.5, max_detections=4)
    assert found.labels[0].tolist() == [2, PADDING, PADDING, PADDING]


def test_image_with_nothing_above_the_threshold_is_all_padding() -> None:
    found = run(np.full((2, A, K), -9.0), np.zeros((2, A, 4)), [PADDED_HW, PADDED_HW], max_detections=4)
    assert (np.asarray(found.labels) == PADDING).all()
    assert (np.asarray(found.scores) == 0).all()


def iou(p: np.ndarray, q: np.ndarray) -> float:
    sides = np.maximum(np.minimum(p[2:], q[2:]) - np.maximum(p[:2], q[:2]), 0)
    overlap = float(np.prod(sides))
    union = float(np.prod(p[2:] - p[:2]) + np.prod(q[2:] - q[:2])) - overlap
    return overlap / union if union > 0 else 0.0


def brute_force(
    logits: np.ndarray, deltas: np.ndarray, size_hw: tuple[int, int], config: DetectionConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    candidates, start = [], 0
    for count in COUNTS:
        level = [(scores[a, k], a, k) for a in range(start, start + count) for k in range(K)]
        candidates += [c for c in sorted(level, key=lambda c: -c[0])[: config.top_k] if c[0] > config.score_threshold]
        start += count
    boxes = np.asarray(jax.jit(decode)(deltas, GRID))
    height, width = size_hw
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    kept: list[tuple[float, int, int]] = []
    for candidate in sorted(candidates, key=lambda c: -c[0]):
        if len(kept) == config.max_detections:
            break
        _, a, k = candidate
        rivals = [boxes[b] for _, b, j in kept if j == k or config.class_agnostic_nms]
        if all(iou(boxes[a], rival) <= config.nms_iou for rival in rivals):
            kept.append(candidate)
    return boxes[[a for _, a, _ in kept]], np.array([s for s, _, _ in kept]), np.array([k for _, _, k in kept])


@pytest.mark.parametrize(("top_k", "class_agnostic"), [(5, False), (60, False), (60, True)])
def test_detect_equals_brute_force_on_every_image(top_k: int, class_agnostic: bool) -> None:
    rng = np.random.default_rng(top_k)
    logits, deltas = rng.normal(-3, 1.5, (2, A, K)).astype(np.float32), rng.normal(0, 0.2, (2, A, 4)).astype(np.float32)
    sizes, options = [(64, 96), (50, 70)], {"top_k": top_k, "max_detections": 20, "score_threshold": 0.25}
    options["class_agnostic_nms"] = class_agnostic
    found = run(logits, deltas, sizes, **options)
    for i in range(2):
        boxes, scores, labels = brute_force(logits[i], deltas[i], sizes[i], DetectionConfig(**options))
        count = len(scores)
        assert count > 5
        np.testing.assert_array_equal(found.labels[i, :count], labels)
        np.testing.assert_allclose(found.scores[i, :count], scores, rtol=1e-5)
        np.testing.assert_allclose(found.boxes_xyxy[i, :count], boxes, atol=1e-3)
        assert (np.asarray(found.labels[i, count:]) == PADDING).all()


def test_bfloat16_outputs_are_decoded_in_float32() -> None:
    logits, deltas, _ = planted()
    found = jax.jit(lambda x, d, s: detect(levels(x), levels(d), GRID, s, DetectionConfig()))(
        jnp.asarray(logits, jnp.bfloat16), jnp.asarray(deltas, jnp.bfloat16), jnp.array([PADDED_HW], jnp.int32)
    )
    assert found.boxes_xyxy.dtype == found.scores.dtype == jnp.float32
    assert found.boxes_xyxy.shape == (1, 100, 4)
    assert found.labels[0, :3].tolist() == [2, 0, 1]


def test_levels_that_do_not_match_the_outputs_are_refused() -> None:
    logits, deltas = levels(jnp.zeros((1, A, K))), levels(jnp.zeros((1, A, 4)))
    with pytest.raises(ValueError, match=f"there are {A} anchors"):
        detect(logits[:-1], deltas[:-1], GRID, jnp.array([PADDED_HW], jnp.int32), DetectionConfig())


def test_detect_is_the_same_under_shard_map() -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(-3, 1, (8, A, K)), jnp.float32)
    deltas = jnp.asarray(rng.normal(0, 0.2, (8, A, 4)), jnp.float32)
    sizes, config = jnp.array([PADDED_HW] * 8, jnp.int32), DetectionConfig(top_k=20, max_detections=10)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_device = jax.shard_map(
        compiled(config), mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")
    )
    expected = compiled(config)(logits, deltas, sizes)
    for got, reference in zip(jax.jit(by_device)(logits, deltas, sizes), expected, strict=True):
        np.testing.assert_allclose(got, reference, atol=1e-4)
