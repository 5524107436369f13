"""Datasets made by accident or on purpose to break a run: sizes, numbers of boxes, paths, and what is not a file."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import assert_named
from PIL import Image
from small_sets import document, encode, named, write_coco

from retina_jax.config import DataConfig
from retina_jax.data.datasets import read_coco
from retina_jax.data.decoding import MAX_SCANS, is_plain_jpeg, largest_file, to_rgb
from retina_jax.data.pipeline import LARGE, eval_batches, overflow, train_batches
from retina_jax.data.reading import read_file
from retina_jax.data.source import BadImage, Source
from retina_jax.data.transforms import buckets, resize, resize_large
from retina_jax.evaluation.coco_scores import evaluate_coco

DATA = DataConfig(batch_size=4, short_side=64, long_side=128, max_boxes=5, workers=2)
SIZES = [
    (1, 1), (2, 1), (1, 3), (1, 20_000), (20_000, 1), (20_000, 200), (200, 20_000), (3, 1000), (64, 64), (65, 64),
    (333, 500), (640, 480), (2048, 2048), (2049, 2048), (5000, 999),
]  # fmt: skip
"""Width and height, from 1x1 to 20000x200, on both sides of LARGE."""


def with_scans(jpeg: bytes, number: int, between: bytes = b"") -> bytes:
    """Returns the JPEG with copies of its last scan, so that it has `number`, and a segment before each copy."""
    start = jpeg.rindex(b"\xff\xda")
    copies = number - jpeg.count(b"\xff\xda")
    return jpeg[:-2] + (between + jpeg[start:-2]) * copies + b"\xff\xd9"


@pytest.mark.parametrize("kind", ["progressive", "grey", "one scan per component"])
def test_a_jpeg_with_many_scans_is_refused_before_it_is_decoded(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    image, file = Image.fromarray(pixels).convert("L" if kind == "grey" else "RGB"), io.BytesIO()
    image.save(file, "JPEG", progressive=kind != "one scan per component", quality=90)
    jpeg = file.getvalue()
    assert to_rgb(jpeg).shape == (64, 64, 3) and is_plain_jpeg(jpeg)
    if kind == "one scan per component":
        start = jpeg.index(b"\xff\xda")
        jpeg = jpeg[:start] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + jpeg[start + 14 :]
    assert len(to_rgb(with_scans(jpeg, MAX_SCANS))) == 64
    comment = b"\xff\xfe\x00\x04\xff\xd9"  # that holds the marker of the end
    lone = b"\xff\x01"  # a marker without a length
    for many in (
        with_scans(jpeg, MAX_SCANS + 1),
        *(with_scans(jpeg, 2_000_000 // len(jpeg), b) for b in (comment, lone)),
    ):
        for read in (to_rgb, is_plain_jpeg):
            with pytest.raises(BadImage, match="more than 100 scans"):
                read(many)


def test_what_follows_a_jpeg_is_not_taken_for_scans() -> None:
    """Phones append a film to a photograph."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=True)
    assert len(to_rgb(file.getvalue() + b"\xff\xda" * 1000)) == 64


def plain_size(width: int, height: int, short: int, long: int) -> tuple[int, int]:
    """Applies the resize rule by hand; returns (width, height)."""
    scale = min(short / min(width, height), long / max(width, height))
    return max(1, math.floor(width * scale + 0.5)), max(1, math.floor(height * scale + 0.5))


@pytest.fixture(scope="module")
def of_every_size(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, list[dict[str, Any]]]:
    """Writes images of one colour each, JPEG and PNG in turn, each with a box of the complete image and one inside;
    returns the annotations."""
    folder = tmp_path_factory.mktemp("sizes")
    rng = np.random.default_rng(5)
    images, annotations = [], []
    (folder / "images").mkdir()
    for i, (width, height) in enumerate(SIZES):
        kind = ("JPEG", "PNG")[i % 2]
        images.append({"id": i, "file_name": f"{i}.{kind.lower()}", "width": width, "height": height})
        pixels = np.full((height, width, 3), (40 + 10 * i, 200 - 10 * i, 120), np.uint8)
        (folder / "images" / images[-1]["file_name"]).write_bytes(encode(pixels, kind))
        x, y = rng.uniform(0, width / 2), rng.uniform(0, height / 2)
        for box in ([0, 0, width, height], [x, y, rng.uniform(0.1, width / 2), rng.uniform(0.1, height / 2)]):
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": 1, "bbox": box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    return read_coco(*write_coco(folder, content)), annotations


@pytest.mark.parametrize("changes", [{}, {"buckets": 1, "pixels": "float32", "resize": "antialias"}, {"buckets": 2}])
def test_every_size_from_1x1_to_20000x200_reaches_its_padded_shape_with_its_boxes(
    of_every_size: tuple[Source, list[dict[str, Any]]], changes: dict[str, Any]
) -> None:
    source, annotations = of_every_size
    data = dataclasses.replace(DATA, **changes)
    shapes, seen = buckets(data, (data.short_side,)), set()
    training = itertools.islice(train_batches(source, data, seed=0), 16)
    evaluation = eval_batches(source, data, batch_size=3)
    exact = eval_batches(source, dataclasses.replace(data, buckets=0), batch_size=3)
    for kind, batch in [("t", b) for b in training] + [("e", b) for b in evaluation] + [("x", b) for b in exact]:
        padded = batch.images.shape[1:3]
        assert kind == "x" or padded in shapes
        for row, index in enumerate(batch.indices.tolist()):
            width, height = SIZES[index]
            w, h = plain_size(width, height, 64, 128)
            assert batch.image_sizes[row].tolist() == [h, w] and h <= padded[0] and w <= padded[1]
            fitting = [shape for shape in shapes if h <= shape[0] and w <= shape[1]]
            smallest = min(a * b for a, b in fitting) if kind != "x" else -(-h // 32) * 32 * (-(-w // 32) * 32)
            assert padded[0] * padded[1] == smallest
            image = batch.images[row]
            assert np.abs(image[:h, :w].astype(int) - [40 + 10 * index, 200 - 10 * index, 120]).max() <= 3
            assert not image[h:].any() and not image[:, w:].any()
            plain = []
            for annotation in annotations[2 * index : 2 * index + 2]:
                x, y, box_width, box_height = annotation["bbox"]
                ends = min(x + box_width, width), min(y + box_height, height)
                plain.append([x * w / width, y * h / height, ends[0] * w / width, ends[1] * h / height])
            mirrored = [[w - x2, y1, w - x1, y2] for x1, y1, x2, y2 in plain]
            found = batch.boxes_xyxy[row, :2]
            candidates = [plain, mirrored] if kind == "t" else [plain]
            assert any(np.allclose(found, boxes, rtol=1e-5, atol=1e-4) for boxes in candidates), (index, found, plain)
            assert batch.labels[row].tolist() == [0, 0, -1, -1, -1] and (batch.valid[row] or kind != "t")
            seen.add((kind, index))
    assert {index for kind, index in seen if kind == "e"} == set(range(len(SIZES)))
    assert {index for kind, index in seen if kind == "x"} == set(range(len(SIZES)))
    assert (
        len({index for kind, index in seen if kind == "t"}) >= len(SIZES) - 4
    )  # Buckets that are not full keep their images.


@pytest.mark.parametrize("kind", ["bilinear", "antialias"])
def test_large_images_are_resized_like_others(kind: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (700, 1100, 3), np.uint8)
    for size in ((64, 101), (900, 1414)):
        exact = resize(image, size, kind, "float32").numpy()
        assert np.abs(resize_large(image, size, kind, "float32") - exact).max() < 1e-3
        off = np.abs(resize_large(image, size, kind).astype(int) - resize(image, size, kind).numpy().astype(int))
        assert off.max() <= 1 and (off > 0).mean() < 1e-3


def test_ten_thousand_boxes_in_an_image(tmp_path: Path) -> None:
    content, rng = document(), np.random.default_rng(0)
    corners = rng.uniform(0, 30, (10_000, 2)).round(2)
    sides = rng.uniform(1, 10, (10_000, 2)).round(2)
    boxes = np.concatenate([corners, sides], axis=1).tolist()
    content["annotations"] = [
        {"id": i + 1, "image_id": 1, "category_id": (3, 7)[i % 2], "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    path, images = write_coco(tmp_path, content)
    for image in content["images"]:
        (images / image["file_name"]).write_bytes(encode(np.zeros((image["height"], image["width"], 3), np.uint8)))
    source = read_coco(path, images)
    expected = [[x, y, x + w, y + h] for x, y, w, h in boxes]
    assert np.array_equal(source.records[0].boxes_xyxy, np.array(expected, np.float32))
    assert source.records[0].labels.tolist() == [(i + 1) % 2 for i in range(10_000)]
    for most, beyond in ((100, 9900), (10_000, 0)):
        data = dataclasses.replace(DATA, max_boxes=most, short_side=48, long_side=64)
        assert overflow(source, data) == (int(beyond > 0), beyond)
        batch = next(b for b in eval_batches(source, data, batch_size=1) if b.indices == [0])
        assert np.allclose(batch.boxes_xyxy[0], expected[:most], atol=1e-4)
        assert batch.labels[0].tolist() == [(i + 1) % 2 for i in range(most)]
    assert [a["bbox"] for a in source.ground_truth["annotations"]] == boxes
    found = [{"image_id": 1, "category_id": 3, "bbox": box, "score": 0.9} for box in boxes[:200:2]]
    scores = evaluate_coco(source.ground_truth, found, [1]).summary
    assert scores["AR100"] == pytest.approx(100 / 5000 / 2, rel=0.01)  # Each of them is right.


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # The names of sockets are short.
        server.bind(path.name)
        os.chdir(here)


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 * 2**30)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (Path.mkdir, "Is a directory"),
    "a pipe": (make_pipe, "regular file"),
    "a socket": (make_socket, "No such device"),
    "a device without end": (lambda path: path.symlink_to("/dev/zero"), "regular file"),
    "a terminal": (lambda path: path.symlink_to("/dev/tty"), "regular file|No such device"),
    "a link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "of 20 GiB": (make_huge, f"{20 * 2**30} .*{largest_file(64 * 48)}"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", NO_FILES)
def test_a_path_that_is_not_a_regular_file_is_refused_at_once(tmp_path: Path, what: str) -> None:
    make, named_in_it = NO_FILES[what]
    source = named(tmp_path, "sub/one.jpg")
    (tmp_path / "images" / "sub").mkdir()
    make(tmp_path / "images" / "sub" / "one.jpg")
    with pytest.raises(BadImage, match=named_in_it) as raised:
        source.read(0)
    assert_named(raised.value, f"{tmp_path / 'images' / 'sub' / 'one.jpg'}: ")


@pytest.mark.parametrize("name", ["a" * 300, "b/" * 2000 + "c", "one.jpg/two.jpg", "no such", "con", "~/x", "%s.jpg"])
def test_impossible_file_names_are_bad_images(tmp_path: Path, name: str) -> None:
    source = named(tmp_path, name)
    (tmp_path / "images" / "one.jpg").write_bytes(b"")
    with pytest.raises(BadImage) as raised:
        source.read(0)
    assert_named(raised.value, f"{tmp_path / 'images'}")


@pytest.mark.parametrize("name", ["\ud800", "a\0b"])
def test_names_that_are_too_long_are_os_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match="name"):
        read_file(tmp_path / name, 10)


def test_symbolic_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    """Datasets made of links, of files and of folders, are common."""
    outside = tmp_path / "outside"
    outside.mkdir()
    encoded = encode(np.zeros((48, 64, 3), np.uint8))
    (outside / "one.jpg").write_bytes(encoded)
    for name in ("linked.jpg", "folder/one.jpg"):
        source = named(tmp_path, name)
        images = tmp_path / "images"
        if not (images / "folder").exists():
            (images / "linked.jpg").symlink_to(outside / "one.jpg")
            (images / "folder").symlink_to(outside)
        assert source.read(0) == encoded


def test_exactly_the_largest_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    assert read_file(tmp_path / "file", 100) == b"x" * 100
    with pytest.raises(OSError, match=r"100 .*99"):
        read_file(tmp_path / "file", 99)


def test_annotations_changed_during_a_run_have_no_effect(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path, document())
    source = read_coco(path, images)
    path.write_text("[]")
    assert [annotation["id"] for annotation in source.ground_truth["annotations"]] == [1, 2]


def test_the_sizes_are_on_both_sides_of_large() -> None:
    pixels = [width * height for width, height in SIZES]
    assert LARGE in pixels and max(pixels) > LARGE and min(pixels) == 1
    assert to_rgb(encode(np.zeros((1, 1, 3), np.uint8), "PNG")).shape == (1, 1, 3)
