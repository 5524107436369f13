"""Drawings have lines at the boxes, labels inside the picture, and fixed colours."""

import numpy as np
import pytest

from retina_jax.evaluation.drawing import LABELLED, class_colour, contact_sheet, draw, format_score

NAMES = [f"class{k}" for k in range(12)]


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == np.array(colour, np.uint8)).all(-1)


def test_colours_are_fixed_and_distinct() -> None:
    colours = np.array([class_colour(k) for k in range(24)])
    assert class_colour(0) == class_colour(0)
    distance = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(24, dtype=int)
    assert distance.min() > 30
    assert np.array([distance[i, i + 1] for i in range(23)]).min() > 200


@pytest.mark.parametrize(("side", "zoom"), [(40, 12), (128, 4), (480, 1), (900, 1)])
def test_box_lines_are_where_the_box_is_at_any_size(side: int, zoom: int) -> None:
    image = np.full((side, side, 3), 90, np.uint8)
    box = np.array([[0.25, 0.25, 0.75, 0.75]], np.float32) * side
    picture = draw(image, box, np.array([1]), class_names=NAMES)
    assert picture.shape == (side * zoom, side * zoom, 3)
    rows, columns = np.nonzero(near(picture, class_colour(1)))
    side *= zoom
    assert abs(rows.max() - 0.75 * side) <= 1 and abs(columns.max() - 0.75 * side) <= 1
    assert abs(columns.min() - 0.25 * side) <= 1
    assert near(picture, class_colour(1))[side // 2].sum() >= 4  # both vertical lines, two pixels each


def test_labels_stay_inside_and_boxes_are_clipped() -> None:
    image = np.full((60, 80, 3), 90, np.uint8)
    boxes = np.array([[-20, -20, 30, 30], [70, 0, 200, 200], [75, 55, 80, 60], [200, 200, 300, 300]], np.float32)
    scores = np.array([0.5, 0.6, 0.7, 1.0], np.float32)
    picture = draw(image, boxes, np.array([0, 1, 2, 30]), scores, class_names=NAMES)
    for label in (0, 1, 2, 30):  # the label is as wide as its text, although the box is a sliver at the border
        rows, columns = np.nonzero(near(picture, class_colour(label)))
        assert np.ptp(columns) > 40 and np.ptp(rows) > 8


def test_padding_draws_nothing_and_the_input_is_untouched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (500, 400, 3), np.uint8)
    before = image.copy()
    box, padding = np.array([[10, 10, 90, 90]], np.float32), np.array([-1])
    np.testing.assert_array_equal(draw(image, box, padding, class_names=NAMES), before)
    draw(image, box, np.array([0]), class_names=NAMES, ground_truth_xyxy=box)
    np.testing.assert_array_equal(image, before)


def test_best_score_is_on_top() -> None:
    image = np.zeros((480, 480, 3), np.uint8)
    boxes = np.array([[100, 100, 300, 300]] * 2, np.float32)
    for scores, top in (((0.9, 0.1), 0), ((0.1, 0.9), 1)):
        picture = draw(image, boxes, np.array([0, 1]), np.array(scores, np.float32), class_names=NAMES)
        assert tuple(picture[200, 100]) == class_colour(top)


def test_ground_truth_is_dashed_white_and_degenerate_boxes_are_drawn() -> None:
    image = np.full((480, 480, 3), 90, np.uint8)
    none = np.zeros((0, 4), np.float32)
    truth = np.array([[50, 50, 400, 400], [20, 20, 20, 20], [30, 30, 10, 10]], np.float32)
    picture = draw(image, none, np.zeros(0, np.int32), class_names=NAMES, ground_truth_xyxy=truth)
    white = near(picture, (255, 255, 255))[50, 50:400]
    assert 0.3 < white.mean() < 0.7 and np.abs(np.diff(white.astype(int))).sum() > 10


@pytest.mark.parametrize(
    ("score", "text"), [(0.874, ".87"), (0.05, ".05"), (0.994, ".99"), (0.995, "1.0"), (1.0, "1.0")]
)
def test_scores_have_two_digits(score: float, text: str) -> None:
    assert format_score(score) == text


def test_the_contact_sheet_contains_every_picture_unchanged() -> None:
    pictures = [np.full((10 + 5 * i, 30 - 3 * i, 3), 100 + i, np.uint8) for i in range(5)]
    sheet = contact_sheet(pictures)
    for picture in pictures:
        rows, columns = np.nonzero(near(sheet, (picture[0, 0, 0],) * 3))
        np.testing.assert_array_equal(sheet[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1], picture)
    assert sheet.shape == (2 * 6 + 20 + 6 + 30, 3 * 30 + 4 * 6, 3)  # two rows of three columns
    with pytest.raises(ValueError):
        contact_sheet([])


def test_a_note_lengthens_only_the_label_of_its_box() -> None:
    image = np.zeros((480, 480, 3), np.uint8)
    boxes, labels = np.array([[50, 100, 60, 110], [50, 300, 60, 310]], np.float32), np.array([0, 1])
    without = draw(image, boxes, labels, class_names=NAMES)
    noted = draw(image, boxes, labels, class_names=NAMES, notes=["", "duplicate"])

    def width(picture: np.ndarray, label: int) -> int:
        return int(np.ptp(np.nonzero(near(picture, class_colour(label)))[1]))

    assert width(noted, 0) == width(without, 0) and width(noted, 1) > width(without, 1) + 30


def test_labels_of_many_boxes_are_left_out() -> None:
    grey = np.full((400, 400, 3), 128, np.uint8)
    corners = np.array([[40 * (i % 9) + 10, 40 * (i // 9) + 30] for i in range(LABELLED + 1)], np.float32)
    boxes = np.concatenate([corners, corners + 20], axis=1)
    drawn = [draw(grey, boxes[:n], np.zeros(n, int), np.ones(n), class_names=("a",)) for n in (LABELLED, LABELLED + 1)]
    changed = [int((picture != 128).any(-1).sum()) / n for picture, n in zip(drawn, (50, 51), strict=True)]
    assert 20 * 4 - 4 <= changed[1] <= 21 * 4 < 2 * changed[1] < changed[0]
