"""What keeps AP50 from 1, in the manner of TIDE (Bolya et al., A General Toolbox for Identifying Object Detection Errors,
ECCV 2020): every wrong detection and every truth that was not found is of exactly one kind, and each kind is worth the AP
that mending it alone would add.

Matching is pycocotools' at IoU .5, so that with nothing mended the AP is its AP50. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from retina_jax.evaluation.precision_recall import AREAS, MOST, RECALLS, Found, Truth

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(len(KINDS))
RIGHT, LEFT_OUT = -1, -2
"""Of what is no error: a detection that found its truth, a truth that was found; and of what counts neither way."""
FOREGROUND, NOTHING = 0.5, 0.1
"""IoU from which on a detection finds a truth, and up to which it lies on background."""


class Errors(NamedTuple):
    """The kind of every detection and truth: an index into KINDS, RIGHT or LEFT_OUT."""

    of_found: Int[np.ndarray, " D"]
    """Never MISSED. LEFT_OUT: took a crowd region, or is not among the 100 best of its image and category."""
    of_truth: Int[np.ndarray, " G"]
    """RIGHT, MISSED, or the kind of the detection that will find it once that one is mended: CLASSIFICATION or
    LOCALISATION. LEFT_OUT: crowd regions."""
    finds: Int[np.ndarray, " D"]
    """The truth that a detection takes (RIGHT) or will take when mended; -1: none."""
    meant: Int[np.ndarray, " D"]
    """The truth that a detection of a wrong class or place overlaps most, taken or not; -1: of any other kind."""


def sort_errors(truth: Truth, found: Found) -> Errors:
    """The kind of each error. With s the highest IoU with a truth of the detection's own category and o that with one of
    another, crowds apart, the first that holds of a detection that found nothing:

    localisation    .1 <= s < .5
    classification  o >= .5
    duplicate       s >= .5: that truth was taken by a better detection
    background      s < .1 and o <= .1
    both            .1 < o < .5: wrong class and wrong place

    Of the detections of the first two kinds that mean the same truth, which none has taken, the one of the highest score
    (of equals the first) will find it when mended; the others would be suppressed.
    """
    of_found = np.full(len(found.scores), LEFT_OUT)
    of_truth = np.full(len(truth.areas), LEFT_OUT)
    finds, meant = np.full(len(found.scores), -1), np.full(len(found.scores), -1)
    low, high = AREAS["all"]
    ignored = truth.crowds | (truth.areas < low) | (truth.areas > high)
    of_truth[~ignored] = MISSED
    found_order = np.lexsort((-found.scores, found.images))
    truth_order = np.argsort(truth.images, kind="stable")
    images = np.arange(1 + max(truth.images.max(initial=-1), found.images.max(initial=-1)))
    found_ends, truth_ends = (
        np.searchsorted(of[order], images, "right")
        for of, order in ((found.images, found_order), (truth.images, truth_order))
    )
    for d, g in zip(np.split(found_order, found_ends), np.split(truth_order, truth_ends), strict=True):
        d = d[_rank(found.categories[d]) < MOST[-1]]  # by falling score
        if not len(d):
            continue
        ious = _ious(found.boxes_xywh[d], truth.boxes_xywh[g], truth.crowds[g])
        same = found.categories[d][:, None] == truth.categories[g][None]
        took = _match(ious * same, ignored[g], truth.crowds[g])
        real = ious * ~ignored[g][None]
        own, other = real * same, real * ~same
        s, o = own.max(axis=1, initial=0), other.max(axis=1, initial=0)
        kinds = np.select(
            [
                (s >= NOTHING) & (s < FOREGROUND), o >= FOREGROUND, s >= FOREGROUND, np.maximum(s, o) <= NOTHING,
            ],
            [LOCALISATION, CLASSIFICATION, DUPLICATE, BACKGROUND],
            BOTH,
        )  # fmt: skip
        areas = found.boxes_xywh[d, 2] * found.boxes_xywh[d, 3]
        kinds[(took < 0) & ((areas < low) | (areas > high))] = LEFT_OUT
        kinds[took >= 0] = np.where(ignored[g][took[took >= 0]], LEFT_OUT, RIGHT)
        of_found[d] = kinds
        right = kinds == RIGHT
        finds[d[right]], of_truth[g[took[right]]] = g[took[right]], RIGHT
        for kind, overlaps in ((LOCALISATION, own), (CLASSIFICATION, other)):
            rows = np.flatnonzero(kinds == kind)
            meant[d[rows]] = g[overlaps[rows].argmax(axis=1)] if len(rows) else meant[d[rows]]
        for row in d[meant[d] >= 0]:
            if of_truth[meant[row]] == MISSED:
                finds[row], of_truth[meant[row]] = meant[row], of_found[row]
    return Errors(of_found, of_truth, finds, meant)


def mended_ap(
    truth: Truth, found: Found, errors: Errors, categories: int, kinds: Collection[int] = ()
) -> Float[np.ndarray, " K"]:
    """AP50 of each category were all errors of `kinds` mended; NaN where there is no truth to find.

    classification, localisation: the detection that will find its truth gets its class and box, and keeps its score; those
    that would then be second are gone. both, duplicate, background: the detection is gone. missed: the truth does not
    count. A category none of whose truths count any more has AP 1 where no detection is left, else 0.
    """
    chosen = np.isin(errors.of_found, list(kinds))
    right = (errors.of_found == RIGHT) | (chosen & (errors.finds >= 0))
    kept = right | (~chosen & (errors.of_found != LEFT_OUT))
    counted = (errors.of_truth != LEFT_OUT) & ~((errors.of_truth == MISSED) & (MISSED in kinds))
    return _class_aps(truth, found, errors, right, kept, counted, categories)


def ap_without(
    wrong: Literal["found", "missed"], truth: Truth, found: Found, errors: Errors, categories: int
) -> Float[np.ndarray, " K"]:
    """AP50 of each category without any false positive ("found": all wrong detections gone), or without any false negative
    ("missed": truths that were not found do not count)."""
    right = errors.of_found == RIGHT
    kept = right if wrong == "found" else errors.of_found != LEFT_OUT
    counted = errors.of_truth == RIGHT if wrong == "missed" else errors.of_truth != LEFT_OUT
    return _class_aps(truth, found, errors, right, kept, counted, categories)


def mean_ap(values: Float[np.ndarray, " K"]) -> float | None:
    """Mean over the categories that have a truth; None where none has."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None


def _class_aps(
    truth: Truth,
    found: Found,
    errors: Errors,
    right: Bool[np.ndarray, " D"],
    kept: Bool[np.ndarray, " D"],
    counted: Bool[np.ndarray, " G"],
    categories: int,
) -> Float[np.ndarray, " K"]:
    """AP of the detections `kept`, those that are `right` in the category of the truth they find."""
    moved = np.where(right, truth.categories[errors.finds], found.categories) if len(truth.areas) else found.categories
    order = np.lexsort((found.images, -found.scores))
    order = order[kept[order]]
    values = np.full(categories, np.nan)
    for k in np.unique(truth.categories[errors.of_truth != LEFT_OUT]):
        rows = order[moved[order] == k]
        number = int((counted & (truth.categories == k)).sum())
        values[k] = average_precision(right[rows], number) if number else float(not len(rows))
    return values


def average_precision(right: Bool[np.ndarray, " D"], truths: int) -> float:
    """COCO's AP at one IoU: the best precision at each of 101 recalls or beyond, 0 where none is reached, and their mean.

    Args:
      right: by falling score, which detections are right.
      truths: boxes to find, at least 1.
    """
    hits, misses = right.cumsum(), (~right).cumsum()
    precision = hits / (hits + misses + np.spacing(1))
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(best[np.searchsorted(hits / truths, RECALLS)].mean())


def _match(
    ious: Float[np.ndarray, "D G"], ignored: Bool[np.ndarray, " G"], crowds: Bool[np.ndarray, " G"]
) -> Int[np.ndarray, " D"]:
    """Which box each detection takes, the best detection first; -1: none. `ious` are 0 between categories.

    The free box that it overlaps most, the last of equals, from an IoU of exactly .5 on; one that is ignored only where
    there is no other, and a crowd region is never used up.
    """
    took, free = np.full(len(ious), -1), np.ones(ious.shape[1], bool)
    for row in np.flatnonzero((ious >= FOREGROUND).any(axis=1)):
        for pool in (~ignored, ignored):
            fits = np.flatnonzero(pool & free & (ious[row] >= FOREGROUND))
            if len(fits):
                took[row] = fits[::-1][ious[row, fits[::-1]].argmax()]
                free[took[row]] = crowds[took[row]]
                break
    return took


def _ious(
    found_xywh: Float[np.ndarray, "D 4"], truth_xywh: Float[np.ndarray, "G 4"], crowds: Bool[np.ndarray, " G"]
) -> Float[np.ndarray, "D G"]:
    """IoU as pycocotools has it: over the detection's own area where the truth is a crowd."""
    low = np.maximum(found_xywh[:, None, :2], truth_xywh[None, :, :2])
    high = np.minimum((found_xywh[:, :2] + found_xywh[:, 2:])[:, None], (truth_xywh[:, :2] + truth_xywh[:, 2:])[None])
    sides = high - low
    both = np.where((sides > 0).all(axis=2), sides[..., 0] * sides[..., 1], 0.0)
    found_areas, truth_areas = (boxes[:, 2] * boxes[:, 3] for boxes in (found_xywh, truth_xywh))
    over = np.where(crowds[None], found_areas[:, None], found_areas[:, None] + truth_areas[None] - both)
    return np.divide(both, over, out=np.zeros_like(both), where=both > 0)


def _rank(groups: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """How many of the same group stand before each one."""
    order = np.argsort(groups, kind="stable")
    ranks = np.empty(len(groups), int)
    ranks[order] = np.arange(len(groups)) - np.searchsorted(groups[order], groups[order])
    return ranks


# Which images went best and worst, and from which score on detections are worth showing.


class OperatingPoint(NamedTuple):
    """Where detections below `score` are dropped, all categories together, at IoU .5."""

    score: float
    precision: float
    recall: float
    f1: float


class Counts(NamedTuple):
    """Of each image: detections that are right and wrong from a score on, and truths that they leave unfound."""

    right: Int[np.ndarray, " I"]
    wrong: Int[np.ndarray, " I"]
    unfound: Int[np.ndarray, " I"]

    @property
    def f1(self) -> Float[np.ndarray, " I"]:
        """2 right / (2 right + wrong + unfound); NaN for images with nothing to find in which nothing was found."""
        both = 2 * self.right + self.wrong + self.unfound
        return np.where(both > 0, 2 * self.right / np.maximum(both, 1), np.nan)


def operating_point(found: Found, errors: Errors) -> OperatingPoint | None:
    """The score of highest F1, the highest of equals; None where no detection is right."""
    rows = np.flatnonzero(errors.of_found != LEFT_OUT)
    rows = rows[np.argsort(-found.scores[rows], kind="stable")]
    right = errors.of_found[rows] == RIGHT
    if not right.any():
        return None
    truths = int((errors.of_truth != LEFT_OUT).sum())
    hits = right.cumsum()
    f1 = 2 * hits / (np.arange(1, len(rows) + 1) + truths)
    # Detections of one score stand or fall together.
    f1[:-1][found.scores[rows][1:] == found.scores[rows][:-1]] = -1
    best = int(f1.argmax())
    return OperatingPoint(
        float(found.scores[rows[best]]), float(hits[best] / (best + 1)), float(hits[best] / truths), float(f1[best])
    )


def count_by_image(truth: Truth, found: Found, errors: Errors, images: int, score: float) -> Counts:
    """Counts of `images` images, of detections from `score` on, itself included."""
    shown = found.scores >= score

    def number(of: Int[np.ndarray, " N"]) -> Int[np.ndarray, " I"]:
        return np.bincount(of, minlength=images)

    right = number(found.images[shown & (errors.of_found == RIGHT)])
    wrong = number(found.images[shown & (errors.of_found >= 0)])
    return Counts(right, wrong, number(truth.images[errors.of_truth != LEFT_OUT]) - right)


def best_and_worst(counts: Counts, most: int) -> tuple[list[int], list[int]]:
    """Up to `most` images each, the best and the worst first, by F1; no image is in both.

    Of equal F1 the one with more right is better, the one with more wrong and unfound is worse. Images with nothing to say
    (F1 NaN) are in neither.
    """
    f1, errors = counts.f1, counts.wrong + counts.unfound
    order = np.lexsort((-errors, counts.right, f1))
    order = order[~np.isnan(f1[order])]
    # In the middle, but an image of F1 0 is never among the best, nor one of F1 1 among the worst.
    middle = np.clip((len(order) + 1) // 2, (f1 == 0).sum(), len(order) - (f1 == 1).sum())
    worst, best = order[:middle], order[middle:][::-1]
    return best[:most].tolist(), worst[:most].tolist()
