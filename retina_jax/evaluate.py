"""Evaluates a detector on a dataset: detections, COCO scores and pictures, written to a run's folder."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from retina_jax import distributed
from retina_jax.console import log, warn
from retina_jax.data.classes import category_ids, class_indices
from retina_jax.data.decoding import image_of
from retina_jax.data.pipeline import Batch, eval_batches
from retina_jax.data.source import Source
from retina_jax.detector import Detector, ImageDetections, sizes
from retina_jax.evaluation.coco_scores import Scores, coco_results, evaluate_coco, score_text
from retina_jax.evaluation.drawing import contact_sheet, draw
from retina_jax.evaluation.precision_recall import MAX_DETECTIONS
from retina_jax.losses.total import ImageLosses, mean_losses
from retina_jax.runs.files import write_bytes, write_json
from retina_jax.runs.folder import Run
from retina_jax.training.compilation import COMPILED, compile_events
from retina_jax.training.parallel import local_rows
from retina_jax.training.step import Inputs

NO_DETECTIONS = ImageDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))


def evaluate(
    run: Run,
    detector: Detector,
    source: Source,
    step: int,
    variant: str = "",
    settings: Mapping[str, Any] | None = None,
    check: Callable[[Iterable[Batch]], Iterable[Batch]] = distributed.counted,
) -> Scores:
    """Detects on `source`, scores against its ground truth, writes the results to the run's folder, returns the scores.

    Writes detections/ (COCO results format), evaluation/ and pictures/ for `step`; of an unlabelled `source` all scores are
    None, and no evaluation is written. Classes are matched by `class_indices`; detections of a class that `source` lacks
    are left out. Several hosts share the images and return the same scores; host 0 writes. `variant` is appended to the
    names of files, for scores with other `settings` than the run's (by dotted name), which are saved with them. `check`
    passes batches on, and may raise to end the evaluation.

    Raises ConfigError, before detection, if the data has boxes of a category that is none of the run's classes.
    """
    ids = category_ids(run.categories, source, f"data.val_annotations {source.name}")
    training = run.config.training
    records = source.records[: training.eval_images or None]
    found = _detect(run, detector, source, len(records), check)
    pictured = dict(itertools.islice(found.items(), training.pictures))
    if unread := set(range(len(records))) - set(found):
        warn(f"{len(unread)} images could not be read and score as images without detections")
        found |= dict.fromkeys(unread, NO_DETECTIONS)
    results = []
    for index, d in sorted(found.items()):
        results += coco_results(records[index].image_id, d.boxes_xyxy, d.scores, d.labels, ids)
    scores = evaluate_coco(source.ground_truth, results, [record.image_id for record in records], training.evaluator)
    if scores.ap_of_all is not None:
        found_in = (
            f"images have up to {scores.objects} objects of a class, of which COCO's AP counts {MAX_DETECTIONS[-1]}"
        )
        log(f"{found_in}; AP of all detections: {score_text(scores.ap_of_all)}")
    if distributed.is_primary():
        write_json(run.path("detections", step, f"{variant}.json"), results, compact=True)
        if source.labelled:
            values = {"step": step, "images": len(records), **scores.summary, "per_class": scores.per_class}
            values |= {"f1_threshold": scores.f1_threshold} | ({"settings": dict(settings)} if settings else {})
            values |= {} if scores.ap_of_all is None else {"AP_of_all_detections": scores.ap_of_all}
            write_json(run.path("evaluation", step, f"{variant}.json"), values)
        _write_pictures(run, detector, source, pictured, step, variant)
    return scores


def _detect(
    run: Run, detector: Detector, source: Source, count: int, check: Callable[[Iterable[Batch]], Iterable[Batch]]
) -> dict[int, ImageDetections]:
    """Returns the detections in the readable ones of the first `count` images, by ascending index, of all hosts."""
    batch_size = _batch_size(run, detector)
    records = source.records[:count]
    tiles = [tile for i, record in enumerate(records) for tile in detector.tiles(i, record.height, record.width)]
    original_sizes = [(tile.height, tile.width) for tile in tiles]
    parts = ""
    if side := detector.config.data.tile:
        source = replace(source, records=records).tiled(side, detector.config.data.tile_overlap)
        parts = f" in {len(tiles):,} tiles"
    most, objects = (
        detector.config.detection.max_detections,
        max((len(r.labels) for r in source.records[: len(tiles)]), default=0),
    )
    if objects > most:
        fix = f"set --detection.max-detections {objects} or more, or cut images into smaller tiles (--data.tile)"
        warn(
            f"{source.name}: up to {objects} objects in an image or tile, but detection.max_detections is {most}; {fix}"
        )
    log(f"evaluating {count:,} images of {source.name}{parts} ...")
    started, of_hosts = time.monotonic(), []
    with compile_events() as events:
        for data in sizes(detector.config):
            batches = eval_batches(source, data, batch_size=batch_size, limit=len(tiles), **distributed.share())
            of_hosts += distributed.exchange(list(detector.detect_batches(check(batches), original_sizes)))
    found = detector.merged(itertools.chain(*of_hosts), tiles)
    elapsed = time.monotonic() - started
    compiled = f", {events[COMPILED + ' seconds']:.1f} of them to compile detection" if events[COMPILED] else ""
    log(f"evaluated {count} images in {elapsed:.1f} s ({count / max(elapsed, 1e-9):.1f} img/s{compiled})")
    return dict(sorted(found.items()))


def _batch_size(run: Run, detector: Detector) -> int:
    """Returns the images per evaluation step, a multiple of the devices."""
    num_devices = detector.driver.num_devices
    return -(-(run.config.training.eval_batch_size or run.config.data.batch_size) // num_devices) * num_devices


def validation_loss(
    run: Run,
    detector: Detector,
    source: Source,
    ema: float,
    check: Callable[[Iterable[Batch]], Iterable[Batch]] = distributed.counted,
) -> dict[str, float]:
    """Returns the training loss of `detector` on the readable images that `evaluate` scores (`losses.total.mean_losses`).
    `ema` is the state's running mean of positive anchors. Batch size, devices and hosts do not change the result. With
    data.tile each tile counts as an image, as in training. All boxes count, data.max_boxes or not."""
    data, driver = replace(run.config.data, max_boxes="auto"), detector.driver
    source = replace(source, records=source.records[: run.config.training.eval_images or None])
    source = source.tiled(data.tile, data.tile_overlap) if data.tile else source
    own = [-1 if index is None else index for index in class_indices(source.categories, run.categories)]
    labels = np.array([*own, -1], np.int32)  # the last one is that of padded rows, -1
    batches = eval_batches(source, data, batch_size=_batch_size(run, detector), **distributed.share())
    found: list[list[float]] = []
    for batch in check(batches):
        inputs = driver.shard_batch(Inputs.of(batch._replace(labels=labels[batch.labels])))
        rows = np.stack(local_rows(driver.losses(detector.prepared, inputs)), axis=1)
        found += rows[batch.valid].tolist()
    every = sorted(itertools.chain(*distributed.exchange(found)))  # in one order, whichever host had an image
    columns = np.array(every, np.float64).reshape(-1, len(ImageLosses._fields))
    images_per_microbatch = run.config.data.batch_size / driver.num_microbatches
    return mean_losses(ImageLosses(*columns.T), run.config.loss, ema / images_per_microbatch)


def _write_pictures(
    run: Run, detector: Detector, source: Source, found: Mapping[int, ImageDetections], step: int, variant: str
) -> None:
    """Writes images with their detections and dashed ground truth: one file each, and one with all."""
    drawn = []
    for index, detections in found.items():
        record, good = source.records[index], detections.scores >= max(0.3, run.config.detection.score_threshold)
        arrays = (of[good] for of in (detections.boxes_xyxy, detections.labels, detections.scores))
        names, boxes = detector.shown_names, record.boxes_xyxy
        drawn.append(draw(image_of(source, index), *arrays, class_names=names, ground_truth_xyxy=boxes))
        write_picture(run.path("pictures", step, f"{variant}_{record.image_id}.png"), drawn[-1])
    if drawn:
        write_picture(run.path("pictures", step, f"{variant}.png"), contact_sheet(drawn))


def write_picture(path: Path, picture: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes an image as PNG. Raises DiskError."""
    write_bytes(path, encoded_png(picture))


def encoded_png(picture: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Returns the content of a PNG file."""
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "png", compress_level=1)  # the quickest
    return encoded.getvalue()


def write_submission(run: Run, step: int, variant: str, annotations: str) -> Path:
    """Writes the detections of `evaluate` for COCO's evaluation server, coordinates rounded to hundredths of a pixel, scores
    to six digits. Returns the path, RUN/detections/detections_SPLIT_RUN_results.json, where SPLIT is from the name of the
    file `annotations` (image_info_test-dev2017.json: test-dev2017)."""
    split = Path(annotations).stem.removeprefix("image_info_")
    path = run.folder / "detections" / f"detections_{split}_{run.folder.resolve().name}_results.json"
    if distributed.is_primary():
        results = msgspec.json.decode(run.path("detections", step, f"{variant}.json").read_bytes())
        for result in results:
            result |= {"bbox": [round(side, 2) for side in result["bbox"]], "score": round(result["score"], 6)}
        write_json(path, results, compact=True)
    return path
