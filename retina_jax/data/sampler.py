"""The order of images in training and evaluation: a pure function of (seed, step), without state, the same on every host.
Each image has a bucket (its padded shape), and a global batch has images of one bucket, so that all hosts run the same
compiled program. Epoch e goes through all N images in a random order, and each image joins the queue of its bucket. When a
queue has B images, they leave it as the next batch; the others stay for the next epoch. So after e epochs bucket b with n_b
images has given floor(e n_b / B) batches: the epoch of a step follows without replay."""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

ORDER, AUGMENTATION = 1, 2  # independent random streams of a seed


class BatchIndices(NamedTuple):
    """Images of a global batch of B."""

    bucket: int
    indices: Int64[np.ndarray, " B"]
    valid: Bool[np.ndarray, " B"]  # False for an image repeated to fill an evaluation batch
    positions: Int64[np.ndarray, " B"]  # in training epoch × N + index: the seed of the image's augmentation
    epoch: int = 0  # epoch that completed the batch; its first images may be from earlier epochs


class _Epoch(NamedTuple):
    queues: list[np.ndarray]  # images of each bucket in the order of this epoch
    buckets: np.ndarray  # bucket of each batch completed in this epoch, in order
    ends: np.ndarray  # end of each of these batches (exclusive) in the sequence of its bucket over all epochs


class BucketSampler:
    """Global training batches of images with these buckets. `batch_size` counts images over all hosts. If a bucket
    has fewer images than a batch, a batch contains an image several times, from different epochs."""

    def __init__(self, buckets: Int[np.ndarray, " N"], batch_size: int, seed: int) -> None:
        self._of_image = buckets
        self._sizes = [int(n) for n in np.bincount(buckets)]
        self._batch_size = batch_size
        self._seed = seed
        # A step needs its own epoch and, for images that have waited, earlier ones.
        self._epoch = functools.lru_cache(maxsize=4)(self._walk)

    def batch(self, step: int) -> BatchIndices:
        """Returns the batch of a step (from 0, unlimited). Every step costs the same."""
        size = self._batch_size
        # floor(e n_b / B) summed over buckets is at most e N / B, so no earlier epoch can hold the step.
        number = step * size // len(self._of_image)
        while self._batches_before(number + 1) <= step:
            number += 1
        epoch = self._epoch(number)
        k = step - self._batches_before(number)
        bucket = int(epoch.buckets[k])
        epochs, ranks = np.divmod(np.arange(epoch.ends[k] - size, epoch.ends[k]), self._sizes[bucket])
        indices = np.empty(size, np.int64)
        for e in np.unique(epochs):
            now = epochs == e
            indices[now] = self._epoch(int(e)).queues[bucket][ranks[now]]
        return BatchIndices(bucket, indices, np.ones(size, bool), epochs * len(self._of_image) + indices, number)

    def _batches_before(self, epoch: int) -> int:
        return sum(epoch * n // self._batch_size for n in self._sizes)

    def _walk(self, number: int) -> _Epoch:
        # A bit generator's raw bits are the same in all versions of numpy, unlike Generator.permutation.
        order = np.argsort(random_bits(ORDER, self._seed, number, count=len(self._of_image)), kind="stable")
        bucket_of = self._of_image[order]
        queues, buckets, ends, completed = [], [], [], []
        for bucket, n in enumerate(self._sizes):
            places = np.flatnonzero(bucket_of == bucket)
            queues.append(order[places])
            first = number * n // self._batch_size + 1
            end = np.arange(first, (number + 1) * n // self._batch_size + 1, dtype=np.int64) * self._batch_size
            buckets.append(np.full(len(end), bucket))
            ends.append(end)
            completed.append(places[end - 1 - number * n])
        in_turn = np.argsort(np.concatenate(completed))
        return _Epoch(queues, np.concatenate(buckets)[in_turn], np.concatenate(ends)[in_turn])


def eval_order(buckets: Int[np.ndarray, " N"], batch_size: int) -> list[BatchIndices]:
    """Returns global evaluation batches: each image once, by bucket; a bucket's last batch repeats its last image."""
    batches = []
    for bucket in np.unique(buckets):
        images = np.flatnonzero(buckets == bucket)
        for start in range(0, len(images), batch_size):
            rows = np.arange(start, start + batch_size)
            indices = images[np.minimum(rows, len(images) - 1)]
            batches.append(BatchIndices(int(bucket), indices, rows < len(images), indices))
    return batches


def host_rows(batch_size: int, host: int, hosts: int) -> slice:
    """Returns the rows of a global batch that a host reads; together, hosts read each row once."""
    if batch_size % hosts or not 0 <= host < hosts:
        raise ValueError(f"batch size {batch_size} must be divisible by {hosts} hosts, and host {host} less than that")
    local = batch_size // hosts
    return slice(host * local, (host + 1) * local)


def random_bits(purpose: int, seed: int, position: int, *, count: int) -> UInt64[np.ndarray, " count"]:
    """Returns random 64-bit integers, a pure function of the arguments; independent for each (purpose, seed, position)."""
    return np.random.Philox([purpose, seed % 2**64, position]).random_raw(count)
