"""Every class on its own: AP, and the curves of precision over recall."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from retina_jax.coco_scores import IOU_THRESHOLDS, RECALLS
from retina_jax.evaluation import number
from retina_jax.pages.charts import Line, line_chart
from retina_jax.pages.page import paragraphs, table
from retina_jax.run_page.error_breakdown import LEFT_OUT
from retina_jax.run_page.findings import Findings
from retina_jax.run_page.record import Record

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
