"""How a run learned: charts of its metrics over the steps, and the COCO figures of its evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from retina_jax.evaluation import SUMMARY, number
from retina_jax.pages.charts import Line, line_chart
from retina_jax.pages.page import paragraphs, table
from retina_jax.run_page.facts import show
from retina_jax.run_page.record import Record

MOST_POINTS = 400
"""Points of a curve; of a longer run each is the mean of neighbours."""
CHARTS = (
    # y label, logarithmic, curves: (legend, metric)
    ("loss", True, (("loss", "loss"), ("classification", "classification_loss"), ("box", "box_loss"))),
    ("learning rate", False, (("learning rate", "learning_rate"),)),
    ("gradient norm", True, (("gradient norm", "gradient_norm"),)),
    ("positives an image", False, (("positive anchors an image", "positives_per_image"),)),
)
AP_CHART = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def learning_curves(record: Record) -> str:
    """Charts of losses, learning rate, gradient norm and positives, or a line that says there is nothing to draw."""
    if len(record.windows) < 2:
        return paragraphs(["Fewer than two lines of training in metrics.jsonl: no curve to draw."])
    drawn = []
    for label, log_y, curves in CHARTS:
        lines = [Line(legend, points(record.windows, metric)) for legend, metric in curves]
        if any(y > 0 or not log_y for line in lines for _, y in line.points):
            drawn.append(line_chart([line for line in lines if line.points], "step", label, log_y=log_y))
    return f'<div class="charts">{"".join(drawn)}</div>'


def points(windows: Sequence[dict[str, Any]], metric: str) -> list[tuple[float, float]]:
    """(step, value) of each window that has the metric, at most MOST_POINTS: of more, neighbours are averaged."""
    given = [(float(w["step"]), float(w[metric])) for w in windows if isinstance(w.get(metric), int | float)]
    size = -(-len(given) // MOST_POINTS)
    groups = [given[i : i + size] for i in range(0, len(given), max(size, 1))]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def evaluations(record: Record) -> str:
    """The 12 figures of every evaluation, from two on a chart of AP, and those of evaluations with other settings."""
    if not record.evaluations:
        return paragraphs(["The run has not been evaluated yet."]) + _variants(record)
    rows = [
        [str(step), str(scores["images"]), *(number(scores[name]) for name in SUMMARY)]
        for step, scores in record.evaluations.items()
    ]
    drawn = table(["step", "images", *SUMMARY], rows)
    lines = [
        Line(name, [(float(step), s[name]) for step, s in record.evaluations.items() if s[name] is not None])
        for name in AP_CHART
    ]
    lines = [line for line in lines if len(line.points) > 1]
    if lines:
        drawn += f'<div class="charts">{line_chart(lines, "step", "AP")}</div>'
    return (
        drawn
        + _variants(record)
        + '<details><summary>what the figures are</summary><dl class="facts">'
        + "".join(
            f"<dt>{name}</dt><dd>{escape(kind)}, IoU {iou}, boxes: {area}, at most {most} detections an image and class</dd>"
            for name, (kind, _, iou, area, most) in SUMMARY.items()
        )
        + "</dl></details>"
    )


def _variants(record: Record) -> str:
    """The 12 figures of each evaluation with settings that are not the run's, which stand in its last column."""
    if not record.variants:
        return ""
    rows = []
    for step, scores in record.variants:
        settings = ", ".join(f"{name} {show(value)}" for name, value in scores.get("settings", {}).items())
        figures = [number(scores[name]) for name in SUMMARY]
        rows.append([str(step), str(scores["images"]), *figures, settings or "not told"])
    return "<h3>With other settings</h3>" + table(["step", "images", *SUMMARY, "settings"], rows)
