"""The order images are visited in, as a pure function of (seed, step): nothing to save, the same on every host.

Every image has a bucket (the canvas it is padded to) and every global batch is of one bucket, so that all hosts run the
same compiled program at the same step. The order is defined by two facts:

    Epoch e walks all N images in a random order of its own. Each image joins the queue of its bucket.
    When a queue holds B images they leave as the next batch.

What is left in the queues at the end of an epoch stays in them, so each epoch still visits every image once, and after e
epochs the bucket b of n_b images has given floor(e n_b / B) batches. That closed form finds the epoch of any step
without replaying the ones before.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

ORDER, AUGMENTATION = 1, 2
"""What random bits are for: separate streams of the same seed."""


class BatchIndices(NamedTuple):
    """The images of a global batch of B."""

    bucket: int
    indices: Int64[np.ndarray, " B"]
    positions: Int64[np.ndarray, " B"]
    """epoch × N + index: no other visit of any image has it, so it seeds the visit's augmentation."""
    epoch: int
    """Epoch in which the batch was completed; its first images may have waited since an earlier one."""


class EvalIndices(NamedTuple):
    """The images of a global evaluation batch of B."""

    bucket: int
    indices: Int64[np.ndarray, " B"]
    valid: Bool[np.ndarray, " B"]
    """False where an image is repeated to fill the batch."""


class _Epoch(NamedTuple):
    queues: list[np.ndarray]
    """Images of each bucket, in the order that this epoch walks them."""
    buckets: np.ndarray
    """Bucket of each batch that this epoch completes, in order."""
    ends: np.ndarray
    """Where in its bucket's whole stream each of those batches ends, exclusive."""


class TrainOrder:
    """Order of the global training batches: `batch(step)`.

    Args:
        buckets: bucket of every image.
        batch_size: images a batch, over all hosts. It may exceed the images of a bucket, or of all: a batch then holds
            an image more than once, from different epochs.
        seed: any integer.
    """

    def __init__(self, buckets: Int[np.ndarray, " N"], batch_size: int, seed: int) -> None:
        if len(buckets) < 1 or batch_size < 1:
            raise ValueError(f"an order needs images and a batch size, not {len(buckets)} images in {batch_size}s")
        self._of_image = buckets
        self._sizes = [int(n) for n in np.bincount(buckets)]
        self._batch_size = batch_size
        self._seed = seed
        # A step looks at its own epoch and, for images that have waited, at the ones before.
        self._epoch = functools.lru_cache(maxsize=4)(self._walk)

    def batch(self, step: int) -> BatchIndices:
        """Batch of a step, from 0 on without end; any step costs the same."""
        size = self._batch_size
        # floor(e n_b / B) summed over buckets is at most e N / B, so no earlier epoch can hold the step.
        number = step * size // len(self._of_image)
        while self._batches_before(number + 1) <= step:
            number += 1
        epoch = self._epoch(number)
        k = step - self._batches_before(number)
        bucket = int(epoch.buckets[k])
        stream = np.arange(epoch.ends[k] - size, epoch.ends[k])
        epochs, ranks = np.divmod(stream, self._sizes[bucket])
        indices = np.empty(size, np.int64)
        for e in np.unique(epochs):
            now = epochs == e
            indices[now] = self._epoch(int(e)).queues[bucket][ranks[now]]
        return BatchIndices(bucket, indices, epochs * len(self._of_image) + indices, number)

    def _batches_before(self, epoch: int) -> int:
        return sum(epoch * n // self._batch_size for n in self._sizes)

    def _walk(self, number: int) -> _Epoch:
        # The raw bits of a bit generator are the same in every version of numpy; Generator.permutation's are not.
        walk = np.argsort(random_bits(ORDER, self._seed, number, count=len(self._of_image)), kind="stable")
        of_walk = self._of_image[walk]
        queues, buckets, ends, completed = [], [], [], []
        for bucket, n in enumerate(self._sizes):
            places = np.flatnonzero(of_walk == bucket)
            queues.append(walk[places])
            first = number * n // self._batch_size + 1
            end = np.arange(first, (number + 1) * n // self._batch_size + 1, dtype=np.int64) * self._batch_size
            buckets.append(np.full(len(end), bucket))
            ends.append(end)
            completed.append(places[end - 1 - number * n])
        in_turn = np.argsort(np.concatenate(completed))
        return _Epoch(queues, np.concatenate(buckets)[in_turn], np.concatenate(ends)[in_turn])


def eval_order(buckets: Int[np.ndarray, " N"], batch_size: int) -> list[EvalIndices]:
    """Global evaluation batches: every image once, bucket by bucket; the last batch of a bucket repeats its last image."""
    batches = []
    for bucket in np.unique(buckets):
        images = np.flatnonzero(buckets == bucket)
        for start in range(0, len(images), batch_size):
            rows = np.arange(start, start + batch_size)
            indices = images[np.minimum(rows, len(images) - 1)]
            batches.append(EvalIndices(int(bucket), indices, rows < len(images)))
    return batches


def host_rows(batch_size: int, host: int, hosts: int) -> slice:
    """Rows of a global batch that a host reads; together the hosts read each row once."""
    if batch_size % hosts or not 0 <= host < hosts:
        raise ValueError(f"batch size {batch_size} must divide by the {hosts} hosts, and host {host} be one of them")
    local = batch_size // hosts
    return slice(host * local, (host + 1) * local)


def random_bits(purpose: int, seed: int, position: int, *, count: int) -> UInt64[np.ndarray, " count"]:
    """Random 64-bit integers, a pure function of the arguments, independent for each (purpose, seed, position)."""
    return np.random.Philox([purpose, seed % 2**64, position]).random_raw(count)
