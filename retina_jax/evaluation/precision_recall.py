"""COCO's matching of detections with ground truth, and its precision and recall, for all images and categories at once.

pycocotools loops over images, categories, areas, thresholds, detections and boxes in Python. Here the overlaps of all pairs
are one array without padding. The r-th best detections of all images and categories are matched together, at all thresholds
and areas, because they never compete for a box. The arithmetic is pycocotools', so the results are equal to the last bit
(except where a compiler fuses its products and sums, as on ARM).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
IOU_INDEX = {"0.50": 0, "0.75": 5}  # places of these thresholds in IOU_THRESHOLDS
# Square pixels; both ends are included, so an area of 1024 is small and medium.
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
MAX_DETECTIONS = (1, 10, 100)  # detections that count, per image and category
PAIRS = 1 << 19  # pairs of a detection and a box processed together: about 50 MiB


class GroundTruth(NamedTuple):
    """G boxes of all images and categories, in the order of the annotations. Images are 0 to I - 1 (which decides the order
    of equal scores), categories 0 to K - 1."""

    images: Int[np.ndarray, " G"]
    categories: Int[np.ndarray, " G"]
    boxes_xywh: Float[np.ndarray, "G 4"]
    areas: Float[np.ndarray, " G"]  # as annotated (in COCO that of the object's outline, not of the box)
    crowds: Bool[np.ndarray, " G"]


class DetectedBoxes(NamedTuple):
    """D detections of all images and categories; of equal scores in an image and category the first is the better."""

    images: Int[np.ndarray, " D"]
    categories: Int[np.ndarray, " D"]
    boxes_xywh: Float[np.ndarray, "D 4"]
    scores: Float[np.ndarray, " D"]


def most_objects(ground_truth: GroundTruth) -> int:
    """Returns the largest number of objects of a category in an image, crowds left out."""
    groups = np.stack([ground_truth.images, ground_truth.categories])[:, ~ground_truth.crowds]
    return int(np.unique(groups, axis=1, return_counts=True)[1].max(initial=0))


def detection_limit(ground_truth: GroundTruth, found: DetectedBoxes) -> int:
    """Returns how many detections of a category in an image are judged: COCO's 100, or all if there are more objects."""
    coco = MAX_DETECTIONS[-1]
    return coco if most_objects(ground_truth) <= coco else max(coco, len(found.scores))


class Pairs(NamedTuple):
    """Overlapping pairs of a detection and a ground-truth box, by ascending detection."""

    detections: Int[np.ndarray, " P"]
    boxes: Int[np.ndarray, " P"]
    ious: Float[np.ndarray, " P"]


class CocoMatches(NamedTuple):
    """Boxes that the detections take, for A areas and T IoU thresholds."""

    detections: Int[np.ndarray, " N"]  # the best of each category and image, by category, image, descending score
    ranks: Int[np.ndarray, " N"]  # rank of each in its category and image, from 0
    takers: Int[np.ndarray, " P"]  # the detections (indices into N) that overlap a box at all
    taken: Int[np.ndarray, "A T P"]  # index of the box that each takes; -1 where there is none
    # Crowd regions and boxes outside the area: no object to find, and a detection that takes one counts neither way.
    ignored_boxes: Bool[np.ndarray, "A G"]
    outside: Bool[np.ndarray, "A N"]  # detections whose own area is outside: without a box they do not count as wrong

    def right_and_wrong(self, area: int) -> tuple[Bool[np.ndarray, "T N"], Bool[np.ndarray, "T N"]]:
        """Returns by threshold which detections take an object, and which take no box and count as wrong."""
        taken, shape = self.taken[area], (self.taken.shape[1], len(self.ranks))
        right, free = np.zeros(shape, bool), np.ones(shape, bool)
        right[:, self.takers] = ~np.append(self.ignored_boxes[area], True)[taken]  # index -1 is the one appended
        free[:, self.takers] = taken < 0
        return right, free & ~self.outside[area]


class Curves(NamedTuple):
    """Precision by IoU threshold, recall, category, area and number of detections; -1 for a category without a box."""

    precision: Float[np.ndarray, "10 101 K 4 M"]  # the highest at this recall or above, 0 if none
    recall: Float[np.ndarray, "10 K 4 M"]  # the highest reached


def coco_curves(
    ground_truth: GroundTruth,
    found: DetectedBoxes,
    categories: int,
    limits: tuple[int, ...] = MAX_DETECTIONS,
) -> Curves:
    """Returns precision and recall of `found`, equal to pycocotools' for finite input (K = categories). See `coco_match`.
    The ascending `limits`, numbers of detections that count per image and category, are the last axis."""
    matches = coco_match(ground_truth, found, most=limits[-1])
    scores, of_category = found.scores[matches.detections], found.categories[matches.detections]
    # The detections of all images by category, the best first; of equal scores those of the earlier image.
    order = np.lexsort((-scores, of_category))
    ranks = matches.ranks[order]
    bounds = np.searchsorted(of_category[order], np.arange(categories + 1))
    shape = (categories, len(AREAS), len(limits))
    precision = np.full((len(IOU_THRESHOLDS), len(RECALLS), *shape), -1.0)
    recall = np.full((len(IOU_THRESHOLDS), *shape), -1.0)
    for a, ignored in enumerate(matches.ignored_boxes):
        objects = np.bincount(ground_truth.categories[~ignored], minlength=categories)
        hits, misses = (which[:, order] for which in matches.right_and_wrong(a))
        for k in np.flatnonzero(objects):
            of_class = slice(bounds[k], bounds[k + 1])
            for m, most in enumerate(limits):
                counted = ranks[of_class] < most
                right, wrong = hits[:, of_class][:, counted], misses[:, of_class][:, counted]
                precision[:, :, k, a, m], recall[:, k, a, m] = precision_curve(right, wrong, int(objects[k]))
    return Curves(precision, recall)


def mean(values: Float[np.ndarray, " *N"]) -> float:
    """Returns the mean of the values that are defined (not -1); -1 if there are none."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def coco_stats(curves: Curves) -> Float[np.ndarray, " 12"]:
    """Returns COCO's twelve scores in pycocotools' order, -1 where there is nothing to find: AP, AP at IoU 0.5 and 0.75, AP
    of small, medium and large boxes; recall with 1, 10 and 100 detections, and of small, medium and large boxes."""
    precision, recall = curves
    by_iou = [mean(precision[..., 0, -1]), *(mean(precision[t, ..., 0, -1]) for t in IOU_INDEX.values())]
    by_size = [[mean(array[..., a, -1]) for a in (1, 2, 3)] for array in curves]
    recalls = (mean(recall[..., 0, m]) for m in range(len(MAX_DETECTIONS)))
    return np.array([*by_iou, *by_size[0], *recalls, *by_size[1]])


class OperatingPoint(NamedTuple):
    """Precision and recall at IoU 0.5 over all categories together if detections below `score` are dropped."""

    score: float
    precision: float
    recall: float
    f1: float


def best_f1(scores: Float[np.ndarray, " N"], right: Bool[np.ndarray, " N"], objects: int) -> OperatingPoint | None:
    """Returns the score with the highest F1 (of equals the highest score) of detections, `right` or not, of `objects`
    objects; None if no detection is right."""
    if not right.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], right[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + objects)
    f1[:-1][scores[1:] == scores[:-1]] = -1  # detections of one score are dropped or kept together
    best = int(f1.argmax())
    return OperatingPoint(*map(float, (scores[best], hits[best] / (best + 1), hits[best] / objects, f1[best])))


def coco_operating_point(ground_truth: GroundTruth, found: DetectedBoxes) -> OperatingPoint | None:
    """Returns `best_f1` at IoU 0.5, with `detection_limit`. Detections that take a crowd region do not count."""
    limit = detection_limit(ground_truth, found)
    matches = coco_match(ground_truth, found, IOU_THRESHOLDS[:1], {"all": AREAS["all"]}, limit)
    right, wrong = (which[0] for which in matches.right_and_wrong(0))
    counted = (right & ~matches.outside[0]) | wrong
    return best_f1(found.scores[matches.detections[counted]], right[counted], int((~matches.ignored_boxes).sum()))


@np.errstate(all="ignore")  # areas that are not finite, see the last sentence
def coco_match(
    ground_truth: GroundTruth,
    found: DetectedBoxes,
    thresholds: Float[np.ndarray, " T"] = IOU_THRESHOLDS,
    areas: Mapping[str, tuple[float, float]] = AREAS,
    most: int = MAX_DETECTIONS[-1],
) -> CocoMatches:
    """Matches detections with ground-truth boxes as pycocotools does, for each threshold (ascending) and area.

    Per image and category the `most` best detections count. Each, the best first, takes the free box that it overlaps most
    (the last of equals) with an IoU of the threshold or more, exactly the threshold included. It takes an ignored box (a
    crowd region, or a box outside the area) only if no other fits. A crowd region stays free, and the IoU with it is the
    overlap over the detection's own area. Two boxes whose areas are not finite or are denormal in float64 (products beyond
    1e308, or below 1e-308) do not overlap here; pycocotools matches them always.
    """
    images = 1 + max(ground_truth.images.max(initial=-1), found.images.max(initial=-1))
    box_groups, groups = (boxes.categories * images + boxes.images for boxes in (ground_truth, found))
    order = np.lexsort((-found.scores, groups))
    ranks = np.arange(len(order)) - np.searchsorted(groups[order], groups[order])
    kept, ranks = order[ranks < most], ranks[ranks < most]
    found = DetectedBoxes(*(column[kept] for column in found))
    ignored = ground_truth.crowds[None] | _outside(ground_truth.areas, areas)
    pairs = overlapping(ground_truth, found.boxes_xywh, box_groups, groups[kept], float(thresholds[0]))
    takers, taken = _take_boxes(pairs, ranks, ignored, ground_truth.crowds, thresholds)
    outside = _outside(found.boxes_xywh[:, 2] * found.boxes_xywh[:, 3], areas)
    return CocoMatches(kept, ranks, takers, taken, ignored, outside)


def _outside(values: Float[np.ndarray, " N"], areas: Mapping[str, tuple[float, float]]) -> Bool[np.ndarray, "A N"]:
    low, high = np.array(list(areas.values())).T[:, :, None]
    return (values[None] < low) | (values[None] > high)


def _spans(sizes: Int[np.ndarray, " N"], most: int) -> Iterator[slice]:
    """Yields spans of consecutive elements whose sizes sum to at most `most`; a larger element is alone."""
    ends, start, before = sizes.cumsum(), 0, 0
    while start < len(sizes):
        stop = max(start + 1, int(np.searchsorted(ends, before + most, "right")))
        yield slice(start, stop)
        start, before = stop, ends[stop - 1]


@np.errstate(all="ignore")
def overlapping(
    ground_truth: GroundTruth,
    boxes_xywh: Float[np.ndarray, "D 4"],
    box_groups: Int[np.ndarray, " G"],
    groups: Int[np.ndarray, " D"],
    least_iou: float,
) -> Pairs:
    """Returns the pairs of one group with an IoU of `least_iou` or more (over the detection's area if the box is a crowd
    region). Time is linear in the pairs of one group, memory in the pairs returned."""
    order = np.argsort(box_groups, kind="stable")
    first = np.searchsorted(box_groups[order], groups)
    numbers = np.searchsorted(box_groups[order], groups, "right") - first
    # Columns of numbers are gathered several times faster than rows of two.
    (left_d, top_d, right_d, bottom_d), (left_g, top_g, right_g, bottom_g) = (
        np.ascontiguousarray(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).T)
        for boxes in (boxes_xywh, ground_truth.boxes_xywh)
    )
    areas_d, areas_g = (boxes[:, 2] * boxes[:, 3] for boxes in (boxes_xywh, ground_truth.boxes_xywh))
    parts = [Pairs(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for span in _spans(numbers, PAIRS):
        number = numbers[span]
        d = np.repeat(np.arange(span.start, span.stop), number)
        g = order[np.arange(len(d)) - np.repeat(number.cumsum() - number, number) + first[d]]
        width = np.minimum(right_d[d], right_g[g]) - np.maximum(left_d[d], left_g[g])
        touching = np.flatnonzero(width > 0)
        d, g, width = d[touching], g[touching], width[touching]
        height = np.minimum(bottom_d[d], bottom_g[g]) - np.maximum(top_d[d], top_g[g])
        touching = np.flatnonzero(height > 0)
        d, g, both = d[touching], g[touching], width[touching] * height[touching]
        ious = both / np.where(ground_truth.crowds[g], areas_d[d], areas_d[d] + areas_g[g] - both)
        near = ious >= least_iou
        parts.append(Pairs(d[near], g[near], ious[near]))
    return Pairs(*map(np.concatenate, zip(*parts, strict=True)))


def _take_boxes(
    pairs: Pairs,
    ranks: Int[np.ndarray, " N"],
    ignored: Bool[np.ndarray, "A G"],
    crowds: Bool[np.ndarray, " G"],
    thresholds: Float[np.ndarray, " T"],
) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, "A T P"]]:
    """Returns the detections of the pairs and the box that each takes by area and threshold, -1: none. `pairs` are those
    of an IoU of the lowest threshold or more. Detections of one rank are of different images or categories, and choose
    together."""
    taken = np.zeros((len(ignored), len(thresholds), len(crowds)), bool)
    detections, segment = np.unique(pairs.detections, return_inverse=True)
    turns = ranks[detections]
    # The pairs by the rank of their detection, then by detection, then by its preference: largest IoU, last of equals.
    order = np.lexsort((-pairs.boxes, -pairs.ious, segment, turns[segment]))
    walk = np.argsort(turns, kind="stable")
    detections, sizes = detections[walk], np.bincount(segment, minlength=len(walk))[walk]
    boxes = np.full((len(ignored), len(thresholds), len(walk)), -1, np.int32)
    starts = np.concatenate([[0], sizes.cumsum()])
    segment = np.repeat(np.arange(len(walk)), sizes)
    # For each area, boxes that are not ignored come first.
    by_area = [order[np.argsort(2 * segment + later[pairs.boxes[order]], kind="stable")] for later in ignored]
    preferred, ious = (array[np.stack(by_area)] for array in (pairs.boxes, pairs.ious))

    area, level = np.arange(len(ignored))[:, None, None], np.arange(len(thresholds))[None, :, None]
    rounds = np.searchsorted(turns[walk], np.arange(turns.max(initial=-1) + 2))
    for first, last in pairwise(rounds):
        for span in _spans(sizes[first:last], PAIRS // (len(ignored) * len(thresholds))):
            own = slice(first + span.start, first + span.stop)
            here = slice(starts[own.start], starts[own.stop])
            # The first pair of each detection whose box is free and whose IoU reaches the threshold, by area and threshold.
            box, iou = preferred[:, None, here], ious[:, None, here]
            fits = ~taken[area, level, box] & (iou >= thresholds[None, :, None])
            nowhere = here.stop - here.start
            place = np.where(fits, np.arange(nowhere)[None, None], nowhere)
            best = np.minimum.reduceat(place, starts[own] - here.start, axis=2)
            a, t, d = np.nonzero(best < nowhere)
            chosen = preferred[a, here.start + best[a, t, d]]
            taken[a, t, chosen] = ~crowds[chosen]
            boxes[a, t, own.start + d] = chosen
    return detections, boxes


def precision_curve(
    hits: Bool[np.ndarray, "T D"], misses: Bool[np.ndarray, "T D"], objects: int
) -> tuple[Float[np.ndarray, "T 101"], Float[np.ndarray, " T"]]:
    """Returns precision at RECALLS, each the highest at this recall or above (0 if none), and the highest recall. `hits` and
    `misses` are the right and wrong detections by descending score, `objects` is the number of boxes to find, at least 1."""
    # Recall and precision rise at hits alone, so only these points of the curve are computed.
    level, at = np.nonzero(hits)
    numbers = np.bincount(level, minlength=len(hits))
    right = np.arange(len(level)) - np.repeat(numbers.cumsum() - numbers, numbers) + 1
    wrong = misses.cumsum(axis=1, dtype=np.int32)[level, at]
    most = int(numbers.max(initial=0))
    precision = np.zeros((len(hits), most + 1))  # the last column stays 0: a recall that is not reached
    precision[level, right - 1] = right / (wrong + right + np.spacing(1))
    best_beyond = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(np.arange(1, most + 1) / objects, RECALLS)
    return best_beyond[:, reached], numbers / objects
