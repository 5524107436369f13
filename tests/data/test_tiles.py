"""Tiles against plain loops: where they are, the boxes they show, the pixels they have, the detections that remain."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_sets import rectangles, write_coco
from test_pipeline import DATA, same, take

from retina_jax.config import Config, DataConfig
from retina_jax.config_io import override
from retina_jax.data.datasets import open_sources, read_coco
from retina_jax.data.decoding import image_of
from retina_jax.data.pipeline import Batch, eval_batches, max_boxes, train_batches
from retina_jax.data.source import DataError
from retina_jax.data.tiles import Tile, boxes_in, cut_off, tiles_of

side = st.integers(32, 90)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 400), st.integers(1, 400), side, st.floats(0, 0.9))
def test_tiles_cover_the_image_and_overlap_enough(height: int, width: int, size: int, overlap: float) -> None:
    tiles = tiles_of(3, height, width, size, overlap)
    assert tiles == sorted(tiles, key=lambda t: (t.top, t.left)) and len(set(tiles)) == len(tiles)
    assert {(t.image, t.width, t.height) for t in tiles} == {(3, min(size, width), min(size, height))}
    for length, starts in ((height, sorted({t.top for t in tiles})), (width, sorted({t.left for t in tiles}))):
        assert starts[0] == 0 and starts[-1] == max(0, length - size)
        needed = math.ceil(size * overlap)
        shared = [first + size - second for first, second in itertools.pairwise(starts)]
        assert all(needed <= common or needed == size for common in shared)
        if len(starts) > 1 and needed < size:  # with one tile less the step would be too long
            assert len(starts) == 2 or (length - size) / (len(starts) - 2) > size - needed
    assert len(tiles) == len({t.top for t in tiles}) * len({t.left for t in tiles})
    assert tiles_of(3, height, width, 0, overlap) == [Tile(3, 0, 0, width, height)]


def random_boxes(rng: np.random.Generator, count: int, extent: int, longest: int) -> np.ndarray:
    corner, size = rng.uniform(0, extent - longest, (count, 2)), rng.uniform(1, longest, (count, 2))
    return np.concatenate([corner, corner + size], 1).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_boxes_of_a_tile_are_those_of_a_loop(seed: int) -> None:
    boxes = random_boxes(np.random.default_rng(seed), 40, 200, 60)
    tile = Tile(0, 50, 30, 90, 70)
    expected, kept = [], []
    for i, (x1, y1, x2, y2) in enumerate(boxes.astype(np.float64).tolist()):
        a, b, c, d = max(x1, 50), max(y1, 30), min(x2, 140), min(y2, 100)
        if c > a and d > b and (c - a) * (d - b) >= 0.5 * (x2 - x1) * (y2 - y1):
            expected.append([a - 50, b - 30, c - 50, d - 30])
            kept.append(i)
    found, which = boxes_in(tile, boxes)
    assert which.tolist() == kept and 0 < len(kept) < 40 and np.array_equal(found, np.array(expected, np.float32))
    everything, which = boxes_in(Tile(0, 0, 0, 200, 200), boxes)
    assert np.array_equal(everything, boxes) and which.tolist() == list(range(40))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(150, 400), st.integers(150, 400))
def test_of_an_object_only_views_of_all_of_it_remain(seed: int, height: int, width: int) -> None:
    """This holds for objects that are shorter than the overlap less two margins, which each tile sees exactly."""
    size, overlap = 100, 0.3
    tiles = tiles_of(0, height, width, size, overlap)
    boxes = random_boxes(np.random.default_rng(seed), 30, min(height, width), 28)
    seen = np.zeros(len(boxes), int)
    for tile in tiles:
        inside, which = boxes_in(tile._replace(), boxes)
        inside += np.array([[tile.left, tile.top] * 2], np.float32)
        kept = ~cut_off(inside, tile, tiles, (width, height))
        complete = np.abs(inside - boxes[which]).max(1, initial=0) < 1e-3
        assert complete[kept].all()
        seen[which[kept]] += 1
    assert (seen >= 1).all()


def test_an_object_that_no_tile_shows_completely_is_kept_in_parts() -> None:
    tiles = tiles_of(0, 100, 190, 100, 0.1)
    assert [tile.left for tile in tiles] == [0, 90]
    long_one = np.array([[20, 20, 170, 60]], np.float32)
    parts = [np.clip(long_one, [[t.left, 0] * 2], [[t.left + 100, 100] * 2]) for t in tiles]
    assert [cut_off(p, t, tiles, (190, 100)).tolist() for p, t in zip(parts, tiles, strict=True)] == [[False], [False]]


def test_tiles_are_read_as_parts_of_their_image(tmp_path: Path) -> None:
    source = rectangles(tmp_path, [(150, 130), (64, 64), (50, 200)], kind="PNG")
    tiles = source.tiled(64, 0.25)
    assert len(tiles) == sum(len(tiles_of(0, r.height, r.width, 64, 0.25)) for r in source.records)
    data = DataConfig(batch_size=4, short_side=64, long_side=64, buckets=1, workers=2)
    whole, seen = [image_of(source, i) for i in range(3)], []
    for batch in eval_batches(tiles, data, batch_size=4):
        for row in np.flatnonzero(batch.valid):
            record = tiles.records[batch.indices[row]]
            expected = record.tile.of(whole[record.tile.image])
            seen.append(int(batch.indices[row]))
            if expected.shape[:2] == (64, 64):  # not resized
                assert np.array_equal(batch.images[row], expected)
                assert np.array_equal(batch.boxes_xyxy[row, : len(record.labels)], record.boxes_xyxy)
    assert sorted(seen) == list(range(len(tiles)))
    trained = source.tiled(64, 0.25, "drop")
    assert 3 <= len(trained) < len(tiles) and all(len(record.labels) for record in trained.records)
    one = take(train_batches(trained, data, seed=0), 5)
    assert same(take(train_batches(trained, data, seed=0, start_step=3), 2), one[3:])
    halves = [take(train_batches(trained, data, seed=0, host=host, hosts=2), 5) for host in range(2)]
    assert same([Batch(*map(np.concatenate, zip(*pair, strict=True))) for pair in zip(*halves, strict=True)], one)


def crowded(folder: Path, count: int) -> Config:
    """Writes a dataset of an image with `count` objects of 12 px and one with a single one; returns its config."""
    source = rectangles(folder, [(256, 256), (64, 64)], kind="PNG")
    document = json.loads((folder / "annotations.json").read_text())
    boxes = [[16 * (i % 16) + 2, 16 * (i // 16) + 2, 12, 12] for i in range(count)]
    document["annotations"] = [
        {"id": 1 + i, "image_id": 10, "category_id": 1 + i % 2, "bbox": box} for i, box in enumerate(boxes)
    ] + [{"id": 999, "image_id": 11, "category_id": 1, "bbox": [5, 5, 50, 50]}]
    path, images = write_coco(folder, document)
    assert len(source) == 2
    names = {
        f"data.{split}_{what}": str(p)
        for split in ("train", "val")
        for what, p in (("annotations", path), ("images", images))
    }
    return override(Config(), names)


def test_max_boxes_auto_is_what_the_data_needs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = crowded(tmp_path, 140)
    for tile, expected in ((0, 144), (64, 16)):
        train, val, found = open_sources(override(config, {"data.max_boxes": "auto", "data.tile": tile}))
        most = max(len(record.labels) for record in train.records)
        assert found.data.max_boxes == expected == -(-most // 8) * 8 == max_boxes(train, found.data)
        assert len(val) == 2 and (len(train) > 2) == (tile > 0)
    open_sources(config)
    (warning,) = [line for line in "".join(capsys.readouterr()).splitlines() if "max_boxes leaves out" in line]
    assert "40 boxes of 1 images" in warning and "--data.max-boxes 140 or auto" in warning
    assert max_boxes(dataclasses.replace(train, records=[]), DataConfig(max_boxes="auto")) == 8


def test_boxes_that_no_tile_shows_are_counted_and_refused_if_all_are(tmp_path: Path) -> None:
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 300, "height": 300}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 300, 300]}],
        "categories": [{"id": 1, "name": "red"}],
    }
    path, images = write_coco(tmp_path, document)
    tiles = read_coco(path, images).tiled(64, 0.25)
    assert tiles.counts["in_no_tile"] == 1 and "1 too large for data.tile" in str(tiles)
    (images / "a.png").write_bytes((tmp_path / "annotations.json").read_bytes())
    changes = {
        "data.train_annotations": str(path),
        "data.train_images": str(images),
        "data.tile": 64,
        "training.eval_every": -1,
    }
    with pytest.raises(DataError, match=r"no tile of 64 px shows half of a box; raise data\.tile"):
        open_sources(override(Config(), changes))


def test_crops_of_tiles_jitter_like_images(tmp_path: Path) -> None:
    source = rectangles(tmp_path, [(150, 130), (90, 120)]).tiled(64, 0.25, "drop")
    data = dataclasses.replace(DATA, scale_jitter=(0.5, 2.0), colour_jitter=0.3)
    for batch in take(train_batches(source, data, seed=0), 3):
        assert (batch.boxes_xyxy[..., 2:] <= batch.image_sizes[:, None, ::-1]).all()
