"""COCO's matching of boxes and its precision and recall, over all images and categories at once (NumPy alone).

pycocotools walks through images, categories, areas, thresholds, detections and boxes in Python. Here the overlaps of all
pairs lie in one array, without padding, and those that could never match are dropped; the r-th best detections of all
images and categories are matched together, at all thresholds and for all areas, because they cannot be in each other's way.
A hundred rounds at most remain. The arithmetic is pycocotools', operation by operation, so that the results are the same
bits; a compiler that fuses a product and a sum in its C code (on ARM) may differ in an overlap's last.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
"""Square pixels; both ends are inside, so that an area of 1024 is small and medium."""
MOST = (1, 10, 100)
"""Detections that count, of an image and category."""
PAIRS = 1 << 19
"""Pairs of a detection and a box looked at together: some 50 MiB."""


class Truth(NamedTuple):
    """Ground truth: all boxes of all images and categories, in the order of the annotations."""

    images: Int[np.ndarray, " G"]
    """Place of the box's image among the images, 0 to I - 1, which also settles the order of equal scores."""
    categories: Int[np.ndarray, " G"]
    """Place of its category, 0 to K - 1."""
    boxes_xywh: Float[np.ndarray, "G 4"]
    areas: Float[np.ndarray, " G"]
    """The annotation's area (COCO's is the object's, not the box's), for AREAS."""
    crowds: Bool[np.ndarray, " G"]


class Found(NamedTuple):
    """Detections of all images and categories; of equal scores in an image and category the first is the better."""

    images: Int[np.ndarray, " D"]
    categories: Int[np.ndarray, " D"]
    boxes_xywh: Float[np.ndarray, "D 4"]
    scores: Float[np.ndarray, " D"]


class Curves(NamedTuple):
    """What COCOeval.accumulate leaves; -1 where a category has no box of the area to find."""

    precision: Float[np.ndarray, "10 101 K 4 3"]
    """By IoU threshold, recall, category, area and number of detections: the best at this recall or beyond, 0 if none."""
    recall: Float[np.ndarray, "10 K 4 3"]
    """The highest reached."""


class _Pairs(NamedTuple):
    """Detections and boxes of one image and category that overlap enough for the lowest threshold."""

    found: Int[np.ndarray, " P"]
    """Ascending."""
    truth: Int[np.ndarray, " P"]
    ious: Float[np.ndarray, " P"]


@np.errstate(all="ignore")  # Areas that are no numbers: see the last paragraph.
def coco_curves(truth: Truth, found: Found, categories: int) -> Curves:
    """Precision and recall of `found`, equal to pycocotools' for finite input (K = categories).

    An image and category's detections beyond its 100 best do not count. At each threshold every detection, the best
    first, takes the free box of its image and category that it overlaps most, the last of equals, from an IoU of exactly
    the threshold on; a box that is to be ignored (a crowd region, or outside the area) only where there is no other. A
    crowd region is never used up, and overlap with it is over the detection's area. Detections that took an ignored box,
    or none and are themselves outside the area, count neither way.

    Two boxes whose areas are not numbers of float64 (products beyond 1e308, or below 1e-308) do not overlap here;
    pycocotools matches them whatever they are.
    """
    images = 1 + max(truth.images.max(initial=-1), found.images.max(initial=-1))
    truth = Truth(*_take(truth, np.argsort(truth.categories * images + truth.images, kind="stable")))
    found = Found(*_take(found, np.lexsort((-found.scores, found.categories * images + found.images))))
    groups = found.categories * images + found.images
    ranks = _places(groups)
    kept = np.flatnonzero(ranks < MOST[-1])
    found, groups, ranks = Found(*_take(found, kept)), groups[kept], ranks[kept]

    areas = found.boxes_xywh[:, 2] * found.boxes_xywh[:, 3]
    ignored = truth.crowds[None] | _outside(truth.areas)
    pairs = _pairs(truth, found, truth.categories * images + truth.images, groups)
    hits, misses = _match(pairs, groups, ignored, truth.crowds, _outside(areas))

    # The detections of all images by category, the best first; of equal scores those of the earlier image.
    order = np.lexsort((-found.scores, found.categories))
    hits, misses, ranks = hits[..., order], misses[..., order], ranks[order]
    bounds = np.searchsorted(found.categories[order], np.arange(categories + 1))
    shape = (categories, len(AREAS), len(MOST))
    precision = np.full((len(IOU_THRESHOLDS), len(RECALLS), *shape), -1.0)
    recall = np.full((len(IOU_THRESHOLDS), *shape), -1.0)
    for a, left_out in enumerate(ignored):
        boxes = np.bincount(truth.categories[~left_out], minlength=categories)
        for k in np.flatnonzero(boxes):
            own = slice(bounds[k], bounds[k + 1])
            for m, most in enumerate(MOST):
                counted = ranks[own] < most
                of_class = [array[a, :, own] for array in (hits, misses)]
                if not counted.all():
                    of_class = [array[:, counted] for array in of_class]
                precision[:, :, k, a, m], recall[:, k, a, m] = _curve(*of_class, int(boxes[k]))
    return Curves(precision, recall)


def coco_stats(curves: Curves) -> Float[np.ndarray, " 12"]:
    """COCO's twelve numbers, in pycocotools' order, -1 where there is nothing to find: AP, at IoU .5, at .75, of small,
    medium and large boxes; recall with 1, 10 and 100 detections, and of small, medium and large boxes."""

    def mean(values: Float[np.ndarray, " *N"]) -> float:
        defined = values[values > -1]
        return defined.mean() if defined.size else -1.0

    precision, recall = curves
    at_50, at_75 = (np.flatnonzero(iou == IOU_THRESHOLDS)[0] for iou in (0.5, 0.75))
    by_iou = [mean(precision[..., 0, -1]), *(mean(precision[t, ..., 0, -1]) for t in (at_50, at_75))]
    by_size = [[mean(array[..., a, -1]) for a in (1, 2, 3)] for array in curves]
    return np.array([*by_iou, *by_size[0], *(mean(recall[..., 0, m]) for m in range(len(MOST))), *by_size[1]])


def _take(columns: tuple[np.ndarray, ...], rows: Int[np.ndarray, " N"]) -> Iterator[np.ndarray]:
    return (column[rows] for column in columns)


def _places(groups: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Each one's place in its group, from 0; groups are ascending."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


def _outside(areas: Float[np.ndarray, " N"]) -> Bool[np.ndarray, "4 N"]:
    low, high = np.array(list(AREAS.values())).T[:, :, None]
    return (areas[None] < low) | (areas[None] > high)


def _spans(sizes: Int[np.ndarray, " N"], most: int) -> Iterator[slice]:
    """Neighbours in spans of at most `most` together; one that is larger is alone."""
    ends, start, before = sizes.cumsum(), 0, 0
    while start < len(sizes):
        stop = max(start + 1, int(np.searchsorted(ends, before + most, "right")))
        yield slice(start, stop)
        start, before = stop, ends[stop - 1]


def _pairs(
    truth: Truth, found: Found, truth_groups: Int[np.ndarray, " G"], found_groups: Int[np.ndarray, " D"]
) -> _Pairs:
    """The pairs that could match. Time is linear in the pairs of one image and category; memory in those that overlap."""
    first = np.searchsorted(truth_groups, found_groups)
    numbers = np.searchsorted(truth_groups, found_groups, "right") - first
    ends_d, ends_g = (boxes[:, :2] + boxes[:, 2:] for boxes in (found.boxes_xywh, truth.boxes_xywh))
    areas_d, areas_g = (boxes[:, 2] * boxes[:, 3] for boxes in (found.boxes_xywh, truth.boxes_xywh))
    parts = [_Pairs(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for span in _spans(numbers, PAIRS):
        number = numbers[span]
        d = np.repeat(np.arange(span.start, span.stop), number)
        g = np.arange(len(d)) - np.repeat(number.cumsum() - number, number) + first[d]
        low = np.maximum(found.boxes_xywh[d, :2], truth.boxes_xywh[g, :2])
        sides = np.minimum(ends_d[d], ends_g[g]) - low
        touching = np.flatnonzero((sides > 0).all(axis=1))
        d, g, sides = d[touching], g[touching], sides[touching]
        both = sides[:, 0] * sides[:, 1]
        ious = both / np.where(truth.crowds[g], areas_d[d], areas_d[d] + areas_g[g] - both)
        near = ious >= IOU_THRESHOLDS[0]
        parts.append(_Pairs(d[near], g[near], ious[near]))
    return _Pairs(*map(np.concatenate, zip(*parts, strict=True)))


def _match(
    pairs: _Pairs,
    groups: Int[np.ndarray, " D"],
    ignored: Bool[np.ndarray, "4 G"],
    crowds: Bool[np.ndarray, " G"],
    outside: Bool[np.ndarray, "4 D"],
) -> tuple[Bool[np.ndarray, "4 10 D"], Bool[np.ndarray, "4 10 D"]]:
    """Which detections are right and which are wrong, by area and threshold; what counts neither way is in none."""
    hits = np.zeros((len(AREAS), len(IOU_THRESHOLDS), len(groups)), bool)
    misses = np.repeat(~outside[:, None], len(IOU_THRESHOLDS), axis=1)
    taken = np.zeros((len(AREAS), len(IOU_THRESHOLDS), len(crowds)), bool)

    detections, segment = np.unique(pairs.found, return_inverse=True)
    turns = _places(groups[detections])
    # Pairs in the order of the walk: the detection's turn, the detection, and which box it would rather have.
    order = np.lexsort((-pairs.truth, -pairs.ious, segment, turns[segment]))
    walk = np.argsort(turns, kind="stable")
    detections, sizes = detections[walk], np.bincount(segment, minlength=len(walk))[walk]
    starts = np.concatenate([[0], sizes.cumsum()])
    segment = np.repeat(np.arange(len(walk)), sizes)
    by_area = [order[np.argsort(2 * segment + later[pairs.truth[order]], kind="stable")] for later in ignored]
    truth, ious = (array[np.stack(by_area)] for array in (pairs.truth, pairs.ious))

    area, level = np.arange(len(AREAS))[:, None, None], np.arange(len(IOU_THRESHOLDS))[None, :, None]
    rounds = np.searchsorted(turns[walk], np.arange(turns.max(initial=-1) + 2))
    for first, last in pairwise(rounds):
        for span in _spans(sizes[first:last], PAIRS // (len(AREAS) * len(IOU_THRESHOLDS))):
            own = slice(first + span.start, first + span.stop)
            here = slice(starts[own.start], starts[own.stop])
            box, iou = truth[:, None, here], ious[:, None, here]
            fits = ~taken[area, level, box] & (iou >= IOU_THRESHOLDS[None, :, None])
            nowhere = here.stop - here.start
            place = np.where(fits, np.arange(nowhere)[None, None], nowhere)
            best = np.minimum.reduceat(place, starts[own] - here.start, axis=2)
            a, t, d = np.nonzero(best < nowhere)
            chosen = truth[a, here.start + best[a, t, d]]
            taken[a, t, chosen] = ~crowds[chosen]
            hits[a, t, detections[own][d]] = ~ignored[a, chosen]
            misses[a, t, detections[own][d]] = False
    return hits, misses


def _curve(
    hits: Bool[np.ndarray, "10 D"], misses: Bool[np.ndarray, "10 D"], boxes: int
) -> tuple[Float[np.ndarray, "10 101"], Float[np.ndarray, " 10"]]:
    """Precision at RECALLS, and the highest recall, of detections in order of their scores.

    Both change for the better at hits alone, so that only the curve's points there are made.
    """
    level, at = np.nonzero(hits)
    numbers = np.bincount(level, minlength=len(hits))
    right = np.arange(len(level)) - np.repeat(numbers.cumsum() - numbers, numbers) + 1
    wrong = misses.cumsum(axis=1, dtype=np.int32)[level, at]
    most = int(numbers.max(initial=0))
    precision = np.zeros((len(hits), most + 1))  # The last column stays 0: a recall that nobody reaches.
    precision[level, right - 1] = right / (wrong + right + np.spacing(1))
    best_beyond = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(np.arange(1, most + 1) / boxes, RECALLS)
    return best_beyond[:, reached], numbers / boxes
