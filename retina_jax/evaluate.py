"""A run assessed at a step: detections over a dataset, COCO scores, pictures, all in the run's folder."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from retina_jax import detector as tta
from retina_jax import distributed
from retina_jax.console import log, warn
from retina_jax.data.classes import category_ids
from retina_jax.data.decoding import image_of
from retina_jax.data.pipeline import Batch, eval_batches
from retina_jax.data.source import Source
from retina_jax.detector import Detector, ImageDetections
from retina_jax.errors import reason
from retina_jax.evaluation.coco_scores import Scores, coco_results, evaluate_coco
from retina_jax.evaluation.drawing import contact_sheet, draw
from retina_jax.runs.files import DiskError
from retina_jax.runs.folder import Run, write_json
from retina_jax.training.compilation import COMPILED, compile_events, seconds

Pairs = list[tuple[int, ImageDetections]]
"""Index of an image and what was found in it, once for each version asked (`retina_jax.detector`)."""


def assess(
    run: Run,
    detector: Detector,
    source: Source,
    step: int,
    variant: str = "",
    settings: Mapping[str, Any] | None = None,
    check: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> Scores:
    """Detect on `source`, score against its own ground truth by image id, write what was found, return the scores.

    The run's classes are found in the data as `classes.match` does; detections of one that `source` lacks are left out.
    Several hosts share the images, each has all detections and scores afterwards, and host 0 writes. Raises ConfigError,
    before anything is detected, if the data has boxes of a category that is none of the run's classes.

    Writes RUN/evaluation/ (not if `source` is unlabelled: all scores are None), RUN/detections/ (COCO results format) and
    RUN/pictures/ for `step`;
    `variant` is appended to the names, for scores that are not of the run's own setting; `settings` are those that differ,
    by their dotted names, and stand with the scores. `check` passes batches on, and may end it all.
    """
    ids = category_ids(run.categories, source, f"data.val_annotations {source.name}")
    in_data = np.array([category_id is not None for category_id in ids], bool)
    training = run.config.training
    limit = min(training.eval_images or len(source), len(source))
    shards = detector.driver.shards
    wanted = training.eval_batch_size or run.config.data.batch_size
    batch_size = -(-wanted // shards) * shards
    sizes = [(record.height, record.width) for record in source.records]

    of_sizes = [
        eval_batches(source, data, batch_size=batch_size, limit=limit, **distributed.share())
        for data in tta.sizes(detector.config)
    ]
    started = time.monotonic()
    versions: Pairs = []
    with compile_events() as events:
        for batches in of_sizes:
            of_host = list(detector.detect_batches(check(batches), sizes))
            versions += _of_all_hosts(of_host, detector.config.detection.max_detections)
    found = detector.merged(versions)
    elapsed = time.monotonic() - started
    # A bad image that was skipped is one in which nothing was found: its objects count as missed.
    unread = set(range(limit)) - set(found)
    if unread:
        warn(f"{len(unread)} images could not be read and score as images without detections")
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
        found |= {index: ImageDetections(*nothing) for index in unread}
    results = []
    for index, detections in sorted(found.items()):
        image_id = source.records[index].image_id
        known = in_data[detections.labels]
        boxes_xyxy, labels = detections.boxes_xyxy[known], detections.labels[known]
        results += coco_results(image_id, boxes_xyxy, detections.scores[known], labels, ids)
    image_ids = [record.image_id for record in source.records[:limit]]
    evaluated_ids, evaluator = [source.records[index].image_id for index in found], run.config.training.evaluator
    scores = evaluate_coco(source.truth, results, image_ids, evaluated_ids, evaluator)
    if distributed.first():
        write_json(run.path("detections", step, f"{variant}.json"), results)
        if source.labelled:
            write_json(
                run.path("evaluation", step, f"{variant}.json"),
                {"step": step, "images": len(image_ids), **scores.summary, "per_class": scores.per_class}
                | ({"settings": dict(settings)} if settings else {}),
            )
        _write_pictures(run, detector, source, found, unread, step, variant)
    compiled = f", {events[seconds(COMPILED)]:.1f} of them to compile detection" if events[COMPILED] else ""
    speed = f"{len(image_ids) / max(elapsed, 1e-9):.1f} img/s"
    log(f"evaluated {len(image_ids)} images in {elapsed:.1f} s ({speed}{compiled})")
    return scores


def _of_all_hosts(own: Pairs, most: int) -> Pairs:
    """The detections of all hosts, given this one's; `most` is how many one of them can have."""
    if not distributed.several():
        return own
    rows = int(distributed.gather(np.array([len(own)], np.int32)).max())
    indices, counts = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
    boxes, scores = np.zeros((rows, most, 4), np.float32), np.zeros((rows, most), np.float32)
    labels = np.zeros((rows, most), np.int32)
    for row, (index, detections) in enumerate(own):
        indices[row], counts[row] = index, (n := len(detections.scores))
        boxes[row, :n], scores[row, :n] = detections.boxes_xyxy, detections.scores
        labels[row, :n] = detections.labels
    gathered = distributed.gather((indices, counts, boxes, scores, labels))
    return [
        (int(index), ImageDetections(boxes[:n], scores[:n], labels[:n]))
        for index, n, boxes, scores, labels in zip(*gathered, strict=True)
        if index >= 0
    ]


def _write_pictures(
    run: Run,
    detector: Detector,
    source: Source,
    found: dict[int, ImageDetections],
    unread: set[int],
    step: int,
    variant: str,
) -> None:
    """The first images with their detections and, thin, the truth; and all of them on one sheet."""
    drawn = []
    readable = (index for index in sorted(found) if index not in unread)
    for index in itertools.islice(readable, run.config.training.pictures):
        record, detections = source.records[index], found[index]
        image = image_of(source, index)
        good = detections.scores >= max(0.3, run.config.detection.score_threshold)
        picture = draw(
            image,
            detections.boxes_xyxy[good],
            detections.labels[good],
            detections.scores[good],
            class_names=detector.shown_names,
            truth_boxes_xyxy=record.boxes_xyxy,
        )
        write_picture(run.path("pictures", step, f"{variant}_{record.image_id}.png"), picture)
        drawn.append(np.asarray(picture))
    if drawn:
        write_picture(run.path("pictures", step, f"{variant}.png"), contact_sheet(drawn))


def write_picture(path: Path, picture: UInt8[np.ndarray, "H W 3"]) -> None:
    """Raises DiskError where it cannot be written."""
    try:
        Image.fromarray(picture).save(path)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {reason(error)}") from error


# Detections as COCO's evaluation server takes them, for images whose labels are not public (test-dev).


def write_submission(run: Run, step: int, variant: str, annotations: str) -> Path:
    """Writes RUN/detections/detections_<split>_<run>_results.json from what `assess` wrote there; returns its path.

    The split is the name of the file `annotations` (image_info_test-dev2017.json: test-dev2017). Coordinates are rounded to
    hundredths of a pixel, scores to six digits. An earlier submission of the run is replaced.
    """
    split = Path(annotations).stem.removeprefix("image_info_")
    path = run.folder / "detections" / f"detections_{split}_{run.folder.resolve().name}_results.json"
    if distributed.first():
        results = json.loads(run.path("detections", step, f"{variant}.json").read_text())
        rounded = [
            {**r, "bbox": [round(side, 2) for side in r["bbox"]], "score": round(r["score"], 6)} for r in results
        ]
        write_json(path, rounded, indent=None)
    return path
