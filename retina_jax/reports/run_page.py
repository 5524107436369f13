"""The page of a run: what was run, how it learned, its scores, and the errors of its newest evaluation."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from retina_jax.config import Config
from retina_jax.config_io import flatten
from retina_jax.console import duration, log
from retina_jax.data.classes import unique_names
from retina_jax.data.decoding import image_of
from retina_jax.data.source import BadImage
from retina_jax.errors import PlainError
from retina_jax.evaluation import error_analysis
from retina_jax.evaluation.coco_scores import SUMMARY, score_text
from retina_jax.evaluation.drawing import draw
from retina_jax.evaluation.error_analysis import KINDS, LEFT_OUT, MISSED, NOTHING, RIGHT, Analysis, mean_ap
from retina_jax.evaluation.precision_recall import IOU_INDEX, RECALLS, OperatingPoint
from retina_jax.reports import jpeg, render
from retina_jax.reports.charts import Line, Mark, line_chart
from retina_jax.runs.record import RunRecord, read_record

MOST_POINTS = 400  # points of a curve; in longer runs each point is the mean of neighbours
CHARTS = (
    # y label, logarithmic, curves: (legend, metric)
    ("loss", True, (("loss", "loss"), ("classification", "classification_loss"), ("box", "box_loss"))),
    ("learning rate", False, (("learning rate", "learning_rate"),)),
    ("gradient norm", True, (("gradient norm", "gradient_norm"),)),
    ("positives per image", False, (("positive anchors per image", "positives_per_image"),)),
)
MOST_LINES = 8  # classes in one chart; with more classes each has a chart of its own
MOST_COLUMNS = 8  # classes in the table of confusions; with more classes the most frequent pairs are listed
# Images drawn of the best and of the worst; their longer side at most, pixels; scale of labels, which are shown small.
MOST_IMAGES, LONGEST, SCALE = 6, 800, 1.6


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
    differing = [name for name in own if paper[name] not in (None, own[name])]  # None is taken from the data
    page = render(
        "run.html",
        title=f"Run {folder.resolve().name}",
        sections=[
            "curves",
            *(["confusion", "images", "classes", "errors"] if errors else ["classes"]),
            "scores",
            "run",
        ],
        state=state(record),
        progress=1.0 if record.summary else record.step / record.config.training.steps,
        tiles=_tiles(record),
        facts=facts(record),
        differences=[(name, show(own[name]), show(paper[name])) for name in differing],
        changes=[(c.get("after_step"), c.get("field")) for c in changes if isinstance(c, dict)],
        settings=[(name, show(value)) for name, value in own.items()],
        curves=learning_curves(record.windows),
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
    return f"Finished after {record.step} steps{took}."


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
            f"{median(waits):.0f} % of the time waiting for data" if waits else "",
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
    return "python " + shlex.join(map(str, words)) if isinstance(words, list) else None


def measured(windows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Returns the values of a metric in the windows that have it."""
    return [window[name] for window in windows if isinstance(window.get(name), int | float)]


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


def learning_curves(windows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the charts of the metrics over the steps; none for fewer than two windows."""
    charts = []
    for label, log_y, curves in CHARTS if len(windows) > 1 else ():
        lines = [(legend, drawn) for legend, metric in curves if (drawn := points(windows, metric))]
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
    errors, scores, kinds = analysis.errors, [], []
    for k, name in enumerate(analysis.names):
        objects = errors.of_objects[errors.ground_truth.categories == k]
        detections = errors.of_found[errors.found.categories == k]
        levels = (analysis.precision[t, :, k] for t in (slice(None), *IOU_INDEX.values()))
        aps = [score_text(float(p.mean()) if (p > -1).all() else None) for p in levels]
        scores.append([name, str((objects != LEFT_OUT).sum()), str(len(detections)), *aps])
        counts = [((objects if kind == MISSED else detections) == kind).sum() for kind in (RIGHT, *range(len(KINDS)))]
        kinds.append([name, *map(str, counts)])
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

    pooled, few = (
        line("all classes together", error_analysis.pooled_precision(analysis.errors)),
        len(defined) <= MOST_LINES,
    )
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
