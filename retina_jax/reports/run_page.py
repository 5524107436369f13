"""What was run: the command, the code, the machine, and each setting that is not the paper's."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from retina_jax.config import Config
from retina_jax.config_io import flatten
from retina_jax.console import duration
from retina_jax.data.classes import unique_names
from retina_jax.errors import PlainError
from retina_jax.evaluation.coco_scores import SUMMARY, number
from retina_jax.evaluation.error_analysis import operating_point
from retina_jax.reports.charts import Line, line_chart
from retina_jax.reports.page import page, paragraphs, table
from retina_jax.reports.run_findings import (
    ap_of_classes,
    best_and_worst_images,
    error_breakdown,
    find,
    precision_recall,
)
from retina_jax.runs.record import Record, read_record


def headline(record: Record) -> str:
    """The run in a sentence or two: how far it came, how long it took, what it reached."""
    steps, last = record.config.training.steps, record.step
    if record.summary is not None:
        state = f"Finished after {last} steps"
        seconds = record.summary.get("seconds")
        state += f" in {duration(seconds)}" if isinstance(seconds, int | float) else ""
    else:
        state = f"Not finished: step {last} of {steps}"
    if record.evaluations:
        step, scores = max(record.evaluations.items())
        reached = ", ".join(f"{name} {number(scores[name])}" for name in ("AP", "AP50", "AP75"))
        state += f". {reached} on {scores['images']} images at step {step}"
    return state + "."


def what_was_run(record: Record) -> str:
    """Lists of the facts and of the settings."""
    own, paper = flatten(record.config), flatten(Config())
    # None is taken from the data.
    changed = [(name, value) for name, value in own.items() if value != paper[name] and paper[name] is not None]
    rows = [(name, show(value), show(paper[name])) for name, value in changed]
    resumed = record.saved.get("changes") or []
    changes = [f"After step {c.get('after_step')}: {c.get('field')}." for c in resumed if isinstance(c, dict)]
    every = definitions([(name, show(value)) for name, value in own.items()])
    return (
        definitions(facts(record))
        + "<h3>Settings that are not the paper's</h3>"
        + (_differences(rows) if rows else paragraphs(["None."]))
        + (paragraphs(["Changed when the run was resumed:", *changes]) if changes else "")
        + f"<details><summary>every setting</summary>{every}</details>"
    )


def facts(record: Record) -> list[tuple[str, str]]:
    """(name, value) of what config.json, summary.json and metrics.jsonl tell; what is not known is left out."""
    saved, versions = record.saved, dict(record.saved.get("versions") or {})
    first = saved.get("first_start") or {}
    named = [
        ("command", _command(saved.get("command"))),
        ("first command", _command(first.get("command")) if first.get("command") != saved.get("command") else None),
        ("git commit", saved.get("commit")),
        ("first commit", first.get("commit") if first.get("commit") != saved.get("commit") else None),
        ("devices", versions.pop("devices", None)),
        ("speed", _speed(record.windows)),
        ("versions", ", ".join(f"{package} {version}" for package, version in versions.items())),
        ("classes", _classes(unique_names(record.categories))),
        *dict(saved.get("facts") or {}).items(),
    ]
    if record.summary is not None:
        named += [(name.replace("_", " "), record.summary.get(name)) for name in ("images", "parameters_sha256")]
    return [(str(name), str(value)) for name, value in named if value]


def definitions(rows: Sequence[tuple[str, str]]) -> str:
    """A list of names and values."""
    return '<dl class="facts">' + "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in rows) + "</dl>"


def _differences(rows: Sequence[tuple[str, str, str]]) -> str:
    """Each setting with this run's value and the paper's."""
    items = "".join(
        f"<li>{escape(name)} <b>{escape(own)}</b> <small>paper: {escape(paper)}</small></li>"
        for name, own, paper in rows
    )
    return f'<ul class="settings">{items}</ul>'


def show(value: Any) -> str:
    """A setting as it is typed on a command line; floats to six digits."""
    if isinstance(value, tuple | list):
        return " ".join(map(show, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value) if value != "" else "none"


def _command(words: Any) -> str | None:
    return "python " + shlex.join(map(str, words)) if isinstance(words, list) else None


def _speed(windows: Sequence[dict[str, Any]]) -> str | None:
    """Medians: the first windows hold compilation."""
    parts = []
    for metric, text in (
        ("images_per_second", "{:.1f} images/s"),
        ("data_wait_percent", "{:.0f} % of the time waiting for data"),
    ):
        values = [w[metric] for w in windows if isinstance(w.get(metric), int | float)]
        parts += [text.format(median(values))] if values else []
    peak = max((w["peak_memory_mib"] for w in windows if isinstance(w.get("peak_memory_mib"), int | float)), default=0)
    parts += [f"peak memory {peak / 1024:.1f} GiB"] if peak else []
    return ", ".join(parts) + " (medians of the windows)" if parts else None


def _classes(names: Sequence[str]) -> str:
    return f"{len(names)}: " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


# How a run learned: charts of its metrics over the steps, and the COCO figures of its evaluations.

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


# The page of a run, put together.


def run_page(folder: Path) -> tuple[str, str]:
    """The page of the run in `folder`, finished or not, and its headline. What cannot be had is said on the page.

    Raises ConfigError, one line that names the file, where one of the run's own files cannot be what it should.
    """
    record = read_record(folder)
    try:
        findings, why = find(record), ""
    except PlainError as error:
        findings, why = None, str(error)
    point = operating_point(findings.found, findings.errors) if findings is not None else None
    score = point.score if point is not None else record.config.detection.score_threshold
    parts = {"run": what_was_run(record), "learning": learning_curves(record), "evaluations": evaluations(record)}
    if findings is None:
        missing = f"Classes beyond AP, errors and pictures need the detections and their truth: {why}"
        parts["classes"] = f'<p class="warning">{escape(missing)}</p>{ap_of_classes(record, None)}'
    else:
        note = f'<p class="warning">{escape(findings.note)}</p>' if findings.note else ""
        parts["classes"] = note + ap_of_classes(record, findings) + precision_recall(findings)
        parts["errors"] = error_breakdown(findings, score)
        told = (
            "No detection is right, so all of them are drawn, and images are ranked by what is wrong."
            if point is None
            else (
                f"Drawn from score {score:.2f} on, where F1 over all classes at IoU .5 is highest: {point.f1:.3f}, at "
                f"precision {point.precision:.3f} and recall {point.recall:.3f}. Images are ranked by their own F1 there. A "
                "wrong detection is tagged with its kind, a truth that was not found is dashed. A click enlarges."
            )
        )
        parts["images"] = paragraphs([told]) + best_and_worst_images(findings, score)
    said = headline(record)
    body = f'<p class="headline">{escape(said)}</p>' + "".join(
        f'<section id="{name}"><h2>{TITLES[name]}</h2>{body}</section>\n' for name, body in parts.items()
    )
    title = f"Run {folder.resolve().name}"
    return page(title, f"{body}<script>{SCRIPT}</script>", list(parts), style=STYLE), said


TITLES = {
    "run": "What was run",
    "learning": "How it learned",
    "evaluations": "COCO figures",
    "classes": "Classes",
    "errors": "What it gets wrong",
    "images": "Worst and best images",
}


# What the page looks and acts like beyond `pages.page`: everything can be read without the script.

STYLE = """
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
.headline { font-size: 1.05rem; color: var(--ink) }
.warning { border-left: 3px solid #d55e00; padding-left: .7rem; color: var(--ink); overflow-wrap: anywhere }
summary { cursor: pointer } details.pictures > summary { font-size: 1rem; margin: .6rem 0 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; margin: 0 0 1rem }
.pair img { width: 100%; cursor: zoom-in }
.pair figure.zoomed { grid-column: 1 / -1; overflow: auto; max-height: 95vh }
.pair figure.zoomed img { width: auto; max-width: none; min-width: 100%; cursor: zoom-out }
.kinds small { display: block; color: var(--grey) } .kinds td:first-child { min-width: 8rem }
.kinds td { vertical-align: top } .kinds td:nth-child(2) { text-align: left; min-width: 6.2rem }
.kinds th:nth-child(2) { text-align: left } .kinds th { max-width: 7rem }
.settings { columns: 22rem; padding: 0; list-style: none; font-size: .85rem; overflow-wrap: anywhere }
.settings li { break-inside: avoid; margin-bottom: .25rem } .settings small { color: var(--grey) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)) }
.bar { display: inline-block; height: .8rem; background: #0072b2 }
.sum td { font-weight: 600 }
.facts dd { margin-bottom: .2rem }
th button { all: unset; cursor: pointer; font: inherit }
th button:focus-visible { outline: 2px solid #0072b2 }
th[aria-sort=ascending] button::after { content: " \\25B2" } th[aria-sort=descending] button::after { content: " \\25BC" }
details .charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)) }
@media (max-width: 44rem) {
  th { min-width: 0 } th, td { padding: .3rem .35rem }
  .kinds td:first-child { position: static; min-width: 6.5rem; max-width: 8rem }
  .pair { grid-template-columns: 1fr } dl { grid-template-columns: 1fr } dd { margin-bottom: .5rem }
}
"""

SCRIPT = """
for (const table of document.querySelectorAll(".sortable table")) {
  const heads = [...table.tHead.rows[0].cells], rows = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    button.title = "sort";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const up = (before || (column ? "ascending" : "descending")) === "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const text = row => row.cells[column].textContent;
      const number = row => Number.isNaN(Number(text(row))) ? -Infinity : Number(text(row));
      const compare = column ? (a, b) => number(a) - number(b) : (a, b) => text(a).localeCompare(text(b));
      rows.replaceChildren(...[...rows.rows].sort((a, b) => up ? compare(a, b) : compare(b, a)));
    });
  });
}
for (const picture of document.querySelectorAll(".pair img"))
  picture.addEventListener("click", () => picture.closest("figure").classList.toggle("zoomed"));
"""
