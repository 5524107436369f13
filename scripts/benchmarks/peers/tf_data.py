"""A plain tf.data pipeline."""

from __future__ import annotations

import tensorflow as tf

from benchmarks.photographs import batches_per_repetition, in_batches, photographs, rest
from benchmarks.work import BenchmarkError, Task, Work


def make(task: Task) -> Work:
    """Prepares reading, decoding, resize, mirroring, padding and batching."""
    if task.name != "input":
        raise BenchmarkError(f"tf.data has no benchmark {task.name}; use --peer torchvision")
    columns = tuple(map(list, zip(*in_batches(photographs(task), task.batch), strict=True)))
    dataset = tf.data.Dataset.from_tensor_slices(columns).repeat()
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(task.batch).prefetch(2)
    batches = dataset.as_numpy_iterator()
    count = batches_per_repetition(task.batch)

    def run() -> None:
        for _ in range(count):
            next(batches)
        rest()

    return Work(run, images=count * task.batch, facts={"version": f"tensorflow {tf.__version__}"})


def load(path: tf.Tensor, size_hw: tf.Tensor, padded_hw: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns a photograph in its padded shape, and its size there. The pixels are uint8, as in this project:
    mirroring, padding and batching the float32 of a resize takes 1.9 times as long."""
    image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
    image = tf.cast(tf.round(tf.image.resize(image, size_hw)), tf.uint8)
    image = tf.image.random_flip_left_right(image)
    return tf.image.pad_to_bounding_box(image, 0, 0, padded_hw[0], padded_hw[1]), size_hw
