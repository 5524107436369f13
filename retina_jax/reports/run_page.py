"""The page of a run: what was run, how it learned, its scores, and the errors of its newest evaluation."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from retina_jax.config import Config
from retina_jax.config_io import flatten
from retina_jax.console import duration
from retina_jax.data.classes import unique_names
from retina_jax.errors import PlainError
from retina_jax.evaluation.coco_scores import SUMMARY, number
from retina_jax.evaluation.error_analysis import analyse, operating_point
from retina_jax.reports import render
from retina_jax.reports.charts import Line, line_chart
from retina_jax.reports.run_errors import errors_section
from retina_jax.runs.record import RunRecord, read_record

MOST_POINTS = 400  # points of a curve; in longer runs each point is the mean of neighbours
CHARTS = (
    # y label, logarithmic, curves: (legend, metric)
    ("loss", True, (("loss", "loss"), ("classification", "classification_loss"), ("box", "box_loss"))),
    ("learning rate", False, (("learning rate", "learning_rate"),)),
    ("gradient norm", True, (("gradient norm", "gradient_norm"),)),
    ("positives per image", False, (("positive anchors per image", "positives_per_image"),)),
)
AP_CHART = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def run_page(folder: Path) -> tuple[str, str]:
    """The page of the run in `folder`, finished or not, and its headline. What is missing is named on the page.

    Raises ConfigError, one line that names the file, if a file of the run itself is malformed.
    """
    record = read_record(folder)
    analysis, why, newest = None, "", {}
    if not record.evaluations:
        why = f"{folder / 'evaluation'}: there is no evaluation yet"
    else:
        step, newest = max(record.evaluations.items())
        file = folder / "detections" / f"step_{step:08d}.json"
        try:
            analysis = analyse(file, newest, record.config.data, record.categories)
        except PlainError as error:
            why = str(error)
    point = operating_point(analysis.errors) if analysis else None
    score = point.score if point else record.config.detection.score_threshold
    sections = ["run", "learning", "evaluations", "classes", *(["errors", "images"] if analysis else [])]
    changes = record.saved.get("changes") or []
    aps = {n: [(float(step), s[n]) for step, s in record.evaluations.items() if s[n] is not None] for n in AP_CHART}
    ap_lines = [Line(name, of_name) for name, of_name in aps.items() if len(of_name) > 1]
    own, paper = flatten(record.config), flatten(Config())
    page = render(
        "run.html",
        title=f"Run {folder.resolve().name}",
        sections=sections,
        headline=headline(record),
        facts=facts(record),
        differences=[
            # A paper value of None is taken from the data.
            (name, show(value), show(paper[name]))
            for name, value in own.items()
            if value != paper[name] and paper[name] is not None
        ],
        changes=[(c.get("after_step"), c.get("field")) for c in changes if isinstance(c, dict)],
        settings=[(name, show(value)) for name, value in own.items()],
        curves=learning_curves(record.windows),
        summary=SUMMARY,
        evaluations=[_scores(step, scores) for step, scores in record.evaluations.items()],
        ap_chart=line_chart(ap_lines, "step", "AP") if ap_lines else "",
        variants=[[*_scores(step, scores), settings_text(scores)] for step, scores in record.variants],
        why=why,
        per_class=[(name, number(value)) for name, value in newest.get("per_class", {}).items()],
        point=point,
        score=score,
        errors=errors_section(analysis, score) if analysis else None,
    )
    return str(page), headline(record)


def headline(record: RunRecord) -> str:
    """One or two sentences: how many steps the run has made, how long they took, and the newest scores."""
    if record.summary is not None:
        state = f"Finished after {record.step} steps"
        seconds = record.summary.get("seconds")
        state += f" in {duration(seconds)}" if isinstance(seconds, int | float) else ""
    else:
        state = f"Not finished: step {record.step} of {record.config.training.steps}"
    if record.evaluations:
        step, scores = max(record.evaluations.items())
        reached = ", ".join(f"{name} {number(scores[name])}" for name in ("AP", "AP50", "AP75"))
        state += f". {reached} on {scores['images']} images at step {step}"
    return state + "."


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """(name, value) of the facts in config.json, summary.json and metrics.jsonl, as far as they are known."""
    saved, versions = record.saved, dict(record.saved.get("versions") or {})
    first, summary = saved.get("first_start") or {}, record.summary or {}
    names = unique_names(record.categories)
    named = {
        "command": _command(saved),
        "first command": _command(first) if first.get("command") != saved.get("command") else None,
        "git commit": saved.get("commit"),
        "first commit": first.get("commit") if first.get("commit") != saved.get("commit") else None,
        "devices": versions.pop("devices", None),
        "speed": _speed(record.windows),
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
        "classes": f"{len(names)}: " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else ""),
        **dict(saved.get("facts") or {}),
        **{name.replace("_", " "): summary.get(name) for name in ("images", "parameters_sha256") if name in summary},
    }
    return [(name, str(value)) for name, value in named.items() if value]


def _command(start: dict[str, Any]) -> str | None:
    words = start.get("command")
    return "python " + shlex.join(map(str, words)) if isinstance(words, list) else None


def _speed(windows: Sequence[dict[str, Any]]) -> str | None:
    """Medians: the first windows include compilation."""
    metrics = {"images_per_second": "{:.1f} images/s", "data_wait_percent": "{:.0f} % of the time waiting for data"}
    values = {
        name: [window[name] for window in windows if isinstance(window.get(name), int | float)]
        for name in (*metrics, "peak_memory_mib")
    }
    parts = [text.format(median(values[name])) for name, text in metrics.items() if values[name]]
    if peak := max(values["peak_memory_mib"], default=0):
        parts.append(f"peak memory {peak / 1024:.1f} GiB")
    return ", ".join(parts) + " (medians of the windows)" if parts else None


def show(value: Any) -> str:
    """A setting as on a command line; floats to six digits."""
    if isinstance(value, tuple | list):
        return " ".join(map(show, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value) if value != "" else "none"


def learning_curves(windows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the charts of the metrics over the steps; none for fewer than two windows."""
    charts = []
    for label, log_y, curves in CHARTS if len(windows) > 1 else ():
        lines = [Line(legend, points(windows, metric)) for legend, metric in curves]
        if any(y > 0 or not log_y for line in lines for _, y in line.points):
            charts.append(line_chart([line for line in lines if line.points], "step", label, log_y=log_y))
    return charts


def points(windows: Sequence[dict[str, Any]], metric: str) -> list[tuple[float, float]]:
    """(step, value) of each window that has the metric; if they are more than MOST_POINTS, means of neighbours."""
    given = [(float(w["step"]), float(w[metric])) for w in windows if isinstance(w.get(metric), int | float)]
    size = max(-(-len(given) // MOST_POINTS), 1)
    groups = [given[i : i + size] for i in range(0, len(given), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _scores(step: int, scores: dict[str, Any]) -> list[str]:
    return [str(step), str(scores["images"]), *(number(scores[name]) for name in SUMMARY)]


def settings_text(scores: dict[str, Any]) -> str:
    """Returns the inference settings of an evaluation as text."""
    return ", ".join(f"{name} {show(value)}" for name, value in scores.get("settings", {}).items()) or "not known"
