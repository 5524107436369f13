"""A trained network, ready to be asked: `load_detector(RUN).detect(images)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree, UInt8

from retina_jax.config import Config, ConfigError, DataConfig
from retina_jax.data.pipeline import Batch
from retina_jax.data.preprocessing import assign_bucket, buckets, resize, resized_size
from retina_jax.training.checkpoints import Checkpoints
from retina_jax.training.parallel import Driver
from retina_jax.training.run import read_run
from retina_jax.training.step import Inputs


@dataclass(frozen=True)
class ImageDetections:
    """What was found in one image, best first."""

    boxes_xyxy: Float[np.ndarray, "N 4"]
    """Pixels of the original image."""
    scores: Float[np.ndarray, " N"]
    labels: Int[np.ndarray, " N"]
    """Indices into the detector's `class_names`."""


@dataclass(frozen=True)
class Detector:
    """A network with weights and the names of its classes."""

    driver: Driver
    variables: dict[str, PyTree]
    """Collections `params`, `frozen`, `stats`, placed on the devices."""
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    """COCO category id of each class."""

    @property
    def config(self) -> Config:
        """The config the network was built from."""
        return self.driver.config

    def detect(self, images: Iterable[np.ndarray]) -> list[ImageDetections]:
        """Detections of uint8 images [h w 3] (RGB) of any sizes, each in its own pixels."""
        found = []
        for number, image in enumerate(images):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape) == 0:
                raise ValueError(
                    f"image {number}: {image.dtype} of shape {image.shape}; detect takes uint8 arrays [h, w, 3]"
                )
            batch = to_canvas(image, self.config.data)
            # One image at a time: over several devices the other rows of the batch repeat it.
            batch = jax.tree.map(lambda x: np.repeat(x, self.driver.shards, axis=0), batch)
            _, detections = next(self._read(batch, self._run(batch), [image.shape[:2]]))
            found.append(detections)
        return found

    def detect_batches(
        self, batches: Iterable[Batch], sizes_hw: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, ImageDetections]]:
        """(index, detections) of every valid row; `sizes_hw` are the original sizes by index.

        The device works on a batch while the one before is read back.
        """
        before: tuple[Batch, Any] | None = None
        for batch in batches:
            running = (batch, self._run(batch))
            if before is not None:
                yield from self._read(*before, sizes_hw)
            before = running
        if before is not None:
            yield from self._read(*before, sizes_hw)

    def _run(self, batch: Batch) -> Any:
        inputs = Inputs(batch.images, batch.image_sizes, batch.boxes_xyxy, batch.labels, batch.valid)
        return self.driver.detect(self.variables, self.driver.place(inputs))

    def _read(
        self, batch: Batch, detections: Any, sizes_hw: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, ImageDetections]]:
        boxes, scores, labels = jax.device_get((detections.boxes_xyxy, detections.scores, detections.labels))
        for row, index in enumerate(batch.indices.tolist()):
            if not batch.valid[row]:
                continue
            kept = labels[row] >= 0
            height, width = sizes_hw[index]
            original = boxes[row][kept] / np.tile(batch.scales[row], 2)[None]
            original = np.clip(original, 0, np.array([width, height, width, height], np.float32)[None])
            yield index, ImageDetections(original.astype(np.float32), scores[row][kept], labels[row][kept])


def to_canvas(image: UInt8[np.ndarray, "h w 3"], data: DataConfig) -> Batch:
    """A batch of this one image, resized and padded as evaluation does it."""
    height, width = image.shape[:2]
    size = resized_size(height, width, data.short_side, data.long_side)
    shapes = buckets(data, (data.short_side,))
    canvas = np.zeros((1, *shapes[assign_bucket(size, shapes)], 3), np.uint8)
    canvas[0, : size[0], : size[1]] = np.asarray(resize(image, size, data.resize))
    return Batch(
        images=canvas,
        image_sizes=np.array([size], np.int32),
        boxes_xyxy=np.zeros((1, data.max_boxes, 4), np.float32),
        labels=np.full((1, data.max_boxes), -1, np.int32),
        indices=np.zeros(1, np.int64),
        valid=np.ones(1, bool),
        scales=np.array([[size[1] / width, size[0] / height]], np.float32),
    )


def load_detector(run: str | Path, step: int | None = None, config: Config | None = None) -> tuple[Detector, int]:
    """The detector of a run's folder at a saved step (None: the newest), and that step.

    `config` replaces the run's own where only inference differs (thresholds, devices, image size).
    """
    folder = Path(run)
    saved = read_run(folder)
    if not (folder / "checkpoints").is_dir():
        raise ConfigError(f"--workdir {folder}: its run has saved no checkpoint yet")
    driver = Driver(config or saved.config, len(saved.class_names))
    with Checkpoints(folder / "checkpoints", keep=None) as checkpoints:
        state = checkpoints.restore(driver.first_state(), step)
    return Detector(driver, state.variables, saved.class_names, saved.category_ids), int(state.step)
