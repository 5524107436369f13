"""Writes a detector to one file, and keeps the file only if it gives the same detections as the original."""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import time
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from retina_jax.config import ConfigError, DataConfig, ScenesConfig
from retina_jax.config_io import override
from retina_jax.console import log, warn
from retina_jax.data.datasets import open_source
from retina_jax.data.decoding import image_of, read_rgb
from retina_jax.data.image_paths import image_files
from retina_jax.data.scenes import VAL, draw_scene
from retina_jax.data.source import DataError
from retina_jax.data.survey import decoding_of_files
from retina_jax.detector import Detector, ImageDetections, versions
from retina_jax.errors import PlainError, reason
from retina_jax.export.loader import FORMAT, PILLOW_FORMAT, STRETCH_FORMAT, ExportedDetector, Found, load
from retina_jax.export.programs import PLATFORMS, padded_shapes, programs
from retina_jax.training.opening import code_commit, package_versions

BOX_TOLERANCE = 1e-4  # of a side of a box, as a share of the longer side of its image: 0.06 pixels of 640
SCORE_TOLERANCE = 1e-3  # maximum difference of a score
RENEW = "scripts/export.py"
MOST_SHAPES = 4  # number of padded shapes up to which each one is tried; each takes time to compile

Images = list[UInt8[np.ndarray, "_ _ 3"]]


class ExportError(PlainError, RuntimeError):
    """Detector that cannot be exported; the message is one line with the reason."""


def export_detector(detector: Detector, path: Path, source: str, images: Images, renew: str = RENEW) -> str:
    """Writes the file, loads it, and keeps it if both give the same detections in `images`; returns the text of `check`.
    `renew` is the command that writes it again, which the loader names before the file expires.

    Raises ExportError if they differ, if the file cannot be written, or if the detector uses test-time augmentation, which
    cannot be exported. Then an older file at `path` stays as it was.
    """
    if versions(detector.config) > 1:
        options = "--detection.no-tta-flip --detection.tta-short-sides"
        raise ExportError(f"test-time augmentation cannot be exported; add {options}")
    if side := detector.config.data.tile:
        warn(f"data.tile {side} is not part of the file: cut images into tiles (data/tiles.py) before its detector")
        config = override(detector.config, {"data.tile": 0})
        detector = replace(detector, driver=replace(detector.driver, config=config))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log(f"exporting the programs for {len(padded_shapes(detector.config.data))} padded shapes ...")
        write_file(temporary, detector, source, renew)
        log(f"detecting with both detectors in {len(images)} images ...")
        text = check(detector, load(str(temporary)), images)
        temporary.replace(path)
    except OSError as error:
        raise ExportError(f"--out {path}: cannot be written: {reason(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return text


def write_file(path: Path, detector: Detector, source: str, renew: str = RENEW) -> None:
    """Writes `detector`, which was loaded from `source`, for loader.py."""
    data, detection = detector.config.data, detector.config.detection
    about = {
        "format": _format_of(data),
        "source": source,
        "step": detector.step,
        "class_names": list(detector.shown_names),
        "category_ids": list(detector.category_ids),
        **{
            k: getattr(data, k) for k in ("short_side", "long_side", "size_rounding", "resize", "resize_rule", "pixels")
        },
        "bits": None if data.bits == "auto" else data.bits,
        "canvases": padded_shapes(data),
        **{k: getattr(detection, k) for k in ("max_detections", "score_threshold")},
        "f1_threshold": detector.f1_threshold,
        "platforms": PLATFORMS,
        "commit": code_commit(),
        "versions": package_versions(),
        "exported": date.today().isoformat(),
        "renew": renew,
    }
    arrays = io.BytesIO()
    # Numbered in the order of the programs' first argument.
    np.savez(arrays, **{f"{i:04d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(detector.variables))})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("about.json", json.dumps(about, indent=1))
        file.writestr("parameters.npz", arrays.getbuffer(), zipfile.ZIP_STORED)
        for name, program in programs(detector):
            file.writestr(f"programs/{name}", program)


def _format_of(data: DataConfig) -> str:
    """Returns the oldest format whose loaders resize as `data` asks."""
    if data.resize_rule == "stretch":
        return STRETCH_FORMAT
    return PILLOW_FORMAT if data.resize == "pillow" else FORMAT


class Comparison(NamedTuple):
    """Differences of the detections of two detectors in the same images."""

    images: int
    detections: int  # of the original detector
    unmatched: int  # detections that only one of them has, except scores at the threshold
    box_difference: float  # largest difference of a side of a matched box, pixels
    score_difference: float  # largest difference of a matched score

    def __str__(self) -> str:
        result = f"{self.unmatched} found by only one of the two"
        if not self.unmatched:
            differences = f"{self.box_difference:.2g} pixels, scores by at most {self.score_difference:.2g}"
            result = f"all found by both, boxes differ by at most {differences}"
        return f"{self.images} images, {self.detections} detections: {result}"


def check(original: Detector, exported: ExportedDetector, images: Images) -> str:
    """Returns how the detections of both differ, and how fast both are; ExportError if they differ or if there are none."""
    made, rule = for_other_shapes(exported, images), original.config.detection
    tried = [*images, *made]
    threshold = rule.score_threshold if rule.threshold_coarsest else 0.0
    found, expected = ([detector.detect([image])[0] for image in tried] for detector in (exported, original))
    compared = compare(expected, found, tried, threshold, rule.max_detections)
    if compared.unmatched:
        raise ExportError(f"the exported detector gives other detections than the original and is not kept: {compared}")
    if compared.detections == 0:
        found = f"the detector found nothing in {len(tried)} images, so nothing was compared"
        raise ExportError(f"{found}; give other images with --images")
    text = f"{compared}" + (f"; {len(made)} images were made from the first, for other padded shapes" if made else "")
    shapes = len(exported.about["canvases"])
    if untried := shapes - len(_shapes_of(exported, tried)):
        text += f"; {untried} of {shapes} padded shapes were not tried"
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(max(10, len(images))):
        # In turn, because the machine's speed may change.
        for detector, seconds in zip((original, exported), taken, strict=True):
            start = time.perf_counter()
            detector.detect([images[turn % len(images)]])
            seconds.append(1e3 * (time.perf_counter() - start))
    before, after = (f"{statistics.median(seconds):.1f} ms" for seconds in taken)
    return f"{text}\nmedian time per image: {before} original, {after} exported ({jax.devices()[0].device_kind})"


def _shapes_of(exported: ExportedDetector, images: Images) -> set[tuple[int, int]]:
    return {exported.padded_shape(exported.resized_size(*image.shape[:2])) for image in images}


def for_other_shapes(exported: ExportedDetector, images: Images) -> Images:
    """Returns the first image, repeated and cropped, for each padded shape that none has; [] for more than MOST_SHAPES."""
    shapes = set(map(tuple, exported.about["canvases"]))
    if not images or len(shapes) > MOST_SHAPES:
        return []
    height, width = images[0].shape[:2]
    others = sorted(shapes - _shapes_of(exported, images))
    return [images[0][np.arange(h) % height][:, np.arange(w) % width] for h, w in others]


def compare(
    original: Sequence[ImageDetections], exported: Sequence[Found], images: Images, threshold: float, most: int
) -> Comparison:
    """Matches the detections of each image one to one: same label, box and score within their tolerances.

    A detection without a match is not counted if its score is within SCORE_TOLERANCE of the limit below which the other
    detector drops it: the threshold, or its last score if it has `most` of them.
    """
    unmatched, box_difference, score_difference = 0, 0.0, 0.0
    for one, other, image in zip(original, exported, images, strict=True):
        tolerance = BOX_TOLERANCE * max(image.shape[:2])
        boxes = np.abs(one.boxes_xyxy[:, None] - other.boxes_xyxy[None]).max(axis=2, initial=0.0)
        scores = np.abs(one.scores[:, None] - other.scores[None])
        fits = (boxes <= tolerance) & (scores <= SCORE_TOLERANCE) & (one.labels[:, None] == other.labels[None])
        alone, free = np.ones(len(one.labels), bool), np.ones(len(other.labels), bool)
        for i in range(len(one.labels)):
            if (candidates := np.flatnonzero(fits[i] & free)).size:
                nearest = candidates[np.argmin(boxes[i, candidates])]
                alone[i] = free[nearest] = False
                box_difference = max(box_difference, float(boxes[i, nearest]))
                score_difference = max(score_difference, float(scores[i, nearest]))
        for mine, left, others in ((one.scores, alone, other.scores), (other.scores, free, one.scores)):
            limit = others.min() if len(others) >= most else threshold
            unmatched += int((mine[left] > limit + SCORE_TOLERANCE).sum())
    detections = sum(len(one.labels) for one in original)
    return Comparison(len(images), detections, unmatched, box_difference, score_difference)


def images_for(detector: Detector, files: Path | None, count: int) -> tuple[Images, str]:
    """Returns up to `count` images of `files`, else readable ones of the validation data, else scenes; and what they are."""
    images, errors = [], []
    if files is not None:
        found = list(image_files([files], out=Path(os.devnull)))[:count]  # nothing is drawn
        decoding = decoding_of_files(found, detector.config.data)
        images = [read_rgb(file, decoding) for file in found]
        return images, f"{len(images)} images of {files}"
    try:
        source = open_source(detector.config.data, "val")
        for index in range(min(count, len(source))):
            try:
                images.append(image_of(source, index))
            except (DataError, OSError) as error:
                errors.append(reason(error))
        left_out = f"{len(errors)} unreadable ones left out, the last one: {errors[-1]}" if errors else ""
        if images:
            return images, f"the first {len(images)} images of {source.name}" + (f" ({left_out})" if left_out else "")
        missing = f"{source.name}: {left_out or 'no images'}"
    except (ConfigError, DataError, OSError) as error:
        missing = reason(error)
    scenes = ScenesConfig(size=max(64, detector.config.data.short_side))
    return [draw_scene(scenes, VAL, i).image for i in range(count)], f"{count} generated scenes ({missing})"
