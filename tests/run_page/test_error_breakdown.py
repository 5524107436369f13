"""The kinds of error: handmade cases of each, sums, TIDE's figures, and AP 1 once all errors are fixed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_jax.evaluation.coco_scores import as_arrays
from retina_jax.evaluation.error_analysis import (
    BACKGROUND,
    BOTH,
    CLASSIFICATION,
    DUPLICATE,
    KINDS,
    LEFT_OUT,
    LOCALISATION,
    MISSED,
    NOTHING,
    RIGHT,
    Errors,
    ap_without,
    classify_errors,
    confusions,
    fixed_ap,
    mean_ap,
)
from retina_jax.evaluation.precision_recall import DetectedBoxes, GroundTruth, coco_curves, coco_stats, precision_curve

ALL = range(len(KINDS))
CAT, DOG = 0, 1


def made(truth: list[tuple], found: list[tuple], crowds: tuple[int, ...] = ()) -> tuple[GroundTruth, DetectedBoxes]:
    """Returns one image with objects (category, x, y, w, h) and detections (category, x, y, w, h, score)."""
    boxes, detections = np.array(truth, float).reshape(-1, 5), np.array(found, float).reshape(-1, 6)
    crowd = np.isin(np.arange(len(boxes)), crowds)
    return (
        GroundTruth(np.zeros(len(boxes), int), boxes[:, 0].astype(int), boxes[:, 1:], boxes[:, 3] * boxes[:, 4], crowd),
        DetectedBoxes(
            np.zeros(len(detections), int), detections[:, 0].astype(int), detections[:, 1:5], detections[:, 5]
        ),
    )


# A cat of 10 x 10; a detection of the same size moved right by m overlaps it with IoU (10 - m) / (10 + m).
THE_CAT = (CAT, 0, 0, 10, 10)


@pytest.mark.parametrize(
    ("detection", "kind", "of_objects"),
    [
        ((CAT, 0, 0, 10, 10, 0.9), RIGHT, RIGHT),
        ((CAT, 0, 0, 10, 5, 0.9), RIGHT, RIGHT),  # IoU exactly .5
        ((CAT, 5, 0, 10, 10, 0.9), LOCALISATION, LOCALISATION),  # 1/3
        ((CAT, 0, 0, 10, 1, 0.9), LOCALISATION, LOCALISATION),  # exactly .1
        ((DOG, 1, 0, 10, 10, 0.9), CLASSIFICATION, CLASSIFICATION),  # 9/11
        ((DOG, 0, 0, 10, 5, 0.9), CLASSIFICATION, CLASSIFICATION),  # exactly .5
        ((DOG, 5, 0, 10, 10, 0.9), BOTH, MISSED),  # 1/3
        ((DOG, 0, 0, 10, 1, 0.9), BACKGROUND, MISSED),  # exactly .1
        ((CAT, 9, 0, 10, 10, 0.9), BACKGROUND, MISSED),  # 1/19
        ((CAT, 50, 50, 10, 10, 0.9), BACKGROUND, MISSED),
    ],
)
def test_the_overlap_of_a_single_detection_decides_its_kind(detection: tuple, kind: int, of_objects: int) -> None:
    errors = classify_errors(*made([THE_CAT], [detection]))
    assert errors.of_found.tolist() == [kind] and errors.of_objects.tolist() == [of_objects]
    assert errors.finds.tolist() == [0 if of_objects != MISSED else -1]


def test_the_second_detection_of_an_object_is_a_duplicate() -> None:
    truth, found = made([THE_CAT], [(CAT, 0, 0, 10, 9, 0.3), (CAT, 0, 0, 10, 8, 0.8)])
    assert classify_errors(truth, found).of_found.tolist() == [DUPLICATE, RIGHT]


def test_of_two_detections_with_one_target_the_better_finds_it() -> None:
    """By hand: nothing is found, AP 0. If one kind is fixed, its best detection finds the cat, or none does."""
    truth, found = made(
        [THE_CAT],
        [(CAT, 5, 0, 10, 10, 0.4), (DOG, 0, 0, 10, 10, 0.7), (CAT, 0, 5, 10, 10, 0.6), (CAT, 50, 0, 9, 9, 0.9)],
    )
    errors = classify_errors(truth, found)
    assert errors.of_found.tolist() == [LOCALISATION, CLASSIFICATION, LOCALISATION, BACKGROUND]
    assert errors.of_objects.tolist() == [CLASSIFICATION] and errors.finds.tolist() == [-1, 0, -1, -1]
    assert errors.target.tolist() == [0, 0, 0, -1]
    ap = {kinds: fixed_ap(errors, 2, kinds)[CAT] for kinds in ((), (LOCALISATION,), (CLASSIFICATION,))}
    # Fixed, the dog is a cat of score .7 behind a false one of .9, and before two of .6 and .4: precision 1/2.
    assert ap == {(): 0.0, (LOCALISATION,): 0.0, (CLASSIFICATION,): pytest.approx(0.5)}
    assert fixed_ap(errors, 2, (CLASSIFICATION, BACKGROUND))[CAT] == pytest.approx(1.0)


def test_confusions_are_of_right_and_classification_and_the_rest_is_nothing() -> None:
    """A found cat that is a dog too, a dog found as a cat, a missed cat; a cat on nothing, and one below the score."""
    truth, found = made([THE_CAT, (DOG, 30, 0, 10, 10), (CAT, 60, 0, 10, 10)], [
        (CAT, 0, 0, 10, 10, 0.9), (DOG, 0, 0, 10, 9, 0.8), (CAT, 30, 0, 10, 10, 0.7), (CAT, 90, 0, 9, 9, 0.6),
        (CAT, 60, 0, 10, 10, 0.4),
    ])  # fmt: skip
    errors = classify_errors(truth, found)
    expected = {(CAT, CAT): 1, (CAT, DOG): 1, (DOG, CAT): 1, (NOTHING, CAT): 1, (CAT, NOTHING): 1}
    assert confusions(errors, 0.5) == expected
    assert confusions(errors, 0.4) == {**{pair: 1 for pair in expected if pair != (CAT, NOTHING)}, (CAT, CAT): 2}
    assert confusions(errors, 1.0) == {(CAT, NOTHING): 2, (DOG, NOTHING): 1}


def test_removing_a_wrong_class_on_a_found_object_raises_ap() -> None:
    truth, found = made([THE_CAT, (DOG, 30, 0, 10, 10)], [
        (CAT, 0, 0, 10, 10, 0.9), (DOG, 0, 0, 10, 10, 0.8), (DOG, 30, 0, 10, 10, 0.7),
    ])  # fmt: skip
    errors = classify_errors(truth, found)
    assert errors.of_found.tolist() == [RIGHT, CLASSIFICATION, RIGHT] and errors.target.tolist() == [-1, 0, -1]
    assert fixed_ap(errors, 2).tolist() == pytest.approx([1.0, 0.5])
    assert fixed_ap(errors, 2, (CLASSIFICATION,)).tolist() == pytest.approx([1.0, 1.0])


def test_fixing_missed_objects_leaves_the_others() -> None:
    """With one cat of two found, recall 1/2 at precision 1 is AP 51/101; without the missed one it is 1."""
    truth, found = made([THE_CAT, (CAT, 30, 0, 10, 10)], [(CAT, 0, 0, 10, 10, 0.9)])
    errors = classify_errors(truth, found)
    assert errors.of_objects.tolist() == [RIGHT, MISSED]
    assert fixed_ap(errors, 2)[CAT] == pytest.approx(51 / 101)
    assert fixed_ap(errors, 2, (MISSED,))[CAT] == pytest.approx(1.0)
    assert ap_without("false_negatives", errors, 2)[CAT] == pytest.approx(1.0)
    assert ap_without("false_positives", errors, 2)[CAT] == pytest.approx(51 / 101)
    assert np.isnan(fixed_ap(errors, 2)[DOG])


def test_a_completely_missed_class_scores_one_once_it_is_fixed() -> None:
    truth, found = made([(DOG, 0, 0, 10, 10)], [(DOG, 50, 0, 10, 10, 0.5)])
    errors = classify_errors(truth, found)
    gains = {kinds: fixed_ap(errors, 2, kinds)[DOG] for kinds in ((MISSED,), (BACKGROUND,), ALL)}
    assert gains == {(MISSED,): 0.0, (BACKGROUND,): 0.0, ALL: 1.0}


def test_a_crowd_takes_any_number_of_detections_without_error() -> None:
    truth, found = made(
        [(CAT, 0, 0, 100, 100), THE_CAT],
        [(CAT, 40, 40, 10, 10, 0.9), (CAT, 60, 60, 10, 10, 0.8), (DOG, 60, 60, 10, 10, 0.7), (CAT, 0, 0, 10, 10, 0.6)],
        crowds=(0,),
    )
    errors = classify_errors(truth, found)
    assert errors.of_found.tolist() == [LEFT_OUT, LEFT_OUT, BACKGROUND, RIGHT]
    assert errors.of_objects.tolist() == [LEFT_OUT, RIGHT]


def test_only_the_best_hundred_detections_per_image_and_class_count() -> None:
    found = [(CAT, 50, 0, 10, 10, 1 - n / 1000) for n in range(101)] + [(DOG, 50, 0, 10, 10, 0.1)]
    errors = classify_errors(*made([THE_CAT], found))
    assert errors.of_found.tolist() == [BACKGROUND] * 100 + [LEFT_OUT, BACKGROUND]


def test_average_precision_of_hits_in_between() -> None:
    """The detections are right, wrong, right of two objects: precision 1 up to recall 1/2 (51 of the 101 recalls), 2/3
    beyond."""
    right = np.array([[True, False, True]])
    ap = precision_curve(right, ~right, 2)[0].mean()
    assert ap == pytest.approx((51 + 50 * 2 / 3) / 101)


def check_sums(errors: Errors, categories: int) -> None:
    """Checks properties that the errors of any detections have."""
    assert set(errors.of_found.tolist()) <= {RIGHT, LEFT_OUT, *ALL} - {MISSED}
    assert set(errors.of_objects.tolist()) <= {RIGHT, LEFT_OUT, CLASSIFICATION, LOCALISATION, MISSED}
    # Every object that is found, now or once its error is fixed, is found by one detection of that kind.
    finders = np.flatnonzero(errors.finds >= 0)
    assert len(set(errors.finds[finders].tolist())) == len(finders)
    assert (errors.of_objects[errors.finds[finders]] == errors.of_found[finders]).all()
    for kind in (RIGHT, CLASSIFICATION, LOCALISATION):
        assert (errors.of_objects == kind).sum() == (errors.of_found[finders] == kind).sum()
    base, theirs = (
        mean_ap(fixed_ap(errors, categories)),
        coco_stats(coco_curves(errors.ground_truth, errors.found, categories))[1],
    )
    assert (-1 if base is None else base) == pytest.approx(theirs, abs=1e-12)
    fixed = fixed_ap(errors, categories, ALL)
    assert fixed[~np.isnan(fixed)] == pytest.approx(1.0, abs=1e-12)
    for side in ("false_positives", "false_negatives"):
        alone = mean_ap(ap_without(side, errors, categories))
        assert alone is None or alone >= base - 1e-12


@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 4),
    categories=st.integers(1, 4),
    boxes=st.integers(0, 25),
    detections=st.integers(0, 60),
    side=st.sampled_from([4, 12, 60]),
    levels=st.sampled_from([2, 1000]),
)
@settings(max_examples=80, deadline=None)
def test_kinds_sum_up_and_fixing_none_or_all_gives_ap50_or_one(
    seed: int, images: int, categories: int, boxes: int, detections: int, side: int, levels: int
) -> None:
    """AP50 equals that of coco_scores, which equals pycocotools'. Boxes have integer sides, so many overlaps are
    equal."""
    rng = np.random.default_rng(seed)

    def squares(number: int) -> np.ndarray:
        corners, sides = rng.integers(0, side, (number, 2)), rng.integers(0, side + 1, (number, 2))
        return np.concatenate([corners, sides], axis=1).astype(float)

    truth_boxes, found_boxes = squares(boxes), squares(detections)
    if boxes:
        near = rng.uniform(size=detections) < 0.7
        found_boxes[near] = truth_boxes[rng.integers(0, boxes, near.sum())] + rng.integers(-1, 2, (near.sum(), 4))
        found_boxes[:, 2:] = np.maximum(found_boxes[:, 2:], 0)
    truth = GroundTruth(
        rng.integers(0, images, boxes),
        rng.integers(0, categories, boxes),
        truth_boxes,
        np.where(rng.uniform(size=boxes) < 0.05, 2e10, truth_boxes[:, 2] * truth_boxes[:, 3]),
        rng.uniform(size=boxes) < rng.choice([0, 0.3]),
    )
    scores = rng.integers(0, levels, detections) / levels
    found = DetectedBoxes(
        rng.integers(0, images, detections), rng.integers(0, categories, detections), found_boxes, scores
    )
    check_sums(classify_errors(truth, found), categories)


def test_the_published_detections_have_the_error_counts_of_tide(shared_data: Path) -> None:
    """AP50 is as published; the counts are those of tidecv 1.0.1 (IoU 0.5 and 0.1, boxes) on the same files, run once
    on 2026-11-25."""
    folder = shared_data / "coco_eval_fixture"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    detections = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    image_ids = sorted({d["image_id"] for d in truth["annotations"]} | {d["image_id"] for d in detections})
    arrays = as_arrays(truth, detections, image_ids)
    errors = classify_errors(*arrays[:2])
    lines = (folder / "val2014_fake_eval_res.txt").read_text().split("type=bbox")[1].split("type=")[0]
    published = float(re.search(r"IoU=0.50 +\| area= +all .*= ([0-9.]+)", lines)[1])
    assert round(mean_ap(fixed_ap(errors, arrays[2])), 3) == published == 0.697
    assert [(errors.of_found == kind).sum() for kind in ALL] == [83, 1, 0, 1, 0, 0]
    assert (errors.of_objects == MISSED).sum() == 97
    check_sums(errors, arrays[2])


def test_counts_and_costs_of_every_kind_equal_those_of_tide(shared_data: Path) -> None:
    """Compares COCO's ground truth without crowds and detections generated from it with tidecv 1.0.1 on both, run on
    2026-11-25.

    Its AP differs in the fourth digit, because its recalls are k / 100 and COCO's linspace(0, 1, 101), so that a recall
    of exactly such a value may fall on either side. Missed objects differ more: there, a class whose objects are all
    missed counts as 0 once they do not count.
    """
    truth = json.loads((shared_data / "coco_subset/annotations/instances_val2017.json").read_text())
    rng = np.random.default_rng(1)
    ids = [category["id"] for category in truth["categories"]]
    detections = []

    def found(of: dict, category: int, box: list[float]) -> None:
        score = float(rng.uniform())
        detections.append({"image_id": of["image_id"], "category_id": category, "bbox": box, "score": score})

    for a in truth["annotations"]:
        x, y, w, h = a["bbox"]
        for _ in range(int(rng.integers(0, 4))):
            s = rng.choice([0.02, 0.1, 0.3, 0.8])
            box = [x + w * s * rng.normal(), y + h * s * rng.normal()]
            box += [w * np.exp(s * rng.normal() / 2), h * np.exp(s * rng.normal() / 2)]
            found(a, a["category_id"] if rng.uniform() < 0.75 else int(rng.choice(ids[:10])), [float(v) for v in box])
        if rng.uniform() < 0.3:
            found(a, a["category_id"], [float(rng.uniform(0, 400)), float(rng.uniform(0, 300)), 30.0, 30.0])
    truth["annotations"] = [a for a in truth["annotations"] if not a["iscrowd"]]
    present = {a["category_id"] for a in truth["annotations"]}
    detections = [d for d in detections if d["category_id"] in present]
    arrays = as_arrays(truth, detections, sorted(image["id"] for image in truth["images"]))
    errors = classify_errors(*arrays[:2])
    counts = [(errors.of_found == kind).sum() + (kind == MISSED) * (errors.of_objects == kind).sum() for kind in ALL]
    assert counts == [446, 653, 255, 327, 948, 648]
    base = mean_ap(fixed_ap(errors, arrays[2]))
    gains = [100 * (mean_ap(fixed_ap(errors, arrays[2], (kind,))) - base) for kind in ALL]
    assert gains[:MISSED] == pytest.approx([7.8974, 11.1513, 0.8019, 0.6989, 8.0433], abs=0.02)
