"""Errors by kind, after TIDE (Bolya et al., A General Toolbox for Identifying Object Detection Errors, ECCV 2020).

Every wrong detection and every object that was not found is of exactly one kind. Each kind has a gain: the AP50 that would
be added if its errors alone were fixed. Matching is COCO's at IoU 0.5 (`precision_recall.coco_match`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from jaxtyping import Bool, Float, Int

from retina_jax.config import DataConfig
from retina_jax.data.classes import Category, unique_names
from retina_jax.data.datasets import open_source
from retina_jax.evaluation import precision_recall
from retina_jax.evaluation.coco_scores import EvaluationError, as_arrays, read_results
from retina_jax.evaluation.precision_recall import (
    AREAS,
    DetectedBoxes,
    GroundTruth,
    OperatingPoint,
    Pairs,
    best_f1,
    coco_match,
    detection_limit,
    overlapping,
)

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(len(KINDS))
RIGHT, LEFT_OUT = -1, -2  # a detection that found its object, or an object that was found; what counts neither way
NOTHING = -1  # in place of a category
FOREGROUND_IOU = 0.5  # IoU from which a detection finds an object
BACKGROUND_IOU = 0.1  # IoU up to which it is on background
Mistakes = Literal["false_positives", "false_negatives"]


class Errors(NamedTuple):
    """Kinds of D detections and G objects: indices into KINDS, RIGHT or LEFT_OUT."""

    ground_truth: GroundTruth
    found: DetectedBoxes
    # Never MISSED. LEFT_OUT: took a crowd region, or is not among the 100 best of its image and category.
    of_found: Int[np.ndarray, " D"]
    # RIGHT, MISSED, CLASSIFICATION or LOCALISATION (of the detection that finds it once fixed); LEFT_OUT: crowd regions.
    of_objects: Int[np.ndarray, " G"]
    finds: Int[np.ndarray, " D"]  # the object that a detection finds (RIGHT), or finds once it is fixed; -1: none
    by_score: Int[np.ndarray, " D"]  # all detections by descending score, of equal scores by image
    target: Int[np.ndarray, " D"]  # the object that one of wrong class or place overlaps most; -1: of any other kind


def classify_errors(ground_truth: GroundTruth, found: DetectedBoxes) -> Errors:
    """Returns the kind of each error. For a detection that found nothing, let s be its highest IoU with an object of its
    category and o that with one of another, crowds left out. The first condition that holds is its kind:

    localisation    0.1 <= s < 0.5
    classification  o >= 0.5
    duplicate       s >= 0.5: a better detection found that object
    background      s < 0.1 and o <= 0.1
    both            0.1 < o < 0.5: wrong class and wrong place

    If several detections of the first two kinds have the same target and none has found it, the one with the highest score
    (of equals the first) finds it once it is fixed; the others would be suppressed.
    """
    limit = detection_limit(ground_truth, found)
    matches = coco_match(ground_truth, found, np.array([FOREGROUND_IOU]), {"all": AREAS["all"]}, limit)
    rows, ignored = matches.detections, matches.ignored_boxes[0]
    took = np.full(len(rows), -1)
    took[matches.takers] = matches.taken[0, 0]
    pairs = overlapping(ground_truth, found.boxes_xywh[rows], ground_truth.images, found.images[rows], BACKGROUND_IOU)
    same = found.categories[rows][pairs.detections] == ground_truth.categories[pairs.boxes]
    (s, own), (o, other) = (_best(pairs, of & ~ignored[pairs.boxes], len(rows)) for of in (same, ~same))
    on_own, on_other = s >= FOREGROUND_IOU, o >= FOREGROUND_IOU
    conditions = (s >= BACKGROUND_IOU) & ~on_own, on_other, on_own, np.maximum(s, o) <= BACKGROUND_IOU
    kinds = np.select(conditions, (LOCALISATION, CLASSIFICATION, DUPLICATE, BACKGROUND), BOTH)
    kinds[matches.outside[0]] = LEFT_OUT
    kinds[took >= 0] = np.where(ignored[took[took >= 0]], LEFT_OUT, RIGHT)

    of_found, of_objects = np.full(len(found.scores), LEFT_OUT), np.where(ignored, LEFT_OUT, MISSED)
    finds, target = np.full((2, len(found.scores)), -1)
    of_found[rows] = kinds
    target[rows] = np.select((kinds == LOCALISATION, kinds == CLASSIFICATION), (own, other), -1)
    right = kinds == RIGHT
    finds[rows[right]], of_objects[took[right]] = took[right], RIGHT
    candidates = np.argsort(-found.scores, kind="stable")
    candidates = candidates[target[candidates] >= 0]
    candidates = candidates[of_objects[target[candidates]] == MISSED]
    objects, first = np.unique(target[candidates], return_index=True)
    finds[candidates[first]], of_objects[objects] = objects, of_found[candidates[first]]
    by_score = np.lexsort((found.images, -found.scores))
    return Errors(ground_truth, found, of_found, of_objects, finds, by_score, target)


def _best(
    pairs: Pairs, chosen: Bool[np.ndarray, " P"], detections: int
) -> tuple[Float[np.ndarray, " D"], Int[np.ndarray, " D"]]:
    """Returns the highest IoU of each detection in the chosen pairs, and its box (the first of equals); else 0 and -1."""
    ious, boxes = np.zeros(detections), np.full(detections, -1)
    of, box, iou = (column[chosen] for column in pairs)
    order = np.lexsort((box, -iou, of))
    rows, first = np.unique(of[order], return_index=True)
    ious[rows], boxes[rows] = iou[order][first], box[order][first]
    return ious, boxes


def fixed_ap(errors: Errors, categories: int, kinds: Collection[int] = ()) -> Float[np.ndarray, " K"]:
    """Returns AP50 of each category if all errors of `kinds` were fixed; NaN without an object to find.

    classification, localisation: the detection that then finds its object gets its class and box and keeps its score; the
    others with this target are removed. both, duplicate, background: the detection is removed. missed: the object does not
    count. A category without any counted object has AP 1 if no detection is left, else 0.
    """
    chosen = np.isin(errors.of_found, list(kinds))
    right = (errors.of_found == RIGHT) | (chosen & (errors.finds >= 0))
    kept = right | (~chosen & (errors.of_found != LEFT_OUT))
    counted = (errors.of_objects != LEFT_OUT) & ~((errors.of_objects == MISSED) & (MISSED in kinds))
    return _class_aps(errors, categories, right, kept, counted)


def ap_without(without: Mistakes, errors: Errors, categories: int) -> Float[np.ndarray, " K"]:
    """Returns AP50 of each category if all wrong detections are removed, or if objects that were not found do not count."""
    right = errors.of_found == RIGHT
    kept = right if without == "false_positives" else errors.of_found != LEFT_OUT
    counted = errors.of_objects == RIGHT if without == "false_negatives" else errors.of_objects != LEFT_OUT
    return _class_aps(errors, categories, right, kept, counted)


def mean_ap(values: Float[np.ndarray, " K"]) -> float | None:
    """Returns the mean AP over the classes with ground truth (not NaN); None without such classes."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None


def _class_aps(
    errors: Errors,
    categories: int,
    right: Bool[np.ndarray, " D"],
    kept: Bool[np.ndarray, " D"],
    counted: Bool[np.ndarray, " G"],
) -> Float[np.ndarray, " K"]:
    """Returns AP of the detections `kept`, those that are `right` in the category of the object they find."""
    found, classes = errors.found, errors.ground_truth.categories
    moved = np.where(right, classes[errors.finds], found.categories) if len(classes) else found.categories
    order = errors.by_score[kept[errors.by_score]]
    # A stable sort of small integers is linear; with all three keys the nine sorts of a page took a second.
    order = order[np.argsort(moved[order].astype(np.min_scalar_type(categories)), kind="stable")]
    ends = np.searchsorted(moved[order], np.arange(categories + 1))
    values = np.full(categories, np.nan)
    for k in np.unique(classes[errors.of_objects != LEFT_OUT]):
        hits = right[order[ends[k] : ends[k + 1]]]
        objects = int((counted & (classes == k)).sum())
        values[k] = float(not len(hits))
        if objects:  # COCO's AP at one IoU is the mean precision at 101 recalls
            values[k] = precision_recall.precision_curve(hits[None], ~hits[None], objects)[0].mean()
    return values


def confusions(errors: Errors, score: float) -> dict[tuple[int, int], int]:
    """Returns how often an object of a class is detected as a class, by (object's, detection's) category, of detections with
    `score` or more. NOTHING as the object's: of a wrong detection of any kind but classification; as the detection's: of
    an object without a detection that is right or of kind classification."""
    kinds = np.where(errors.found.scores >= score, errors.of_found, LEFT_OUT)
    on_object, wrong = (kinds == RIGHT) | (kinds == CLASSIFICATION), (kinds >= 0) & (kinds != CLASSIFICATION)
    objects = np.where(kinds == RIGHT, errors.finds, errors.target)[on_object]
    missed = errors.of_objects != LEFT_OUT
    missed[objects] = False
    classes, detected = errors.ground_truth.categories, errors.found.categories
    of_objects = np.concatenate([classes[objects], np.full(wrong.sum(), NOTHING), classes[missed]])
    of_found = np.concatenate([detected[on_object], detected[wrong], np.full(missed.sum(), NOTHING)])
    width = 2 + int(max(of_objects.max(initial=NOTHING), of_found.max(initial=NOTHING)))
    pairs, counts = np.unique((of_objects + 1) * width + of_found + 1, return_counts=True)
    return {(pair // width - 1, pair % width - 1): n for pair, n in zip(pairs.tolist(), counts.tolist(), strict=True)}


class Counts(NamedTuple):
    """Numbers of right and wrong detections from a score on, and of objects that they do not find, by image."""

    right: Int[np.ndarray, " I"]
    wrong: Int[np.ndarray, " I"]
    not_found: Int[np.ndarray, " I"]

    @property
    def f1(self) -> Float[np.ndarray, " I"]:
        """Returns 2 right / (2 right + wrong + not found); NaN for images without objects and detections."""
        both = 2 * self.right + self.wrong + self.not_found
        return np.where(both > 0, 2 * self.right / np.maximum(both, 1), np.nan)


def operating_point(errors: Errors) -> OperatingPoint | None:
    """Returns `best_f1` of the detections that count."""
    counted = errors.by_score[errors.of_found[errors.by_score] != LEFT_OUT]  # `best_f1` sorts sorted scores at once
    right, objects = errors.of_found[counted] == RIGHT, int((errors.of_objects != LEFT_OUT).sum())
    return best_f1(errors.found.scores[counted], right, objects)


def pooled_precision(errors: Errors) -> Float[np.ndarray, " 101"]:
    """Returns precision at IoU 0.5 by recall with the detections of all classes in one ranking; see `precision_curve`. At
    least one object must count. The point of `operating_point` is on this curve: a better one would have a higher F1."""
    counted = errors.by_score[errors.of_found[errors.by_score] != LEFT_OUT]
    hits, objects = (errors.of_found[counted] == RIGHT)[None], int((errors.of_objects != LEFT_OUT).sum())
    return precision_recall.precision_curve(hits, ~hits, objects)[0][0]


def count_by_image(errors: Errors, images: int, score: float) -> Counts:
    """Returns the counts for each of `images` images, of detections with `score` or more."""
    kinds = np.where(errors.found.scores >= score, errors.of_found, LEFT_OUT)
    rows = errors.found.images[kinds == RIGHT], errors.found.images[kinds >= 0]
    right, wrong = (np.bincount(of, minlength=images) for of in rows)
    objects = np.bincount(errors.ground_truth.images[errors.of_objects != LEFT_OUT], minlength=images)
    return Counts(right, wrong, objects - right)


def best_and_worst(counts: Counts, most: int) -> tuple[list[int], list[int]]:
    """Returns up to `most` of the best and of the worst images by F1; no image is in both lists. Of equal F1 the one with
    more right is better, the one with more errors is worse. Images without objects and detections are left out."""
    f1, errors = counts.f1, counts.wrong + counts.not_found
    order = np.lexsort((-errors, counts.right, f1))
    order = order[~np.isnan(f1[order])]
    # Split in the middle, but an image of F1 0 is never among the best, nor one of F1 1 among the worst.
    middle = np.clip((len(order) + 1) // 2, (f1 == 0).sum(), len(order) - (f1 == 1).sum())
    worst, best = order[:middle], order[middle:][::-1]
    return best[:most].tolist(), worst[:most].tolist()


class Analysis:
    """Errors of a saved evaluation. Category k is `names[k]`, image i is record `records[i]` of `source`."""

    def __init__(self, file: Path, scores: dict[str, Any], data: DataConfig, categories: Sequence[Category]) -> None:
        """Analyses the detections in `file` (COCO results) of an evaluation with `scores`, on the evaluation data of `data`.

        Raises PlainError, one line: the file is missing or malformed, the data cannot be opened, or they do not fit.
        """
        if data.source == "coco" and not Path(data.val_images).is_dir() and Path(data.val_annotations).is_file():
            # The pictures alone need the images. Any folder will do: drawing reports that images are missing.
            data = replace(data, val_images=str(Path(data.val_annotations).parent))
        self.source = source = open_source(data, "val", list(categories))
        # An evaluation takes the first images of the split.
        records = {record.image_id: row for row, record in enumerate(source.records[: scores["images"]])}
        image_ids = sorted(records)
        try:
            ground_truth, detections, number = as_arrays(source.ground_truth, read_results(file), image_ids)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise EvaluationError(f"{file}: cannot be read as a list of COCO results: {error}") from None
        curves = precision_recall.coco_curves(ground_truth, detections, number)
        self.records = [records[image_id] for image_id in image_ids]
        self.names = unique_names(sorted(source.categories))
        self.errors = classify_errors(ground_truth, detections)
        # By IoU, recall and category; -1 for a category without an object.
        self.precision = curves.precision[..., 0, -1]
        now, then = float(precision_recall.coco_stats(curves)[0]), scores["AP"]
        self.note = ""
        if abs(now - (-1.0 if then is None else then)) >= 1e-6:
            self.note = (
                f"The saved detections now have AP {now:.4f}, the evaluation had {then}: the data has changed since, or "
                "the detections are of another evaluation at this step."
            )
