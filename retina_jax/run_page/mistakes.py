"""The error breakdown as a section: what each kind of error is, how often it occurs, what mending it is worth."""

from __future__ import annotations

from collections import Counter
from html import escape

import numpy as np

from retina_jax.pages.page import paragraphs, table
from retina_jax.run_page.error_breakdown import (
    CLASSIFICATION,
    KINDS,
    LEFT_OUT,
    MISSED,
    RIGHT,
    ap_without,
    mean_ap,
    mended_ap,
)
from retina_jax.run_page.findings import Findings

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
