"""Scores computed in arrays equal pycocotools' to the last bit on published, handmade and random detections, in little
memory."""

import contextlib
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.scoring import detections_like, read_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina_jax.evaluation import precision_recall
from retina_jax.evaluation.coco_scores import evaluate_coco
from retina_jax.evaluation.precision_recall import DetectedBoxes, GroundTruth, coco_curves, coco_stats


def in_arrays(truth: GroundTruth, found: DetectedBoxes, categories: int) -> tuple[np.ndarray, ...]:
    curves = coco_curves(truth, found, categories)
    return curves.precision, curves.recall, coco_stats(curves)


def in_pycocotools(truth: GroundTruth, found: DetectedBoxes, categories: int) -> tuple[np.ndarray, ...]:
    images = 1 + max(truth.images.max(initial=0), found.images.max(initial=0))
    boxes = [
        {"image_id": i, "category_id": k, "bbox": box, "area": area, "iscrowd": int(crowd)}
        for i, k, box, area, crowd in zip(*(column.tolist() for column in truth), strict=True)
    ]
    results = [
        {"image_id": i, "category_id": k, "bbox": box, "score": score, "area": box[2] * box[3], "iscrowd": 0}
        for i, k, box, score in zip(*(column.tolist() for column in found), strict=True)
    ]
    indices = []
    for records in (boxes, results):
        index = COCO()
        index.dataset = {
            "images": [{"id": i} for i in range(images)],
            "categories": [{"id": k} for k in range(categories)],
            "annotations": [{**record, "id": number} for number, record in enumerate(records, start=1)],
        }
        indices.append(index)
    with contextlib.redirect_stdout(io.StringIO()):
        for index in indices:
            index.createIndex()
        evaluation = COCOeval(*indices, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.eval["precision"], evaluation.eval["recall"], evaluation.stats


def check_equal(truth: GroundTruth, found: DetectedBoxes, categories: int) -> None:
    ours, theirs = in_arrays(truth, found, categories), in_pycocotools(truth, found, categories)
    for name, own, other in zip(("precision", "recall", "stats"), ours, theirs, strict=True):
        np.testing.assert_array_equal(own, other, name)


def columns(truth: dict[str, Any], detections: list[dict[str, Any]]) -> tuple[GroundTruth, DetectedBoxes, int]:
    """Returns the arguments of `coco_curves` for COCO's records."""
    images = {image_id: i for i, image_id in enumerate(sorted(image["id"] for image in truth["images"]))}
    categories = {k: i for i, k in enumerate(sorted(category["id"] for category in truth["categories"]))}
    boxes, tail = truth["annotations"], []
    for records in (boxes, detections):
        tail.append([np.array([images[r["image_id"]] for r in records], int)])
        tail[-1].append(np.array([categories[r["category_id"]] for r in records], int))
        tail[-1].append(np.array([r["bbox"] for r in records], float).reshape(-1, 4))
    areas, crowds = np.array([a["area"] for a in boxes], float), np.array([a["iscrowd"] for a in boxes], bool)
    return (
        GroundTruth(*tail[0], areas, crowds),
        DetectedBoxes(*tail[1], np.array([d["score"] for d in detections])),
        len(categories),
    )


def random_data(
    seed: int, images: int, categories: int, boxes: int, detections: int, side: int, levels: int
) -> tuple[GroundTruth, DetectedBoxes, int]:
    """Draws boxes with integer coordinates in a square of `side` pixels, so that many overlap equally, and few
    different scores. Some have no area, a negative or a huge one; some areas differ from the box's; some boxes are
    crowds or duplicates."""
    rng = np.random.default_rng(seed)

    def squares(number: int) -> np.ndarray:
        made = np.concatenate([rng.integers(0, side, (number, 2)), rng.integers(1, side + 1, (number, 2))], axis=1)
        odd = rng.uniform(size=(number, 4))
        made[:, 2:][odd[:, 2:] < 0.03] *= 0
        made[:, 2:][odd[:, 2:] > 0.98] *= -1
        made[(odd[:, :1] < 0.02)[:, 0], 2:] += 2**18
        return made.astype(float)

    truth_boxes, found_boxes = squares(boxes), squares(detections)
    if boxes:
        twins = rng.uniform(size=boxes) < 0.3
        truth_boxes[twins] = truth_boxes[rng.integers(0, boxes, twins.sum())]
        alike = rng.uniform(size=detections) < 0.7
        found_boxes[alike] = truth_boxes[rng.integers(0, boxes, alike.sum())]
        found_boxes[alike] += rng.integers(-1, 2, (alike.sum(), 4)) * (rng.uniform(size=(alike.sum(), 1)) < 0.6)
    areas = truth_boxes[:, 2] * truth_boxes[:, 3]
    edges = rng.choice([0, 1023.5, 1024, 1024.5, 9216, 9216.5, 1e10, 2e10, -1], boxes)
    areas = np.where(rng.uniform(size=boxes) < 0.4, edges, areas)
    truth = GroundTruth(
        rng.integers(0, images, boxes),
        rng.integers(0, categories, boxes),
        truth_boxes,
        areas,
        rng.uniform(size=boxes) < rng.choice([0, 0.3]),
    )
    scores = rng.integers(-1, levels, detections) / levels
    return (
        truth,
        DetectedBoxes(
            rng.integers(0, images, detections), rng.integers(0, categories, detections), found_boxes, scores
        ),
        categories,
    )


@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 5),
    categories=st.integers(1, 4),
    boxes=st.integers(0, 40),
    detections=st.integers(0, 120),
    side=st.sampled_from([2, 8, 40, 200]),
    levels=st.sampled_from([1, 4, 1000]),
)
@settings(max_examples=120, deadline=None)
def test_random_data_equals_pycocotools_to_the_last_bit(**sizes: int) -> None:
    check_equal(*random_data(**sizes))


@pytest.mark.parametrize("seed", range(3))
def test_only_the_best_hundred_detections_per_image_and_class_count(seed: int) -> None:
    truth, found, categories = random_data(seed, images=2, categories=2, boxes=60, detections=900, side=30, levels=5)
    check_equal(truth, found, categories)
    more = DetectedBoxes(
        *(np.concatenate([column, column[:300]]) for column in found[:3]), np.r_[found.scores, np.full(300, -2.0)]
    )
    for own, other in zip(in_arrays(truth, more, categories), in_arrays(truth, found, categories), strict=True):
        np.testing.assert_array_equal(own, other)


def test_overlaps_of_any_floats_equal_pycocotools_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    truth = np.concatenate([rng.uniform(0, 300, (400, 2)), rng.uniform(20, 120, (400, 2))], axis=1)
    found = (truth.repeat(6, axis=0) + rng.normal(0, 8, (2400, 4))).astype(np.float32).astype(float)
    of_image = rng.integers(0, 40, 400)
    areas, crowds = truth[:, 2] * truth[:, 3] * rng.uniform(0.5, 1, 400), rng.uniform(size=400) < 0.1
    boxes = GroundTruth(of_image, np.zeros(400, int), truth, areas, crowds)
    check_equal(boxes, DetectedBoxes(of_image.repeat(6), np.zeros(2400, int), found, rng.uniform(size=2400)), 1)


@pytest.fixture
def fixture(shared_data: Path) -> tuple[dict, list[dict]]:
    folder = shared_data / "coco_eval_fixture"
    names = ("instances_val2014_100", "instances_val2014_fakebbox100_results")
    return tuple(json.loads((folder / f"{name}.json").read_text()) for name in names)


def test_fixture_equals_pycocotools_to_the_last_bit(fixture: tuple) -> None:
    truth, published = fixture
    assert any(a["iscrowd"] for a in truth["annotations"])
    made = detections_like(truth, 36.0, seed=0)
    assert made == detections_like(truth, 36.0, seed=0) != detections_like(truth, 36.0, seed=1)
    assert len(made) == 36 * len(truth["images"])
    for detections in (published, made):
        check_equal(*columns(truth, detections))
    ids = [image["id"] for image in truth["images"]]
    assert evaluate_coco(truth, made, ids) == evaluate_coco(truth, made, ids, evaluator="pycocotools")
    assert 0.3 < evaluate_coco(truth, made, ids).summary["AP"] < 0.45


def test_val2017_equals_pycocotools_to_the_last_bit(shared_data: Path) -> None:
    truth = read_boxes(shared_data / "coco_val2017_boxes" / "val2017.txt")
    assert (len(truth["images"]), len(truth["annotations"])) == (4952, 36781)
    some = {image["id"] for image in truth["images"][:150]}
    truth["images"] = [image for image in truth["images"] if image["id"] in some]
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in some]
    check_equal(*columns(truth, detections_like(truth, 30.5, seed=0)))


@pytest.mark.parametrize("seed", range(4))
def test_ground_truth_as_detections_has_precision_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes_xywh = np.concatenate([rng.uniform(0, 500, (300, 2)), rng.uniform(1, 200, (300, 2))], axis=1)
    of_image, of_class = rng.integers(0, 20, 300), rng.integers(0, 3, 300)
    truth = GroundTruth(of_image, of_class, boxes_xywh, boxes_xywh[:, 2] * boxes_xywh[:, 3], np.zeros(300, bool))
    precision, recall, stats = in_arrays(truth, DetectedBoxes(of_image, of_class, boxes_xywh, rng.uniform(size=300)), 4)
    np.testing.assert_allclose(precision[:, :, :3, :, -1], 1, rtol=1e-12)
    np.testing.assert_array_equal(recall[:, :3, :, -1], 1)
    assert (precision[:, :, 3] == -1).all() and (recall[:, 3] == -1).all()  # This class has no objects.
    np.testing.assert_allclose(stats[[0, 1, 2, 3, 4, 5, 8, 9, 10, 11]], 1, rtol=1e-12)


def test_no_objects_and_no_detections_score_minus_one() -> None:
    nothing = GroundTruth(*(np.zeros(0, int),) * 2, np.zeros((0, 4)), np.zeros(0), np.zeros(0, bool))
    for categories in (0, 2):
        precision, recall, stats = in_arrays(nothing, DetectedBoxes(*nothing[:4]), categories)
        assert precision.shape == (10, 101, categories, 4, 3) and recall.shape == (10, categories, 4, 3)
        assert (precision == -1).all() and (recall == -1).all() and stats.tolist() == [-1] * 12


def test_an_overlap_beyond_float64_is_no_overlap() -> None:
    of_one, box = np.zeros(1, int), np.array([[0, 0, 1e200, 1e200]])
    truth = GroundTruth(of_one, of_one, box, np.ones(1), np.zeros(1, bool))
    precision, recall, _ = in_arrays(truth, DetectedBoxes(of_one, of_one, box, np.ones(1)), 1)
    assert (precision[:, :, 0, 0] == 0).all() and (recall[:, 0, 0] == 0).all()


def test_scores_do_not_depend_on_the_number_of_pairs_processed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_data(0, images=3, categories=2, boxes=60, detections=300, side=20, levels=9)
    at_once = in_arrays(*data)
    for pairs in (1, 50, 5000):
        monkeypatch.setattr(precision_recall, "PAIRS", pairs)
        for own, other in zip(in_arrays(*data), at_once, strict=True):
            np.testing.assert_array_equal(own, other)


def test_one_crowded_image_does_not_increase_the_memory_of_the_others() -> None:
    """One of 3000 images has 2000 people: if all were padded to it, the overlaps alone would take 4.8 GB."""
    rng = np.random.default_rng(0)
    of_truth = np.concatenate([np.zeros(2000, int), np.arange(3000)])
    of_found = np.concatenate([np.zeros(100, int), np.arange(3000)])
    boxes_xywh = np.concatenate([rng.uniform(0, 40, (5000, 2)), rng.uniform(60, 80, (5000, 2))], axis=1)
    truth = GroundTruth(of_truth, 0 * of_truth, boxes_xywh, np.full(5000, 4000.0), np.zeros(5000, bool))
    found = DetectedBoxes(of_found, 0 * of_found, boxes_xywh[1900:], rng.uniform(size=3100))
    tracemalloc.start()
    try:
        coco_curves(truth, found, 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * 2**20
