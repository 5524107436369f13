"""The page of a run, put together."""

from __future__ import annotations

from html import escape
from pathlib import Path

from retina_jax.errors import PlainError
from retina_jax.pages.page import page, paragraphs
from retina_jax.run_page.classes import ap_of_classes, precision_recall
from retina_jax.run_page.curves import evaluations, learning_curves
from retina_jax.run_page.facts import headline, what_was_run
from retina_jax.run_page.findings import find
from retina_jax.run_page.mistakes import error_breakdown
from retina_jax.run_page.pictures import best_and_worst_images
from retina_jax.run_page.ranking import operating_point
from retina_jax.run_page.record import read_record
from retina_jax.run_page.script import SCRIPT, STYLE


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
