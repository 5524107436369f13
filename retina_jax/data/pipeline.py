"""Batches of images and boxes: a tf.data pipeline over an index, whose only state is the step. Element i is row i % b of
step i // b, a pure function of (seed, step, row), so that training can start at any step."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8

from retina_jax.config import DataConfig
from retina_jax.console import cores
from retina_jax.data import sampler, transforms
from retina_jax.data.decoding import DECODING, is_one_colour, is_plain_jpeg, to_rgb
from retina_jax.data.reading import SlowReadMonitor, read_again
from retina_jax.data.source import BadImage, Size, Source
from retina_jax.data.transforms import Shapes, tf
from retina_jax.errors import one_line, reason

log = logging.getLogger(__name__)
# Larger images (in pixels) are decoded and resized within the budget `DECODING`, which bounds the memory that they use.
LARGE = 2**22
LOGGED = 5  # number of images of one colour that are logged; all are counted
LOOK_AHEAD = 1000  # largest number of batches that `Batches.padded_shapes` checks
NO_IMAGE = np.zeros((0, 0, 3), np.uint8)


class Batch(NamedTuple):
    """b images with padded shape H W: this host's rows of a global batch."""

    images: UInt8[np.ndarray, "b H W 3"] | Float32[np.ndarray, "b H W 3"]  # RGB, in the upper left; the padding is 0
    image_sizes: Int32[np.ndarray, "b 2"]  # height and width without padding
    boxes_xyxy: Float32[np.ndarray, "b G 4"]  # pixels of the padded image; 0 for no box
    labels: Int32[np.ndarray, "b G"]  # 0 to K-1; -1 for no box
    indices: Int64[np.ndarray, " b"]  # rows in `source.records`
    valid: Bool[np.ndarray, " b"]  # False: repeated to fill an evaluation batch, or bad (black, 1x1, without boxes)
    scales: Float32[np.ndarray, "b 2"]  # pixels per original pixel, along x and y


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

    def augment(position: int) -> tuple[int, bool]:
        coin, die = sampler.random_bits(sampler.AUGMENTATION, seed, position, count=2)
        return short_sides[int(die) % len(short_sides)], data.flip and int(coin) % 2 == 1

    return Batches(source, data, shapes, order.batch, augment, mine, start_step, None)


def eval_batches(
    source: Source, data: DataConfig, *, batch_size: int, limit: int = 0, host: int = 0, hosts: int = 1
) -> Batches:
    """Returns evaluation batches: each image (of the first `limit`, unless 0) once, not flipped, at `data.short_side`.
    All hosts get as many batches, with the same shapes; rows that only fill a batch are not `valid`. With
    `data.buckets` 0 the images of a batch have their exact padded shape."""
    shapes = transforms.buckets(data, (data.short_side,))
    if data.buckets == 0:
        rule = data.short_side, data.long_side, data.size_rounding
        sizes = (transforms.resized_size(record.height, record.width, *rule) for record in source.records)
        shapes = tuple(sorted({transforms.exact_padded_shape(size, data) for size in sizes}))
    batches = sampler.eval_order(_image_buckets(source, data, data.short_side, shapes)[: limit or None], batch_size)
    mine = sampler.host_rows(batch_size, host, hosts)
    return Batches(source, data, shapes, batches.__getitem__, lambda _: (data.short_side, False), mine, 0, len(batches))


def overflow(source: Source, data: DataConfig) -> tuple[int, int]:
    """Returns how many images have more than `data.max_boxes` boxes, and how many boxes are dropped (an image's last)."""
    beyond = [len(record.labels) - data.max_boxes for record in source.records]
    return sum(n > 0 for n in beyond), sum(max(n, 0) for n in beyond)


class Batches(Iterator[Batch]):
    """Iterator over the batches of steps `start` to `stop` (None: infinite), with the rows `mine` of each global batch.
    `augment` returns the short side and whether to flip, from `BatchIndices.positions`. A bad image raises BadImage at its
    own step. With `data.bad_images` skip, its row is not valid instead; it is logged once, and counted in `skipped`."""

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        shapes: Shapes,
        batch_at: Callable[[int], sampler.BatchIndices],
        augment: Callable[[int], tuple[int, bool]],
        mine: slice,
        start: int,
        stop: int | None,
    ) -> None:
        transforms.load()
        self.skipped: Counter[str] = Counter()  # bad images that were left out, and how often (data.bad_images skip)
        self.one_colour: list[str] = []  # images of (nearly) one colour
        self._seen = np.zeros(len(source), bool)  # whether an image's colours were checked
        self._source, self._data = source, data
        self._shapes, self._augment, self._mine = shapes, augment, mine
        self._batch_at = functools.lru_cache(maxsize=64)(batch_at)
        self._local, self._step, self._stop = mine.stop - mine.start, start, stop
        self._bad: dict[int, BadImage] = {}
        self._doubted: set[int] = set()
        self._reads = SlowReadMonitor(source.where)
        self._iterator: Iterator[tuple] | None = None

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
                    batch = Batch(*next(self._iterator))
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
        for index in batch.indices[self._batch_at(self._step).valid[self._mine] & ~batch.valid].tolist():
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
            self._seen[index] = True
            if is_one_colour(batch.images[row, :height, :width], boxes[boxes[:, 2] > boxes[:, 0]]):
                self.one_colour.append(self._source.where(index))
                if len(self.one_colour) <= LOGGED:
                    shown = one_line(self.one_colour[-1])
                    log.warning("warning: %s: one colour, nothing to learn from; check the file", shown)

    def _dataset(self) -> tf.data.Dataset:
        workers = self._data.workers or cores()
        options = tf.data.Options()
        options.deterministic = True
        options.autotune.enabled = False
        options.threading.private_threadpool_size = workers
        options.threading.max_intra_op_parallelism = 1  # images are processed in parallel instead
        stop = tf.int64.max if self._stop is None else self._stop * self._local
        element = tf.autograph.experimental.do_not_convert(self._element)
        elements = tf.data.Dataset.range(self._step * self._local, stop).map(element, num_parallel_calls=workers)
        return elements.batch(self._local, drop_remainder=True).prefetch(self._data.prefetch).with_options(options)

    def _element(self, i: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Returns one row of a Batch: Python decides what to make, TensorFlow makes the pixels without holding the GIL."""
        columns = tf.bool, tf.int32, tf.int32, tf.float32, tf.int32, tf.int64, tf.bool, tf.float32
        inputs = tf.string, tf.uint8, tf.as_dtype(self._data.pixels)
        encoded, decoded, resized, flip, shape, size, *others = tf.numpy_function(self._load, [i], inputs + columns)
        decoded.set_shape((None, None, 3))
        resized.set_shape((None, None, 3))

        def resize() -> tf.Tensor:
            image = tf.cond(tf.strings.length(encoded) > 0, lambda: decode_jpeg(encoded), lambda: decoded)
            return transforms.resize(image, size, self._data.resize, self._data.pixels)

        image = tf.cond(tf.size(resized) > 0, lambda: resized, resize)
        # Flipped last, so that a flipped image has exactly the pixels of the original.
        image = tf.cond(flip, lambda: tf.reverse(image, axis=[1]), lambda: image)
        return transforms.pad(image, shape), size, *others

    def _load(self, i: np.int64) -> tuple:
        """Returns element i without work on pixels: the image from `_read`, flip, padded shape, other fields of Batch."""
        step, row = divmod(int(i), self._local)
        rows, data, row = self._batch_at(step), self._data, self._mine.start + row
        index = int(rows.indices[row])
        record = self._source.records[index]
        shape = np.array(self._shapes[rows.bucket], np.int32)
        boxes, labels = np.zeros((data.max_boxes, 4), np.float32), np.full(data.max_boxes, -1, np.int32)
        short_side, flip = self._augment(int(rows.positions[row]))
        rule = short_side, data.long_side, data.size_rounding
        height, width = transforms.resized_size(record.height, record.width, *rule)
        try:
            inputs = self._read(index, (height, width))
        except BadImage as error:
            # Raised in `__next__`, as TensorFlow would turn it into another error.
            self._bad[index] = error
            size, scales, black = np.ones(2, np.int32), np.ones(2, np.float32), np.zeros((1, 1, 3), data.pixels)
            return b"", NO_IMAGE, black, False, shape, size, boxes, labels, np.int64(index), False, scales
        scales = np.array([width / record.width, height / record.height])
        n = min(len(record.labels), data.max_boxes)
        # In float64, so that a box that ends at the image's edge still does after the resize.
        scaled = transforms.to_padded_pixels(record.boxes_xyxy[:n], scales, data.box_ends).astype(np.float32)
        boxes[:n] = transforms.flip_boxes(scaled, width) if flip else scaled
        labels[:n] = record.labels[:n]
        size, valid = np.array([height, width], np.int32), bool(rows.valid[row])
        return *inputs, flip, shape, size, boxes, labels, np.int64(index), valid, scales.astype(np.float32)

    def _read(self, index: int, size_hw: Size) -> tuple[bytes, np.ndarray, np.ndarray]:
        """Returns (encoded, decoded, resized), two of them empty. Plain JPEGs stay encoded, large images are resized."""
        if index in self._bad:
            raise self._bad[index]
        record, data = self._source.records[index], self._data
        not_resized = NO_IMAGE.astype(data.pixels)
        try:
            with self._reads.reading(index):
                encoded = read_again(lambda: self._source.read(index), self._source.where(index))
        except OSError as error:
            raise BadImage(f"{self._source.where(index)}: cannot be read: {reason(error)}") from None
        pixels, annotated = record.width * record.height, {"expected_size": (record.width, record.height)}
        decoding = self._source.decoding
        try:
            if pixels > LARGE:
                with DECODING.share(pixels):
                    image = to_rgb(encoded, decoding, **annotated)
                    return b"", NO_IMAGE, transforms.resize_large(image, size_hw, data.resize, data.pixels)
            if is_plain_jpeg(encoded, decoding, **annotated):
                if index not in self._doubted:
                    return encoded, NO_IMAGE, not_resized
                # Its batch failed, perhaps because of another image: as before, TensorFlow decodes it if it can.
                with contextlib.suppress(tf.errors.OpError):
                    return b"", decode_jpeg(encoded).numpy(), not_resized
            return b"", to_rgb(encoded, decoding, **annotated), not_resized
        except BadImage as error:
            raise BadImage(f"{self._source.where(index)}: {error}") from None


def decode_jpeg(encoded: tf.Tensor | bytes) -> tf.Tensor:
    """Returns the RGB of a JPEG, identical to PIL's."""
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")


def _image_buckets(source: Source, data: DataConfig, short_side: int, shapes: Shapes) -> Int64[np.ndarray, " N"]:
    rule = short_side, data.long_side, data.size_rounding
    bucket = functools.cache(lambda *size: transforms.assign_bucket(transforms.resized_size(*size, *rule), shapes))
    return np.array([bucket(record.height, record.width) for record in source.records], np.int64)
