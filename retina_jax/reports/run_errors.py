"""The part of a run's page on its newest evaluation: precision and recall, confusions, kinds of error, images."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from retina_jax.data.decoding import image_of
from retina_jax.data.source import BadImage
from retina_jax.evaluation import error_analysis
from retina_jax.evaluation.coco_scores import score_text
from retina_jax.evaluation.drawing import draw
from retina_jax.evaluation.error_analysis import KINDS, LEFT_OUT, MISSED, NOTHING, RIGHT, Analysis, mean_ap
from retina_jax.evaluation.precision_recall import IOU_INDEX, RECALLS, OperatingPoint
from retina_jax.reports import jpeg
from retina_jax.reports.charts import Line, Mark, line_chart

MOST_LINES = 8  # classes in one chart; with more classes each has a chart of its own
MOST_COLUMNS = 8  # classes in the table of confusions; with more classes the most frequent pairs are listed
# Images drawn of the best and of the worst; their longer side at most, pixels; scale of labels, which are shown small.
MOST_IMAGES, LONGEST, SCALE = 6, 800, 1.3


def errors_section(analysis: Analysis, point: OperatingPoint | None, score: float) -> dict[str, Any]:
    """Returns the contents of the sections on precision, classes, errors and images; detections with `score` or more are
    drawn."""
    return {
        "note": analysis.note,
        "kind_names": list(KINDS),
        **_confusion(analysis, score),
        **_by_class(analysis),
        **_precision_recall(analysis, point),
        **_kinds(analysis, score),
        **_best_and_worst_images(analysis, score),
    }


def _confusion(analysis: Analysis, score: float) -> dict[str, Any]:
    """Returns, up to MOST_COLUMNS classes, the `matrix`: rows of name and cells (count, share, whether it is right), the
    last one for detections on no object, the last column for missed objects. Else `confusions`, the most frequent pairs."""
    names, errors = analysis.names, analysis.errors
    counts = error_analysis.confusions(errors, score)
    objects = np.bincount(errors.ground_truth.categories[errors.of_objects != LEFT_OUT], minlength=len(names))
    if len(names) > MOST_COLUMNS:
        pairs = sorted((-n, a, b) for (a, b), n in counts.items() if a != b and NOTHING not in (a, b))[:12]
        rows = [(names[a], names[b], str(-n), f"{-n / objects[a]:.1%} of {objects[a]}") for n, a, b in pairs]
        return {"matrix": [], "confusions": rows}
    classes = range(len(names))
    matrix = []
    for a in (*classes, NOTHING):
        cells = [counts.get((a, b), 0) for b in (*classes, NOTHING)]
        totals = [sum(cells)] * len(cells)
        if a == NOTHING:
            totals = [sum(counts.get((c, b), 0) for c in (*classes, NOTHING)) for b in classes] + [0]
            cells[-1] = ""
        shares = [cell / total if cell else 0.0 for cell, total in zip(cells, totals, strict=True)]
        right = [b == a for b in (*classes, NOTHING)]
        matrix.append((names[a] if a != NOTHING else "background", list(zip(cells, shares, right, strict=True))))
    return {"matrix": matrix, "confusion_names": [*names, "missed"]}


def _by_class(analysis: Analysis) -> dict[str, list[list[str]]]:
    """Returns `classes`: rows of name, objects, detections, AP, AP50 and AP75; and `by_class`: rows of name, right
    detections, and errors of each kind: detections of the class, or for missed objects of it."""
    errors, scores, kinds, number = analysis.errors, [], [], len(KINDS) - LEFT_OUT

    def count(categories: Int[np.ndarray, " N"], of: Int[np.ndarray, " N"]) -> Int[np.ndarray, "K 8"]:
        cells = np.bincount(categories * number + of - LEFT_OUT, minlength=len(analysis.names) * number)
        return cells.reshape(-1, number)

    found = count(errors.found.categories, errors.of_found)
    objects = count(errors.ground_truth.categories, errors.of_objects)
    for k, name in enumerate(analysis.names):
        levels = (analysis.precision[t, :, k] for t in (slice(None), *IOU_INDEX.values()))
        aps = [score_text(float(p.mean()) if (p > -1).all() else None) for p in levels]
        scores.append([name, str(objects[k].sum() - objects[k, 0]), str(found[k].sum()), *aps])
        of_kinds = [(objects if kind == MISSED else found)[k, kind - LEFT_OUT] for kind in (RIGHT, *range(len(KINDS)))]
        kinds.append([name, *map(str, of_kinds)])
    return {"classes": scores, "by_class": kinds}


def _precision_recall(analysis: Analysis, point: OperatingPoint | None) -> dict[str, Any]:
    """Draws `curve`, of all classes together at IoU 0.5 with the `point`, and `curves`, of the mean at both IoUs. Up to
    MOST_LINES classes are in all of them; for more `class_curves` has one chart per class."""
    names, precision = analysis.names, analysis.precision
    defined = [k for k in range(len(names)) if (precision[0, :, k] > -1).all()]
    if not defined:
        return {"curve": "", "curves": [], "class_curves": []}

    def line(label: str, values: Float[np.ndarray, " 101"]) -> Line:
        return label, list(zip(RECALLS.tolist(), values.tolist(), strict=True))

    pooled = line("all classes together", error_analysis.pooled_precision(analysis.errors))
    few = len(defined) <= MOST_LINES
    at_50, at_75 = (
        [line("mean of the classes", precision[t][:, defined].mean(axis=1))]
        + [line(names[k], precision[t, :, k]) for k in (defined if few and len(defined) > 1 else ())]
        for t in IOU_INDEX.values()
    )
    mark = point and Mark(point.recall, point.precision, f"score {point.score:.2f}: highest F1, {point.f1:.3f}")
    charts = [
        line_chart(lines, "recall", f"precision at IoU {iou}", emphasis=True, mark=of)
        for lines, iou, of in (([pooled, *at_50[1:]], "0.50", mark), (at_50, "0.50", None), (at_75, "0.75", None))
    ]
    of_classes = []
    for k in () if few else defined:
        lines = [line(f"{names[k]}, IoU {iou}", precision[t, :, k]) for iou, t in IOU_INDEX.items()]
        of_classes.append(line_chart(lines, "recall", "precision", emphasis=True))
    return {"curve": charts[0], "curves": charts[1:], "class_curves": of_classes}


def _kinds(analysis: Analysis, score: float) -> dict[str, Any]:
    """Returns AP50, AP50 without all errors of a side, and the rows (kind, gain, width of its bar, counts) with a sum."""
    errors, classes = analysis.errors, len(analysis.names)
    base = mean_ap(error_analysis.fixed_ap(errors, classes))
    if base is None:
        return {"ap50": None}
    gains = [mean_ap(error_analysis.fixed_ap(errors, classes, (k,))) - base for k in range(len(KINDS))]
    shown, widest = errors.found.scores >= score, max(1e-9, *gains)

    def counts(*kinds: int) -> list[int]:
        found, objects = np.isin(errors.of_found, kinds), np.isin(errors.of_objects, kinds)
        return [int(found.sum()), int((shown & found).sum()), int(objects.sum())]

    rows = []
    for k, kind in enumerate(KINDS):
        *detections, objects = counts(k)
        cells = ["", "", objects] if k == MISSED else [*detections, objects or ""]
        rows.append((kind, gains[k], max(0.0, 5 * gains[k] / widest), cells))
    others = {"right": (RIGHT,), "left out": (LEFT_OUT,), "all": (*range(len(KINDS)), RIGHT, LEFT_OUT)}
    rows += [(label, None, 0.0, counts(*kinds)) for label, kinds in others.items()]
    sides = ("false_positives", "false_negatives")
    without = {side: mean_ap(error_analysis.ap_without(side, errors, classes)) for side in sides}
    return {"ap50": base, "ap50_without": without, "kinds": rows}


def _best_and_worst_images(analysis: Analysis, score: float) -> dict[str, Any]:
    """Returns (name, counts, image with ground truth, image with detections) of the `worst` and the `best` images, and why
    some images could not be read; these have no picture."""
    counts = error_analysis.count_by_image(analysis.errors, len(analysis.records), score)
    best, worst = error_analysis.best_and_worst(counts, MOST_IMAGES)
    groups, unreadable = {"worst": [], "best": []}, []
    for group, images in zip(groups.values(), (worst, best), strict=True):
        for image in images:
            record = analysis.source.records[analysis.records[image]]
            right, wrong, not_found = (of[image] for of in counts)
            try:
                pair = _draw(analysis, image, score)
            except BadImage as error:
                unreadable.append(str(error))
                pair = (None, None)
            counted = f"{right} right, {wrong} wrong, {not_found} not found"
            group.append((str(record.file_name or record.image_id), counted, *pair))
    return {**groups, "unreadable": unreadable}


def _draw(analysis: Analysis, image: int, score: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draws the ground truth, and the detections: wrong ones are labelled with their kind, objects not found are dashed."""
    errors, names = analysis.errors, analysis.names
    objects, found = errors.ground_truth, errors.found
    original = Image.fromarray(image_of(analysis.source, analysis.records[image]))
    width = original.width
    original.thumbnail((LONGEST, LONGEST), Image.Resampling.BILINEAR)
    pixels, scale = np.asarray(original), original.width / width
    g = np.flatnonzero(objects.images == image)
    d = np.flatnonzero((found.images == image) & (found.scores >= score) & (errors.of_found != LEFT_OUT))
    missed = np.setdiff1d(g[errors.of_objects[g] != LEFT_OUT], errors.finds[d[errors.of_found[d] == RIGHT]])

    def corners(boxes_xywh: Float[np.ndarray, "N 4"], rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n 4"]:
        x, y, w, h = boxes_xywh[rows].T
        return scale * np.stack([x, y, x + w, y + h], axis=1)

    crowds = ["crowd" if crowd else "" for crowd in objects.crowds[g]]
    kinds = ["" if kind == RIGHT else KINDS[kind] for kind in errors.of_found[d]]
    of_objects = draw(
        pixels, corners(objects.boxes_xywh, g), objects.categories[g], class_names=names, notes=crowds, scale=SCALE
    )
    arrays, dashed = (found.categories[d], found.scores[d]), corners(objects.boxes_xywh, missed)
    boxes = corners(found.boxes_xywh, d)
    of_found = draw(pixels, boxes, *arrays, class_names=names, ground_truth_xyxy=dashed, notes=kinds, scale=SCALE)
    return jpeg(of_objects), jpeg(of_found)
