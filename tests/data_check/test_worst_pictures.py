"""The selection of the labelled and of the worst pictures, and the colours of their boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from planted import CONFIG, clean

from retina_jax.data.source import AS_VIEWERS
from retina_jax.data_check.coverage import Coverage, Views, view_boxes
from retina_jax.data_check.examples import examples
from retina_jax.data_check.split import Split, read_split
from retina_jax.reports.check_page import ON_IMAGES, RESCUED, UNCOVERED, draw_coverage, labelled_images, worst_pictures


def coverage_of(views: Views, states: dict[int, str]) -> Coverage:
    """Returns coverage of all boxes except the named ones: "low" by the low-quality rule, "none" not at all,
    "outbid"."""
    of = [states.get(n, "iou") for n in range(len(views.labels))]
    iou = np.array([{"iou": 0.8, "outbid": 0.6}.get(state, 0.4) for state in of], np.float32)
    return Coverage(iou, np.array([0 if state in ("none", "outbid") else 3 for state in of], np.int64), 0.5)


def clean_split(folder: Path) -> tuple[Split, Views]:
    split = read_split("train", *clean().write(folder)["train"], "keep")
    return split, view_boxes(split.records, CONFIG.data)


def test_images_with_most_boxes_without_anchors_come_first(tmp_path: Path) -> None:
    split, views = clean_split(tmp_path)
    # Two boxes an image: image 1 lacks two, image 4 one by being outbid, image 3 has two rescued, image 0 one.
    states = {2: "none", 3: "none", 8: "outbid", 6: "low", 7: "low", 0: "low"}
    coverage = coverage_of(views, states)
    captions = [caption for _, caption in worst_pictures(split, CONFIG.data, AS_VIEWERS, views, coverage, 8)]
    assert [caption.split(",")[0] for caption in captions] == ["001.jpg", "004.jpg", "003.jpg", "000.jpg"]
    assert captions[0] == "001.jpg, at 128 x 96: 2 boxes, 2 without an anchor, 0 by the low-quality rule only"
    assert len(worst_pictures(split, CONFIG.data, AS_VIEWERS, views, coverage, 2)) == 2
    (split.folder / "001.jpg").unlink()
    assert worst_pictures(split, CONFIG.data, AS_VIEWERS, views, coverage, 1)[0][1].startswith("004.jpg")


def test_there_is_no_worst_picture_if_all_boxes_are_covered(tmp_path: Path) -> None:
    split, views = clean_split(tmp_path)
    assert worst_pictures(split, CONFIG.data, AS_VIEWERS, views, coverage_of(views, {}), 8) == []


def test_boxes_are_green_yellow_and_red(tmp_path: Path) -> None:
    split, views = clean_split(tmp_path)
    grey = np.full((96, 128, 3), 128, np.uint8)
    drawn = draw_coverage(grey, split.class_names, views, coverage_of(views, {1: "low"}), 0)
    zoom = drawn.shape[0] // 96
    assert drawn.shape == (96 * zoom, 128 * zoom, 3)
    for n, colour in ((0, (0, 255, 0)), (1, ON_IMAGES[RESCUED])):
        x1, _, _, y2 = (views.boxes_xyxy[n] * zoom).astype(int).tolist()
        assert tuple(drawn[y2 - 20, x1]) == colour  # the left side, below the tag
    red = draw_coverage(grey, split.class_names, views, coverage_of(views, {0: "outbid"}), 0)
    x1, _, _, y2 = (views.boxes_xyxy[0] * zoom).astype(int).tolist()
    assert tuple(red[y2 - 20, x1]) == ON_IMAGES[UNCOVERED] and tuple(red[y2 - 20, x1 + 60]) == (128, 128, 128)


def test_the_wall_shows_every_class_and_unusual_images_first(tmp_path: Path) -> None:
    splits = clean()
    splits.documents["train"]["categories"].append({"id": 3, "name": "rare"})
    splits.box(9)["category_id"] = 3  # in 004.jpg
    splits.add_box(50, 15, (10, 20, 4, 4))
    splits.add_box(51, 11, (100, 20, 60, 48))
    splits.add_box(52, 11, (100, 20, 48, 0))
    split = read_split("train", *splits.write(tmp_path)["train"], "keep")
    shown = [(split.images[row][1], why) for row, why in examples(split, 4)]
    assert shown[:3] == [
        ("004.jpg", "rare"),
        ("001.jpg", "the most boxes: 3; the largest box: 60 x 48; a box extends beyond the image; a box has no area"),
        ("005.jpg", "the smallest box: 4 x 4"),
    ]
    assert sorted(name for name, _ in shown) == [f"00{i}.jpg" for i in range(6)], "each once"
    (split.folder / "004.jpg").unlink()
    pixels, name, why, text = labelled_images(split, AS_VIEWERS)[0]
    assert (name, text) == ("001.jpg", "001.jpg: cell (2), dust (1)") and pixels.shape[1] >= 600 and "no area" in why
