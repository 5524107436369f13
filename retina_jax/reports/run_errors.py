"""The part of a run's page on its newest evaluation: classes, errors by kind, best and worst images."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from retina_jax.data.decoding import image_of
from retina_jax.data.source import BadImage
from retina_jax.evaluation import error_analysis
from retina_jax.evaluation.coco_scores import number
from retina_jax.evaluation.drawing import draw
from retina_jax.evaluation.error_analysis import CLASSIFICATION, KINDS, LEFT_OUT, MISSED, RIGHT, Analysis, mean_ap
from retina_jax.evaluation.precision_recall import IOU_THRESHOLDS, RECALLS
from retina_jax.reports import jpeg
from retina_jax.reports.charts import Line, line_chart

MOST_LINES = 10  # classes in one chart; with more classes each has a chart of its own
IOUS = {f"{iou:.2f}": int(np.argmin(abs(IOU_THRESHOLDS - iou))) for iou in (0.5, 0.75)}
MOST_CONFUSIONS = 12
MOST_IMAGES, LONGEST = 6, 800  # images drawn of the best and of the worst; their longer side at most, pixels


def errors_section(analysis: Analysis, score: float) -> dict[str, Any]:
    """What the page shows of the evaluation; detections with `score` or more are drawn."""
    errors, names = analysis.errors, analysis.names
    of = np.flatnonzero(errors.of_found == CLASSIFICATION)
    pairs = zip(errors.found.categories[of].tolist(), errors.truth.categories[errors.target[of]].tolist(), strict=True)
    confusions = Counter(pairs).most_common(MOST_CONFUSIONS)  # (detected class, true class)
    return {
        "note": analysis.note,
        "kind_names": list(KINDS),
        "confusions": [(names[a], names[b], count) for (a, b), count in confusions],
        **_by_class(analysis),
        **_precision_recall(analysis),
        **_kinds(analysis, score),
        **_best_and_worst_images(analysis, score),
    }


def _by_class(analysis: Analysis) -> dict[str, list[list[str]]]:
    """`classes`: rows of name, objects, detections, AP, AP50 and AP75. `by_class`: rows of name, right detections, and
    errors of each kind: detections of the class, or for missed objects of it."""
    truth, found, of_found, of_truth, *_ = analysis.errors
    scores, kinds = [], []
    for k, name in enumerate(analysis.names):
        objects, detections = of_truth[truth.categories == k], of_found[found.categories == k]
        levels = (analysis.precision[t, :, k] for t in (slice(None), *IOUS.values()))
        aps = [number(float(p.mean()) if (p > -1).all() else None) for p in levels]
        scores.append([name, str((objects != LEFT_OUT).sum()), str(len(detections)), *aps])
        counts = [((objects if kind == MISSED else detections) == kind).sum() for kind in (RIGHT, *range(len(KINDS)))]
        kinds.append([name, *map(str, counts)])
    return {"classes": scores, "by_class": kinds}


def _precision_recall(analysis: Analysis) -> dict[str, list[str]]:
    """Charts at IoU 0.5 and 0.75 of the mean over the classes and, up to MOST_LINES, of each; else a chart of each class."""
    names, precision = analysis.names, analysis.precision
    defined = [k for k in range(len(names)) if (precision[0, :, k] > -1).all()]

    def line(label: str, values: Float[np.ndarray, " 101"]) -> Line:
        return Line(label, list(zip(RECALLS.tolist(), values.tolist(), strict=True)))

    few, together = len(defined) <= MOST_LINES, []
    for iou, t in IOUS.items() if defined else ():
        mean = line("mean of the classes", precision[t][:, defined].mean(axis=1))
        each = [line(names[k], precision[t, :, k]) for k in (defined if few else ())]
        together.append(line_chart([mean, *each], "recall", f"precision at IoU {iou}"))
    of_classes = []
    for k in () if few else defined:
        lines = [line(f"{names[k]}, IoU {iou}", precision[t, :, k]) for iou, t in IOUS.items()]
        of_classes.append(line_chart(lines, "recall", "precision"))
    return {"curves": together, "class_curves": of_classes}


def _kinds(analysis: Analysis, score: float) -> dict[str, Any]:
    """AP50, AP50 without all errors of a side, and the rows (kind, gain, width of its bar, counts); the last is the sum."""
    errors, classes = analysis.errors, len(analysis.names)
    base = mean_ap(error_analysis.fixed_ap(errors, classes))
    if base is None:
        return {"ap50": None}
    gains = [mean_ap(error_analysis.fixed_ap(errors, classes, (k,))) - base for k in range(len(KINDS))]
    shown, widest = errors.found.scores >= score, max(1e-9, *gains)

    def counts(of_found: np.ndarray, of_truth: np.ndarray) -> list[int]:
        return [int(of_found.sum()), int((shown & of_found).sum()), int(of_truth.sum())]

    rows = []
    for k, kind in enumerate(KINDS):
        *detections, objects = counts(errors.of_found == k, errors.of_truth == k)
        cells = ["", "", objects] if k == MISSED else [*detections, objects or ""]
        rows.append((kind, gains[k], max(0.0, 5 * gains[k] / widest), cells))
    for label, of in (("right", RIGHT), ("left out", LEFT_OUT)):
        rows.append((label, None, 0.0, counts(errors.of_found == of, errors.of_truth == of)))
    rows.append(("all", None, 0.0, [len(errors.of_found), int(shown.sum()), len(errors.of_truth)]))
    without = {wrong: mean_ap(error_analysis.ap_without(wrong, errors, classes)) for wrong in ("found", "missed")}
    return {"ap50": base, "ap50_without": without, "kinds": rows}


def _best_and_worst_images(analysis: Analysis, score: float) -> dict[str, Any]:
    """(caption, image with ground truth, image with detections) of the worst and the best images, and why some images
    could not be read; these have a caption alone."""
    counts = error_analysis.count_by_image(analysis.errors, len(analysis.records), score)
    best, worst = error_analysis.best_and_worst(counts, MOST_IMAGES)
    groups, unreadable = {}, []
    for title, images in (("Worst", worst), ("Best", best)):
        groups[title] = []
        for image in images:
            record = analysis.source.records[analysis.records[image]]
            right, wrong, not_found = (of[image] for of in counts)
            try:
                pair = _draw(analysis, image, score)
            except BadImage as error:
                unreadable.append(str(error))
                pair = (None, None)
            caption = f"{record.file_name or record.image_id}: {right} right, {wrong} wrong, {not_found} not found"
            groups[title].append((caption, *pair))
    return {"images": groups, "unreadable": unreadable}


def _draw(analysis: Analysis, image: int, score: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ground truth, and the detections: wrong ones are labelled with their kind, objects not found are dashed."""
    truth, found, errors = analysis.errors.truth, analysis.errors.found, analysis.errors
    original = Image.fromarray(image_of(analysis.source, analysis.records[image]))
    width = original.width
    original.thumbnail((LONGEST, LONGEST), Image.Resampling.BILINEAR)
    pixels, scale = np.asarray(original), original.width / width
    g = np.flatnonzero(truth.images == image)
    d = np.flatnonzero((found.images == image) & (found.scores >= score) & (errors.of_found != LEFT_OUT))
    not_found = np.setdiff1d(g[errors.of_truth[g] != LEFT_OUT], errors.finds[d[errors.of_found[d] == RIGHT]])
    objects, detected, missed = (
        scale * np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
        for boxes_xywh in (truth.boxes_xywh[g], found.boxes_xywh[d], truth.boxes_xywh[not_found])
    )
    crowds = ["crowd" if crowd else "" for crowd in truth.crowds[g]]
    kinds = ["" if kind == RIGHT else KINDS[kind] for kind in errors.of_found[d]]
    classes, scores, names = found.categories[d], found.scores[d], analysis.names
    of_truth = draw(pixels, objects, truth.categories[g], class_names=names, notes=crowds)
    of_found = draw(pixels, detected, classes, scores, class_names=names, ground_truth_xyxy=missed, notes=kinds)
    return jpeg(of_truth), jpeg(of_found)
