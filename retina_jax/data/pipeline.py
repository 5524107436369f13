"""Batches of images and boxes: a tf.data pipeline over an index, whose only state is the step. Element i is row i % b of
step i // b, a pure function of (seed, step, row), so that training can start at any step."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8

from retina_jax.config import DataConfig
from retina_jax.console import cores
from retina_jax.data import sampler, transforms
from retina_jax.data.augmentation import Draw, crop_boxes, crop_of, draw, recolour
from retina_jax.data.decoding import DECODING, RGB, is_one_colour, is_plain_jpeg, to_rgb
from retina_jax.data.reading import SlowReadMonitor, read_again
from retina_jax.data.source import BadImage, Size, Source
from retina_jax.data.transforms import Shapes, tf
from retina_jax.errors import one_line, reason

log = logging.getLogger(__name__)
# Larger images (in pixels) are decoded and resized within the budget `DECODING`, which bounds the memory that they use.
LARGE = 2**22
GROUP, GROUP_BYTES = 8, 2**22  # images, and about how many bytes of them, that are read by one call of Python
OPEN: weakref.WeakSet[Batches] = weakref.WeakSet()
LOGGED = 5  # number of images of one colour that are logged; all are counted
BOX_MULTIPLE = 8  # `data.max_boxes auto` is a multiple of this
LOOK_AHEAD = 1000  # largest number of batches that `Batches.padded_shapes` checks
T = TypeVar("T")


@atexit.register
def _close() -> None:
    """Ends the threads of all batches: one that runs Python while the interpreter ends would abort the process."""
    for batches in list(OPEN):
        batches._iterator = None


class Batch(NamedTuple):
    """b images with padded shape H W: this host's rows of a global batch."""

    images: UInt8[np.ndarray, "b H W 3"] | Float32[np.ndarray, "b H W 3"]  # RGB, in the upper left; the padding is 0
    image_sizes: Int32[np.ndarray, "b 2"]  # height and width without padding
    boxes_xyxy: Float32[np.ndarray, "b G 4"]  # pixels of the padded image; 0 for no box
    labels: Int32[np.ndarray, "b G"]  # 0 to K-1; -1 for no box
    indices: Int64[np.ndarray, " b"]  # rows in `source.records`
    valid: Bool[np.ndarray, " b"]  # False: repeated to fill an evaluation batch, or bad (black, 1x1, without boxes)
    scales: Float32[np.ndarray, "b 2"]  # pixels per original pixel, along x and y


class Rows(NamedTuple):
    """This host's rows of a step, without what is read from files."""

    indices: Int64[np.ndarray, " b"]
    valid: Bool[np.ndarray, " b"]
    draws: list[Draw]
    resized_hw: Int32[np.ndarray, "b 2"]
    corners_yx: Int32[np.ndarray, "b 2"]  # of the crop in the resized image
    sizes_hw: Int32[np.ndarray, "b 2"]  # of the crop
    padded_hw: Size


def train_batches(
    source: Source, data: DataConfig, *, seed: int, start_step: int = 0, host: int = 0, hosts: int = 1
) -> Batches:
    """Returns infinite training batches from `start_step` on; the same batch at a step however often training resumed.
    At each step all hosts get the same padded shape, and together the images that a single host would get."""
    short_sides = transforms.train_short_sides(data)
    shapes = transforms.buckets(data, short_sides)
    # A padded shape for the largest short side also fits the others.
    order = sampler.BucketSampler(_image_buckets(source, data, max(short_sides), shapes), data.batch_size, seed)
    mine = sampler.host_rows(data.batch_size, host, hosts)
    return Batches(source, data, shapes, order.batch, functools.partial(draw, data, seed), mine, start_step, None)


def eval_batches(
    source: Source, data: DataConfig, *, batch_size: int, limit: int = 0, host: int = 0, hosts: int = 1
) -> Batches:
    """Returns evaluation batches: each image (of the first `limit`, unless 0) once, not flipped, at `data.short_side`.
    All hosts get as many batches, with the same shapes; rows that only fill a batch are not `valid`. With
    `data.buckets` 0 the images of a batch have their exact padded shape."""
    shapes = transforms.buckets(data, (data.short_side,))
    if data.buckets == 0:
        rule = data.short_side, data.long_side, data.size_rounding, data.resize_rule
        sizes = (transforms.resized_size(record.height, record.width, *rule) for record in source.records)
        shapes = tuple(sorted({transforms.exact_padded_shape(size, data) for size in sizes}))
    batches = sampler.eval_order(_image_buckets(source, data, data.short_side, shapes)[: limit or None], batch_size)
    mine = sampler.host_rows(batch_size, host, hosts)
    data = replace(data, scale_jitter=None, colour_jitter=0.0)
    return Batches(source, data, shapes, batches.__getitem__, lambda _: Draw(data.short_side), mine, 0, len(batches))


def max_boxes(source: Source, data: DataConfig) -> int:
    """Returns `data.max_boxes`; for auto the largest number of boxes of an image, rounded up to a multiple, at least one."""
    if data.max_boxes != "auto":
        return data.max_boxes
    most = max((len(record.labels) for record in source.records), default=0)
    return max(1, -(-most // BOX_MULTIPLE)) * BOX_MULTIPLE


def overflow(source: Source, data: DataConfig) -> tuple[int, int]:
    """Returns how many images have more than `data.max_boxes` boxes, and how many boxes are dropped (an image's last)."""
    most = max_boxes(source, data)
    beyond = [len(record.labels) - most for record in source.records]
    return sum(n > 0 for n in beyond), sum(max(n, 0) for n in beyond)


class Batches(Iterator[Batch]):
    """Iterator over the batches of steps `start` to `stop` (None: infinite), with the rows `mine` of each global batch.
    `augment` returns what is drawn for an image, from `BatchIndices.positions`. A bad image raises BadImage at its own
    step. With `data.bad_images` skip, its row is not valid instead; it is logged once, and counted in `skipped`."""

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        shapes: Shapes,
        batch_at: Callable[[int], sampler.BatchIndices],
        augment: Callable[[int], Draw],
        mine: slice,
        start: int,
        stop: int | None,
    ) -> None:
        transforms.load()
        self.skipped: Counter[str] = Counter()  # bad images that were left out, and how often (data.bad_images skip)
        self.one_colour: list[str] = []  # images of (nearly) one colour
        # Whether an image's colours were checked; tiles without boxes may have one colour.
        self._seen = np.array([record.tile is not None and not len(record.labels) for record in source.records], bool)
        self._source, self._data, self._max_boxes = source, data, max_boxes(source, data)
        self._files = source.uncut or source  # the images to read; records are these or tiles of them
        self._decoded = functools.lru_cache(maxsize=2)(self._decode_file)  # images whose tiles are needed
        self._locks = [threading.Lock() for _ in range(16)]  # several threads decode none of them at once
        self._shapes, self._augment, self._mine = shapes, augment, mine
        self._batch_at = functools.lru_cache(maxsize=256)(batch_at)
        self._rows = functools.lru_cache(maxsize=256)(self._make_rows)
        self._local, self._step, self._stop = mine.stop - mine.start, start, stop
        self._bad: dict[int, BadImage] = {}
        self._doubted: set[int] = set()
        self._reads = SlowReadMonitor(self._files.where)
        self._iterator: Iterator[tuple] | None = None
        OPEN.add(self)

    @property
    def num_shapes(self) -> int:
        """Number of padded shapes that batches can have."""
        return len(self._shapes)

    def padded_shapes(self, steps: int) -> list[Size]:
        """Returns the padded shapes of the next `steps` batches (at most LOOK_AHEAD), each once, in order of first use."""
        buckets = (self._batch_at(self._step + i).bucket for i in range(min(steps, LOOK_AHEAD)))
        return list(dict.fromkeys(self._shapes[bucket] for bucket in buckets))

    def __next__(self) -> Batch:
        while True:
            if self._iterator is None:
                self._iterator = self._dataset().as_numpy_iterator()
            try:
                with self._reads.waiting(self._step):
                    batch = self._batch(*next(self._iterator))
                break
            except StopIteration:
                self._iterator = None  # ends its threads
                raise
            except tf.errors.OpError:
                # TensorFlow does not report which image failed: make the batch again, decoding its images one by one.
                suspects = set(self._batch_at(self._step).indices[self._mine].tolist())
                if suspects <= self._doubted:
                    raise
                self._doubted |= suspects
                self._iterator = None
        for index in batch.indices[self._rows(self._step).valid & ~batch.valid].tolist():
            if self._data.bad_images == "stop":
                self._iterator = None  # so that the next call returns this step again
                raise self._bad[index]
            name = self._source.where(index)
            if name not in self.skipped:
                log.warning("warning: skipped: %s", one_line(self._bad[index]))
            self.skipped[name] += 1
        self._check_colours(batch)
        self._step += 1
        return batch

    def _check_colours(self, batch: Batch) -> None:
        """Checks each image of the dataset once; logs the first LOGGED of one colour."""
        for row in np.flatnonzero(batch.valid & ~self._seen[batch.indices]).tolist():
            index, (height, width), boxes = int(batch.indices[row]), batch.image_sizes[row], batch.boxes_xyxy[row]
            if self._seen[index]:  # an earlier row of this batch
                continue
            if self._rows(self._step).resized_hw[row].tolist() != [height, width]:  # a crop may have one colour
                continue
            self._seen[index] = True
            if is_one_colour(batch.images[row, :height, :width], boxes[boxes[:, 2] > boxes[:, 0]]):
                self.one_colour.append(self._source.where(index))
                if len(self.one_colour) <= LOGGED:
                    shown = one_line(self.one_colour[-1])
                    log.warning("warning: %s: one colour, nothing to learn from; check the file", shown)

    def _make_rows(self, step: int) -> Rows:
        batch, data = self._batch_at(step), self._data
        indices = batch.indices[self._mine]
        draws = [self._augment(position) for position in batch.positions[self._mine].tolist()]
        rule, padded = (data.long_side, data.size_rounding, data.resize_rule), self._shapes[batch.bucket]
        resized = [
            transforms.resized_size(record.height, record.width, drawn.short_side, *rule, drawn.factor)
            for record, drawn in zip((self._source.records[i] for i in indices), draws, strict=True)
        ]
        crops = [crop_of(drawn.place_yx, size, padded) for drawn, size in zip(draws, resized, strict=True)]
        corners, sizes = np.array(crops, np.int32).swapaxes(0, 1)
        return Rows(indices, batch.valid[self._mine], draws, np.array(resized, np.int32), corners, sizes, padded)

    def _batch(
        self, images: UInt8[np.ndarray, "b H W 3"] | Float32[np.ndarray, "b H W 3"], good: Bool[np.ndarray, " b"]
    ) -> Batch:
        """Returns the batch of this step; `good` is False for bad images."""
        rows, data = self._rows(self._step), self._data
        boxes = np.zeros((self._local, self._max_boxes, 4), np.float32)
        labels, scales = np.full(boxes.shape[:2], -1, np.int32), np.ones((self._local, 2), np.float32)
        for row in np.flatnonzero(good).tolist():
            record, (height, width) = self._source.records[rows.indices[row]], rows.resized_hw[row].tolist()
            scale, of_boxes = np.array([width / record.width, height / record.height]), record.labels
            # In float64, so that a box that ends at the image's edge still does after the resize.
            scaled = transforms.to_padded_pixels(record.boxes_xyxy, scale, data.box_ends)
            if data.scale_jitter:
                crop = tuple(rows.corners_yx[row].tolist()), tuple(rows.sizes_hw[row].tolist())
                scaled, kept = crop_boxes(scaled, *crop)
                of_boxes = of_boxes[kept]
            scaled, n = scaled[: self._max_boxes].astype(np.float32), min(len(of_boxes), self._max_boxes)
            width = int(rows.sizes_hw[row, 1])
            boxes[row, :n] = transforms.flip_boxes(scaled, width) if rows.draws[row].flip else scaled
            labels[row, :n], scales[row] = of_boxes[:n], scale
        sizes = np.where(good[:, None], rows.sizes_hw, np.int32(1))
        return Batch(images, sizes, boxes, labels, rows.indices, rows.valid & good, scales)

    def _dataset(self) -> tf.data.Dataset:
        parallel = {"num_parallel_calls": self._data.workers or cores()}
        options = tf.data.Options()
        options.deterministic = True
        options.autotune.enabled = False
        options.threading.private_threadpool_size = parallel["num_parallel_calls"]
        options.threading.max_intra_op_parallelism = 1  # images are processed in parallel instead
        stop = tf.int64.max if self._stop is None else self._stop * self._local
        # Conversion by AutoGraph would leave compiled files in the folder of temporary files.
        group, image = map(tf.autograph.experimental.do_not_convert, (self._group, self._image))
        groups = tf.data.Dataset.range(self._step * self._local, stop, GROUP).map(group, **parallel)
        batches = groups.unbatch().map(image, **parallel).batch(self._local, drop_remainder=True)
        return batches.prefetch(self._data.prefetch).with_options(options)

    def _group(self, first: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        encoded, plans, colours = tf.numpy_function(self._load, [first], (tf.string, tf.int64, tf.float32))
        shapes = (None,), (None, 9), (None, 10)
        return tuple(map(tf.ensure_shape, (encoded, plans, colours), shapes))

    def _image(self, encoded: tf.Tensor, plan: tf.Tensor, colours: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns a padded image, and whether it is good. TensorFlow makes its pixels, without holding the GIL."""
        index, by_tensorflow, flip = tf.unstack(plan[:3])
        size, shape, corner = tf.unstack(tf.reshape(tf.cast(plan[3:], tf.int32), (3, 2)))
        kind, pixels = self._data.resize, self._data.pixels

        def by_python() -> tf.Tensor:
            image = tf.numpy_function(self._resized, [index, size, encoded], tf.as_dtype(pixels))
            return tf.ensure_shape(image, (None, None, 3))

        image = tf.cond(
            by_tensorflow > 0, lambda: transforms.resize(decode_jpeg(encoded), size, kind, pixels), by_python
        )
        if self._data.scale_jitter:
            image = image[corner[0] : corner[0] + shape[0], corner[1] : corner[1] + shape[1]]
        if self._data.colour_jitter:
            image = recolour(image, colours)
        # Flipped last, so that a flipped image has exactly the pixels of the original.
        flipped = tf.cond(flip > 0, lambda: tf.reverse(image, axis=[1]), lambda: image)
        return transforms.pad(flipped, shape), tf.size(image) > 0

    def _load(self, first: np.int64) -> tuple[np.ndarray, Int64[np.ndarray, "n 9"], Float32[np.ndarray, "n 10"]]:
        """Returns GROUP encoded images from element `first` on, and of each its index, whether TensorFlow decodes it,
        whether to flip it, (height, width) resized and padded, and the corner of its crop; and the argument of `recolour`.
        Tiles, and images after GROUP_BYTES, are left to `_resized`. Pixels evict Python's code from the processor's caches:
        a call per image takes three times as long."""
        end = int(first) + GROUP
        images, plans, colours, read = [], [], [], 0
        for i in range(int(first), end if self._stop is None else min(end, self._stop * self._local)):
            step, row = divmod(i, self._local)
            rows = self._rows(step)
            index, encoded, plain = int(rows.indices[row]), b"", False
            record = self._source.records[index]
            small = record.tile is None and record.width * record.height <= LARGE
            if index not in self._bad and small and read < GROUP_BYTES:
                with self._noting(index):
                    encoded = self._encoded(index)
                    read += len(encoded)
                    plain = index not in self._doubted and self._decode(is_plain_jpeg, index, encoded)
            images.append(encoded)
            sizes = *rows.resized_hw[row], *rows.padded_hw, *rows.corners_yx[row]
            plans.append((index, plain, rows.draws[row].flip, *sizes))
            colours.append(rows.draws[row].colours)
        return np.array(images, object), np.array(plans, np.int64), np.array(colours, np.float32)

    def _resized(self, index: np.int64, size_hw: Int32[np.ndarray, " 2"], encoded: bytes) -> transforms.Resized:
        """Decodes and resizes an image that TensorFlow alone does not; without pixels if it is bad."""
        index, size, data = int(index), tuple(size_hw.tolist()), self._data
        record = self._source.records[index]
        if index not in self._bad:
            with self._noting(index):
                if record.tile is not None:
                    with self._locks[record.tile.image % len(self._locks)]:
                        image = record.tile.of(self._decoded(record.tile.image))
                    resize = transforms.resize_large if record.width * record.height > LARGE else transforms.resize
                    return np.asarray(resize(image, size, data.resize, data.pixels))
                if (area := record.width * record.height) > LARGE:
                    encoded = self._encoded(index)
                    with DECODING.share(area):
                        image = self._decode(to_rgb, index, encoded)
                        return transforms.resize_large(image, size, data.resize, data.pixels)
                image, encoded = None, encoded or self._encoded(index)
                if self._decode(is_plain_jpeg, index, encoded):
                    # Its batch failed, perhaps because of another image: as before, TensorFlow decodes it if it can.
                    with contextlib.suppress(tf.errors.OpError):
                        image = decode_jpeg(encoded)
                image = self._decode(to_rgb, index, encoded) if image is None else image
                return transforms.resize(image, size, data.resize, data.pixels).numpy()
        return np.zeros((0, 0, 3), data.pixels)

    @contextlib.contextmanager
    def _noting(self, index: int) -> Iterator[None]:
        """Keeps a BadImage for `__next__`: TensorFlow would turn it into another error."""
        try:
            yield
        except BadImage as error:
            self._bad[index] = error

    def _decode_file(self, index: int) -> RGB:
        """Decodes an image of which records are tiles."""
        record = self._files.records[index]
        with DECODING.share(record.width * record.height):
            return self._decode(to_rgb, index, self._encoded(index))

    def _encoded(self, index: int) -> bytes:
        """Reads an image of `_files`; BadImage names it."""
        try:
            with self._reads.reading(index):
                return read_again(lambda: self._files.read(index), self._files.where(index))
        except OSError as error:
            raise BadImage(f"{self._files.where(index)}: cannot be read: {reason(error)}") from None

    def _decode(self, function: Callable[..., T], index: int, encoded: bytes) -> T:
        """Calls `to_rgb` or `is_plain_jpeg` for an image of `_files`; BadImage names it."""
        record = self._files.records[index]
        try:
            return function(encoded, self._files.decoding, expected_size=(record.width, record.height))
        except BadImage as error:
            raise BadImage(f"{self._files.where(index)}: {error}") from None


def decode_jpeg(encoded: tf.Tensor | bytes) -> tf.Tensor:
    """Returns the RGB of a JPEG, identical to PIL's."""
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")


def _image_buckets(source: Source, data: DataConfig, short_side: int, shapes: Shapes) -> Int64[np.ndarray, " N"]:
    rule = short_side, data.long_side, data.size_rounding, data.resize_rule
    bucket = functools.cache(lambda *size: transforms.assign_bucket(transforms.resized_size(*size, *rule), shapes))
    return np.array([bucket(record.height, record.width) for record in source.records], np.int64)
