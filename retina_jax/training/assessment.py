"""A run assessed at a step: detections over a dataset, COCO scores, pictures, all in the run's folder."""

from __future__ import annotations

import itertools
import time
from collections.abc import Container

import numpy as np
from PIL import Image

from retina_jax.data.decoding import to_rgb
from retina_jax.data.pipeline import eval_batches
from retina_jax.data.source import Source
from retina_jax.detector import Detector, ImageDetections
from retina_jax.evaluation import Scores, coco_results, evaluate_coco
from retina_jax.training.run import Run, write_json
from retina_jax.visualize import contact_sheet, draw


def assess(run: Run, detector: Detector, source: Source, step: int, variant: str = "") -> Scores:
    """Detect on `source`, score against its own ground truth by image id, write what was found, return the scores.

    Classes meet by name; detections of a class that `source` does not have are left out.

    Writes RUN/evaluation/, RUN/detections/ (COCO results format) and RUN/pictures/ for `step`;
    `variant` is appended to the names, for scores that are not of the run's own setting.
    """
    training = run.config.training
    limit = training.eval_images or len(source)
    shards = detector.driver.shards
    wanted = training.eval_batch_size or run.config.data.batch_size
    batch_size = -(-wanted // shards) * shards
    batches = eval_batches(source, run.config.data, batch_size=batch_size, limit=limit)
    sizes = [(record.height, record.width) for record in source.records]

    started = time.monotonic()
    pairs = list(detector.detect_batches(batches, sizes))
    found: dict[int, ImageDetections] = dict(pairs)
    seconds = time.monotonic() - started
    # A bad image that was skipped is one in which nothing was found: its objects count as missed.
    unread = [i for i in range(min(limit, len(source))) if i not in found and source.where(i) in batches.skipped]
    if unread:
        print(f"warning: {len(unread)} images could not be read and score as images without detections")
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
        pairs += [(index, ImageDetections(*nothing)) for index in unread]
        found = dict(pairs)
    by_name = dict(zip(source.class_names, source.category_ids, strict=True))
    category_ids = [by_name.get(name, -1) for name in detector.class_names]
    results = []
    for index, detections in sorted(found.items()):
        image_id = source.records[index].image_id
        known = np.array([category_ids[label] >= 0 for label in detections.labels], bool)
        boxes_xyxy, labels = detections.boxes_xyxy[known], detections.labels[known]
        results += coco_results(image_id, boxes_xyxy, detections.scores[known], labels, category_ids)
    image_ids = [record.image_id for record in source.records[:limit]]
    scores = evaluate_coco(source.truth, results, image_ids, [source.records[index].image_id for index, _ in pairs])
    write_json(run.path("detections", step, f"{variant}.json"), results)
    write_json(
        run.path("evaluation", step, f"{variant}.json"),
        {"step": step, "images": len(image_ids), **scores.summary, "per_class": scores.per_class},
    )
    _write_pictures(run, detector, source, found, batches.skipped, step, variant)
    print(f"evaluated {len(image_ids)} images in {seconds:.1f} s ({len(image_ids) / max(seconds, 1e-9):.1f} img/s)")
    return scores


def _write_pictures(
    run: Run,
    detector: Detector,
    source: Source,
    found: dict[int, ImageDetections],
    skipped: Container[str],
    step: int,
    variant: str,
) -> None:
    """The first images with their detections and, thin, the truth; and all of them on one sheet."""
    drawn = []
    readable = (index for index in sorted(found) if source.where(index) not in skipped)
    for index in itertools.islice(readable, run.config.training.pictures):
        record, detections = source.records[index], found[index]
        image = to_rgb(source.read(index), expected_size=(record.width, record.height))
        good = detections.scores >= max(0.3, run.config.detection.score_threshold)
        picture = draw(
            image,
            detections.boxes_xyxy[good],
            detections.labels[good],
            detections.scores[good],
            class_names=detector.class_names,
            truth_boxes_xyxy=record.boxes_xyxy,
        )
        Image.fromarray(picture).save(run.path("pictures", step, f"{variant}_{record.image_id}.png"))
        drawn.append(np.asarray(picture))
    if drawn:
        Image.fromarray(contact_sheet(drawn)).save(run.path("pictures", step, f"{variant}.png"))
