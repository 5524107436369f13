"""Batches are the same however they are reached, boxes are on their objects, and bad images are handled."""

import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_sets import encode, rectangles

from retina_jax.config import DataConfig
from retina_jax.data.datasets import read_coco
from retina_jax.data.pipeline import Batch, Batches, eval_batches, overflow, train_batches
from retina_jax.data.source import BadImage, Source
from retina_jax.data.transforms import buckets, resized_size, train_short_sides

SIZES = [(96, 72), (72, 96), (120, 60), (60, 120), (80, 80), (64, 48), (100, 75), (50, 110), (90, 60), (33, 47)]
DATA = DataConfig(batch_size=4, short_side=100, long_side=160, max_boxes=5, workers=2)


def take(batches: Batches, count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def same(first: Sequence[Batch], second: Sequence[Batch]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(np.array_equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def coloured(image: np.ndarray, label: int) -> tuple[float, float, float, float]:
    """Returns the bounds of the pixels of the label's colour."""
    others = [channel for channel in range(3) if channel != label]
    found = (image[..., label].astype(int) - image[..., others].max(-1)) > 128
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def spoil(source: Source, index: int, encoded: bytes | None) -> str:
    """Replaces the file of an image, or removes it; returns its path."""
    path = Path(source.where(index))
    path.unlink() if encoded is None else path.write_bytes(encoded)
    return str(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("resize", ["bilinear", "antialias"])
def test_boxes_are_on_their_objects(tmp_path: Path, kind: str, resize: str) -> None:
    source = rectangles(tmp_path, SIZES, kind=kind)
    data = dataclasses.replace(DATA, resize=resize, jitter_short_sides=(50, 100, 120))
    seen, flipped, sides = set(), set(), set()
    for batch in take(train_batches(source, data, seed=3), 12):
        assert batch.images.shape[1:3] in buckets(data, train_short_sides(data))
        for row, index in enumerate(batch.indices.tolist()):
            record, size = source.records[index], batch.image_sizes[row]
            box, label = batch.boxes_xyxy[row, 0], int(batch.labels[row, 0])
            assert np.abs(np.array(coloured(batch.images[row], label)) - box).max() <= 1
            assert (
                label == record.labels[0] and batch.labels[row, 1:].max() == -1 and not batch.boxes_xyxy[row, 1:].any()
            )
            assert not batch.images[row, size[0] :].any() and not batch.images[row, :, size[1] :].any()
            assert batch.images[row, : size[0], : size[1]].max(-1).min() > 0
            scale = batch.scales[row]
            assert np.allclose(scale, [size[1] / record.width, size[0] / record.height])
            plain, mirrored = record.boxes_xyxy[0] * np.tile(scale, 2), box.copy()
            mirrored[[0, 2]] = size[1] - box[[2, 0]]
            (at,) = [flip for flip, candidate in enumerate((box, mirrored)) if np.allclose(candidate, plain, atol=1e-3)]
            seen.add(index), flipped.add(at), sides.add(int(min(size)))
    assert seen == set(range(len(SIZES))) and flipped == {0, 1} and sides >= {50, 100}


def test_box_at_the_edge_ends_at_the_edge(tmp_path: Path) -> None:
    source = rectangles(tmp_path, [(97, 61)] * 4)
    full = np.array([[0, 0, 97, 61]], np.float32)
    records = [dataclasses.replace(record, boxes_xyxy=full) for record in source.records]
    for batch in take(train_batches(dataclasses.replace(source, records=records), DATA, seed=0), 3):
        sizes = batch.image_sizes[:, ::-1].astype(np.float32)
        assert np.array_equal(batch.boxes_xyxy[:, 0], np.concatenate([sizes * 0, sizes], 1))


@pytest.mark.parametrize("start", [1, 7])
def test_resumed_batches_are_those_of_one_run(tmp_path: Path, start: int) -> None:
    source = rectangles(tmp_path, SIZES)
    data = dataclasses.replace(DATA, jitter_short_sides=(60, 100))
    uninterrupted = take(train_batches(source, data, seed=1), 10)
    assert same(take(train_batches(source, data, seed=1, start_step=start), 10 - start), uninterrupted[start:])
    assert not same(take(train_batches(source, data, seed=2), 10), uninterrupted)


def test_short_sides_are_drawn_equally_often_mirrored_or_not(tmp_path: Path) -> None:
    """This includes images whose size is then limited by the long side; they keep their aspect ratio."""
    source = rectangles(tmp_path, [(40, 40), (80, 40)] * 4)
    data = dataclasses.replace(DATA, short_side=32, long_side=64, jitter_short_sides=(16, 32, 48), batch_size=8)
    counts: Counter[tuple[int, bool]] = Counter()
    for batch in take(train_batches(source, data, seed=5), 90):
        assert batch.images.shape[1:3] == (64, 64)
        for row, index in enumerate(batch.indices.tolist()):
            height, width = batch.image_sizes[row]
            record = source.records[index]
            plain = np.allclose(batch.boxes_xyxy[row, 0, 0], record.boxes_xyxy[0, 0] * batch.scales[row, 0], atol=1e-3)
            if record.width == 40:
                counts[int(height), plain] += 1
            else:
                assert (height, width) in ((16, 32), (32, 64))
    expected = 90 * 8 / 2 / 6
    assert len(counts) == 6 and all(abs(n - expected) < 4 * expected**0.5 for n in counts.values()), counts


def test_hosts_read_together_what_one_host_reads(tmp_path: Path) -> None:
    source, data = rectangles(tmp_path, SIZES), dataclasses.replace(DATA, jitter_short_sides=(60, 100))
    one = take(train_batches(source, data, seed=1), 6)
    halves = [take(train_batches(source, data, seed=1, host=host, hosts=2), 6) for host in range(2)]
    assert same([Batch(*map(np.concatenate, zip(*pair, strict=True))) for pair in zip(*halves, strict=True)], one)
    evaluated = [list(eval_batches(source, DATA, batch_size=4, host=host, hosts=2)) for host in range(2)]
    joined = [Batch(*map(np.concatenate, zip(*pair, strict=True))) for pair in zip(*evaluated, strict=True)]
    assert same(joined, list(eval_batches(source, DATA, batch_size=4)))


def test_without_flip_nothing_is_mirrored(tmp_path: Path) -> None:
    source = rectangles(tmp_path, SIZES)
    for batch in take(train_batches(source, dataclasses.replace(DATA, flip=False), seed=0), 6):
        scales = np.tile(batch.scales, 2)
        plain = np.stack([source.records[i].boxes_xyxy[0] for i in batch.indices])
        assert np.allclose(batch.boxes_xyxy[:, 0], plain * scales, atol=1e-3)


def test_half_of_the_images_are_mirrored(tmp_path: Path) -> None:
    source = rectangles(tmp_path, [(40, 40)] * 8)
    data = dataclasses.replace(DATA, batch_size=8, short_side=32, long_side=32)
    mirrored = [
        not np.allclose(batch.boxes_xyxy[row, 0], source.records[i].boxes_xyxy[0] * 0.8, atol=1e-3)
        for batch in take(train_batches(source, data, seed=0), 40)
        for row, i in enumerate(batch.indices)
        if source.records[i].boxes_xyxy[0, [0, 2]].sum() != 40  # A box in the middle mirrors to itself.
    ]
    assert len(mirrored) == 5 * 40 and 0.4 < np.mean(mirrored) < 0.6


@pytest.mark.parametrize("limit", [0, 7])
def test_evaluation_takes_each_image_once_unchanged(tmp_path: Path, limit: int) -> None:
    source = rectangles(tmp_path, SIZES)
    batches = list(eval_batches(source, dataclasses.replace(DATA, jitter_short_sides=(50,)), batch_size=4, limit=limit))
    valid = np.concatenate([batch.indices[batch.valid] for batch in batches])
    assert sorted(valid.tolist()) == list(range(limit or len(SIZES)))
    for batch in batches:
        records = [source.records[i] for i in batch.indices]
        expected = [resized_size(record.height, record.width, DATA.short_side, DATA.long_side) for record in records]
        assert batch.image_sizes.tolist() == [list(size) for size in expected]
        plain = np.stack([record.boxes_xyxy[0] for record in records])
        assert np.allclose(batch.boxes_xyxy[:, 0] / np.tile(batch.scales, 2), plain, atol=1e-3)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in Linux's /proc")
def test_a_finished_evaluation_ends_its_threads(tmp_path: Path) -> None:
    source = rectangles(tmp_path, [(40, 60)] * 6)
    threads = []
    for _ in range(4):
        batches = eval_batches(source, dataclasses.replace(DATA, workers=8), batch_size=2)
        assert len(list(batches)) == 3
        threads.append(len(list(Path("/proc/self/task").iterdir())))
    assert threads[-1] <= threads[0] + 3  # each has a thread that watches for slow files and lives for seconds


def test_pixels_are_the_resized_file(tmp_path: Path) -> None:
    source = rectangles(tmp_path, SIZES)
    data = dataclasses.replace(DATA, short_side=48, long_side=64)
    batch = next(batch for batch in eval_batches(source, data, batch_size=1) if batch.indices == [5])
    assert batch.image_sizes.tolist() == [[48, 64]] and SIZES[5] == (64, 48)
    assert np.array_equal(batch.images[0, :48, :64], np.asarray(Image.open(source.where(5))))


def test_types_are_the_declared_ones(tmp_path: Path) -> None:
    (batch,) = take(train_batches(rectangles(tmp_path, SIZES), DATA, seed=0), 1)
    kinds = [np.uint8, np.int32, np.float32, np.int32, np.int64, np.bool_, np.float32]
    assert [column.dtype for column in batch] == kinds
    assert [column.shape[1:] for column in batch[1:]] == [(2,), (5, 4), (5,), (), (), (2,)]


def test_boxes_beyond_the_maximum_are_counted_and_left_out(tmp_path: Path) -> None:
    source = rectangles(tmp_path, SIZES[:4])
    many = np.tile(np.array([[1, 2, 30, 40]], np.float32), (8, 1))
    record = dataclasses.replace(source.records[0], boxes_xyxy=many, labels=np.arange(8, dtype=np.int32) % 2)
    source = dataclasses.replace(source, records=[record, *source.records[1:]])
    assert overflow(source, DATA) == (1, 3) and overflow(source, dataclasses.replace(DATA, max_boxes=8)) == (0, 0)
    batch = next(b for b in eval_batches(source, DATA, batch_size=4) if 0 in b.indices)
    assert batch.labels[batch.indices.tolist().index(0)].tolist() == [0, 1, 0, 1, 0]


GREY = np.full((9, 11, 3), 100, np.uint8)
SPOILED: dict[str, tuple[Any, str]] = {
    "missing": (lambda encoded: None, "cannot be read: No such file or directory"),
    "empty": (lambda encoded: b"", "is not an image"),
    "truncated": (lambda encoded: encoded[: len(encoded) // 2], "cannot be decoded: image file is truncated"),
    # The header is complete and the end marker exists: only decoding shows that tables are missing.
    "without tables": (lambda encoded: encoded.replace(b"\xff\xdb", b"\xff\xef"), "cannot be decoded"),
    "another size": (lambda encoded: encode(GREY), "is 11x9 pixels, but 80x80 in the annotations"),
}


@pytest.mark.parametrize("way", SPOILED)
def test_bad_image_stops_at_its_step_in_one_line(tmp_path: Path, way: str) -> None:
    change, message = SPOILED[way]
    source = rectangles(tmp_path, SIZES)
    good = take(train_batches(source, DATA, seed=0), 8)
    step = next(k for k, batch in enumerate(good) if 4 in batch.indices)
    path = spoil(source, 4, change(source.read(4)))
    batches = train_batches(source, DATA, seed=0)
    assert same(take(batches, step), good[:step])
    for _ in range(2):  # The next request stops again.
        with pytest.raises(BadImage) as raised:
            next(batches)
        assert str(raised.value).startswith(f"{path}: {message}") and "\n" not in str(raised.value)


@pytest.mark.parametrize("way", SPOILED)
def test_bad_image_is_skipped_named_once_and_counted(
    tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, message = SPOILED[way]
    source = rectangles(tmp_path, SIZES)
    good = take(train_batches(source, DATA, seed=0), 12)
    path = spoil(source, 4, change(source.read(4)))
    batches = train_batches(source, dataclasses.replace(DATA, bad_images="skip"), seed=0)
    with caplog.at_level(logging.WARNING, "retina_jax"):
        found = take(batches, 12)
    times = 0
    for batch, other in zip(found, good, strict=True):
        bad = batch.indices == 4
        times += int(bad.sum())
        assert np.array_equal(batch.indices, other.indices) and np.array_equal(batch.valid, ~bad)
        assert all(np.array_equal(a[~bad], b[~bad]) for a, b in zip(batch, other, strict=True))
        assert not batch.images[bad].any() and (batch.image_sizes[bad] == 1).all() and (batch.labels[bad] == -1).all()
    assert times > 1 and batches.skipped == {path: times}
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("retina_jax")]
    assert line.startswith(f"warning: skipped: {path}: {message}")


def test_skipped_evaluation_image_is_not_valid(tmp_path: Path) -> None:
    source = rectangles(tmp_path, SIZES)
    path = spoil(source, 4, None)
    batches = eval_batches(source, dataclasses.replace(DATA, bad_images="skip"), batch_size=4)
    valid = np.concatenate([batch.indices[batch.valid] for batch in batches])
    assert sorted(valid.tolist()) == [i for i in range(len(SIZES)) if i != 4] and batches.skipped == {path: 1}


def test_real_images_fill_batches(shared_data: Path) -> None:
    folder = shared_data / "coco_subset"
    source = read_coco(folder / "annotations/instances_val2017.json", folder / "val2017")
    data = dataclasses.replace(DATA, short_side=128, long_side=213, batch_size=8, max_boxes=100)
    assert overflow(source, data) == (0, 0)
    batches = list(eval_batches(source, data, batch_size=8, limit=60))
    assert sorted(np.concatenate([batch.indices[batch.valid] for batch in batches]).tolist()) == list(range(60))
    assert {batch.images.shape[1:3] for batch in batches} <= set(buckets(data, (128,)))
    for batch in batches:
        assert (batch.boxes_xyxy[..., 2:] <= batch.image_sizes[:, None, ::-1]).all()
        assert 20 < batch.images[batch.images > 0].mean() < 200
