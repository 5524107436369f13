"""The newest evaluation gone through once more, box by box: its detections beside the truth of the run's data."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from retina_jax.config_io import override
from retina_jax.data.classes import unique_names
from retina_jax.data.datasets import open_source
from retina_jax.data.decoding import image_of
from retina_jax.data.source import BadImage, Source
from retina_jax.evaluation.coco_scores import EvaluationError, check, in_arrays, number
from retina_jax.evaluation.drawing import draw
from retina_jax.evaluation.error_analysis import (
    CLASSIFICATION,
    KINDS,
    LEFT_OUT,
    MISSED,
    RIGHT,
    Errors,
    ap_without,
    best_and_worst,
    count_by_image,
    mean_ap,
    mended_ap,
    sort_errors,
)
from retina_jax.evaluation.precision_recall import IOU_THRESHOLDS, RECALLS, Found, Truth, coco_curves, coco_stats
from retina_jax.reports.charts import Line, line_chart
from retina_jax.reports.page import paragraphs, picture, table
from retina_jax.runs.record import Record

RESULT = {"image_id", "category_id", "bbox", "score"}
"""What a detection has in COCO's results format."""


@dataclass(frozen=True, eq=False)
class Findings:
    """Detections and truth of the evaluated images; category k is `names[k]`, image i is record `rows[i]` of the source."""

    step: int
    source: Source
    names: tuple[str, ...]
    truth: Truth
    found: Found
    errors: Errors
    precision: Float[np.ndarray, "10 101 K"]
    """By IoU, recall and category; -1 where a category has no truth."""
    rows: tuple[int, ...]
    note: str
    """Where the scores now are not those of the evaluation: what that may come from. Else empty."""


def find(record: Record) -> Findings:
    """The findings of the newest evaluation.

    Raises PlainError (ConfigError, DataError, EvaluationError), one line, where there is no evaluation, its detections are
    gone, the data cannot be opened, or the detections are not of this data.
    """
    if not record.evaluations:
        raise EvaluationError(f"{record.folder / 'evaluation'}: holds no evaluation yet")
    step, scores = max(record.evaluations.items())
    path = record.folder / "detections" / f"step_{step:08d}.json"
    try:
        detections = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from None
    if not isinstance(detections, list) or not all(isinstance(d, dict) and d.keys() >= RESULT for d in detections):
        raise EvaluationError(f"{path}: must be a list of COCO results ({', '.join(sorted(RESULT))})")
    source = _open(record)
    # As `assess` has it: the first images of the split.
    rows = {source.records[row].image_id: row for row in range(min(scores["images"], len(source)))}
    image_ids = sorted(rows)
    check(source.truth, detections, image_ids, None)
    truth, found, categories = in_arrays(source.truth, detections, image_ids)
    curves = coco_curves(truth, found, categories)
    now, then = float(coco_stats(curves)[0]), scores["AP"]
    same = abs(now - (-1.0 if then is None else then)) < 1e-6
    note = (
        ""
        if same
        else (
            f"AP of the saved detections on the data of today is {now:.4f}, the evaluation had {then}: the data has changed "
            "since, or the detections are of another evaluation at this step."
        )
    )
    return Findings(
        step,
        source,
        unique_names(sorted(source.categories)),
        truth,
        found,
        sort_errors(truth, found),
        curves.precision[..., 0, -1],
        tuple(rows[image_id] for image_id in image_ids),
        note,
    )


def _open(record: Record) -> Source:
    """The evaluation data; where only the folder of its images is gone, their truth all the same."""
    config, data = record.config, record.config.data
    if data.source == "coco" and not Path(data.val_images).is_dir() and Path(data.val_annotations).is_file():
        # Any folder does: that its images cannot be read is found, and said, when they are to be drawn.
        config = override(config, {"data.val_images": str(Path(data.val_annotations).parent)})
    return open_source(config.data, "val", record.categories)


# Every class on its own: AP, and the curves of precision over recall.

MOST_LINES = 10
"""Classes in one chart; more have a chart each."""
IOUS = {f"{iou:.2f}".removeprefix("0"): int(np.argmin(abs(IOU_THRESHOLDS - iou))) for iou in (0.5, 0.75)}


def ap_of_classes(record: Record, findings: Findings | None) -> str:
    """A table of the newest evaluation, which a click on a column sorts; without findings, AP alone."""
    if not record.evaluations:
        return paragraphs(["The run has not been evaluated yet."])
    per_class = record.evaluations[max(record.evaluations)]["per_class"]
    if findings is None:
        return _sortable(table(["class", "AP"], [[name, number(value)] for name, value in per_class.items()]))
    counted = findings.truth.categories[findings.errors.of_truth != LEFT_OUT]
    truths = np.bincount(counted, minlength=len(findings.names))
    found = np.bincount(findings.found.categories, minlength=len(findings.names))
    rows = [
        [
            name,
            str(truths[k]),
            str(found[k]),
            *(number(_mean(findings.precision[t, :, k])) for t in (slice(None), 0, 5)),
        ]
        for k, name in enumerate(findings.names)
    ]
    return _sortable(table(["class", "boxes", "detections", "AP", "AP50", "AP75"], rows))


def precision_recall(findings: Findings) -> str:
    """Curves at IoU .5 and .75: of all classes together and, up to MOST_LINES, of each; beyond, each has a chart below."""
    defined = [k for k in range(len(findings.names)) if (findings.precision[0, :, k] > -1).all()]
    if not defined:
        return paragraphs(["There is no box to find, hence no curve."])
    together = []
    for iou, t in IOUS.items():
        lines = [_line("mean of the classes", findings.precision[t][:, defined].mean(axis=1))]
        if len(defined) <= MOST_LINES:
            lines += [_line(findings.names[k], findings.precision[t, :, k]) for k in defined]
        together.append(line_chart(lines, "recall", f"precision at IoU {iou}"))
    drawn = f'<div class="charts">{"".join(together)}</div>'
    if len(defined) > MOST_LINES:
        each = "".join(
            line_chart(
                [_line(f"{findings.names[k]}, IoU {iou}", findings.precision[t, :, k]) for iou, t in IOUS.items()],
                "recall",
                "precision",
            )
            for k in defined
        )
        drawn += (
            f'<details><summary>each of the {len(defined)} classes</summary><div class="charts">{each}</div></details>'
        )
    return drawn


def _line(label: str, precision: Float[np.ndarray, " 101"]) -> Line:
    return Line(label, list(zip(RECALLS.tolist(), precision.tolist(), strict=True)))


def _mean(precision: Float[np.ndarray, "*N"]) -> float | None:
    return float(precision.mean()) if (precision > -1).all() else None


def _sortable(of: str) -> str:
    return f'<div class="sortable">{of}</div>'


# The error breakdown as a section: what each kind of error is, how often it occurs, what mending it is worth.

MEANS = {
    "classification": "on an object of another class (IoU .5 or more)",
    "localisation": "right class, but IoU with the object only .1 to .5",
    "both": "wrong class and IoU only .1 to .5",
    "duplicate": "on an object that a better detection has found",
    "background": "on nothing: IoU at most .1 with any object",
    "missed": "objects not found, nor meant by a detection of the wrong class or place",
}
MOST_CONFUSIONS = 12
HOW_TO_READ = (
    "In the manner of TIDE (Bolya et al. 2020): every detection that is not right and every object that was not found is of "
    "exactly one kind. The gain is what AP50 would rise by were all errors of this kind alone mended; gains do not add up, "
    "because one error hides another."
)


def error_breakdown(findings: Findings, score: float) -> str:
    """The table of kinds, the same by class, and the classes that are taken for each other."""
    truth, found, errors, names = findings.truth, findings.found, findings.errors, findings.names
    arrays = truth, found, errors, len(names)
    base = mean_ap(mended_ap(*arrays))
    if base is None:
        return paragraphs(["There is no box to find, hence nothing to miss."])
    gains = {kind: mean_ap(mended_ap(*arrays, (k,))) - base for k, kind in enumerate(KINDS)}
    widest = max(1e-9, *gains.values())
    shown = found.scores >= score
    head = ("kind", "gain of AP50", "detections", f"of score {score:.2f} or more", "objects")
    rows = []
    for k, kind in enumerate(KINDS):
        of_found, objects = errors.of_found == k, int((errors.of_truth == k).sum())
        detections = ["", ""] if k == MISSED else [str(of_found.sum()), str((shown & of_found).sum())]
        cells = [*detections, str(objects) if objects or k == MISSED else ""]
        bar = f'<span class="bar" style="width:{max(0.0, 5 * gains[kind] / widest):.2f}rem"></span>'
        name = f"<td>{kind}<small>{escape(MEANS[kind])}</small></td>"
        rows.append(f"<tr>{name}<td>{gains[kind]:+.3f}<br>{bar}</td>{_cells(cells)}</tr>")
    for label, of in (("right", RIGHT), ("left out", LEFT_OUT)):
        numbers = (errors.of_found == of).sum(), (shown & (errors.of_found == of)).sum(), (errors.of_truth == of).sum()
        rows.append(f"<tr><td>{label}</td><td></td>{_cells(map(str, numbers))}</tr>")
    numbers = len(errors.of_found), shown.sum(), len(errors.of_truth)
    rows.append(f'<tr class="sum"><td>all</td><td></td>{_cells(map(str, numbers))}</tr>')
    body = "".join(rows)
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    without = {wrong: mean_ap(ap_without(wrong, *arrays)) for wrong in ("found", "missed")}
    return (
        paragraphs(
            [
                HOW_TO_READ,
                f"AP50 is {base:.3f}. Without any wrong detection it would be {without['found']:.3f}, without any object "
                f"not found {without['missed']:.3f}.",
            ]
        )
        + f'<div class="scroll"><table class="kinds"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
        + "<details><summary>by class</summary>"
        + _by_class(findings)
        + "</details>"
        + _confusions(findings)
    )


def _cells(texts: object) -> str:
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def _by_class(findings: Findings) -> str:
    """Errors of each class: detections of it, and, as missed, objects of it."""
    rows = []
    for k, name in enumerate(findings.names):
        of_found = findings.errors.of_found[findings.found.categories == k]
        of_truth = findings.errors.of_truth[findings.truth.categories == k]
        counts = [(of_truth if kind == MISSED else of_found) == kind for kind in range(len(KINDS))]
        rows.append([name, str((of_found == RIGHT).sum()), *(str(count.sum()) for count in counts)])
    return f'<div class="sortable">{table(["class", "right", *KINDS], rows)}</div>'


def _confusions(findings: Findings) -> str:
    """Which class is taken for which, the most frequent first."""
    rows = np.flatnonzero(findings.errors.of_found == CLASSIFICATION)
    taken = findings.found.categories[rows].tolist()
    meant = findings.truth.categories[findings.errors.meant[rows]].tolist()
    pairs = Counter(zip(taken, meant, strict=True)).most_common(MOST_CONFUSIONS)
    if not pairs:
        return ""
    names = findings.names
    shown = table(
        ["said", "but it is", "detections"], [[names[said], names[true], str(count)] for (said, true), count in pairs]
    )
    return f"<details><summary>classes taken for each other</summary>{shown}</details>"


# The images that went best and worst, drawn: their truth beside what was found.

MOST = 6
"""Images drawn of the best, and of the worst."""
LONGEST = 800
"""Images are drawn at most this long, pixels."""


def best_and_worst_images(findings: Findings, score: float) -> str:
    """Both groups, of detections from `score` on. Where images cannot be read the page says which, and why."""
    counts = count_by_image(findings.truth, findings.found, findings.errors, len(findings.rows), score)
    best, worst = best_and_worst(counts, MOST)
    drawn, lost = "", []
    for title, images, shown in (("worst", worst, True), ("best", best, False)):
        pairs = []
        for image in images:
            record = findings.source.records[findings.rows[image]]
            told = (
                f"{record.file_name or record.image_id}: {counts.right[image]} right, {counts.wrong[image]} wrong, "
                f"{counts.unfound[image]} not found"
            )
            try:
                truth, found = _draw(findings, image, score)
            except BadImage as error:
                lost.append(f"{error}")
                pairs.append(paragraphs([f"{told}. It cannot be read, and is not drawn."]))
                continue
            pairs.append(
                f'<div class="pair">{picture(truth, f"{told}. Truth", quality=80)}'
                f"{picture(found, f'Found from score {score:.2f} on', quality=80)}</div>"
            )
        body = "".join(pairs) or paragraphs(["None."])
        drawn += (
            f'<details class="pictures"{" open" if shown else ""}><summary>{title} images</summary>{body}</details>'
        )
    if lost:
        some = f"{len(lost)} images could not be read, so they are not drawn. The first: {lost[0]}"
        drawn = f'<p class="warning">{escape(some)}</p>' + drawn
    return drawn


def _draw(
    findings: Findings, image: int, score: float
) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W 3"]]:
    """Truth, and what was found: wrong detections are tagged with their kind, truths not found are dashed."""
    truth, found, errors, row = findings.truth, findings.found, findings.errors, findings.rows[image]
    pixels, scale = _smaller(image_of(findings.source, row))
    g = np.flatnonzero(truth.images == image)
    d = np.flatnonzero((found.images == image) & (found.scores >= score) & (errors.of_found != LEFT_OUT))
    unfound = np.setdiff1d(g[errors.of_truth[g] != LEFT_OUT], errors.finds[d[errors.of_found[d] == RIGHT]])
    of_truth = draw(
        pixels,
        _xyxy(truth.boxes_xywh[g]) * scale,
        truth.categories[g],
        class_names=findings.names,
        notes=["crowd" if crowd else "" for crowd in truth.crowds[g]],
    )
    of_found = draw(
        pixels,
        _xyxy(found.boxes_xywh[d]) * scale,
        found.categories[d],
        found.scores[d],
        class_names=findings.names,
        truth_boxes_xyxy=_xyxy(truth.boxes_xywh[unfound]) * scale,
        notes=["" if kind == RIGHT else KINDS[kind] for kind in errors.of_found[d]],
    )
    return of_truth, of_found


def _smaller(pixels: UInt8[np.ndarray, "h w 3"]) -> tuple[UInt8[np.ndarray, "H W 3"], float]:
    """The image at most LONGEST long, and what its sides were multiplied by."""
    scale = min(1.0, LONGEST / max(pixels.shape[:2]))
    if scale == 1:
        return pixels, scale
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)), scale


def _xyxy(boxes_xywh: Float[np.ndarray, "N 4"]) -> Float[np.ndarray, "N 4"]:
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
