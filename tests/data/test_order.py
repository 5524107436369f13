"""The order of images: every epoch is complete, any step is found directly, and hosts divide the batches."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_jax.data.sampler import ORDER, BucketSampler, eval_order, host_rows, random_bits

sizes = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 9), st.integers(-3, 2**40))


def queued(buckets: np.ndarray, batch_size: int, seed: int, epochs: int) -> list[tuple[int, list[int], list[int], int]]:
    """Returns the order by its definition: goes through the images epoch by epoch with queues."""
    queues: dict[int, list[tuple[int, int]]] = {}
    batches = []
    for epoch in range(epochs):
        for image in np.argsort(random_bits(ORDER, seed, epoch, count=len(buckets)), kind="stable").tolist():
            queue = queues.setdefault(int(buckets[image]), [])
            queue.append((image, epoch * len(buckets) + image))
            if len(queue) == batch_size:
                batches.append((int(buckets[image]), *map(list, zip(*queue, strict=True)), epoch))
                queue.clear()
    return batches


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_the_closed_form_equals_the_queues(case: tuple[list[int], int, int]) -> None:
    buckets, batch_size, seed = np.array(case[0]), case[1], case[2]
    order = BucketSampler(buckets, batch_size, seed)
    expected = queued(buckets, batch_size, seed, epochs=12)
    found = [order.batch(step) for step in range(len(expected))]
    assert [(b.bucket, b.indices.tolist(), b.positions.tolist(), b.epoch) for b in found] == expected


@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(0, 10_000))
def test_any_step_equals_iterating_to_it(case: tuple[list[int], int, int], step: int) -> None:
    buckets, batch_size, seed = np.array(case[0]), case[1], case[2]
    walked = BucketSampler(buckets, batch_size, seed)
    for earlier in range(max(0, step - 20), step):
        walked.batch(earlier)
    fresh = BucketSampler(buckets, batch_size, seed).batch(step)
    assert all(np.array_equal(a, b) for a, b in zip(fresh, walked.batch(step), strict=True))
    assert (buckets[fresh.indices] == fresh.bucket).all()


def test_every_epoch_visits_every_image_once() -> None:
    buckets = np.random.default_rng(0).choice(4, 103, p=[0.6, 0.3, 0.08, 0.02])
    order, epochs = BucketSampler(buckets, 8, seed=5), 40
    batches = [order.batch(step) for step in range(epochs * 103 // 8)]
    visits = np.concatenate([batch.positions for batch in batches])
    assert len(set(visits.tolist())) == len(visits)
    visited = np.bincount(visits // 103)[: epochs - 8]
    # A bucket of two images needs four epochs to fill a batch: all visits of earlier epochs have been returned.
    assert (visited == 103).all()


def test_epochs_differ_and_seeds_differ() -> None:
    buckets = np.zeros(64, int)
    first, second = (
        np.concatenate([BucketSampler(buckets, 8, 0).batch(e * 8 + k).indices for k in range(8)]) for e in (0, 1)
    )
    other = np.concatenate([BucketSampler(buckets, 8, 1).batch(k).indices for k in range(8)])
    assert sorted(first) == sorted(second) == sorted(other) == list(range(64))
    assert not np.array_equal(first, second) and not np.array_equal(first, other)


def test_batches_of_buckets_are_mixed_in_proportion() -> None:
    buckets = np.repeat([0, 1], [3000, 1000])
    order = BucketSampler(buckets, 10, seed=0)
    for start in (0, 200):  # Both halves of the first epoch contain both buckets, three to one.
        share = np.mean([order.batch(start + k).bucket == 0 for k in range(200)])
        assert 0.65 < share < 0.85


def test_the_order_never_changes_between_versions() -> None:
    # A change here would make resumed runs continue in another order than they began.
    batch = BucketSampler(np.arange(11) % 2, 3, seed=7).batch(1000)
    assert (batch.bucket, batch.indices.tolist(), batch.positions.tolist(), batch.epoch) == (
        1,
        [5, 3, 9],
        [2997, 2995, 3001],
        272,
    )


def test_coco_size_at_any_step_in_a_second() -> None:
    buckets = np.random.default_rng(0).choice(4, 117_266, p=[0.55, 0.25, 0.15, 0.05])
    start = time.process_time()
    batch = BucketSampler(buckets, 16, seed=0).batch(89_999)
    assert time.process_time() - start < 1
    assert batch.epoch == 89_999 * 16 // 117_266


def test_eval_order_takes_each_image_once() -> None:
    buckets = np.array([2, 0, 2, 2, 0, 2, 2])
    batches = eval_order(buckets, 3)
    assert [batch.bucket for batch in batches] == [0, 2, 2]
    assert sorted(np.concatenate([batch.indices[batch.valid] for batch in batches])) == list(range(7))
    assert all(len(batch.indices) == 3 and (buckets[batch.indices] == batch.bucket).all() for batch in batches)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_partition_a_batch(hosts: int) -> None:
    rows = np.arange(8)
    assert np.array_equal(np.concatenate([rows[host_rows(8, host, hosts)] for host in range(hosts)]), rows)


@pytest.mark.parametrize(("batch_size", "host", "hosts"), [(8, 0, 3), (8, 2, 2), (8, -1, 2)])
def test_hosts_that_cannot_share_a_batch_are_refused(batch_size: int, host: int, hosts: int) -> None:
    with pytest.raises(ValueError, match="must be divisible by"):
        host_rows(batch_size, host, hosts)
