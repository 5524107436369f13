"""Sizes, padded shapes, resize and mirroring."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_jax.config import DataConfig
from retina_jax.data.transforms import (
    assign_bucket,
    buckets,
    flip_boxes,
    pad,
    plus_half,
    resize,
    resized_size,
    train_short_sides,
)

side = st.integers(1, 6000)


@pytest.mark.parametrize(
    ("size", "rule", "expected"),
    [
        ((480, 640), (600, 1000), (600, 800)),
        ((640, 480), (800, 1333), (1067, 800)),
        ((427, 640), (600, 1000), (600, 899)),
        ((300, 640), (600, 1000), (469, 1000)),
        ((1, 5000), (600, 1000), (1, 1000)),
        ((128, 128), (128, 128), (128, 128)),
        ((2, 3), (3, 100), (3, 5)),  # 4.5, a half, goes up
        ((500, 500), (600, 400), (400, 400)),
    ],
)
def test_resized_size(size: tuple[int, int], rule: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(*size, *rule) == expected


@settings(deadline=None, max_examples=200)
@given(side, side, st.integers(1, 1200), st.integers(1, 1500))
def test_resized_size_keeps_its_bounds(height: int, width: int, short_side: int, long_side: int) -> None:
    resized = resized_size(height, width, short_side, long_side)
    assert 1 <= min(resized) <= short_side and max(resized) <= long_side
    assert min(resized) == short_side or max(resized) == long_side


@settings(deadline=None, max_examples=200)
@given(
    side,
    side,
    st.lists(st.integers(1, 900), min_size=1, max_size=4),
    st.integers(1, 1500),
    st.sampled_from([1, 2, 4, 6]),
    st.sampled_from([32, 64, 128]),
)
def test_every_image_fits_into_a_padded_shape(
    height: int, width: int, short_sides: list[int], long_side: int, count: int, multiple: int
) -> None:
    data = DataConfig(long_side=long_side, buckets=count, pad_multiple=multiple)
    shapes = buckets(data, tuple(short_sides))
    assert len(set(shapes)) == len(shapes) <= count
    assert all(s % multiple == 0 for shape in shapes for s in shape)
    padded = shapes[assign_bucket(resized_size(height, width, max(short_sides), long_side), shapes)]
    for short_side in short_sides:
        resized = resized_size(height, width, short_side, long_side)
        assert resized[0] <= padded[0] and resized[1] <= padded[1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ((608, 800), (800, 608), (608, 928), (928, 608), (608, 1024), (1024, 608))),
        ({"buckets": 4}, ((608, 800), (800, 608), (608, 1024), (1024, 608))),
        (
            {"short_side": 800, "long_side": 1333},
            ((800, 1088), (1088, 800), (800, 1216), (1216, 800), (800, 1344), (1344, 800)),
        ),
        ({"buckets": 2}, ((608, 1024), (1024, 608))),
        ({"buckets": 1}, ((1024, 1024),)),
        ({"pad_multiple": 128, "buckets": 4}, ((640, 896), (896, 640), (640, 1024), (1024, 640))),
        ({"short_side": 128, "long_side": 128}, ((128, 128),)),
        ({"short_side": 600, "long_side": 800}, ((608, 800), (800, 608))),
        (
            {"jitter_short_sides": (400, 800), "long_side": 1333, "buckets": 4},
            ((800, 1088), (1088, 800), (800, 1344), (1344, 800)),
        ),
    ],
)
def test_padded_shapes(changes: dict, expected: tuple) -> None:
    data = DataConfig(**changes)
    assert buckets(data, train_short_sides(data)) == expected


@pytest.mark.parametrize(("short", "long"), [(600, 1000), (800, 1333), (256, 416)])
def test_six_padded_shapes_add_the_ratio_3_to_2_and_need_fewer_pixels(short: int, long: int) -> None:
    """Sizes are mostly 4:3 and 3:2, as COCO's are. The reference tries every shape on every image."""
    rng = np.random.default_rng(0)
    sides = [(480, 640), (427, 640), (426, 640), (375, 500), (333, 500), *rng.integers(320, 641, (8, 2)).tolist()]
    sizes = [resized_size(*(hw if i % 3 else hw[::-1]), short, long) for i in range(4) for hw in sides]
    padded, up = {}, lambda side: -(-side // 32) * 32
    for number, ratios in ((4, (4 / 3,)), (6, (4 / 3, 1.5))):
        shapes = buckets(DataConfig(short_side=short, long_side=long, buckets=number), (short,))
        expected = [(up(short), up(math.ceil(ratio * short))) for ratio in ratios] + [(up(short), up(long))]
        assert sorted(shapes) == sorted({*expected, *(shape[::-1] for shape in expected)})
        least = [min(h * w for h, w in shapes if h >= size[0] and w >= size[1]) for size in sizes]
        padded[number] = [math.prod(shapes[assign_bucket(size, shapes)]) for size in sizes]
        assert padded[number] == least
    assert all(six <= four for six, four in zip(padded[6], padded[4], strict=True)) and sum(padded[6]) < sum(padded[4])


def test_the_smallest_padded_shape_is_used() -> None:
    shapes = buckets(DataConfig(), (600,))
    assert [shapes[assign_bucket(size, shapes)] for size in ((600, 800), (600, 801), (899, 600), (600, 600))] == [
        (608, 800),
        (608, 928),
        (928, 608),
        (608, 800),
    ]
    with pytest.raises(ValueError, match="fits none of"):
        assign_bucket((609, 900), shapes)


def half_pixel_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Interpolates between the two by two neighbours of each output pixel's centre, with edges repeated, in float64."""
    for axis, n in enumerate(size):
        centre = (np.arange(n) + 0.5) * image.shape[axis] / n - 0.5
        low = np.floor(centre)
        weight = (centre - low).reshape([-1 if a == axis else 1 for a in range(3)])
        first, second = (np.clip(low + k, 0, image.shape[axis] - 1).astype(int) for k in (0, 1))
        image = np.take(image, first, axis) * (1 - weight) + np.take(image, second, axis) * weight
    return image


@pytest.mark.parametrize("size", [(31, 47), (20, 33), (9, 5), (1, 1), (20, 47)])
def test_bilinear_is_half_pixel_bilinear(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 33, 3), np.uint8)
    expected = half_pixel_bilinear(image.astype(np.float64), size)
    found = resize(image, size, "bilinear").numpy()
    assert found.dtype == np.uint8 and np.abs(found - expected).max() < 0.501
    if size == (20, 33):
        assert np.array_equal(found, image)
    if min(size) >= 20:
        assert np.array_equal(resize(image, size, "antialias").numpy(), found)


def test_plus_half_is_a_cast_and_a_sum() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(plus_half(levels), levels.astype(np.float32) + 0.5)


@settings(deadline=None, max_examples=50)
@given(*[st.integers(1, 60)] * 4, st.integers(0, 9))
def test_rounding_adds_a_half_and_truncates(h: int, w: int, height: int, width: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    halves = tf.constant(image.astype(np.float32) + 0.5)
    for kind in ("bilinear", "antialias"):
        resized = tf.image.resize(halves, (height, width), method="bilinear", antialias=kind == "antialias")
        plain = tf.image.resize(halves, (height, width), method="bilinear")
        expected = resized if (h > height or w > width) else plain
        assert np.array_equal(resize(image, (height, width), kind), tf.cast(expected, tf.uint8))


@settings(deadline=None, max_examples=50)
@given(*[st.integers(1, 40)] * 2, *[st.integers(0, 40)] * 2, st.sampled_from([np.uint8, np.float32]))
def test_padding_is_below_and_right(h: int, w: int, below: int, right: int, kind: type) -> None:
    image = np.random.default_rng(0).integers(1, 256, (h, w, 3)).astype(kind)
    padded = pad(tf.constant(image), (h + below, w + right))
    assert np.array_equal(padded, np.pad(image, [(0, below), (0, right), (0, 0)])) and padded.dtype == kind


def test_antialiasing_averages_if_it_reduces() -> None:
    stripes = np.zeros((40, 40, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resize(stripes, (10, 10), "antialias").numpy()[2:-2, 2:-2]
    assert np.abs(small.astype(int) - 128).max() <= 2
    assert np.abs(resize(stripes, (8, 8), "bilinear").numpy().astype(int) - 128).max() > 100


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.integers(0, 500)] * 4), max_size=5))
def test_mirroring_twice_restores_the_image(corners: list[tuple[int, int, int, int]]) -> None:
    boxes = np.array(corners, np.float32).reshape(-1, 4)
    mirrored = flip_boxes(boxes, 500)
    assert np.array_equal(flip_boxes(mirrored, 500), boxes)
    assert np.array_equal(mirrored[:, 2] - mirrored[:, 0], boxes[:, 2] - boxes[:, 0])
    assert np.array_equal(mirrored[:, [1, 3]], boxes[:, [1, 3]])


def test_mirrored_box_ends_where_it_began() -> None:
    assert flip_boxes(np.array([[0, 1, 3, 4]], np.float32), 10).tolist() == [[7, 1, 10, 4]]
