"""The comparison of the detections of two detectors."""

from __future__ import annotations

import numpy as np
import pytest

from retina_jax.detector import ImageDetections
from retina_jax.export.agreement import PROGRAMS, Comparison, compare
from retina_jax.export.loader import Found

IMAGE = np.zeros((50, 100, 3), np.uint8)
"""With this side the tolerance is a hundredth of a pixel."""
BOXES = [[10, 10, 20, 20], [30, 10, 40, 20], [50, 10, 60, 20]]


def compared(
    boxes: list[list[float]], scores: list[float], labels: list[int], most: int = 100, threshold: float = 0.05
) -> Comparison:
    """Compares BOXES with scores 0.9, 0.5, 0.0505 and label 0, at a threshold of 0.05."""
    live = ImageDetections(np.array(BOXES, np.float32), np.array([0.9, 0.5, 0.0505], np.float32), np.zeros(3, np.int32))
    exported = Found(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels, np.int32)
    )
    return compare([live], [exported], [IMAGE], threshold, most, PROGRAMS)


def test_equal_detections_agree() -> None:
    found = compared(BOXES, [0.9, 0.5, 0.0505], [0, 0, 0])
    assert found.unmatched == 0 and found == Comparison(1, 3, 0, 0.0, 0.0)


def test_the_largest_differences_are_reported() -> None:
    moved = [[10, 10, 20, 20.005], *BOXES[1:]]
    found = compared(moved, [0.9, 0.5006, 0.0505], [0, 0, 0])
    assert found.unmatched == 0 and found.box_difference == pytest.approx(0.005, abs=1e-5)
    assert found.score_difference == pytest.approx(0.0006, abs=1e-6)


def test_order_does_not_matter() -> None:
    assert compared(BOXES[::-1], [0.0505, 0.5, 0.9], [0, 0, 0]).unmatched == 0


@pytest.mark.parametrize(
    ("boxes", "scores", "labels", "unmatched"),
    [
        ([[10, 10, 20, 20.02], *BOXES[1:]], [0.9, 0.5, 0.0505], [0, 0, 0], 2),  # a side differs too much
        (BOXES, [0.9, 0.502, 0.0505], [0, 0, 0], 2),  # a score differs too much
        (BOXES, [0.9, 0.5, 0.0505], [0, 1, 0], 2),  # another label
        ([BOXES[0], BOXES[2]], [0.9, 0.0505], [0, 0], 1),  # one is missing
        ([*BOXES, BOXES[1]], [0.9, 0.5, 0.0505, 0.5], [0] * 4, 1),  # one is twice
        ([], [], [], 2),  # all are missing; the last is at the threshold
        (BOXES, [float("nan")] * 3, [0, 0, 0], 2),
    ],
)
def test_differing_detections_are_counted(boxes: list, scores: list[float], labels: list[int], unmatched: int) -> None:
    found = compared(boxes, scores, labels)
    assert found.unmatched == unmatched and str(unmatched) in str(found)


def test_a_detection_at_the_threshold_may_be_missing() -> None:
    assert compared(BOXES[:2], [0.9, 0.5], [0, 0]).unmatched == 0
    assert compared(BOXES[:2], [0.9, 0.5], [0, 0], threshold=0.01).unmatched


def test_the_last_detection_of_a_full_list_may_be_another_of_equal_score() -> None:
    others = [*BOXES[:2], [70, 10, 80, 20]]
    assert compared(others, [0.9, 0.5, 0.0508], [0, 0, 0], most=3, threshold=0.0).unmatched == 0
    assert compared(others, [0.9, 0.5, 0.0508], [0, 0, 0], most=4, threshold=0.0).unmatched
    assert compared(others, [0.9, 0.5, 0.0525], [0, 0, 0], most=3, threshold=0.0).unmatched
