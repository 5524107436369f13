"""The fields in which public detectors differ: sizes, pixels, ends of boxes, padded shapes, thresholds, clipping."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_jax.config import AnchorConfig, Config, ConfigError, DataConfig, DetectionConfig, ModelConfig
from retina_jax.config_io import from_dict, override, to_dict, validate
from retina_jax.data.transforms import (
    buckets,
    exact_padded_shape,
    resize,
    resized_size,
    to_original_pixels,
    to_padded_pixels,
)
from retina_jax.detector import padded_batch
from retina_jax.model.retinanet import normalise
from retina_jax.ops.anchors import anchor_grid
from retina_jax.ops.postprocess import Detections, detect

BOXES = np.array([[0, 0, 10, 20], [3, 4, 50, 60]], np.float32)


def test_sides_are_rounded_to_the_nearest_or_down() -> None:
    assert resized_size(427, 640, 800, 1333) == (800, 1199)
    assert resized_size(375, 500, 601, 1000) == (601, 801)
    assert resized_size(375, 500, 601, 1000, "floor") == (601, 801)
    assert resized_size(480, 641, 800, 1333) == (800, 1068)
    assert resized_size(333, 500, 800, 1333) == (800, 1201)
    assert resized_size(333, 500, 800, 1200) == (799, 1200)
    assert resized_size(1, 10_000, 800, 1333, "floor") == (1, 1333)


def test_floor_is_torchvisions_rule() -> None:
    rng = np.random.default_rng(0)
    for height, width in rng.integers(20, 3000, (200, 2)).tolist():
        factor = min(800 / min(height, width), 1333 / max(height, width))
        expected = (max(1, int(height * factor)), max(1, int(width * factor)))
        assert resized_size(height, width, 800, 1333, "floor") == expected


@pytest.mark.parametrize("kind", ["bilinear", "antialias"])
def test_rounding_the_float_pixels_gives_the_uint8_ones(kind: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)
    exact = resize(image, (23, 41), kind, "float32").numpy()
    whole = resize(image, (23, 41), kind).numpy()
    assert exact.dtype == np.float32 and whole.dtype == np.uint8
    clear = abs(exact % 1 - 0.5) > 1e-3  # an exact half may fall to either side in float32
    np.testing.assert_array_equal(np.floor(exact + 0.5)[clear], whole[clear])
    assert (exact % 1 != 0).mean() > 0.5


def test_integer_float_pixels_are_the_same_input_as_uint8_ones() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3)).astype(np.uint8)
    sizes = jnp.array([[8, 6]], jnp.int32)
    for kind in ("detectron", "detectron2", "imagenet"):
        one = normalise(jnp.asarray(image), sizes, kind)
        np.testing.assert_array_equal(one, normalise(jnp.asarray(image, jnp.float32), sizes, kind))


def test_inclusive_ends_are_detectrons() -> None:
    """Detectron keeps x2 - 1, multiplies it by the scale, and adds the 1 again whenever it needs a width."""
    scale = np.array([2.0, 3.0], np.float32)
    made = to_padded_pixels(BOXES, scale, "inclusive")
    np.testing.assert_array_equal(made[0], [0, 0, (10 - 1) * 2 + 1, (20 - 1) * 3 + 1])
    np.testing.assert_array_equal(to_padded_pixels(BOXES, scale, "half_open")[1], [6, 12, 100, 180])


@settings(max_examples=50, deadline=None)
@given(x=st.floats(0.1, 5), y=st.floats(0.1, 5), ends=st.sampled_from(["half_open", "inclusive"]))
def test_boxes_return_from_padded_to_original_pixels(x: float, y: float, ends: str) -> None:
    scale = np.array([x, y], np.float32)
    back = to_original_pixels(to_padded_pixels(BOXES, scale, ends), scale, ends)
    np.testing.assert_allclose(back, BOXES, atol=1e-4)


def test_no_buckets_give_the_smallest_padded_shape_that_contains_the_images() -> None:
    data = DataConfig(short_side=100, long_side=200, buckets=0, pixels="float32")
    assert exact_padded_shape((100, 133), data) == (128, 160)
    images = [np.full((height, width, 3), 9, np.uint8) for height, width in ((50, 66), (90, 60))]
    assert padded_batch(images[:1], data, 1).images.shape == (1, 128, 160, 3)
    batch = padded_batch(images, data, 3)
    assert batch.images.shape == (3, 160, 160, 3) and batch.images.dtype == np.float32
    assert batch.image_sizes.tolist() == [[100, 132], [150, 100], [150, 100]]
    assert batch.valid.tolist() == [True, True, False]
    assert (batch.images[0, :100, :132] == 9).all() and (batch.images[0, 100:] == 0).all()
    # Training has four nevertheless.
    assert buckets(data, (100,)) == buckets(DataConfig(short_side=100, long_side=200, buckets=4), (100,))


def test_images_that_fit_no_common_bucket_get_separate_padded_shapes() -> None:
    data = DataConfig(short_side=100, long_side=200)
    images = [np.zeros((100, 200, 3), np.uint8), np.zeros((200, 100, 3), np.uint8)]
    assert padded_batch(images[:1], data, 1).images.shape[1:3] == (128, 224)
    assert padded_batch(images, data, 2).images.shape[1:3] == (224, 224)


def test_detectron2_centres_the_papers_cells_on_the_corner() -> None:
    paper = anchor_grid((64, 96), AnchorConfig(), ModelConfig(max_level=5))
    corner = anchor_grid((64, 96), AnchorConfig(style="detectron2"), ModelConfig(max_level=5))
    half = np.repeat([4, 8, 16], [8 * 12 * 9, 4 * 6 * 9, 2 * 3 * 9]).astype(np.float32)
    np.testing.assert_allclose(paper - corner, np.tile(half[:, None], (1, 4)), atol=1e-4)


def found(logits: np.ndarray, anchors: np.ndarray, counts: tuple[int, ...], **options: object) -> Detections:
    """Detects on a 100 x 100 image with one class and deltas 0."""
    ends = np.cumsum(counts)[:-1]
    return detect(
        jnp.split(jnp.asarray(logits, jnp.float32)[None, :, None], ends, axis=1),
        jnp.split(jnp.zeros((1, len(anchors), 4)), ends, axis=1),
        jnp.asarray(anchors, jnp.float32),
        jnp.array([[100, 100]], jnp.int32),
        DetectionConfig(max_detections=5, **options),
    )


def test_detectron_keeps_low_scores_on_the_coarsest_level_only() -> None:
    anchors = np.array([[0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 90, 90], [0, 50, 20, 90]])
    logits = np.array([2.0, -4.0, -4.0, -6.0])
    labels = found(logits, anchors, (2, 2)).labels
    assert labels[0].tolist() == [0, -1, -1, -1, -1]
    made = found(logits, anchors, (2, 2), threshold_coarsest=False)
    assert made.labels[0].tolist() == [0, 0, 0, -1, -1]
    np.testing.assert_array_equal(made.boxes_xyxy[0, :3], anchors[[0, 2, 3]])


def test_detectron2_suppresses_unclipped_boxes_and_clips_afterwards() -> None:
    # Clipped, the first two are the same box; unclipped, they overlap little. The third is outside and dropped at the end.
    anchors = np.array([[90, 0, 100, 10], [90, 0, 300, 10], [110, 110, 120, 120], [50, 50, 60, 60]])
    logits = np.array([3.0, 2.0, 1.0, 0.0])
    before = found(logits, anchors, (4,), clip="before_nms")
    np.testing.assert_array_equal(before.boxes_xyxy[0, :3], [[90, 0, 100, 10], [100, 100, 100, 100], [50, 50, 60, 60]])
    assert before.labels[0].tolist() == [0, 0, 0, -1, -1]
    after = found(logits, anchors, (4,), clip="after_nms")
    np.testing.assert_array_equal(after.boxes_xyxy[0, :3], [[90, 0, 100, 10], [90, 0, 100, 10], [50, 50, 60, 60]])
    assert after.labels[0].tolist() == [0, 0, 0, -1, -1]
    assert (np.diff(np.asarray(after.scores[0])) <= 0).all()
    np.testing.assert_array_equal(after.boxes_xyxy[0, 3:], 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.min_level", 1),
        ("model.min_level", 6),
        ("model.max_level", 4),
        ("model.stage_blocks", (1, 1, 1)),
        ("model.stage_blocks", (1, 0, 1, 1)),
        ("model.frozen_stages", 6),
        ("model.prior", 0.0),
        ("model.prior", 1.0),
        ("model.prior", -0.1),
        ("anchors.scales", ()),
        ("anchors.ratios", (0.0,)),
        ("anchors.size_factor", -1.0),
        ("loss.kind", "logistic"),
        ("loss.box", "l2"),
        ("loss.beta", -0.1),
        ("loss.normaliser", "median"),
        ("loss.mining_batch", 0),
    ],
)
def test_invalid_values_of_the_method_are_refused_by_name(field: str, value: object) -> None:
    values, (section, name) = to_dict(Config()), field.split(".")
    values[section][name] = value
    with pytest.raises(ConfigError, match=rf"{re.escape(field)}\b"):
        validate(from_dict(values))


def test_invalid_combinations_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"loss\.gamma\b"):
        validate(override(Config(), {"loss.kind": "focal_star", "loss.gamma": 0.0}))
    for kind in ("ohem_1_3", "ohem_1_3_strict"):
        with pytest.raises(ConfigError, match=r"loss\.mining_batch\b"):
            validate(override(Config(), {"loss.mining": kind, "loss.mining_batch": 3}))
