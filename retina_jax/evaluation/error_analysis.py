"""What keeps AP50 from 1, after TIDE (Bolya et al., A General Toolbox for Identifying Object Detection Errors, ECCV 2020).

Every wrong detection and every object that was not found is of exactly one kind. Each kind has a gain: the AP50 that would
be added if its errors alone were fixed. Matching is COCO's at IoU 0.5 (`precision_recall.coco_match`), so with nothing fixed
the AP is pycocotools' AP50.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from retina_jax.config import DataConfig
from retina_jax.data.classes import Category, unique_names
from retina_jax.data.datasets import open_source
from retina_jax.data.source import Source
from retina_jax.evaluation import precision_recall
from retina_jax.evaluation.coco_scores import EvaluationError, as_arrays, check_inputs
from retina_jax.evaluation.precision_recall import AREAS, DetectedBoxes, GroundTruth, Pairs, coco_match, precision_curve

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(len(KINDS))
RIGHT, LEFT_OUT = -1, -2  # a detection that found its object, or an object that was found; what counts neither way
FOREGROUND, NOTHING = 0.5, 0.1  # IoU from which a detection finds an object, and up to which it is on background
RESULT_KEYS = {"image_id", "category_id", "bbox", "score"}  # keys of a detection in COCO's results format


class Errors(NamedTuple):
    """D detections, G objects, and the kind of each: an index into KINDS, RIGHT or LEFT_OUT."""

    truth: GroundTruth
    found: DetectedBoxes
    # Never MISSED. LEFT_OUT: took a crowd region, or is not among the 100 best of its image and category.
    of_found: Int[np.ndarray, " D"]
    # RIGHT, MISSED, CLASSIFICATION or LOCALISATION (of the detection that finds it once fixed); LEFT_OUT: crowd regions.
    of_truth: Int[np.ndarray, " G"]
    finds: Int[np.ndarray, " D"]  # the object that a detection finds (RIGHT), or finds once it is fixed; -1: none
    target: Int[np.ndarray, " D"]  # the object that one of wrong class or place overlaps most; -1: of any other kind


def classify_errors(truth: GroundTruth, found: DetectedBoxes) -> Errors:
    """The kind of each error. For a detection that found nothing, let s be its highest IoU with an object of its category
    and o that with one of another, crowds left out. The first that holds is its kind:

    localisation    0.1 <= s < 0.5
    classification  o >= 0.5
    duplicate       s >= 0.5: a better detection found that object
    background      s < 0.1 and o <= 0.1
    both            0.1 < o < 0.5: wrong class and wrong place

    If several detections of the first two kinds have the same target and none has found it, the one with the highest score
    (of equals the first) finds it once it is fixed; the others would be suppressed.
    """
    matches = coco_match(truth, found, np.array([FOREGROUND]), {"all": AREAS["all"]})
    rows, took, ignored = matches.detections, matches.boxes[0, 0], matches.ignored_boxes[0]
    pairs = precision_recall.overlapping(truth, found.boxes_xywh[rows], truth.images, found.images[rows], NOTHING)
    same = found.categories[rows][pairs.detections] == truth.categories[pairs.boxes]
    (s, own), (o, other) = (_best(pairs, of & ~ignored[pairs.boxes], len(rows)) for of in (same, ~same))
    conditions = (s >= NOTHING) & (s < FOREGROUND), o >= FOREGROUND, s >= FOREGROUND, np.maximum(s, o) <= NOTHING
    kinds = np.select(conditions, (LOCALISATION, CLASSIFICATION, DUPLICATE, BACKGROUND), BOTH)
    kinds[matches.outside[0]] = LEFT_OUT
    kinds[took >= 0] = np.where(ignored[took[took >= 0]], LEFT_OUT, RIGHT)

    of_found, of_truth = np.full(len(found.scores), LEFT_OUT), np.where(ignored, LEFT_OUT, MISSED)
    finds, target = np.full(len(found.scores), -1), np.full(len(found.scores), -1)
    of_found[rows] = kinds
    target[rows] = np.select((kinds == LOCALISATION, kinds == CLASSIFICATION), (own, other), -1)
    right = kinds == RIGHT
    finds[rows[right]], of_truth[took[right]] = took[right], RIGHT
    candidates = np.argsort(-found.scores, kind="stable")
    candidates = candidates[target[candidates] >= 0]
    candidates = candidates[of_truth[target[candidates]] == MISSED]
    objects, first = np.unique(target[candidates], return_index=True)
    finds[candidates[first]], of_truth[objects] = objects, of_found[candidates[first]]
    return Errors(truth, found, of_found, of_truth, finds, target)


def _best(
    pairs: Pairs, chosen: Bool[np.ndarray, " P"], detections: int
) -> tuple[Float[np.ndarray, " D"], Int[np.ndarray, " D"]]:
    """The highest IoU of each detection in the chosen pairs, and the box (of equals the first); 0 and -1 without a pair."""
    ious, boxes = np.zeros(detections), np.full(detections, -1)
    of, box, iou = (column[chosen] for column in pairs)
    order = np.lexsort((box, -iou, of))
    rows, first = np.unique(of[order], return_index=True)
    ious[rows], boxes[rows] = iou[order][first], box[order][first]
    return ious, boxes


def fixed_ap(errors: Errors, categories: int, kinds: Collection[int] = ()) -> Float[np.ndarray, " K"]:
    """AP50 of each category if all errors of `kinds` were fixed; NaN where there is no object to find.

    classification, localisation: the detection that then finds its object gets its class and box and keeps its score; the
    others with this target are removed. both, duplicate, background: the detection is removed. missed: the object does not
    count. A category without any counted object has AP 1 if no detection is left, else 0.
    """
    chosen = np.isin(errors.of_found, list(kinds))
    right = (errors.of_found == RIGHT) | (chosen & (errors.finds >= 0))
    kept = right | (~chosen & (errors.of_found != LEFT_OUT))
    counted = (errors.of_truth != LEFT_OUT) & ~((errors.of_truth == MISSED) & (MISSED in kinds))
    return _class_aps(errors, categories, right, kept, counted)


def ap_without(wrong: Literal["found", "missed"], errors: Errors, categories: int) -> Float[np.ndarray, " K"]:
    """AP50 of each category without any false positive ("found": all wrong detections removed), or without any false
    negative ("missed": objects that were not found do not count)."""
    right = errors.of_found == RIGHT
    kept = right if wrong == "found" else errors.of_found != LEFT_OUT
    counted = errors.of_truth == RIGHT if wrong == "missed" else errors.of_truth != LEFT_OUT
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
    """AP of the detections `kept`, those that are `right` in the category of the object they find."""
    found, of_truth = errors.found, errors.truth.categories
    moved = np.where(right, of_truth[errors.finds], found.categories) if len(of_truth) else found.categories
    order = np.lexsort((found.images, -found.scores))
    order = order[kept[order]]
    values = np.full(categories, np.nan)
    for k in np.unique(of_truth[errors.of_truth != LEFT_OUT]):
        hits = right[order[moved[order] == k]]
        objects = int((counted & (of_truth == k)).sum())
        # COCO's AP at one IoU is the mean precision at 101 recalls.
        values[k] = precision_curve(hits[None], ~hits[None], objects)[0].mean() if objects else float(not len(hits))
    return values


class OperatingPoint(NamedTuple):
    """Precision and recall at IoU 0.5 over all categories together if detections below `score` are dropped."""

    score: float
    precision: float
    recall: float
    f1: float


class Counts(NamedTuple):
    """Per image: right and wrong detections from a score on, and objects that they do not find."""

    right: Int[np.ndarray, " I"]
    wrong: Int[np.ndarray, " I"]
    not_found: Int[np.ndarray, " I"]

    @property
    def f1(self) -> Float[np.ndarray, " I"]:
        """2 right / (2 right + wrong + not found); NaN for images without objects and detections."""
        both = 2 * self.right + self.wrong + self.not_found
        return np.where(both > 0, 2 * self.right / np.maximum(both, 1), np.nan)


def operating_point(errors: Errors) -> OperatingPoint | None:
    """The score with the highest F1 (of equals the highest score); None if no detection is right."""
    rows = np.flatnonzero(errors.of_found != LEFT_OUT)
    rows = rows[np.argsort(-errors.found.scores[rows], kind="stable")]
    scores, right = errors.found.scores[rows], errors.of_found[rows] == RIGHT
    if not right.any():
        return None
    objects, hits = int((errors.of_truth != LEFT_OUT).sum()), right.cumsum()
    f1 = 2 * hits / (np.arange(1, len(rows) + 1) + objects)
    f1[:-1][scores[1:] == scores[:-1]] = -1  # detections of one score are dropped or kept together
    best = int(f1.argmax())
    values = scores[best], hits[best] / (best + 1), hits[best] / objects, f1[best]
    return OperatingPoint(*map(float, values))


def count_by_image(errors: Errors, images: int, score: float) -> Counts:
    """Counts for each of `images` images, of detections with `score` or more."""
    shown = errors.found.scores >= score
    right, wrong = shown & (errors.of_found == RIGHT), shown & (errors.of_found >= 0)
    rows = errors.found.images[right], errors.found.images[wrong], errors.truth.images[errors.of_truth != LEFT_OUT]
    right, wrong, objects = (np.bincount(of, minlength=images) for of in rows)
    return Counts(right, wrong, objects - right)


def best_and_worst(counts: Counts, most: int) -> tuple[list[int], list[int]]:
    """Up to `most` images each, the best and the worst first, by F1; no image is in both lists. Of equal F1 the one with
    more right is better, the one with more errors is worse. Images without objects and detections are left out."""
    f1, errors = counts.f1, counts.wrong + counts.not_found
    order = np.lexsort((-errors, counts.right, f1))
    order = order[~np.isnan(f1[order])]
    # Split in the middle, but an image of F1 0 is never among the best, nor one of F1 1 among the worst.
    middle = np.clip((len(order) + 1) // 2, (f1 == 0).sum(), len(order) - (f1 == 1).sum())
    worst, best = order[:middle], order[middle:][::-1]
    return best[:most].tolist(), worst[:most].tolist()


class Analysis(NamedTuple):
    """A saved evaluation with its errors. Category k is `names[k]`, image i is record `records[i]` of the source."""

    source: Source
    names: tuple[str, ...]
    errors: Errors
    precision: Float[np.ndarray, "10 101 K"]  # by IoU, recall and category; -1 where a category has no object
    records: tuple[int, ...]
    note: str  # why the AP computed now may differ from that of the evaluation; empty if it does not


def analyse(file: Path, scores: dict[str, Any], data: DataConfig, categories: Sequence[Category]) -> Analysis:
    """Analyses the detections in `file` (COCO results) of an evaluation with `scores`, on the evaluation data of `data`.

    Raises PlainError, one line: the file is missing or malformed, the data cannot be opened, or they do not fit each other.
    """
    try:
        detections = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{file}: cannot be read: {error}") from None
    if not isinstance(detections, list) or not all(isinstance(d, dict) and d.keys() >= RESULT_KEYS for d in detections):
        raise EvaluationError(f"{file}: must be a list of COCO results ({', '.join(sorted(RESULT_KEYS))})")
    if data.source == "coco" and not Path(data.val_images).is_dir() and Path(data.val_annotations).is_file():
        # The ground truth is enough for all but the pictures. Any folder will do: drawing reports that images are missing.
        data = replace(data, val_images=str(Path(data.val_annotations).parent))
    source = open_source(data, "val", list(categories))
    # An evaluation takes the first images of the split.
    records = {source.records[row].image_id: row for row in range(min(scores["images"], len(source)))}
    image_ids = sorted(records)
    check_inputs(source.truth, detections, image_ids, None)
    truth, found, number = as_arrays(source.truth, detections, image_ids)
    curves = precision_recall.coco_curves(truth, found, number)
    now, then = float(precision_recall.coco_stats(curves)[0]), scores["AP"]
    note = ""
    if abs(now - (-1.0 if then is None else then)) >= 1e-6:
        note = (
            f"The saved detections now have AP {now:.4f}, the evaluation had {then}: the data has changed since, or the "
            "detections are of another evaluation at this step."
        )
    return Analysis(
        source,
        unique_names(sorted(source.categories)),
        classify_errors(truth, found),
        curves.precision[..., 0, -1],
        tuple(records[image_id] for image_id in image_ids),
        note,
    )
