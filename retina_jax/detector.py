"""A trained network, ready to be asked: `load_detector("torchvision:FILE").detect(images)`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree, UInt8

from retina_jax import detector as tta
from retina_jax.config import Config, ConfigError, DataConfig, DetectionConfig
from retina_jax.config_io import override, validate
from retina_jax.data.classes import unique_names
from retina_jax.data.pipeline import LARGE, Batch
from retina_jax.data.transforms import (
    buckets,
    exact_canvas,
    flip_boxes,
    resize,
    resize_large,
    resized_size,
    to_original_pixels,
)
from retina_jax.ops.nms import nms
from retina_jax.runs.folder import read_run
from retina_jax.training.checkpoints import Checkpoints, Step
from retina_jax.training.parallel import Driver, own_rows
from retina_jax.training.state import TrainState
from retina_jax.training.step import Inputs
from retina_jax.weights.importing import import_detector, kind_of


@dataclass(frozen=True)
class ImageDetections:
    """What was found in one image, best first."""

    boxes_xyxy: Float[np.ndarray, "N 4"]
    """Pixels of the original image."""
    scores: Float[np.ndarray, " N"]
    labels: Int[np.ndarray, " N"]
    """Indices into the detector's `class_names`."""
    class_names: tuple[str, ...] = ()
    """Name of the class of each, as in the detector's `shown_names`."""


@dataclass(frozen=True)
class Detector:
    """A network with weights and the names of its classes."""

    driver: Driver
    variables: dict[str, PyTree]
    """Collections `params`, `frozen`, `stats`, placed on the devices."""
    class_names: tuple[str, ...]
    """As the training data has them: names may repeat."""
    category_ids: tuple[int, ...]
    """Category id of each class in the training data."""
    step: int = 0
    """Training steps its weights have seen here; 0 where they come from elsewhere."""

    @classmethod
    def of(
        cls, driver: Driver, state: TrainState, class_names: tuple[str, ...], category_ids: tuple[int, ...]
    ) -> Detector:
        """The detector that a run has come to: its running means where it keeps some, as detection.parameters says."""
        variables = state.detector(driver.config.detection.parameters)
        return cls(driver, variables, class_names, category_ids, int(state.step))

    @cached_property
    def shown_names(self) -> tuple[str, ...]:
        """Unique name of each class: one that repeats carries its category id, "wheel (1)"."""
        return unique_names(list(zip(self.category_ids, self.class_names, strict=True)))

    @property
    def config(self) -> Config:
        """The config the network was built from."""
        return self.driver.config

    def detect(self, images: Iterable[np.ndarray], *, batch_size: int = 1) -> list[ImageDetections]:
        """Detections of uint8 images [h w 3] (RGB) of any sizes, each in its own pixels.

        Images of a batch share a canvas, the smallest that holds them all; what one of them is padded with can change its
        detections a little, as it does in torchvision and detectron2. A batch of 1 leaves every image to itself. With
        test-time augmentation (`retina_jax.detector`) all versions of an image are asked and merged.
        """
        found: list[ImageDetections] = []
        remaining = iter(images)
        while group := list(itertools.islice(remaining, batch_size)):
            for number, image in enumerate(group, start=len(found)):
                if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape) == 0:
                    raise ValueError(
                        f"image {number}: {image.dtype} of shape {image.shape}; detect takes uint8 arrays [h, w, 3]"
                    )
            rows = -(-len(group) // self.driver.shards) * self.driver.shards
            batches = (to_canvas(group, data, rows) for data in tta.sizes(self.config))
            merged = self.merged(self.detect_batches(batches, [image.shape[:2] for image in group]))
            found += [merged[row] for row in range(len(group))]
        return found

    def detect_batches(
        self, batches: Iterable[Batch], sizes_hw: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, ImageDetections]]:
        """(index, detections) of every valid row, with detection.tta_flip a second time as the mirrored image has them;
        `sizes_hw` are the original sizes by index.

        On several hosts each gives those of its own rows. The device works on a batch while the one before is read back.
        """
        before: tuple[Batch, Any, bool] | None = None
        for plain in batches:
            for flipped in (False, True)[: 1 + self.config.detection.tta_flip]:
                batch = tta.mirrored(plain) if flipped else plain
                running = (batch, self._run(batch), flipped)
                if before is not None:
                    yield from self._read(*before, sizes_hw)
                before = running
        if before is not None:
            yield from self._read(*before, sizes_hw)

    def merged(self, found: Iterable[tuple[int, ImageDetections]]) -> dict[int, ImageDetections]:
        """By index, what was `found` in all versions of an image as one; without augmentation, what was found."""
        of_image: dict[int, list[ImageDetections]] = {}
        for index, detections in found:
            of_image.setdefault(index, []).append(detections)
        if (versions := tta.versions(self.config)) == 1:
            return {index: detections for index, (detections,) in of_image.items()}
        return {index: self._merged(parts, versions) for index, parts in of_image.items()}

    def _merged(self, parts: Sequence[ImageDetections], versions: int) -> ImageDetections:
        boxes, scores, labels = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("boxes_xyxy", "scores", "labels")
        )
        detection = self.config.detection
        kept = tta.merge(boxes, scores, labels, detection, versions * detection.max_detections)
        return ImageDetections(boxes[kept], scores[kept], labels[kept], self._names(labels[kept]))

    def _names(self, labels: Int[np.ndarray, " N"]) -> tuple[str, ...]:
        return tuple(self.shown_names[label] for label in labels)

    def _run(self, batch: Batch) -> Any:
        return self.driver.detect(self.variables, self.driver.place(Inputs.of(batch)))

    def _read(
        self, batch: Batch, detections: Any, flipped: bool, sizes_hw: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, ImageDetections]]:
        boxes, scores, labels = own_rows((detections.boxes_xyxy, detections.scores, detections.labels))
        for row, index in enumerate(batch.indices.tolist()):
            if not batch.valid[row]:
                continue
            kept = labels[row] >= 0
            height, width = sizes_hw[index]
            on_canvas = boxes[row][kept]
            if flipped:
                on_canvas = flip_boxes(on_canvas, int(batch.image_sizes[row, 1]))
            original = to_original_pixels(on_canvas, batch.scales[row], self.config.data.box_ends)
            original = np.clip(original, 0, np.array([width, height, width, height], np.float32)[None])
            found = original.astype(np.float32), scores[row][kept], labels[row][kept]
            yield index, ImageDetections(*found, self._names(labels[row][kept]))


def to_canvas(images: Sequence[UInt8[np.ndarray, "_ _ 3"]], data: DataConfig, rows: int) -> Batch:
    """A batch of these images, resized and padded as evaluation does it; the last one fills the `rows` that are left.

    The canvas is the smallest of the configured ones that holds them all; where none does, or with `data.buckets` 0, it is
    the smallest there is.
    """
    sizes = [resized_size(*image.shape[:2], data.short_side, data.long_side, data.size_rounding) for image in images]
    largest = max(height for height, _ in sizes), max(width for _, width in sizes)
    shapes = buckets(data, (data.short_side,)) if data.buckets else ()
    fitting = [shape for shape in shapes if largest[0] <= shape[0] and largest[1] <= shape[1]]
    canvas = min(fitting, key=lambda shape: shape[0] * shape[1], default=exact_canvas(largest, data))
    pixels = np.zeros((rows, *canvas, 3), data.pixels)
    for row, (image, size) in enumerate(zip(images, sizes, strict=True)):
        smaller = resize_large if image.shape[0] * image.shape[1] > LARGE else resize
        pixels[row, : size[0], : size[1]] = np.asarray(smaller(image, size, data.resize, data.pixels))
    pixels[len(images) :] = pixels[len(images) - 1]
    of_row = np.minimum(np.arange(rows), len(images) - 1)
    scales = [(size[1] / image.shape[1], size[0] / image.shape[0]) for image, size in zip(images, sizes, strict=True)]
    return Batch(
        images=pixels,
        image_sizes=np.array(sizes, np.int32)[of_row],
        boxes_xyxy=np.zeros((rows, data.max_boxes, 4), np.float32),
        labels=np.full((rows, data.max_boxes), -1, np.int32),
        indices=of_row.astype(np.int64),
        valid=np.arange(rows) < len(images),
        scales=np.array(scales, np.float32)[of_row],
    )


def load_detector(
    source: str | Path,
    *,
    short_side: int | None = None,
    long_side: int | None = None,
    step: Step = None,
    config: Config | None = None,
    class_names: Sequence[str] = (),
    batchnorm_eps: float | None = None,
) -> Detector:
    """The detector of a run's folder, or of weights from elsewhere.

    Args:
      source: a run's folder, KIND:FILE, or KIND:NAME (`retina_jax.weights.named`, fetched once); KIND is torchvision,
        detectron2 or detectron.
      short_side: length that the shorter image side is resized to, pixels; None: as in training.
      long_side: most the longer side may be; None: as in training, and in proportion where only short_side is given.
      step: saved step of a run, or "best", that with the highest AP; None: the newest.
      config: replaces the detector's own where only inference differs (thresholds, devices, image size). None: its own on
        one device.
      class_names: of weights from elsewhere that are not COCO's.
      batchnorm_eps: of torchvision's weights; see `weights.importing.convert`.

    Raises:
      ConfigError, WeightsError: one line that names the folder or file and what is wrong with it.
    """
    if kind_of(str(source)) is not None:
        imported = import_detector(str(source), class_names=class_names, batchnorm_eps=batchnorm_eps)
        found, names, ids = imported.config, imported.class_names, imported.category_ids
    elif class_names or batchnorm_eps is not None:
        raise ConfigError(f"{source}: is a run's folder, whose class_names and batchnorm_eps are fixed")
    else:
        saved = read_run(Path(source))
        found, names, ids = saved.config, saved.class_names, saved.category_ids
    config = config or override(found, {"devices": 1})
    if short_side is not None or long_side is not None:
        short = short_side or config.data.short_side
        long = long_side or round(config.data.long_side * short / config.data.short_side)
        size = {"data.short_side": short, "data.long_side": long, "data.jitter_short_sides": ()}
        config = validate(override(config, size))
    driver = Driver(config, len(names))
    if kind_of(str(source)) is not None:
        return Detector(driver, driver.place_state(imported.variables), names, ids)
    folder = Path(source) / "checkpoints"
    if not folder.is_dir():
        raise ConfigError(f"--workdir {source}: its run has saved no checkpoint yet")
    with Checkpoints(folder, keep=None, read_only=True) as checkpoints:
        state = checkpoints.restore(driver.first_state(), step)
    return Detector.of(driver, state, names, ids)


# Test-time augmentation: an image asked at several sizes and mirrored, its answers merged.
#
# Merged as in detectron2's GeneralizedRCNNWithTTA: each version is detected for itself, with its own suppression and its own
# max_detections; the boxes are mapped back to pixels of the original image and put together; those of a class suppress one
# another at detection.nms_iou, and the best detection.max_detections remain. Scores are neither averaged nor counted.

_nms = jax.jit(nms, static_argnames=("iou_threshold", "max_detections"))


def sizes(config: Config) -> tuple[DataConfig, ...]:
    """`config.data` at each size that an image is asked at: its own, then those of detection.tta_short_sides, none twice.

    The long side grows in proportion, so that an image of any shape grows by the same factor. Each size has canvases of its
    own, and as many programs are compiled as they have; a mirrored image takes those of the plain one.
    """
    data = config.data
    others = dict.fromkeys(side for side in config.detection.tta_short_sides if side != data.short_side)
    longs = {side: max(side, round(data.long_side * side / data.short_side)) for side in others}
    return data, *(dataclasses.replace(data, short_side=s, long_side=longs[s], jitter_short_sides=()) for s in others)


def versions(config: Config) -> int:
    """Times that an image is asked; 1 without augmentation."""
    return len(sizes(config)) * (1 + config.detection.tta_flip)


def mirrored(batch: Batch) -> Batch:
    """Each image mirrored left to right where it is, at the upper left of its canvas. For detection: boxes stay."""
    images = batch.images.copy()
    for row, (height, width) in enumerate(batch.image_sizes):
        images[row, :height, :width] = batch.images[row, :height, width - 1 :: -1]
    return batch._replace(images=images)


def merge(
    boxes_xyxy: Float[np.ndarray, "N 4"],
    scores: Float[np.ndarray, " N"],
    labels: Int[np.ndarray, " N"],
    config: DetectionConfig,
    most: int,
) -> Int[np.ndarray, " M"]:
    """Which of the detections of all versions remain, best first: M <= config.max_detections.

    `most` is the largest N there can be: arrays are padded to it, so that one program serves all images.
    """
    room = most - len(scores)
    kept, real = _nms(
        np.pad(boxes_xyxy.astype(np.float32), ((0, room), (0, 0))),
        np.pad(scores.astype(np.float32), (0, room), constant_values=-np.inf),
        np.pad(labels.astype(np.int32), (0, room)),
        iou_threshold=config.nms_iou,
        max_detections=config.max_detections,
    )
    return np.asarray(kept)[np.asarray(real)]
