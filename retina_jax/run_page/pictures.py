"""The images that went best and worst, drawn: their truth beside what was found."""

from __future__ import annotations

from html import escape

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from retina_jax.data.decoding import image_of
from retina_jax.data.source import BadImage
from retina_jax.pages.page import paragraphs, picture
from retina_jax.run_page.error_breakdown import KINDS, LEFT_OUT, RIGHT
from retina_jax.run_page.findings import Findings
from retina_jax.run_page.ranking import best_and_worst, count_by_image
from retina_jax.visualize import draw

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
