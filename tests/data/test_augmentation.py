"""Scale jitter, crops and colour jitter against plain loops; the same draws wherever and whenever an image is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_sets import rectangles
from test_pipeline import DATA, SIZES, coloured, same, take

from retina_jax.config import Config, ConfigError, DataConfig
from retina_jax.config_io import from_dict, override, to_dict, validate
from retina_jax.data.augmentation import colour_change, crop_boxes, crop_of, draw, recolour
from retina_jax.data.pipeline import Batch, eval_batches, train_batches
from retina_jax.data.transforms import resize, resized_size

JITTERED = dataclasses.replace(DATA, scale_jitter=(0.4, 2.5), colour_jitter=0.4)
number = st.floats(0, 1, exclude_max=True)


def test_boxes_are_on_their_objects_in_the_crop(tmp_path: Path) -> None:
    """A box is dropped only if nothing of its object is in the crop."""
    source = rectangles(tmp_path, SIZES)
    data = dataclasses.replace(DATA, scale_jitter=(0.3, 6.0))
    larger = dropped = smaller = 0
    for batch in take(train_batches(source, data, seed=3), 20):
        for row, index in enumerate(batch.indices.tolist()):
            record, (height, width) = source.records[index], batch.image_sizes[row]
            assert batch.images.shape[1] >= height and batch.images.shape[2] >= width
            assert not batch.images[row, height:].any() and not batch.images[row, :, width:].any()
            label = int(record.labels[0])
            others = [channel for channel in range(3) if channel != label]
            reddish = batch.images[row, ..., label].astype(int) - batch.images[row][..., others].max(-1) > 128
            if batch.labels[row, 0] < 0:
                dropped += 1
                assert not reddish.any() and not batch.boxes_xyxy[row].any()
                continue
            box = batch.boxes_xyxy[row, 0]
            assert batch.labels[row, 0] == label and (box >= 0).all() and (box[2:] <= [width, height]).all()
            if (box[2:] - box[:2]).min() > 2:
                off = np.abs(np.array(coloured(batch.images[row], label)) - box).max()
                assert off <= max(1, batch.scales[row].max())  # its edges are blurred
            resized = np.array([record.width, record.height]) * batch.scales[row]
            larger += bool((resized.round() > [width, height]).any())
            smaller += bool((resized < np.array(batch.images.shape[2:0:-1]) / 2).all())
    assert min(larger, dropped, smaller) > 3


def test_a_factor_of_1_changes_nothing(tmp_path: Path) -> None:
    source = rectangles(tmp_path, SIZES)
    one = dataclasses.replace(DATA, scale_jitter=(1.0, 1.0))
    assert same(take(train_batches(source, one, seed=1), 5), take(train_batches(source, DATA, seed=1), 5))


def test_pixels_are_those_of_resize_crop_recolour_and_flip(tmp_path: Path) -> None:
    source = rectangles(tmp_path, [(60, 40)] * 4, kind="PNG")
    data = dataclasses.replace(JITTERED, short_side=64, long_side=96)
    flips = set()
    for epoch, batch in enumerate(take(train_batches(source, data, seed=2), 4)):
        for row, index in enumerate(batch.indices.tolist()):
            drawn = draw(data, 2, epoch * 4 + index)
            size = resized_size(40, 60, 64, 96, factor=drawn.factor)
            image = resize(np.asarray(Image.open(source.where(index))), size, "bilinear").numpy()
            (top, left), (height, width) = crop_of(drawn.place_yx, size, batch.images.shape[1:3])
            image = plain_recolour(image[top : top + height, left : left + width], drawn.colours)
            expected = image[:, ::-1] if drawn.flip else image
            assert batch.image_sizes[row].tolist() == [height, width]
            assert np.array_equal(batch.images[row, :height, :width], expected)
            flips.add(drawn.flip)
    assert flips == {False, True}


@pytest.mark.parametrize("changes", [{}, {"resize_rule": "stretch", "short_side": 96, "long_side": 96}])
def test_draws_are_stateless_and_the_same_on_all_hosts(tmp_path: Path, changes: dict[str, Any]) -> None:
    source, data = rectangles(tmp_path, SIZES), dataclasses.replace(JITTERED, **changes)
    one = take(train_batches(source, data, seed=1), 6)
    assert same(take(train_batches(source, data, seed=1, start_step=4), 2), one[4:])
    halves = [take(train_batches(source, data, seed=1, host=host, hosts=2), 6) for host in range(2)]
    assert same([Batch(*map(np.concatenate, zip(*pair, strict=True))) for pair in zip(*halves, strict=True)], one)
    evaluated = list(eval_batches(source, data, batch_size=4))
    plain = dataclasses.replace(data, scale_jitter=None, colour_jitter=0.0)
    assert same(evaluated, list(eval_batches(source, plain, batch_size=4)))


def test_draws_cover_their_ranges_and_leave_the_flips_as_they_were() -> None:
    draws = [draw(JITTERED, 7, position) for position in range(2000)]
    plain = [draw(DATA, 7, position) for position in range(2000)]
    assert [d.flip for d in draws] == [d.flip for d in plain] and {d.factor for d in plain} == {1.0}
    for numbers, low, high in (
        ([d.factor for d in draws], 0.4, 2.5),
        *(([d.place_yx[axis] for d in draws], 0.0, 1.0) for axis in (0, 1)),
    ):
        counts = np.histogram(numbers, 10, (low, high))[0]
        assert counts.sum() == 2000 and abs(counts - 200).max() < 70
    assert len({d.colours for d in draws}) == 2000 and draw(JITTERED, 8, 0) != draws[0]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(*[st.floats(-20, 120, width=32)] * 4), max_size=6),
    *[st.integers(0, 60)] * 2,
    *[st.integers(1, 60)] * 2,
)
def test_cropped_boxes_are_those_of_a_loop(boxes: list, top: int, left: int, height: int, width: int) -> None:
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in boxes]
    expected, kept = [], []
    for x1, y1, x2, y2 in boxes:
        x1, x2 = (np.float32(min(max(x - left, 0), width)) for x in (x1, x2))
        y1, y2 = (np.float32(min(max(y - top, 0), height)) for y in (y1, y2))
        kept.append(bool(x2 > x1 and y2 > y1))
        expected += [[x1, y1, x2, y2]] * kept[-1]
    found, which = crop_boxes(np.array(boxes, np.float64).reshape(-1, 4), (top, left), (height, width))
    assert which.tolist() == kept and np.array_equal(found, np.array(expected, np.float32).reshape(-1, 4))


@given(number, number, *[st.integers(1, 30)] * 4)
def test_a_crop_is_inside_the_resized_image(y: float, x: float, h: int, w: int, padded_h: int, padded_w: int) -> None:
    (top, left), size = crop_of((y, x), (h, w), (padded_h, padded_w))
    assert size == (min(h, padded_h), min(w, padded_w))
    assert 0 <= top <= h - size[0] and 0 <= left <= w - size[1]
    ends = crop_of((0.0, 1 - 2**-53), (h, w), (padded_h, padded_w))[0]
    assert ends == (0, max(0, w - padded_w))


def plain_recolour(image: np.ndarray, colours: tuple[float, ...]) -> np.ndarray:
    """Applies the matrix pixel by pixel, in float32."""
    matrix, share = np.array(colours[:9], np.float32).reshape(3, 3), np.float32(colours[9])
    grey = sum(weight * image[..., k].astype(np.int64).mean() for k, weight in enumerate((0.299, 0.587, 0.114)))
    x = image.astype(np.float32)
    rows = [x[..., 0] * a + x[..., 1] * b + x[..., 2] * c + share * np.float32(grey) for a, b, c in matrix]
    y = np.clip(np.stack(rows, -1), 0, 255)
    return (y + np.float32(0.5)).astype(np.uint8) if image.dtype == np.uint8 else y


@settings(deadline=None, max_examples=10)
@given(number, number, number, number, st.integers(0, 99))
def test_colours_are_brightness_contrast_saturation_and_hue_in_turn(
    b: float, c: float, s: float, h: float, seed: int
) -> None:
    """The reference does one after the other, in the middle of the range, where nothing is clipped."""
    image = np.random.default_rng(seed).uniform(110, 140, (5, 7, 3)).astype(np.float32)
    grey, strength = np.array([0.299, 0.587, 0.114]), 0.2
    fb, fc, fs = (1 + strength * (2 * u - 1) for u in (b, c, s))
    y = image.astype(np.float64) * fb
    mean = (np.floor(image).mean((0, 1)) @ grey) * fb  # of pixels that are rounded down
    y = (y - mean) * fc + mean
    level = (y @ grey)[..., None]
    y = level + (y - level) * fs
    yiq = np.array([grey, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    angle = 2 * np.pi * 0.05 * (2 * h - 1)
    chroma = (y @ yiq.T)[..., 1] + 1j * (y @ yiq.T)[..., 2]
    turned = chroma * np.exp(1j * angle)
    y = np.stack([y @ grey, turned.real, turned.imag], -1) @ np.linalg.inv(yiq).T
    found = recolour(tf.constant(image), tf.constant(colour_change(strength, b, c, s, h))).numpy()
    assert np.abs(found - y).max() < 1e-2


def test_strength_0_leaves_the_colours_and_grey_stays_grey() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    assert np.array_equal(recolour(tf.constant(image), tf.constant(colour_change(0.0, 0.3, 0.9, 0.1, 0.7))), image)
    flat = np.repeat(image[..., :1], 3, axis=2)
    changed = recolour(tf.constant(flat), tf.constant(colour_change(0.5, 0.5, 0.5, 0.9, 0.1))).numpy()
    assert np.array_equal(changed, flat)


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("data.scale_jitter", (1.2, 0.8), "the smaller factor, then the larger one"),
        ("data.scale_jitter", (0.0, 1.0), "> 0, <= 8"),
        ("data.colour_jitter", 1.5, ">= 0, <= 1"),
        ("data.tile", 16, "0, or at least 32 px"),
        ("data.resize_rule", "stretch", "data.short_side"),
    ],
)
def test_invalid_values_are_refused_in_one_line(name: str, value: Any, right: str) -> None:
    with pytest.raises(ConfigError, match=right):
        validate(override(Config(), {name: value}))


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [("scale_jitter", [0.5], "two numbers or null"), ("max_boxes", "all", "an integer below 2\\^63 or auto")],
)
def test_values_of_the_wrong_type_are_refused_in_one_line(name: str, value: Any, right: str) -> None:
    with pytest.raises(ConfigError, match=rf"^run: data\.{name}: .* must be {right}$"):
        from_dict({"data": {name: value}}, "run")


def test_fields_are_kept_in_json() -> None:
    config = Config(data=DataConfig(scale_jitter=(0.1, 2.0), max_boxes="auto"))
    assert from_dict(to_dict(config)) == config == validate(config)
