"""Which images went best and worst, and from which score on detections are worth showing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from retina_jax.coco_scores import Found, Truth
from retina_jax.run_page.error_breakdown import LEFT_OUT, RIGHT, Errors


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
