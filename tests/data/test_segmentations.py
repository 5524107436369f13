"""The box of a segmentation is the smallest around its polygons or mask; anything else is an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fuzzing import assert_named
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from retina_jax.data.coco_entries import box_of
from retina_jax.data.source import DataError


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.02, 0.3, 1.0]))
def test_run_lengths_have_the_box_of_their_mask(seed: int, height: int, width: int, share: float) -> None:
    pixels = np.random.default_rng(seed).uniform(size=(height, width)) < share
    compressed = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    text = {"size": [height, width], "counts": compressed["counts"].decode()}
    flat = pixels.T.reshape(-1)
    changes = np.flatnonzero(np.diff(np.r_[False, flat]))
    counts = np.diff(np.r_[0, changes, len(flat)]).tolist()
    rows, columns = np.nonzero(pixels)
    expected = None
    if len(rows):
        left, top = columns.min(), rows.min()
        expected = (left, top, columns.max() + 1 - left, rows.max() + 1 - top)
    assert box_of(text) == expected and box_of({"size": [height, width], "counts": counts}) == expected


def test_polygons_have_the_box_of_all_their_points() -> None:
    assert box_of([[1, 2, 5, 2, 5, 8.5]]) == (1, 2, 4, 6.5)
    assert box_of([[1, 2, 5, 2, 5, 8], [9, 0, 10, 1]]) == (1, 0, 9, 8)
    assert box_of([1, 2, 5, 2, 5, 8]) == (1, 2, 4, 6)
    assert box_of(None) is None and box_of([]) is None and box_of([[]]) is None
    assert box_of([[], []]) is None and box_of([[], [1, 2, 5, 2, 5, 8]]) == (1, 2, 4, 6)


BAD: list[Any] = [
    3, "x", [[1, 2, 3]], [["a", "b"]], [[1, float("nan")]], [[1, 1e300]], [[1, 2], 3], [[True, 1]], {}, {"size": [2, 2]},
    {"size": [0, 4], "counts": [0]}, {"size": [2, 2], "counts": [1]}, {"size": [2, 2], "counts": [1, -1, 4]},
    {"size": [2, 2], "counts": "o" * 100}, {"size": [2, 2], "counts": "é"}, {"size": [10**9, 10**9], "counts": [10**18]},
    {"size": [2, 2], "counts": []}, {"size": [2.0, 2], "counts": [4]}, {"size": [2, 2], "counts": {"a": 1}}, [{}], [None],
]  # fmt: skip


@pytest.mark.parametrize("segmentation", BAD)
def test_anything_else_is_refused(segmentation: Any) -> None:
    with pytest.raises(DataError) as raised:
        box_of(segmentation)
    assert_named(raised.value, "bbox", "segmentation")


def test_a_mask_has_the_size_of_its_image() -> None:
    mask = {"size": [4, 6], "counts": [5, 2, 17]}
    assert box_of(mask) == box_of(mask, (6, 4)) == (1, 1, 1, 2)
    for size_wh in ((4, 6), (12, 8)):
        with pytest.raises(DataError, match="height"):
            box_of(mask, size_wh)
