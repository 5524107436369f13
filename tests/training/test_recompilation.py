"""However many sizes the images have, there are as many compiled programs as buckets."""

from __future__ import annotations

from collections import Counter

import jax
import numpy as np
import pytest
from small_sets import encode

from retina_jax.config import Config
from retina_jax.config_io import override
from retina_jax.data.pipeline import Batch, eval_batches, train_batches
from retina_jax.data.source import Record, Source
from retina_jax.data.transforms import assign_bucket, buckets, resized_size
from retina_jax.training.parallel import Driver
from retina_jax.training.step import Inputs


def of_random_sizes(count: int) -> Source:
    """Returns images of `count` different sizes, wide and tall, with 0 to 3 boxes each; they are drawn when they are
    read."""
    rng = np.random.default_rng(0)
    sizes: dict[tuple[int, int], None] = {}
    while len(sizes) < count:
        short = int(rng.integers(20, 200))
        sides = short, int(short * rng.uniform(1, 3))
        sizes[sides[:: int(rng.choice([-1, 1]))]] = None
    records = []
    for i, (width, height) in enumerate(sizes):
        corners = rng.uniform(0, 0.5, (int(rng.integers(0, 4)), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(0.2, 0.5, corners.shape)], 1)
        boxes *= np.array([[width, height, width, height]])
        labels = rng.integers(0, 3, len(boxes)).astype(np.int32)
        records.append(Record(i + 1, f"{i}.png", width, height, boxes.astype(np.float32), labels))

    def read(index: int) -> bytes:
        return encode(np.full((records[index].height, records[index].width, 3), index % 256, np.uint8), "PNG")

    return Source("random sizes", records, [(1, "a"), (2, "b"), (3, "c")], {}, read, str, dict)


@pytest.mark.parametrize("number", [2, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 4, 6))])
def test_there_are_as_many_programs_as_buckets_for_any_sizes(tiny: Config, number: int) -> None:
    config = override(
        tiny,
        {
            "data.short_side": 64,
            "data.long_side": 128,
            "data.jitter_short_sides": (48, 64),
            "data.buckets": number,
            "data.batch_size": 4,
            "devices": 2,
        },
    )
    data, source = config.data, of_random_sizes(80)
    assert len({(r.height, r.width) for r in source.records}) == 80
    shapes = buckets(data, data.jitter_short_sides)
    assert len(shapes) == number
    of_bucket = Counter(assign_bucket(resized_size(r.height, r.width, 64, 128), shapes) for r in source.records)
    assert set(of_bucket) == set(range(number))  # The sizes cover all of them.

    driver = Driver(config, 3)
    state, used, seen = driver.init_state(), set(), set()

    def placed(batch: Batch) -> Inputs:
        used.add(batch.images.shape[1:3])
        seen.update(batch.indices.tolist())
        return driver.shard_batch(Inputs(batch.images, batch.image_sizes, batch.boxes_xyxy, batch.labels, batch.valid))

    for batch in train_batches(source, data, seed=0):
        state, metrics = driver.step(state, placed(batch))
        if len(seen) == len(source):
            break
    assert np.isfinite(float(metrics["loss"]))
    assert used == set(shapes) and driver.step._cache_size() == number

    used.clear(), seen.clear()
    for batch in eval_batches(source, data, batch_size=4):
        found = driver.detect(state.variables, placed(batch))
    jax.block_until_ready(found)
    assert used == set(shapes) and len(seen) == 80 and driver.detect._cache_size() == number
