"""The resize of an exported detector equals that of evaluation to the last bit."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retina_jax.data.transforms import resize, resize_large
from retina_jax.export.programs import resize_and_pad

SHAPE = 64, 96
height, width = st.integers(1, 64), st.integers(1, 96)


@partial(jax.jit, static_argnames=("kind", "pixels"))
def on_device(image: np.ndarray, size: np.ndarray, resized: np.ndarray, kind: str, pixels: str) -> jax.Array:
    return resize_and_pad(image, size, resized, SHAPE, kind, pixels)


def resized_on_device(image: np.ndarray, size: tuple[int, int], resized: tuple[int, int], *how: str) -> np.ndarray:
    return np.asarray(on_device(image, np.array(size, np.int32), np.array(resized, np.int32), *how))


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
@pytest.mark.parametrize("kind", ["bilinear", "antialias"])
def test_pixels_are_those_of_evaluation(kind: str, pixels: str) -> None:
    """Resizes from any size to any size, with any content of the storage beyond the image; the padding is 0."""

    @settings(deadline=None, max_examples=60)
    @given(height, width, height, width, st.integers(0, 9))
    @example(64, 96, 32, 48, 0)  # halves, which are rounded up
    @example(64, 96, 21, 32, 1)  # thirds
    @example(1, 96, 1, 32, 2)
    @example(64, 3, 64, 96, 3)  # smaller along one side and larger along the other
    def holds(h: int, w: int, new_h: int, new_w: int, seed: int) -> None:
        storage = np.random.default_rng(seed).integers(0, 256, (*SHAPE, 3), np.uint8)
        found = resized_on_device(storage, (h, w), (new_h, new_w), kind, pixels)
        expected = resize(storage[:h, :w], (new_h, new_w), kind, pixels).numpy()
        assert found.dtype == pixels and not found[new_h:].any() and not found[:, new_w:].any()
        if pixels == "uint8":
            assert np.array_equal(found[:new_h, :new_w], expected)
        else:  # TensorFlow adds long spans in another order
            np.testing.assert_allclose(found[:new_h, :new_w], expected, rtol=0, atol=1e-4)

    holds()


@pytest.mark.parametrize("kind", ["bilinear", "antialias"])
def test_pixels_of_a_large_image_are_those_of_evaluation(kind: str) -> None:
    """The image has more than 2 ** 22 pixels, for which evaluation adds 0.5 for rounding after the weights."""
    image = np.random.default_rng(0).integers(0, 256, (2001, 2997, 3), np.uint8)
    found = resized_on_device(image, image.shape[:2], (64, 96), kind, "uint8")
    assert np.array_equal(found, resize_large(image, (64, 96), kind))
