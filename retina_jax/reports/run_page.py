"""The page of a run: figures, how it learned, the errors of its newest evaluation, its scores, and what was run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from retina_jax.config import Config
from retina_jax.config_io import flatten
from retina_jax.console import duration, log
from retina_jax.data.classes import unique_names
from retina_jax.errors import PlainError
from retina_jax.evaluation import error_analysis
from retina_jax.evaluation.coco_scores import SUMMARY, score_text
from retina_jax.evaluation.error_analysis import Analysis
from retina_jax.evaluation.precision_recall import OperatingPoint
from retina_jax.installation import NAME
from retina_jax.reports import render
from retina_jax.reports.charts import line_chart
from retina_jax.reports.run_errors import errors_section
from retina_jax.runs.record import RunRecord, read_record

FROM_DATA = ("model.num_classes",)
"""Fields that training takes from the data; they are not among a run's differences from the paper."""
MOST_POINTS = 400  # points of a curve; in longer runs each point is the mean of neighbours
CHARTS = (
    # y label, logarithmic, curves: (legend, metric)
    ("loss", True, (("loss", "loss"), ("classification", "classification_loss"), ("box", "box_loss"))),
    ("learning rate", False, (("learning rate", "learning_rate"),)),
    ("gradient norm", True, (("gradient norm", "gradient_norm"),)),
    ("positives per image", False, (("positive anchors per image", "positives_per_image"),)),
)


def run_page(folder: Path, known: dict[Any, Any] | None = None) -> tuple[str, str]:
    """Returns the page of the run in `folder`, finished or not, and its headline. What is missing is named on the page.
    `known` keeps what was made of the newest evaluation for the next call, which uses it if the files have not changed.

    Raises ConfigError, one line that names the file, if a file of the run itself is malformed.
    """
    record = read_record(folder)
    step, newest = max(record.evaluations.items(), default=(0, {}))
    files = [folder / kind / f"step_{step:08d}.json" for kind in ("evaluation", "detections")]
    key, known = (step, *map(stamp, files)), {} if known is None else known
    if key not in known:
        known.clear()
        known[key] = _analysed(record, step, newest)
    why, point, score, errors = known[key]
    changes = record.saved.get("changes") or []
    scores_of = record.evaluations.items()
    aps = {name: [(float(n), s[name]) for n, s in scores_of if s[name] is not None] for name in list(SUMMARY)[:6]}
    ap_lines = [(name, of_name) for name, of_name in aps.items() if len(of_name) > 1]
    own, paper = flatten(record.config), flatten(Config())
    differing = [name for name in own if own[name] != paper[name] and name not in FROM_DATA]
    page = render(
        "run.html",
        title=f"Run {folder.resolve().name}",
        sections=[
            "curves",
            *(["confusion", "classes", "images", "errors"] if errors else ["classes"]),
            "scores",
            "run",
        ],
        state=state(record),
        progress=1.0 if record.summary else record.step / max(record.config.training.steps, 1),
        tiles=_tiles(record),
        facts=facts(record),
        differences=[(name, show(own[name]), show(paper[name])) for name in differing],
        changes=[(c.get("after_step"), c.get("field")) for c in changes if isinstance(c, dict)],
        settings=[(name, show(value)) for name, value in own.items()],
        curves=learning_curves(record.windows, record.validation),
        summary=SUMMARY,
        evaluations=[_scores(step, scores) for step, scores in scores_of],
        ap_chart=line_chart(ap_lines, "step", "AP", emphasis=True) if ap_lines else "",
        variants=[_variant(step, scores) for step, scores in record.variants],
        why=why,
        per_class=[(name, score_text(value)) for name, value in newest.get("per_class", {}).items()],
        point=point,
        score=score,
        errors=errors,
    )
    return str(page), headline(record)


def stamp(file: Path) -> tuple[int, int] | None:
    """Returns the time and size of a file, by which a change is noticed; None without the file."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _analysed(
    record: RunRecord, step: int, newest: dict[str, Any]
) -> tuple[str, OperatingPoint | None, float, dict[str, Any] | None]:
    """Returns why the newest evaluation cannot be analysed ("": it can, or there is none), its score of the highest F1, the
    score from which detections are drawn, and the contents of the sections on errors."""
    if not newest:
        return "", None, 0.0, None
    log(f"analysing the errors of the evaluation at step {step} ...")
    try:
        file = record.folder / "detections" / f"step_{step:08d}.json"
        analysis = Analysis(file, newest, record.config.data, record.categories)
    except PlainError as error:
        return str(error), None, 0.0, None
    point = error_analysis.operating_point(analysis.errors)
    score = point.score if point else record.config.detection.score_threshold
    return "", point, score, errors_section(analysis, point, score)


def state(record: RunRecord) -> str:
    """Returns a sentence: the number of steps and their duration."""
    if record.summary is None:
        return f"Not finished: step {record.step} of {record.config.training.steps}."
    seconds = record.summary.get("seconds")
    took = f" in {duration(seconds)}" if isinstance(seconds, int | float) else ""
    planned, ended = record.config.training.steps, record.summary.get("ended")
    early = f" of {planned} ({ended})" if record.step < planned and isinstance(ended, str) else ""
    return f"Finished after {record.step} steps{early}{took}."


def headline(record: RunRecord) -> str:
    """Returns `state` and the newest scores."""
    if not record.evaluations:
        return state(record)
    step, scores = max(record.evaluations.items())
    reached = ", ".join(f"{name} {score_text(scores[name])}" for name in ("AP", "AP50", "AP75"))
    return f"{state(record)} {reached} on {scores['images']} images at step {step}."


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """Returns name, value and details of the figures at the top of the page; – for what is not known."""
    step, newest = max(record.evaluations.items(), default=(0, {}))
    of_newest = f"step {step}, {newest['images']} images" if newest else "no evaluation yet"
    scored = [(scores["AP"], n) for n, scores in record.evaluations.items() if scores["AP"] is not None]
    ap, best = max(scored, default=(0.0, 0))
    speeds, waits = (measured(record.windows, name) for name in ("images_per_second", "data_wait_percent"))
    kind = str((record.saved.get("versions") or {}).get("devices") or "–")
    return [
        *((name, score_text(newest[name]) if newest else "–", of_newest) for name in ("AP", "AP50")),
        (
            "best step",
            str(best) if scored else "–",
            f"AP {ap:.3f}, {f'highest of {len(scored)}' if scored[1:] else 'one evaluation'}" if scored else of_newest,
        ),
        (
            "images/s",
            f"{median(speeds):.1f}" if speeds else "–",
            f"{median(waits):.0f} % of the time waiting for data" if waits else "not measured yet",
        ),
        ("device", kind, "" if kind != "–" else "not recorded"),
    ]


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Returns (name, value) of the known facts in config.json, summary.json and metrics.jsonl."""
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
    if not isinstance(words, list) or not words:
        return None
    program, *options = map(str, words)
    installed = program.startswith(f"{NAME} ")  # retina-jax train
    return f"{program if installed else f'python {shlex.quote(program)}'} {shlex.join(options)}"


def measured(windows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Returns the values of a metric in the windows that have it."""
    return [float(window[name]) for window in windows if isinstance(window.get(name), int | float)]


def _speed(windows: Sequence[dict[str, Any]]) -> str | None:
    """Returns medians of the windows, since the first ones include compilation."""
    names = ("images_per_second", "data_wait_percent", "peak_memory_mib")
    images, waits, memory = (measured(windows, name) for name in names)
    parts = [f"{median(images):.1f} images/s"] if images else []
    parts += [f"{median(waits):.0f} % of the time waiting for data"] if waits else []
    parts += [f"peak memory {max(memory) / 1024:.1f} GiB"] if any(memory) else []
    return ", ".join(parts) + " (medians of the windows)" if parts else None


def show(value: Any) -> str:
    """Returns a setting as on a command line; floats to six digits."""
    if isinstance(value, tuple | list):
        return " ".join(map(show, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value) if value != "" else "none"


def learning_curves(windows: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Returns the charts of the metrics over the steps, the validation loss with the others; none for fewer than two
    windows."""
    charts = []
    for label, log_y, curves in CHARTS if len(windows) > 1 else ():
        lines = [(legend, drawn) for legend, metric in curves if (drawn := points(windows, metric))]
        if label == "loss" and (drawn := points(validation, "loss")):
            lines.append(("validation loss", drawn))
        if any(y > 0 or not log_y for _, drawn in lines for _, y in drawn):
            charts.append(line_chart(lines, "step", label, log_y=log_y, emphasis=len(lines) > 1))
    return charts


def points(windows: Sequence[dict[str, Any]], metric: str) -> list[tuple[float, float]]:
    """Returns (step, value) of each window that has the metric; means of neighbours if they are more than MOST_POINTS."""
    given = [(float(w["step"]), float(w[metric])) for w in windows if isinstance(w.get(metric), int | float)]
    size = max(-(-len(given) // MOST_POINTS), 1)
    groups = [given[i : i + size] for i in range(0, len(given), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _scores(step: int, scores: dict[str, Any]) -> list[str]:
    return [str(step), str(scores["images"]), *(score_text(scores[name]) for name in SUMMARY)]


def _variant(step: int, scores: dict[str, Any]) -> list[str]:
    settings = [f"{name} {show(value)}" for name, value in scores.get("settings", {}).items()]
    return [*_scores(step, scores), ", ".join(settings) or "not known"]
