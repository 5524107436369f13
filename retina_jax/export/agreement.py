"""Whether a shipped detector answers as the live one does."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from retina_jax.config import ConfigError, ScenesConfig
from retina_jax.data.conventions import Decoding
from retina_jax.data.datasets import open_source
from retina_jax.data.decoding import MAX_PIXELS, image_of, largest_file, to_rgb
from retina_jax.data.image_paths import image_files
from retina_jax.data.reading import read_file
from retina_jax.data.scenes import VAL, draw_scene
from retina_jax.data.source import BadImage, DataError
from retina_jax.data.survey import decoding_of_files
from retina_jax.detector import Detector, ImageDetections
from retina_jax.errors import PlainError, reason
from retina_jax.export.loader import Detector as Shipped
from retina_jax.export.loader import Found

BOX_TOLERANCE = 1e-4
"""Most that a side of a box may differ, as a share of the longer side of its image: 0.06 pixels of 640."""
SCORE_TOLERANCE = 1e-3
"""Most that a score may differ."""

MOST_CANVASES = 4
"""Canvases up to which every one is tried."""


class ExportError(PlainError, RuntimeError):
    """A detector that is not shipped; one line that says why."""


@dataclass(frozen=True)
class Comparison:
    """Of the answers to some images."""

    images: int
    detections: int
    """Of the live detector."""
    strangers: int
    """Detections of either that the other lacks, and that are no matter of a score at the threshold."""
    box_difference: float
    """Largest difference of two sides that belong together, pixels."""
    score_difference: float
    """Largest difference of two scores that belong together."""

    @property
    def agrees(self) -> bool:
        """Whether both say the same."""
        return self.strangers == 0

    def __str__(self) -> str:
        """One line."""
        told = f"{self.images} images, {self.detections} detections: "
        if self.strangers:
            return told + f"{self.strangers} that one of the two lacks"
        return (
            told + f"all found by both, boxes at most {self.box_difference:.2g} pixels apart, "
            f"scores at most {self.score_difference:.2g}"
        )


def check(live: Detector, shipped: Shipped, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> str:
    """What was found on the images by both, and how fast, in two lines.

    Raises ExportError where the answers differ, or where there is none: then nothing was compared.
    """
    made = for_other_canvases(shipped, images)
    asked = [*images, *made]
    rule = live.config.detection
    threshold = rule.score_threshold if rule.threshold_coarsest else 0.0
    answers = [[detector.detect([image])[0] for image in asked] for detector in (live, shipped)]
    compared = compare(*answers, asked, threshold, rule.max_detections)
    if not compared.agrees:
        raise ExportError(f"the shipped detector answers otherwise than the live one and is not kept: {compared}")
    if compared.detections == 0:
        raise ExportError(
            f"nothing was found on {len(asked)} images, so nothing could be compared; name others: --images"
        )
    own, its = seconds_of_each((live, shipped), images)
    told = f"{compared}" + (f"; {len(made)} of them made of the first, for canvases that none had" if made else "")
    if untried := len(shipped.about["canvases"]) - len(canvases_met(shipped, asked)):
        told += f"; {untried} of {len(shipped.about['canvases'])} canvases were tried by none"
    device = jax.devices()[0].device_kind
    return f"{told}\none image takes {1e3 * own:.1f} ms live and {1e3 * its:.1f} ms shipped, in the median ({device})"


def canvases_met(shipped: Shipped, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> set[tuple[int, int]]:
    """The (height, width) that the images are put on."""
    return {shipped.canvas(shipped.resized_size(*image.shape[:2])) for image in images}


def for_other_canvases(
    shipped: Shipped, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]
) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """An image for each canvas that none of `images` is put on: the first of them, repeated and cut to the canvas's sides.

    None where there are more canvases than `data.buckets` can make: each takes its time to compile.
    """
    canvases = [(height, width) for height, width in shipped.about["canvases"]]
    met = canvases_met(shipped, images)
    if not images or len(canvases) > MOST_CANVASES:
        return []
    height, width, _ = images[0].shape
    wrapped = {
        (h, w): [(0, max(0, h - height)), (0, max(0, w - width)), (0, 0)] for h, w in canvases if (h, w) not in met
    }
    return [np.pad(images[0], edges, "wrap")[:h, :w] for (h, w), edges in wrapped.items()]


def compare(
    live: Sequence[ImageDetections],
    shipped: Sequence[Found],
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    threshold: float,
    max_detections: int,
) -> Comparison:
    """Pairs the detections of each image one to one: same label, sides within BOX_TOLERANCE, scores within SCORE_TOLERANCE.

    A detection without a partner counts as a stranger, unless its score is within SCORE_TOLERANCE of the edge below which
    the other had to drop it: the threshold, or where the other is full its last score.
    """
    strangers, boxes_apart, scores_apart = 0, 0.0, 0.0
    for one, other, image in zip(live, shipped, images, strict=True):
        tolerance = BOX_TOLERANCE * max(image.shape[:2])
        apart = np.abs(one.boxes_xyxy[:, None] - other.boxes_xyxy[None]).max(axis=2, initial=0.0)
        scores = np.abs(one.scores[:, None] - other.scores[None])
        fits = (apart <= tolerance) & (scores <= SCORE_TOLERANCE) & (one.labels[:, None] == other.labels[None])
        free = np.ones(len(other.labels), bool)
        alone = []
        for i in range(len(one.labels)):
            at = np.flatnonzero(fits[i] & free)
            if len(at):
                nearest = at[np.argmin(apart[i, at])]
                free[nearest] = False
                boxes_apart = max(boxes_apart, float(apart[i, nearest]))
                scores_apart = max(scores_apart, float(scores[i, nearest]))
            else:
                alone.append(i)
        for mine, unpaired, others in ((one.scores, alone, other.scores), (other.scores, free, one.scores)):
            edge = others.min() if len(others) >= max_detections else threshold
            strangers += int((mine[unpaired] > edge + SCORE_TOLERANCE).sum())
    found = sum(len(one.labels) for one in live)
    return Comparison(len(images), found, strangers, boxes_apart, scores_apart)


def seconds_of_each(detectors: Sequence[Detector | Shipped], images: Sequence[Any], times: int = 10) -> list[float]:
    """Median seconds that each detector takes for one image, pixels to boxes, in turns so that both see the same machine.

    The images must have been through both before: compiling is not counted.
    """
    taken: list[list[float]] = [[] for _ in detectors]
    for turn in range(max(times, len(images))):
        for detector, seconds in zip(detectors, taken, strict=True):
            seconds.append(_seconds(detector.detect, [images[turn % len(images)]]))
    return [statistics.median(seconds) for seconds in taken]


def _seconds(call: Callable[[Any], Any], argument: Any) -> float:
    start = time.perf_counter()
    call(argument)
    return time.perf_counter() - start


# The images that a shipped detector is tried on.

Images = list[UInt8[np.ndarray, "_ _ 3"]]


def images_for(detector: Detector, files: Path | None, count: int) -> tuple[Images, str]:
    """The first `count` images of `files`, else of the validation data, else generated scenes; and what they are, in words.

    Raises ConfigError or BadImage where `files` are named and cannot be read. Validation images that are not there are no
    error: a detector from elsewhere has none, and a run may have moved to another machine. Broken ones are left out.
    """
    if files is not None:
        found = list(image_files([files], out=Path(os.devnull)))[:count]  # nothing is drawn
        decoding = decoding_of_files(found, detector.config.data)
        return [_read(file, decoding) for file in found], f"{len(found)} images of {files}"
    try:
        source = open_source(detector.config.data, "val")
    except (ConfigError, DataError, OSError) as error:
        return _scenes(detector, count), f"{count} generated scenes ({reason(error)})"
    images, why = [], ""
    broken = 0
    for index in range(min(count, len(source))):
        try:
            images.append(image_of(source, index))
        except (DataError, OSError) as error:
            broken, why = broken + 1, reason(error)
    left_out = f"{broken} that cannot be read left out, the last one: {why}" if broken else ""
    if not images:
        return _scenes(detector, count), f"{count} generated scenes (of {source.name}, {left_out or 'which has none'})"
    return images, f"the first {len(images)} images of {source.name}" + (f" ({left_out})" if left_out else "")


def _scenes(detector: Detector, count: int) -> Images:
    scenes = ScenesConfig(size=max(64, detector.config.data.short_side))
    return [draw_scene(scenes, VAL, i).image for i in range(count)]


def _read(file: Path, decoding: Decoding) -> UInt8[np.ndarray, "_ _ 3"]:
    try:
        return to_rgb(read_file(file, largest_file(MAX_PIXELS)), decoding)
    except OSError as error:
        raise BadImage(f"{file}: {reason(error)}") from None
    except BadImage as error:
        raise BadImage(f"{file}: {error}") from None
