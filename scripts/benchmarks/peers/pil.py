"""PIL and NumPy, one image after the other."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import PIL
from jaxtyping import UInt8
from PIL import Image

from benchmarks.photographs import Photograph, batches_per_repetition, in_batches, photographs, rest
from benchmarks.work import BenchmarkError, Task, Work


def make(task: Task) -> Work:
    """Prepares opening, conversion, resize, mirroring of half of the images, padding and batching."""
    if task.name != "input":
        raise BenchmarkError(f"PIL has no benchmark {task.name}; use --peer torchvision")
    stream = itertools.cycle(in_batches(photographs(task), task.batch))
    coin = random.Random(task.seed)
    count = batches_per_repetition(task.batch)

    def run() -> None:
        for _ in range(count):
            batch_of(list(itertools.islice(stream, task.batch)), coin)
        rest()

    return Work(run, images=count * task.batch, facts={"version": f"Pillow {PIL.__version__}"})


def batch_of(photographs: Sequence[Photograph], coin: random.Random) -> UInt8[np.ndarray, "b H W 3"]:
    """Returns a batch of photographs with one padded shape."""
    batch = np.zeros((len(photographs), *photographs[0].padded_hw, 3), np.uint8)
    for row, photograph in zip(batch, photographs, strict=True):
        height, width = photograph.size_hw
        with Image.open(photograph.path) as image:
            pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
        row[:height, :width] = pixels[:, ::-1] if coin.random() < 0.5 else pixels
    return batch
