"""Detection in tiles and in stretched images against plain loops; limits on the number of detections are reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_sets import rectangles
from test_tta import CONFIG, assert_same, detector, naive_merge, pictures

from retina_jax.config import DetectionConfig
from retina_jax.data.decoding import image_of
from retina_jax.data.tiles import cut_off
from retina_jax.data.transforms import resize
from retina_jax.detector import ImageDetections
from retina_jax.evaluate import evaluate
from retina_jax.evaluation.coco_scores import evaluate_coco
from retina_jax.training.opening import open_run

TILED = {"data__tile": 64, "data__tile_overlap": 0.3}


def by_hand(image: np.ndarray) -> ImageDetections:
    """Detects in each tile alone, moves the boxes, drops those that a border cuts off, and suppresses one by one."""
    height, width = image.shape[:2]
    tiles, parts = detector(**TILED).tiles(0, height, width), []
    for tile in tiles:
        (found,) = detector().detect([tile.of(image)])
        boxes = found.boxes_xyxy + np.float32([[tile.left, tile.top, tile.left, tile.top]])
        kept = ~cut_off(boxes, tile, tiles, (width, height))
        parts.append((boxes[kept], found.scores[kept], found.labels[kept]))
    boxes, scores, labels = map(np.concatenate, zip(*parts, strict=True))
    kept = naive_merge(boxes, scores, labels, DetectionConfig(max_detections=10**6))
    assert len(kept) > CONFIG.detection.max_detections, "more than a tile may have"
    return ImageDetections(boxes[kept], scores[kept], labels[kept], tuple(("red", "green")[i] for i in labels[kept]))


def test_detections_of_tiles_are_those_of_each_tile_merged() -> None:
    large, small = pictures((100, 150), (50, 60))
    (found, one), (plain,) = detector(**TILED).detect([large, small], batch_size=2), detector().detect([small])
    assert_same(found, by_hand(large))
    assert_same(one, plain)  # it is one tile


def test_evaluation_in_tiles_equals_detect(tmp_path: Path) -> None:
    source = rectangles(tmp_path, [(150, 100), (60, 50), (70, 130)], kind="PNG")
    detecting = detector(**TILED)
    run = open_run(tmp_path / "run", detecting.config, source.class_names, source.category_ids)
    evaluate(run, detecting, source, 0)
    results = json.loads((run.folder / "detections/step_00000000.json").read_text())
    for index in range(3):
        mine = [r for r in results if r["image_id"] == source.records[index].image_id]
        (found,) = detecting.detect([image_of(source, index)])
        np.testing.assert_allclose([r["score"] for r in mine], found.scores, atol=5e-6)
        np.testing.assert_allclose([r["bbox"][:2] for r in mine], found.boxes_xyxy[:, :2], atol=1e-3)


def test_boxes_of_a_stretched_image_are_mapped_back_with_both_factors() -> None:
    stretched = detector(data__resize_rule="stretch", data__long_side=64)
    (image,) = pictures((40, 100))
    square = np.asarray(resize(image, (64, 64), "bilinear"))
    (found,), (expected,) = stretched.detect([image]), stretched.detect([square])
    boxes = expected.boxes_xyxy * np.float32([[100 / 64, 40 / 64] * 2])
    names = tuple(("red", "green")[label] for label in expected.labels)
    assert_same(found, ImageDetections(boxes, expected.scores, expected.labels, names))


def test_scores_from_which_detections_are_missing_are_known() -> None:
    (image,) = pictures((60, 90))
    (found,), (few,) = detector(detection__max_detections=2000).detect([image]), detector().detect([image])
    assert 20 < len(found.scores) < 2000 and found.full_from == 0
    assert 15 < len(few.scores) <= 20 and 0 < few.full_from <= few.scores.min()
    (tiled,) = detector(**TILED).detect(pictures((60, 90)))
    assert tiled.full_from > 0


@pytest.mark.parametrize("count", [100, 150])
def test_more_objects_than_coco_counts_get_the_ap_of_all_detections(count: int) -> None:
    boxes = [[20 * (i % 10), 20 * (i // 10), 15, 15] for i in range(count)]
    ids = {"image_id": 1, "category_id": 1}
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "tree"}],
        "annotations": [{**ids, "id": i + 1, "bbox": box, "area": 225} for i, box in enumerate(boxes)],
    }
    scores = evaluate_coco(truth, [{**ids, "bbox": box, "score": 1 - i / 999} for i, box in enumerate(boxes)], [1])
    assert scores.objects == count
    if count == 100:
        assert scores.summary["AP"] == 1 and scores.ap_of_all is None and scores.f1_threshold == 1 - 99 / 999
    else:
        # 67 of the 101 recalls, 0 to 0.66, are reached with 100 of 150.
        assert scores.summary["AP"] == pytest.approx(67 / 101) and scores.ap_of_all == 1
        assert scores.f1_threshold == 1 - 149 / 999
