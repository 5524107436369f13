"""The benchmark of the input pipeline: JPEG files to training batches."""

from __future__ import annotations

import dataclasses

from benchmarks.photographs import IMAGES, batches_per_repetition, rest
from benchmarks.work import BenchmarkError, Task, Work
from retina_jax.cli import limit_heaps
from retina_jax.config import DataConfig
from retina_jax.data.datasets import read_coco
from retina_jax.data.pipeline import train_batches
from retina_jax.data.source import DataError


def make(task: Task) -> Work:
    """Prepares `train_batches` of the first IMAGES of `task.annotations`; `task.size` gives the short and the long
    side."""
    limit_heaps()  # as scripts/train.py does
    short_side, long_side = task.padded_hw
    try:
        source = read_coco(task.annotations, task.images)
    except DataError as error:
        raise BenchmarkError(str(error)) from None
    source = dataclasses.replace(source, records=source.records[:IMAGES])
    data = DataConfig(batch_size=task.batch, short_side=short_side, long_side=long_side)
    batches = train_batches(source, data, seed=task.seed)
    count = batches_per_repetition(task.batch)

    def run() -> None:
        for _ in range(count):
            next(batches)
        rest()

    return Work(run, images=count * task.batch)
