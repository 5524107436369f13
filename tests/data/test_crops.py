"""Crops for classification have the labels of their pixels, and are a pure function of seed and index."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from miniature.crops import ACROSS, SIDE, draw_crops

from retina_jax.data.scenes import HUES


def test_crops_are_a_pure_function_of_seed_and_place() -> None:
    crops = draw_crops(18, seed=3)
    assert crops.images.shape == (18, SIDE, SIDE, 3) and crops.images.dtype == np.uint8
    second = draw_crops(9, seed=3, start=9)
    for part, both in zip(second, crops, strict=True):
        np.testing.assert_array_equal(part, both[9:])
    assert (draw_crops(9, seed=4).images != crops.images[:9]).any()


def test_counts_that_cut_a_sheet_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 9"):
        draw_crops(ACROSS**2 + 1, seed=0)


def test_the_middle_of_a_crop_has_the_hue_of_its_label() -> None:
    crops = draw_crops(360, seed=0)
    degrees = np.array(list(HUES.values()))[crops.hues]
    near = []
    for image, wanted in zip(crops.images, degrees, strict=True):
        # The most saturated of the middle pixels: shapes are saturated, backgrounds are muted.
        pixels = [colorsys.rgb_to_hsv(*p) for p in image[18:30, 18:30].reshape(-1, 3) / 255]
        hue = max(pixels, key=lambda hsv: hsv[1] * hsv[2])[0] * 360
        near.append(abs((hue - wanted + 180) % 360 - 180) < 20)
    assert np.mean(near) > 0.9
    assert len(np.unique(crops.shapes)) == len(np.unique(crops.hues)) == 12
