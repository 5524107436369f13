"""The best and worst images, and the score from which detections count: counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from retina_jax.evaluation.error_analysis import (
    Counts,
    Errors,
    best_and_worst,
    classify_errors,
    count_by_image,
    operating_point,
)
from retina_jax.evaluation.precision_recall import DetectedBoxes, GroundTruth


def images_of(rows: list[tuple[int, list[float], list[float]]]) -> Errors:
    """Returns images given as (number of objects, scores of right detections, scores of wrong detections)."""
    truth, found = [], []
    for image, (truths, right, wrong) in enumerate(rows):
        truth += [(image, 20 * n) for n in range(truths)]
        found += [(image, 20 * n, score) for n, score in enumerate(right)]
        found += [(image, 1000 + 20 * n, score) for n, score in enumerate(wrong)]

    def boxes(left: list[int]) -> np.ndarray:
        return np.array([[x, 0, 10, 10] for x in left], float).reshape(-1, 4)

    g, d = len(truth), len(found)
    truths = GroundTruth(
        np.array([i for i, _ in truth], int), np.zeros(g, int), boxes([x for _, x in truth]), np.full(g, 100.0),
        np.zeros(g, bool),
    )  # fmt: skip
    detections = DetectedBoxes(
        np.array([i for i, _, _ in found], int), np.zeros(d, int), boxes([x for _, x, _ in found]),
        np.array([score for _, _, score in found], float),
    )  # fmt: skip
    return classify_errors(truths, detections)


def test_the_operating_point_is_where_f1_is_highest() -> None:
    """By hand: of 3 objects, from 0.6 on two are right and one is wrong, F1 = 4 / (3 + 3); from 0.9 on 2 / (1 + 3)."""
    errors = images_of([(2, [0.9, 0.6], [0.7]), (1, [], [0.5, 0.4])])
    point = operating_point(errors)
    assert point == pytest.approx((0.6, 2 / 3, 2 / 3, 2 / 3))


def test_detections_of_one_score_are_kept_or_dropped_together() -> None:
    errors = images_of([(1, [0.5], [0.5, 0.5])])
    assert operating_point(errors) == pytest.approx((0.5, 1 / 3, 1.0, 0.5))


def test_there_is_no_operating_point_if_nothing_is_right() -> None:
    errors = images_of([(1, [], [0.5])])
    assert operating_point(errors) is None


def test_detections_at_exactly_the_score_count() -> None:
    errors = images_of([(2, [0.9, 0.3], [0.5, 0.2]), (0, [], []), (1, [], [])])
    counts = count_by_image(errors, 3, 0.5)
    assert [c.tolist() for c in counts] == [[1, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert counts.f1.tolist() == pytest.approx([0.5, np.nan, 0.0], nan_ok=True)


def test_best_and_worst_are_sorted_by_f1_then_by_the_number_of_objects() -> None:
    """The images are: perfect of 5, perfect of 1, half, nothing found of 3, nothing found of 1, empty."""
    counts = Counts(np.array([5, 1, 1, 0, 0, 0]), np.array([0, 0, 1, 0, 0, 0]), np.array([0, 0, 1, 3, 1, 0]))
    assert best_and_worst(counts, 2) == ([0, 1], [3, 4])
    best, worst = best_and_worst(counts, 9)
    assert best == [0, 1] and worst == [3, 4, 2], "no image is in both, and a perfect one is never among the worst"


def test_perfect_images_are_never_the_worst_and_lost_ones_never_the_best() -> None:
    one, none = np.ones(4, int), np.zeros(4, int)
    assert best_and_worst(Counts(one, none, none), 6)[1] == []
    assert best_and_worst(Counts(none, one, one), 6) == ([], [0, 1, 2, 3])


def test_the_other_images_are_either_best_or_worst() -> None:
    """Their F1 are 2/3, 4/5 and 6/7."""
    assert best_and_worst(Counts(np.array([1, 2, 3]), np.ones(3, int), np.zeros(3, int)), 6) == ([2], [0, 1])
