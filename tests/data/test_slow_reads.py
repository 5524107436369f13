"""Reads that fail, fail temporarily, or hang are reported, retried or waited for, and never cause a deadlock."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzzing import assert_named
from small_sets import named, rectangles

from retina_jax.config import DataConfig
from retina_jax.data import reading as waiting
from retina_jax.data.pipeline import Batches, train_batches
from retina_jax.data.reading import read_file
from retina_jax.data.source import BadImage, Source

DATA = DataConfig(batch_size=4, short_side=64, long_side=128, max_boxes=5, workers=2)


def reading(source: Source, index: int, instead: Callable[[], object]) -> Source:
    """Returns the source; reading one image calls `instead` first."""

    def read(i: int) -> bytes:
        if i == index:
            instead()
        return source.read(i)

    return dataclasses.replace(source, read=read)


def fail(error: Exception) -> Callable[[], object]:
    def raise_it() -> None:
        raise error

    return raise_it


@pytest.mark.parametrize(
    "error", [OSError(116, "Stale file handle"), OSError("lost\nthe server"), TimeoutError(), PermissionError(13, "no")]
)
def test_any_failing_read_is_a_bad_image(tmp_path: Path, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retina_jax.data.reading.PAUSES", (0.01, 0.01))
    plain = rectangles(tmp_path, [(80, 60)] * 8)
    source = reading(plain, 5, fail(error))
    with pytest.raises(BadImage) as raised:
        list(itertools.islice(train_batches(source, DATA, seed=0), 2))
    assert_named(raised.value, f"{plain.where(5)}: cannot be read: ")
    skipping = train_batches(source, dataclasses.replace(DATA, bad_images="skip"), seed=0)
    indices = np.concatenate([batch.indices[batch.valid] for batch in itertools.islice(skipping, 2)])
    assert sorted(indices.tolist()) == [0, 1, 2, 3, 4, 6, 7] and skipping.skipped == {plain.where(5): 1}


def failing(folder: Path, times: int, error: Exception) -> tuple[Callable[[Path, int], bytes], list[float]]:
    """Returns a version of `read_file` whose first `times` reads in the folder raise, and the times of these reads.

    Other folders are read as usual: batches of earlier tests may still be fetching their images.
    """
    calls: list[float] = []

    def call(path: Path, largest: int) -> bytes:
        if folder in path.parents:
            calls.append(time.monotonic())
            if len(calls) <= times:
                raise error
        return read_file(path, largest)

    return call, calls


PASSING = ["EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "ECONNRESET", "EREMOTEIO"]


@pytest.mark.parametrize("name", PASSING)
def test_a_read_that_fails_temporarily_is_retried(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("retina_jax.data.reading.PAUSES", (0.01, 0.02, 0.08))
    source = named(tmp_path, "one.jpg")
    (tmp_path / "images" / "one.jpg").write_bytes(b"content")
    number = getattr(errno, name)
    read, calls = failing(tmp_path, 3, OSError(number, os.strerror(number)))
    monkeypatch.setattr("retina_jax.data.decoding.read_file", read)
    assert source.read(0) == b"content" and len(calls) == 4
    assert np.all(np.diff(calls) >= [0.01, 0.02, 0.08])
    lines = [record.getMessage() for record in caplog.records if str(tmp_path) in record.getMessage()]
    assert lines == [
        f"warning: {source.where(0)}: cannot be read: {os.strerror(number)}; trying again in {pause} s"
        for pause in (0.01, 0.02, 0.08)
    ]
    # A fourth failure is the image's.
    read, calls = failing(tmp_path, 4, OSError(number, os.strerror(number)))
    monkeypatch.setattr("retina_jax.data.decoding.read_file", read)
    with pytest.raises(BadImage) as raised:
        source.read(0)
    assert_named(raised.value, f"{source.where(0)}: cannot be read: {os.strerror(number)}")
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "EISDIR", "EINVAL", "EFBIG", "ELOOP", "ENAMETOOLONG", "ENXIO"])
def test_a_permanent_error_is_not_retried(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = named(tmp_path, "one.jpg")
    number = getattr(errno, name)
    read, calls = failing(tmp_path, 1, OSError(number, os.strerror(number)))
    monkeypatch.setattr("retina_jax.data.decoding.read_file", read)
    with pytest.raises(BadImage):
        source.read(0)
    assert len(calls) == 1 and not any("again" in record.getMessage() for record in caplog.records)


def test_an_image_read_at_the_second_attempt_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retina_jax.data.reading.PAUSES", (0.01,))
    plain = rectangles(tmp_path, [(80, 60)] * 8)
    calls: list[int] = []

    def fail_once() -> None:
        calls.append(5)
        if len(calls) == 1:
            raise OSError(errno.ESTALE, "stale")

    found = list(itertools.islice(train_batches(reading(plain, 5, fail_once), DATA, seed=0), 2))
    expected = list(itertools.islice(train_batches(plain, DATA, seed=0), 2))
    for one, two in zip(found, expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert len(calls) >= 2


@pytest.mark.timeout(60)
def test_a_read_that_hangs_is_reported_and_its_batch_still_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", 0.3)
    plain = rectangles(tmp_path, [(80, 60)] * 8)
    goes_on, taken = threading.Event(), []
    source = reading(plain, 5, lambda: goes_on.wait(100))

    def take() -> None:
        taken.extend(itertools.islice(train_batches(source, DATA, seed=0), 2))

    with caplog.at_level(logging.WARNING, "retina_jax"):
        thread = threading.Thread(target=take)
        thread.start()
        deadline = time.monotonic() + 60
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.05)
        assert thread.is_alive() and len(taken) < 2
        goes_on.set()
        thread.join(100)
    expected = list(itertools.islice(train_batches(plain, DATA, seed=0), 2))
    assert all(
        np.array_equal(a, b) for one, two in zip(taken, expected, strict=True) for a, b in zip(one, two, strict=True)
    )
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("warning: batch ") and f"reading {plain.where(5)} (" in line and "\n" not in line


def test_batches_that_arrive_in_time_are_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", 5)
    before = threading.active_count()
    batches: Batches = train_batches(rectangles(tmp_path, [(80, 60)] * 8), DATA, seed=0)
    assert len(list(itertools.islice(batches, 20))) == 20 and not caplog.records
    assert threading.active_count() <= before + 1


def test_one_thread_watches_many_batches_and_ends_after_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", 2.0)
    before = set(threading.enumerate())
    reads = waiting.SlowReadMonitor(str)
    for step in range(100):
        with reads.waiting(step):
            watchers = set(threading.enumerate()) - before
            assert len(watchers) == 1
    (thread,) = watchers
    thread.join(60)
    assert thread.daemon and not thread.is_alive() and not caplog.records
    monkeypatch.setattr(waiting, "PATIENCE", 0.2)
    for number, step in enumerate((100, 101), start=1):  # another thread now; one line per batch
        with reads.reading(7), reads.waiting(step):
            deadline = time.monotonic() + 60
            while len(caplog.records) < number and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.5)  # time for a second line
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[1] for line in lines] == [" batch 100", " batch 101"]
    assert all("reading 7 (" in line for line in lines)


def test_batches_that_are_not_requested_are_not_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "CHECKS", 0.1)
    before = set(threading.enumerate())
    batches = train_batches(rectangles(tmp_path, [(80, 60)] * 8), DATA, seed=0)
    next(batches)
    for thread in set(threading.enumerate()) - before:
        if thread.name == "slow files":
            thread.join(60)
            assert not thread.is_alive()
    assert next(batches).indices.shape == (4,)
