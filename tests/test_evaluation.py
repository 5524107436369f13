"""COCO scores: the published fixture, perfect and empty detections, and errors that name the mistake."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from retina_jax.evaluation import coco_scores
from retina_jax.evaluation.coco_scores import (
    SUMMARY,
    EvaluationError,
    as_arrays,
    coco_results,
    coco_table,
    evaluate_coco,
    read_results,
)

TRUTH = {
    "images": [{"id": 1, "width": 100, "height": 100}, {"id": 5, "width": 100, "height": 100}],
    "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}, {"id": 4, "name": "eel"}],
    "annotations": [
        # id 0 on purpose: pycocotools reads it as "not matched" unless it is renumbered
        {"id": 0, "image_id": 1, "category_id": 3, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0},
        {"id": 1, "image_id": 1, "category_id": 9, "bbox": [50, 50, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 2, "image_id": 5, "category_id": 3, "bbox": [0, 0, 90, 90], "area": 8100, "iscrowd": 1},
    ],
}

EVALUATORS = ("arrays", "pycocotools")
BOTH = pytest.mark.parametrize("evaluator", EVALUATORS)


def perfect(truth: dict) -> list[dict]:
    return [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in truth["annotations"]
        if not a.get("iscrowd", 0)
    ]


@pytest.fixture
def fixture(shared_data: Path) -> tuple[dict, list[dict], dict[str, float]]:
    """Returns 100 images of COCO, 734 detections, and the twelve published scores of boxes."""
    folder = shared_data / "coco_eval_fixture"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    detections = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    text = (folder / "val2014_fake_eval_res.txt").read_text().split("type=bbox")[1].split("type=")[0]
    values = [float(line.split("=")[-1]) for line in text.splitlines() if "Average" in line]
    return truth, detections, dict(zip(SUMMARY, values, strict=True))


def ids(truth: dict) -> list[int]:
    return [image["id"] for image in truth["images"]]


@BOTH
def test_published_scores_are_reproduced(fixture: tuple, evaluator: str) -> None:
    truth, detections, published = fixture
    before = copy.deepcopy((truth, detections))
    scores = evaluate_coco(truth, detections, ids(truth), evaluator=evaluator)
    assert published["AP"] == 0.505 and published["APl"] == 0.501
    assert {key: round(value, 3) for key, value in scores.summary.items()} == published
    assert (truth, detections) == before
    defined = [value for value in scores.per_class.values() if value is not None]
    assert len(scores.per_class) == 80 and np.mean(defined) == pytest.approx(scores.summary["AP"])
    for line, value in zip(coco_table(scores).splitlines(), published.values(), strict=False):
        assert line.endswith(f"= {value:.3f}")


def test_ground_truth_as_detections_scores_one(fixture: tuple) -> None:
    truth, _, _ = fixture
    scores = evaluate_coco(truth, perfect(truth), ids(truth))
    for key in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"):
        assert scores.summary[key] == pytest.approx(1)


def test_scoring_some_images_ignores_the_others(fixture: tuple) -> None:
    truth, _, _ = fixture
    some = set(ids(truth)[:20])
    detections = [d for d in perfect(truth) if d["image_id"] in some]
    assert evaluate_coco(truth, detections, sorted(some)).summary["AP"] == pytest.approx(1)
    assert evaluate_coco(truth, detections, ids(truth)).summary["AP"] < 0.5


@BOTH
def test_ground_truth_scores_one_per_class_and_an_undefined_score_is_none(evaluator: str) -> None:
    scores = evaluate_coco(TRUTH, perfect(TRUTH), [1, 5], evaluator=evaluator)
    assert scores.summary["AP"] == pytest.approx(1) and scores.summary["APm"] == pytest.approx(1)
    assert scores.summary["APl"] is None  # the only large box is a crowd
    assert scores.per_class == {"cat": pytest.approx(1), "eel": None, "dog": pytest.approx(1)}
    assert "n/a" in coco_table(scores)
    json.dumps(scores.summary)


@BOTH
def test_no_detections_score_zero_with_ground_truth_and_none_without(evaluator: str) -> None:
    assert evaluate_coco(TRUTH, [], [1, 5], evaluator=evaluator).summary["AP"] == 0
    empty = evaluate_coco(TRUTH | {"annotations": []}, [], [1, 5], evaluator=evaluator)
    assert set(empty.summary.values()) == {None} and list(empty.summary) == list(SUMMARY)


@BOTH
def test_classes_of_one_name_get_unique_names(evaluator: str) -> None:
    truth = TRUTH | {"categories": [{"id": i, "name": "cat"} for i in (3, 9)]}
    assert list(evaluate_coco(truth, [], [1], evaluator=evaluator).per_class) == ["cat (3)", "cat (9)"]


@BOTH
def test_a_missing_area_is_that_of_the_box_and_a_missing_crowd_flag_is_false(evaluator: str) -> None:
    bare = [{k: a[k] for k in ("id", "image_id", "category_id", "bbox")} for a in TRUTH["annotations"][:2]]
    scores = evaluate_coco(TRUTH | {"annotations": bare}, perfect(TRUTH), [1], evaluator=evaluator)
    assert scores.summary["APm"] == pytest.approx(1) and scores.summary["APl"] is None


def test_ground_truth_of_other_images_and_categories_is_ignored() -> None:
    strange = [TRUTH["annotations"][0] | {"id": 7, "category_id": 77}]
    truth = TRUTH | {"annotations": TRUTH["annotations"] + strange}
    for image_ids in ([1, 5], [5, 1], [1]):
        found = [d for d in perfect(TRUTH) if d["image_id"] in image_ids]
        scores = [evaluate_coco(truth, found, image_ids, evaluator=evaluator) for evaluator in EVALUATORS]
        assert scores[0] == scores[1] and scores[0].summary["AP"] == pytest.approx(1)


DETECTION = {"image_id": 1, "category_id": 3, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_ids": []}, "image_ids is empty"),
        ({"image_ids": [1, 5, 5]}, "image_ids has duplicates.*: 5 "),
        ({"image_ids": [1, 7]}, "image_ids has images .*ground truth: 7 "),
        ({"detections": [DETECTION | {"image_id": 8}]}, "detections are of images that are not in image_ids: 8 "),
        ({"detections": [DETECTION | {"category_id": 1}]}, "category ids .*: 1 "),
        ({"detections": [DETECTION | {"score": float("nan")}]}, r"detections\[0\] \(image 1\) .*nan"),
        ({"detections": [DETECTION | {"bbox": [0.0, 0.0, float("inf"), 1.0]}]}, r"detections\[0\] .*inf"),
        (
            {"ground_truth": TRUTH | {"annotations": [TRUTH["annotations"][0] | {"bbox": [0, 0, float("nan"), 1]}]}},
            r"annotations\[0\] \(image 1\) .*nan.*: give finite numbers",
        ),
    ],
)
def test_errors_name_the_mistake_in_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as error:
        evaluate_coco(**{"ground_truth": TRUTH, "detections": [], "image_ids": [1, 5]} | arguments)
    assert "\n" not in str(error.value)


def test_results_in_pieces_are_those_of_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces are smaller than the file; numbers of records in errors are those in the file."""
    rng = np.random.default_rng(0)
    found = [DETECTION | {"bbox": rng.uniform(0, 99, 4).tolist(), "score": float(rng.uniform())} for _ in range(8)]
    at_once = as_arrays(TRUTH, found, [1, 5])
    monkeypatch.setattr(coco_scores, "PIECE", 3)
    file = tmp_path / "found.json"
    file.write_text(json.dumps(found))
    for records in (found, read_results(file)):
        for a, b in zip(as_arrays(TRUTH, records, [1, 5])[1], at_once[1], strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
    with pytest.raises(EvaluationError, match=r"detections\[7\] \(image 1\) .*nan"):
        as_arrays(TRUTH, [*found[:7], DETECTION | {"score": float("nan")}], [1, 5])
    strange = [one | {"image_id": 6 + i} for i, one in enumerate(found)]
    with pytest.raises(EvaluationError, match=r"6, 7, 8, 9, 10, 11, 12, 13 \(8 in all\)"):
        as_arrays(TRUTH, strange, [1, 5])


def test_results_are_xywh_by_category_id_without_padding() -> None:
    boxes = np.array([[1, 2, 4, 8], [0, 0, 0, 0], [5, 5, 6, 7]], np.float32)
    results = coco_results(5, boxes, np.array([0.5, 0, 0.25], np.float32), np.array([1, -1, 0]), (3, 9))
    assert results == [
        {"image_id": 5, "category_id": 9, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5},
        {"image_id": 5, "category_id": 3, "bbox": [5.0, 5.0, 1.0, 2.0], "score": 0.25},
    ]
    nothing = coco_results(5, boxes[:0], np.zeros(0, np.float32), np.zeros(0, np.int32), (3, 9))
    assert nothing == []


def test_evaluation_prints_nothing_and_pycocotools_prints_afterwards(capsys: pytest.CaptureFixture) -> None:
    evaluate_coco(TRUTH, perfect(TRUTH), [1, 5], evaluator="pycocotools")
    assert capsys.readouterr().out == ""
    COCO().createIndex()
    assert "creating index" in capsys.readouterr().out
