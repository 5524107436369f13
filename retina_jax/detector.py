"""Networks with weights, from images to detections: `load_detector("torchvision:FILE").detect(images)`.

Test-time augmentation runs the detector at several sizes (detection.tta_short_sides) and on the mirrored image
(detection.tta_flip). Merging is that of detectron2's GeneralizedRCNNWithTTA: the boxes are mapped to the original image,
those of a class (with detection.class_agnostic_nms, all) suppress one another at detection.nms_iou, and the best
detection.max_detections remain.

With data.tile the detector runs on the tiles of an image (`data.tiles`). Detections that a border of their tile cuts off are
dropped if another tile has room around them, and the others suppress one another like those of test-time augmentation.
detection.max_detections is then the limit of a tile, not of the image.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree, UInt8
from PIL import Image, ImageOps

from retina_jax.config import Config, ConfigError, DataConfig, DetectionConfig
from retina_jax.config_io import override, validate
from retina_jax.data import transforms
from retina_jax.data.classes import unique_names
from retina_jax.data.decoding import opaque, read_rgb
from retina_jax.data.pipeline import LARGE, Batch
from retina_jax.data.source import BadImage
from retina_jax.data.survey import decoding_of_files
from retina_jax.data.tiles import Tile, cut_off, tiles_of
from retina_jax.errors import reason, shortened
from retina_jax.ops.nms import nms
from retina_jax.ops.postprocess import Detections
from retina_jax.runs.folder import best_step, read_run
from retina_jax.runs.record import f1_threshold
from retina_jax.training.checkpoints import Checkpoints, Step
from retina_jax.training.parallel import Driver, local_rows
from retina_jax.training.restore import load_variables
from retina_jax.training.state import TrainState
from retina_jax.training.step import Inputs

if TYPE_CHECKING:
    from retina_jax.weights.importing import Imported

LONGEST_SIDE = 2**14  # pixels; the longest side that `load_detector` may be asked for: a square image then has 0.8 GB
_nms = jax.jit(nms, static_argnames=("iou_threshold", "max_detections"))


@dataclass(frozen=True)
class ImageDetections:
    """N detections of one image, best first."""

    boxes_xyxy: Float[np.ndarray, "N 4"]  # pixels of the original image
    scores: Float[np.ndarray, " N"]
    labels: Int[np.ndarray, " N"]  # indices into the detector's `class_names`
    class_names: tuple[str, ...] = ()  # class name of each detection, as in the detector's `shown_names`
    full_from: float = 0.0  # detections below this score may be missing, because of detection.max_detections


@dataclass(frozen=True, repr=False)
class Detector:
    """Network with weights and the names of its classes."""

    driver: Driver
    variables: dict[str, PyTree]  # collections `params`, `frozen`, `stats`, on the devices
    class_names: tuple[str, ...]  # as in the training data, where names may repeat
    category_ids: tuple[int, ...]  # category id of each class in the training data
    step: int = 0  # training steps of its weights in this project; 0 for imported weights
    f1_threshold: float | None = None  # score with the highest F1 in the evaluation of this step; None: not evaluated

    @classmethod
    def of(cls, driver: Driver, state: TrainState, names: tuple[str, ...], category_ids: tuple[int, ...]) -> Detector:
        """Returns the detector of a state, with its averaged parameters (EMA) unless detection.parameters is "raw"."""
        variables = state.detector(driver.config.detection.parameters)
        return cls(driver, variables, names, category_ids, int(state.step))

    @cached_property
    def shown_names(self) -> tuple[str, ...]:
        """Unique name of each class; a repeated name is followed by its category id, "wheel (1)"."""
        return unique_names(list(zip(self.category_ids, self.class_names, strict=True)))

    @cached_property
    def prepared(self) -> dict[str, PyTree]:
        """What the driver's programs of inference take in place of `variables`; computed once."""
        return self.driver.for_inference(self.variables)

    def __repr__(self) -> str:
        size = f"{self.config.data.short_side}/{self.config.data.long_side} px"
        return shortened(
            f"Detector({self.config.model.backbone}, {size}, step {self.step}, {', '.join(self.shown_names)})"
        )

    @property
    def config(self) -> Config:
        """Config of the driver."""
        return self.driver.config

    def detect(
        self, images: Iterable[np.ndarray | jax.Array | Image.Image | str | Path], *, batch_size: int = 1
    ) -> list[ImageDetections]:
        """Returns the detections of images of any sizes, each in its own pixels: files, PIL images, or uint8 arrays of numpy
        or JAX [h w 3] (RGB). Files are turned as image viewers show them. Images of a batch have one padded shape; the
        padding can change detections a little, as in torchvision and detectron2. Raises ValueError for anything else."""
        _check_positive("batch_size", batch_size)
        one = isinstance(images, str | Path | Image.Image) or getattr(images, "ndim", 4) in (2, 3)
        if one or not isinstance(images, Iterable):
            raise ValueError(f"images: give a list of images, not one {type(images).__name__}")
        found: list[ImageDetections] = []
        remaining = iter(images)
        while group := list(itertools.islice(remaining, batch_size)):
            group = [self._pixels(image, f"image {number}") for number, image in enumerate(group, start=len(found))]
            tiles = [tile for row, image in enumerate(group) for tile in self.tiles(row, *image.shape[:2])]
            of_tiles: list[tuple[int, ImageDetections]] = []
            for start in range(0, len(tiles), batch_size):
                parts = [tile.of(group[tile.image]) for tile in tiles[start : start + batch_size]]
                rows = -(-len(parts) // self.driver.num_devices) * self.driver.num_devices
                batches = (padded_batch(parts, data, rows) for data in sizes(self.config))
                detected = self.detect_batches(batches, [part.shape[:2] for part in parts])
                of_tiles += ((start + row, detections) for row, detections in detected)
            merged = self.merged(of_tiles, tiles)
            found += [merged[row] for row in range(len(group))]
        return found

    def tiles(self, image: int, height: int, width: int) -> list[Tile]:
        """Returns the tiles of data.tile of an image of this size; one without tiles."""
        return tiles_of(image, height, width, self.config.data.tile, self.config.data.tile_overlap)

    def _pixels(self, image: Any, called: str) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the RGB of an image for `detect`."""
        if isinstance(image, str | Path):
            return read_rgb(Path(image), decoding_of_files([Path(image)], self.config.data))
        if isinstance(image, jax.Array):
            image = np.asarray(image)
        if isinstance(image, Image.Image):
            if image.mode.startswith("I"):
                raise ValueError(f"{called}: has more than 8 bits per value; pass its path, or convert it to 8 bits")
            try:
                image = opaque(ImageOps.exif_transpose(image))
            except BadImage as error:
                raise BadImage(f"{called}: {error}") from None
            except MemoryError:
                raise
            except Exception as error:  # PIL decodes only now, and raises nearly anything for a broken file
                raise BadImage(f"{called}: cannot be decoded: {reason(error)}") from None
        kind, shape = getattr(image, "dtype", type(image).__name__), getattr(image, "shape", ())
        if not isinstance(image, np.ndarray) or kind != np.uint8 or shape[2:] != (3,) or image.size == 0:
            raise ValueError(f"{called}: {kind} of shape {shape}; give uint8 arrays [h, w, 3], PIL images or files")
        return image

    def detect_batches(
        self, batches: Iterable[Batch], sizes_hw: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, ImageDetections]]:
        """Yields (index, detections) of every valid row of this host; with detection.tta_flip also those of the mirrored
        image. `sizes_hw` are the original sizes by index."""

        def running() -> Iterator[tuple[Batch, Detections, bool]]:
            for plain in batches:
                for flipped in (False, True)[: 1 + self.config.detection.tta_flip]:
                    batch = mirrored(plain) if flipped else plain
                    yield batch, self.driver.detect(self.prepared, self.driver.shard_batch(Inputs.of(batch))), flipped

        # The device computes a batch while the previous one is read back.
        for (batch, detections, flipped), _ in itertools.pairwise(itertools.chain(running(), [None])):
            boxes, scores, labels = local_rows((detections.boxes_xyxy, detections.scores, detections.labels))
            for row in np.flatnonzero(batch.valid):
                index, kept = int(batch.indices[row]), labels[row] >= 0
                height, width = sizes_hw[index]
                found = boxes[row][kept]
                if flipped:
                    found = transforms.flip_boxes(found, int(batch.image_sizes[row, 1]))
                found = transforms.to_original_pixels(found, batch.scales[row], self.config.data.box_ends)
                found = np.clip(found, 0, np.array([width, height, width, height], np.float32)[None])
                solid = (found[:, 2:] > found[:, :2]).all(axis=1)  # as detectron2: no boxes without area
                arrays = [array[solid] for array in (found.astype(np.float32), scores[row][kept], labels[row][kept])]
                full = kept.sum() == self.config.detection.max_detections
                yield index, self._detections(*arrays, full_from=float(scores[row][kept].min()) if full else 0.0)

    def merged(self, found: Iterable[tuple[int, ImageDetections]], tiles: Sequence[Tile]) -> dict[int, ImageDetections]:
        """Merges the detections of all tiles and versions of an image, by `Tile.image`. `found` has the index of each one's
        tile in `tiles`, which holds all of an image. Images of which no detections were `found` are left out."""
        detection, count = self.config.detection, versions(self.config)
        of_tile: dict[int, list[ImageDetections]] = {}
        for index, detections in found:
            of_tile.setdefault(index, []).append(detections)
        of_image: dict[int, list[int]] = {}
        for index, tile in enumerate(tiles):
            of_image.setdefault(tile.image, []).append(index)
        merged = {}
        for image, indices in of_image.items():
            groups = [(tiles[index], detections) for index in indices for detections in of_tile.get(index, ())]
            if not groups:
                continue
            if count == len(indices) == 1:
                ((_, merged[image]),) = groups  # an image that several hosts evaluated is an error
                continue
            parts = _uncut(groups, [tiles[index] for index in indices])
            arrays = [np.concatenate(column) for column in zip(*parts, strict=True)]
            # A power of two, so that few programs serve all numbers of tiles.
            most = count * detection.max_detections * (1 << (len(indices) - 1).bit_length())
            kept = merge(*arrays, replace(detection, max_detections=most) if len(indices) > 1 else detection, most)
            full_from = max(detections.full_from for _, detections in groups)
            if len(kept) == detection.max_detections and len(indices) == 1:
                full_from = max(full_from, float(arrays[1][kept].min()))
            merged[image] = self._detections(*(array[kept] for array in arrays), full_from=full_from)
        return merged

    def _detections(
        self,
        boxes_xyxy: Float[np.ndarray, "N 4"],
        scores: Float[np.ndarray, " N"],
        labels: Int[np.ndarray, " N"],
        full_from: float,
    ) -> ImageDetections:
        names = tuple(self.shown_names[label] for label in labels)
        return ImageDetections(boxes_xyxy, scores, labels, names, full_from)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_positive(name: str, value: Any, most: int = 2**31 - 1) -> None:
    """Raises ConfigError unless the value of the argument `name` is an integer from 1 to `most`."""
    if not _is_integer(value) or not 1 <= value <= most:
        raise ConfigError(f"{name}: invalid value {shortened(repr(value))}; must be an integer from 1 to {most}")


def _uncut(
    found: Sequence[tuple[Tile, ImageDetections]], tiles: Sequence[Tile]
) -> Iterator[tuple[Float[np.ndarray, "n 4"], Float[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
    """Yields boxes, in pixels of the image, scores and labels of the detections that their tile does not cut off."""
    size_wh = max(tile.left + tile.width for tile in tiles), max(tile.top + tile.height for tile in tiles)
    for tile, detections in found:
        boxes = detections.boxes_xyxy + np.array([[tile.left, tile.top] * 2], np.float32)
        kept = ~cut_off(boxes, tile, tiles, size_wh)
        yield boxes[kept], detections.scores[kept], detections.labels[kept]


def padded_batch(images: Sequence[UInt8[np.ndarray, "_ _ 3"]], data: DataConfig, rows: int) -> Batch:
    """Returns a batch of these images, resized and padded as in evaluation; the last image fills the remaining `rows`. The
    padded shape is the smallest of the configured ones that holds all images. If none does, or `data.buckets` is 0, it is
    the smallest multiple of `data.pad_multiple` that does."""
    original = np.array([image.shape[:2] for image in images])
    rule = data.short_side, data.long_side, data.size_rounding, data.resize_rule
    resized = [transforms.resized_size(height, width, *rule) for height, width in original.tolist()]
    largest = tuple(np.max(resized, axis=0).tolist())
    shapes = transforms.buckets(data, (data.short_side,)) if data.buckets else ()
    fitting = [shape for shape in shapes if largest[0] <= shape[0] and largest[1] <= shape[1]]
    padded = min(fitting, key=lambda shape: shape[0] * shape[1], default=transforms.exact_padded_shape(largest, data))
    pixels = np.zeros((rows, *padded, 3), data.pixels)
    for row, (image, size) in enumerate(zip(images, resized, strict=True)):
        resize_image = transforms.resize_large if image.shape[0] * image.shape[1] > LARGE else transforms.resize
        pixels[row, : size[0], : size[1]] = np.asarray(resize_image(image, size, data.resize, data.pixels))
    pixels[len(images) :] = pixels[len(images) - 1]
    image_of_row = np.minimum(np.arange(rows), len(images) - 1)
    boxes = 1 if data.max_boxes == "auto" else data.max_boxes  # detection needs none
    return Batch(
        images=pixels,
        image_sizes=np.array(resized, np.int32)[image_of_row],
        boxes_xyxy=np.zeros((rows, boxes, 4), np.float32),
        labels=np.full((rows, boxes), -1, np.int32),
        indices=image_of_row.astype(np.int64),
        valid=np.arange(rows) < len(images),
        scales=(np.array(resized) / original)[image_of_row, ::-1].astype(np.float32),
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
    """Returns the detector of a run's folder, or of weights from elsewhere.

    Args:
      source: a run's folder, KIND:FILE, or KIND:NAME (docs/conventions.md lists kinds and names).
      short_side, long_side: length that the shorter image side is resized to, and bound of the longer one, pixels; None: as
        in training, long_side in proportion to short_side.
      step: saved step of a run; "best", that with the highest AP; "newest"; None: the best, or the newest if none was
        evaluated.
      config: replaces the detector's own, with other settings of inference; None: its own, on one device.
      class_names: of weights from elsewhere whose classes are not COCO's.
      batchnorm_eps: of torchvision's weights; see `weights.importing.convert`.

    Raises ConfigError or WeightsError: one line that names the folder or file and what is wrong with it.
    """
    from retina_jax.weights.importing import import_detector, kind_of  # training does not need these readers

    if not isinstance(source, str | Path):
        raise ConfigError(f"source: give a path or KIND:FILE, not a {type(source).__name__}")
    if not isinstance(config, Config | None):
        raise ConfigError(f"config: give a Config, not a {type(config).__name__}; `load_config` reads one from a file")
    step = int(step) if _is_integer(step) else step
    if step not in ("best", "newest", None) and not (_is_integer(step) and step >= 0):
        raise ConfigError(f"step: invalid value {shortened(repr(step))}; must be an integer, best, newest or None")
    imported = None
    if kind_of(str(source)) is not None:
        imported = import_detector(str(source), class_names=class_names, batchnorm_eps=batchnorm_eps)
    elif class_names or batchnorm_eps is not None:
        raise ConfigError(f"{source}: is a run's folder, whose class_names and batchnorm_eps are fixed")
    folder = Path(source) / "checkpoints"
    if imported is None and not (Path(source) / "config.json").is_file():
        kinds = "KIND:FILE or KIND:NAME (KIND is torchvision, detectron2 or detectron)"
        raise ConfigError(f"{shortened(source)}: is neither a run's folder (no config.json in it) nor {kinds}")
    saved = imported or read_run(Path(source))
    config = config or override(saved.config, {"devices": 1})
    if short_side is not None or long_side is not None:
        short = config.data.short_side if short_side is None else short_side
        _check_positive("short_side", short, LONGEST_SIDE)
        long = round(config.data.long_side * short / config.data.short_side) if long_side is None else long_side
        _check_positive("long_side", long, LONGEST_SIDE)
        size = {"data.short_side": int(short), "data.long_side": int(long), "data.jitter_short_sides": ()}
        config = validate(override(config, size))
    driver = Driver(config, len(saved.class_names))
    if imported is not None:
        return Detector(driver, driver.replicate(imported.variables), imported.class_names, imported.category_ids)
    if not folder.is_dir():
        raise ConfigError(f"{shortened(source)}: its run has saved no checkpoint yet; wait for the first, or train it")
    if step is None:
        step = "newest" if best_step(folder) is None else "best"
    with Checkpoints(folder, keep=None, read_only=True) as checkpoints:
        variables, number = load_variables(driver, checkpoints, step)
    threshold = f1_threshold(Path(source), number)
    return Detector(driver, variables, saved.class_names, saved.category_ids, number, threshold)


def import_run(folder: Path) -> Imported:
    """Returns the detector of a run, its best step, or the newest if none was evaluated, to start another run from."""
    from retina_jax.weights.importing import Imported

    detector, run = load_detector(folder), read_run(folder)
    config = override(run.config, {"model.num_classes": None, "model.backbone_weights": ""})
    source, variables = f"{folder}, step {detector.step}", jax.device_get(detector.variables)
    return Imported(source, config, variables, run.class_names, run.category_ids, missing=())


def sizes(config: Config) -> tuple[DataConfig, ...]:
    """Returns `config.data` at each size of test-time augmentation: its own, then those of detection.tta_short_sides. The
    long side grows in proportion. Each size has its own padded shapes, and one program per shape."""
    data = config.data
    others = dict.fromkeys(side for side in config.detection.tta_short_sides if side != data.short_side)
    longs = {side: max(side, round(data.long_side * side / data.short_side)) for side in others}
    return data, *(replace(data, short_side=s, long_side=longs[s], jitter_short_sides=()) for s in others)


def versions(config: Config) -> int:
    """Returns how often the detector runs on each image; 1 without augmentation."""
    return len(sizes(config)) * (1 + config.detection.tta_flip)


def mirrored(batch: Batch) -> Batch:
    """Returns the batch with each image mirrored left to right in its place, the upper left. Boxes are unchanged."""
    images = batch.images.copy()
    for row, (height, width) in enumerate(batch.image_sizes):
        images[row, :height, :width] = batch.images[row, :height, :width][:, ::-1]
    return batch._replace(images=images)


def merge(
    boxes_xyxy: Float[np.ndarray, "N 4"],
    scores: Float[np.ndarray, " N"],
    labels: Int[np.ndarray, " N"],
    config: DetectionConfig,
    most: int,
) -> Int[np.ndarray, " M"]:
    """Returns which of the detections of all versions remain, best first: M <= config.max_detections. Arrays are padded to
    `most`, the largest possible N, so that one program serves all images."""
    room = most - len(scores)
    kept, real = _nms(
        np.pad(boxes_xyxy.astype(np.float32), ((0, room), (0, 0))),
        np.pad(scores.astype(np.float32), (0, room), constant_values=-np.inf),
        np.pad(labels.astype(np.int32) * (not config.class_agnostic_nms), (0, room)),
        iou_threshold=config.nms_iou,
        max_detections=config.max_detections,
    )
    return np.asarray(kept)[np.asarray(real)]
