"""Writes a detector to one file, and keeps the file only if it gives the same detections as the original."""

from __future__ import annotations

import io
import json
import os
import statistics
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from retina_jax.config import Config, ConfigError, ScenesConfig
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
from retina_jax.export.card import CARD, card, facts
from retina_jax.export.loader import (
    BFLOAT16_FORMAT,
    FORMAT,
    PILLOW_FORMAT,
    RENEW_DAYS,
    STRETCH_FORMAT,
    ExportedDetector,
    Found,
    load,
)
from retina_jax.export.programs import PLATFORMS, padded_shapes, programs
from retina_jax.runs.files import DiskError, hidden_folder

RENEW = "scripts/export.py"
MOST_SHAPES = 4  # number of padded shapes up to which each one is tried; each takes time to compile

Images = list[UInt8[np.ndarray, "_ _ 3"]]
Detect = Callable[[Images], Sequence[Found]]


class ExportError(PlainError, RuntimeError):
    """Detector that cannot be exported; the message is one line with the reason."""


class Tolerance(NamedTuple):
    """Largest differences of two detections that count as equal."""

    score: float
    pixels: float = 0.0  # of a side of a box
    share: float = 0.0  # of a side of a box, as a share of the longer side of its image

    def of(self, image: UInt8[np.ndarray, "_ _ 3"]) -> float:
        """Returns the tolerance of a side of a box, pixels."""
        return self.pixels + self.share * max(image.shape[:2])


PROGRAMS, ONNX = Tolerance(score=1e-3, share=1e-4), Tolerance(score=1e-5, pixels=0.01)
"""Of the two formats. 1e-4 are 0.06 pixels of 640."""


def export_detector(
    detector: Detector,
    path: Path,
    source: str,
    images: Images,
    renew: str = RENEW,
    licence: str = "",
    onnx: bool = False,
) -> str:
    """Writes the file, loads it, and keeps it if both give the same detections in `images`; returns the text of `check`.
    `renew` is the command that writes it again, which the loader names before the file expires.

    Raises ExportError if they differ, if the file cannot be written, if the detector uses test-time augmentation, which
    cannot be exported, or if a package is missing. Then an older file at `path` stays as it was.
    """
    if versions(detector.config) > 1:
        options = "--detection.no-tta-flip --detection.tta-short-sides"
        raise ExportError(f"test-time augmentation cannot be exported; add {options}")
    if side := detector.config.data.tile:
        warn(f"data.tile {side} is not part of the file: cut images into tiles (data/tiles.py) before its detector")
        config = override(detector.config, {"data.tile": 0})
        detector = replace(detector, driver=replace(detector.driver, config=config))
    write = _write_onnx if onnx else _write_programs
    try:
        with hidden_folder(path.with_name(f".{path.name}.writing"), path) as hidden:
            text = write(hidden / path.name, detector, facts(detector, source, renew, licence), images)
            (hidden / path.name).replace(path)
    except DiskError as error:
        raise ExportError(f"--out {error}") from None
    except OSError as error:
        raise ExportError(f"--out {path}: cannot be written: {reason(error)}") from None
    return text


def _write_programs(path: Path, detector: Detector, about: dict[str, Any], images: Images) -> str:
    log(f"exporting the programs for {len(padded_shapes(detector.config.data))} padded shapes ...")
    write_file(path, detector, about)
    log(f"detecting with both detectors in {len(images)} images ...")
    exported = load(str(path))
    made = for_other_shapes(exported, images)
    text = check(detector, exported.detect, images, made, PROGRAMS)
    shapes = len(exported.about["canvases"])
    untried = shapes - len(_shapes_of(exported, [*images, *made]))
    return f"{text}\n{untried} of {shapes} padded shapes were not tried" if untried else text


def _write_onnx(path: Path, detector: Detector, about: dict[str, Any], images: Images) -> str:
    try:
        from retina_jax.export import onnx_file  # only this format needs these packages
    except ModuleNotFoundError as error:
        raise ExportError(f"--format onnx: needs the package {error.name}; pip install 'retina-jax[onnx]'") from None
    detector = onnx_file.in_float32(detector)
    log("writing the graph ...")
    onnx_file.write_model(path, detector, about, card(about))
    log(f"detecting with both detectors in {len(images)} images ...")
    # Also the other orientation and another size, for which other branches of the graph may be taken.
    made = [image for image in (images[0].swapaxes(0, 1), images[0][:-1, :-3]) if image.size]
    return check(detector, onnx_file.OnnxDetector(str(path)).detect, images, made, ONNX)


def write_file(path: Path, detector: Detector, about: dict[str, Any]) -> None:
    """Writes `detector` and the facts about it for loader.py, with a model card."""
    data = detector.config.data
    about = {
        "format": _format_of(detector.config),
        **about,
        "canvases": padded_shapes(data),
        "platforms": PLATFORMS,
        "renew_before": (date.fromisoformat(about["exported"]) + timedelta(days=RENEW_DAYS)).isoformat(),
    }
    arrays, weights = io.BytesIO(), detector.driver.prepare(detector.variables)
    # Numbered in the order of the programs' first argument.
    np.savez(arrays, **{f"{i:04d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(weights))})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(CARD, card(about))
        file.writestr("about.json", json.dumps(about, indent=1))
        file.writestr("parameters.npz", arrays.getbuffer(), zipfile.ZIP_STORED)
        for name, program in programs(detector, weights):
            file.writestr(f"programs/{name}", program)


def _format_of(config: Config) -> str:
    """Returns the oldest format whose loaders read the parameters, and resize as the config asks."""
    if config.model.dtype == "bfloat16":
        return BFLOAT16_FORMAT
    if config.data.resize_rule == "stretch":
        return STRETCH_FORMAT
    return PILLOW_FORMAT if config.data.resize == "pillow" else FORMAT


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


def check(original: Detector, detect: Detect, images: Images, made: Images, tolerance: Tolerance) -> str:
    """Returns how the detections of both differ, and how fast both are; ExportError if they differ or if there are none.
    `detect` is the exported detector's; `made` are images made from the first one of `images`, which alone are timed."""
    tried, rule = [*images, *made], original.config.detection
    threshold = rule.score_threshold if rule.threshold_coarsest else 0.0
    expected = [original.detect([image])[0] for image in tried]
    compared = compare(expected, detect(tried), tried, threshold, rule.max_detections, tolerance)
    if compared.unmatched:
        raise ExportError(f"the exported detector gives other detections than the original and is not kept: {compared}")
    if compared.detections == 0:
        found = f"the detector found nothing in {len(tried)} images, so nothing was compared"
        raise ExportError(f"{found}; give other images with --images")
    text = f"{compared}" + (f"; {len(made)} images were made from the first" if made else "")
    taken: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for turn in range(max(10, len(images))):
        # In turn, because the machine's speed may change.
        for run, seconds in zip((original.detect, detect), taken, strict=True):
            start = time.perf_counter(), time.process_time()
            run([images[turn % len(images)]])
            seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    before, after = (
        "{:.1f} ms ({:.1f} ms of CPU time)".format(
            *(1e3 * statistics.median(column) for column in zip(*s, strict=True))
        )
        for s in taken
    )
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
    original: Sequence[ImageDetections],
    exported: Sequence[Found],
    images: Images,
    threshold: float,
    most: int,
    tolerance: Tolerance,
) -> Comparison:
    """Matches the detections of each image one to one: same label, box and score within their tolerances.

    A detection without a match is not counted if its score is within the tolerance of the limit below which the other
    detector drops it: the threshold, or its last score if it has `most` of them.
    """
    unmatched, box_difference, score_difference = 0, 0.0, 0.0
    for one, other, image in zip(original, exported, images, strict=True):
        boxes = np.abs(one.boxes_xyxy[:, None] - other.boxes_xyxy[None]).max(axis=2, initial=0.0)
        scores = np.abs(one.scores[:, None] - other.scores[None])
        fits = (
            (boxes <= tolerance.of(image)) & (scores <= tolerance.score) & (one.labels[:, None] == other.labels[None])
        )
        alone, free = np.ones(len(one.labels), bool), np.ones(len(other.labels), bool)
        for i in range(len(one.labels)):
            if (candidates := np.flatnonzero(fits[i] & free)).size:
                nearest = candidates[np.argmin(boxes[i, candidates])]
                alone[i] = free[nearest] = False
                box_difference = max(box_difference, float(boxes[i, nearest]))
                score_difference = max(score_difference, float(scores[i, nearest]))
        for mine, left, others in ((one.scores, alone, other.scores), (other.scores, free, one.scores)):
            limit = others.min() if len(others) >= most else threshold
            unmatched += int((mine[left] > limit + tolerance.score).sum())
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
