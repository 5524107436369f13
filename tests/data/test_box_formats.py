"""Boxes in formats other than COCO's are converted exactly, and recognised when they are read as COCO's."""

from __future__ import annotations

import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_jax.config import DataConfig
from retina_jax.data.box_formats import BoxFormat, guess_format, guess_other, to_xywh

FORMATS = [name for name in typing.get_args(BoxFormat) if name != "auto"]


def boxes_in_images(rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns boxes (x, y, width, height) of all sizes anywhere in images of several sizes, and the images."""
    sizes_wh = rng.choice([[640, 480], [480, 640], [97, 400], [1920, 1080]], number)
    ends = np.sort(rng.uniform(0, 1, (number, 2, 2)), axis=1) * sizes_wh[:, None]
    ends[:, 1] = np.maximum(ends[:, 1], ends[:, 0] + 0.5)
    return np.concatenate([ends[:, 0], ends[:, 1] - ends[:, 0]], axis=1), sizes_wh


def encoded(boxes_xywh: np.ndarray, sizes_wh: np.ndarray, name: str) -> np.ndarray:
    """Returns the boxes in the format `name`."""
    first, sides = boxes_xywh[:, :2], boxes_xywh[:, 2:]
    layout, _, fractions = name.partition("_")
    pairs = {"xywh": (first, sides), "xyxy": (first, first + sides), "cxcywh": (first + sides / 2, sides)}[layout]
    numbers = np.concatenate(pairs, axis=1)
    return numbers / np.tile(sizes_wh, 2) if fractions else numbers


def test_the_config_names_every_format() -> None:
    assert typing.get_args(typing.get_type_hints(DataConfig)["box_format"]) == typing.get_args(BoxFormat)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(20, 60), st.booleans(), st.sampled_from(FORMATS))
def test_a_format_is_converted_and_recognised(seed: int, number: int, with_areas: bool, name: str) -> None:
    """Every other format is refused; boxes given as centre and size in pixels, which look much like COCO's, cause a
    warning."""
    rng = np.random.default_rng(seed)
    boxes, sizes_wh = boxes_in_images(rng, number)
    numbers = encoded(boxes, sizes_wh, name)
    assert np.allclose(to_xywh(numbers, name, sizes_wh), boxes)
    guess = guess_format(numbers, boxes[:, 2:].prod(1) if with_areas else np.full(number, np.nan), sizes_wh)
    if name == "xywh":
        assert guess is None
    else:
        assert guess is not None and name in guess.formats and (guess.sure or name == "cxcywh")


@pytest.mark.parametrize("name", ["xyxy", "xyxy_fractions", "xywh_fractions"])
def test_a_few_bad_boxes_hide_no_format(name: str) -> None:
    boxes, sizes_wh = boxes_in_images(np.random.default_rng(3), 100)
    numbers = encoded(boxes, sizes_wh, name)
    numbers[:3] = [[-50, 4, 9, 5], [5000, 5000, 1, 1], [7, 7, 0, -3]]
    guess = guess_format(numbers, np.full(100, np.nan), sizes_wh)
    assert guess is not None and guess.sure and name in guess.formats


def test_boxes_in_the_upper_left_are_recognised_only_by_their_areas() -> None:
    sizes_wh = np.full((10, 2), 1000)
    corners = np.array([[10.0 + i, 20, 60 + 2 * i, 50] for i in range(10)])
    areas = (corners[:, 2:] - corners[:, :2]).prod(1)
    guess = guess_format(corners, areas, sizes_wh)
    assert guess is not None and guess.sure and guess.formats == ("xyxy",)
    assert guess_format(corners, corners[:, 2:].prod(1), sizes_wh) is None
    assert guess_format(corners, np.full(10, np.nan), sizes_wh) is None
    assert guess_format(corners, 0.6 * areas, sizes_wh) is None  # areas of masks, which fit neither format


@pytest.mark.parametrize("box", [[40.0, 30, 63, 47], [0.0, 0, 1, 1]])
def test_too_few_boxes_cause_a_warning_and_are_not_refused(box: list[float]) -> None:
    for number, sure in ((1, False), (2, False), (3, True)):
        guess = guess_format(np.array([box] * number), np.full(number, np.nan), np.full((number, 2), (64, 48)))
        assert guess is not None and guess.sure == sure


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_fractions_among_pixels_cause_a_warning(share: float) -> None:
    boxes, sizes_wh = boxes_in_images(np.random.default_rng(4), 200)
    some = np.arange(200) < share * 200
    for name in ("xywh_fractions", "xyxy_fractions"):
        numbers = np.where(some[:, None], encoded(boxes, sizes_wh, name), boxes)
        guess = guess_format(numbers, boxes[:, 2:].prod(1), sizes_wh)
        assert guess is not None and not guess.sure and guess.formats == () and f"{share:.0%}" in guess.why
    numbers = np.where(some[:, None], numbers, encoded(boxes, sizes_wh, "xyxy"))
    guess = guess_format(numbers, np.full(200, np.nan), sizes_wh)
    assert guess is not None and guess.sure and guess.formats == ("xyxy",)  # the others are not xywh either
    assert guess_other(numbers, np.full(200, np.nan), sizes_wh, "xyxy") is not None


def test_fractions_beyond_the_image_are_recognised_as_fractions() -> None:
    boxes, sizes_wh = boxes_in_images(np.random.default_rng(5), 100)
    numbers = boxes / np.tile(sizes_wh, 2)
    numbers[:30, 2:] = 1.3
    guess = guess_format(numbers, np.full(100, np.nan), sizes_wh)
    assert guess is not None and guess.sure and "xywh_fractions" in guess.formats


@pytest.mark.parametrize(("scale", "side", "sure"), [(100, 40, True), (1000, 300, True), (100, 640, False)])
def test_boxes_that_no_option_converts_are_described(scale: int, side: int, sure: bool) -> None:
    """Such boxes are refused if most of them are outside their images; if they are in the upper left, there is a
    warning."""
    rng = np.random.default_rng(6)
    first = rng.uniform(0.45, 0.9, (50, 2)) * scale
    numbers = np.concatenate([first, rng.uniform(0.3, 1, (50, 2)) * (scale - first)], axis=1)
    guess = guess_format(numbers, np.full(50, np.nan), np.full((50, 2), side))
    assert guess is not None and guess.sure == sure and guess.formats == ()
    assert {100: "percent", 1000: "thousandths"}[scale] in guess.why


def test_boxes_outside_their_images_are_refused_in_any_format() -> None:
    boxes, sizes_wh = boxes_in_images(np.random.default_rng(7), 40)
    boxes[:24, 0] += 5 * sizes_wh[:24, 0]
    guess = guess_format(boxes, np.full(40, np.nan), sizes_wh)
    assert guess is not None and guess.sure and guess.formats == ()
    fewer = guess_format(boxes[16:], np.full(24, np.nan), sizes_wh[16:])
    assert fewer is not None and not fewer.sure
    assert guess_format(boxes, np.full(40, np.nan), np.zeros_like(sizes_wh)) is None  # sizes that are unknown


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from(FORMATS), st.sampled_from(FORMATS))
def test_a_chosen_format_causes_a_warning_only_if_another_fits_better(seed: int, name: str, chosen: str) -> None:
    boxes, sizes_wh = boxes_in_images(np.random.default_rng(seed), 60)
    guess = guess_other(encoded(boxes, sizes_wh, name), boxes[:, 2:].prod(1), sizes_wh, chosen)
    if name == chosen:
        assert guess is None
    else:
        assert guess is not None and name in guess.formats and not guess.sure


@pytest.mark.parametrize(
    "numbers",
    [
        [[0, 0, 1, 1]] * 5 + [[40, 30, 1, 1]] * 5,  # one pixel each
        [[0, 0, 64, 48]] * 10,  # the complete image
        [[-4, 40, 80, 20]] * 2,  # beyond both sides
        [[60, 40, 30, 20]] * 2,  # beyond the corner, and not corners themselves
        [[0, 0, 0, 0]] * 10,
        [],
    ],
)
def test_unusual_boxes_of_coco_are_accepted(numbers: list) -> None:
    columns = np.array(numbers, np.float64).reshape(-1, 4)
    assert guess_format(columns, np.full(len(columns), np.nan), np.full((len(columns), 2), (64, 48))) is None


def test_images_of_a_few_pixels_are_no_evidence_of_fractions() -> None:
    numbers, sizes_wh = np.array([[0.0, 0, 1, 1]] * 5), np.full((5, 2), 2)
    assert guess_format(numbers, np.full(5, np.nan), sizes_wh) is None
