"""Data sets made by accident or on purpose to break a run: sizes, numbers of boxes, paths, bombs, files that never come."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import json
import logging
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import assert_named
from PIL import Image, PngImagePlugin
from small_sets import document, encode, rectangles, write_coco

from retina_jax.config import DataConfig
from retina_jax.data import waiting
from retina_jax.data.budget import Budget
from retina_jax.data.coco import read_coco
from retina_jax.data.decoding import MAX_PIXELS, largest_file, to_rgb
from retina_jax.data.pipeline import LARGE, Batches, eval_batches, overflow, train_batches
from retina_jax.data.preprocessing import buckets, resize, resize_large
from retina_jax.data.reading import read_file
from retina_jax.data.source import BadImage, DataError, Source
from retina_jax.evaluation import evaluate_coco

DATA = DataConfig(batch_size=4, short_side=64, long_side=128, max_boxes=5, workers=2)
SIZES = [
    (1, 1), (2, 1), (1, 3), (1, 20_000), (20_000, 1), (20_000, 200), (200, 20_000), (3, 1000), (64, 64), (65, 64),
    (333, 500), (640, 480), (2048, 2048), (2049, 2048), (5000, 999),
]  # fmt: skip
"""Width and height, from 1x1 to 20000x200, on both sides of LARGE."""


def plain_size(width: int, height: int, short: int, long: int) -> tuple[int, int]:
    """The resize rule by hand: (width, height)."""
    scale = min(short / min(width, height), long / max(width, height))
    return max(1, math.floor(width * scale + 0.5)), max(1, math.floor(height * scale + 0.5))


def of_every_size(folder: Path) -> tuple[Source, list[dict[str, Any]]]:
    """Images of one colour each, JPEG and PNG in turn, each with a box of all of it and one inside; the annotations."""
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
def test_every_size_from_1x1_to_20000x200_reaches_its_canvas_with_its_boxes(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    source, annotations = of_every_size(tmp_path)
    data = dataclasses.replace(DATA, **changes)
    shapes, seen = buckets(data, (data.short_side,)), set()
    training = itertools.islice(train_batches(source, data, seed=0), 16)
    evaluation = eval_batches(source, data, batch_size=3)
    exact = eval_batches(source, dataclasses.replace(data, buckets=0), batch_size=3)
    for kind, batch in [("t", b) for b in training] + [("e", b) for b in evaluation] + [("x", b) for b in exact]:
        canvas = batch.images.shape[1:3]
        assert kind == "x" or canvas in shapes
        for row, index in enumerate(batch.indices.tolist()):
            width, height = SIZES[index]
            w, h = plain_size(width, height, 64, 128)
            assert batch.image_sizes[row].tolist() == [h, w] and h <= canvas[0] and w <= canvas[1]
            fitting = [shape for shape in shapes if h <= shape[0] and w <= shape[1]]
            smallest = min(a * b for a, b in fitting) if kind != "x" else -(-h // 32) * 32 * (-(-w // 32) * 32)
            assert canvas[0] * canvas[1] == smallest
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
    assert len({index for kind, index in seen if kind == "t"}) >= len(SIZES) - 4  # Buckets that are not full wait.


@pytest.mark.parametrize("kind", ["bilinear", "antialias"])
def test_large_images_are_resized_as_others_are(kind: str) -> None:
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
    assert source.records[0].labels.tolist() == [i % 2 for i in range(10_000)]
    for most, beyond in ((100, 9900), (10_000, 0)):
        data = dataclasses.replace(DATA, max_boxes=most, short_side=48, long_side=64)
        assert overflow(source, data) == (int(beyond > 0), beyond)
        batch = next(b for b in eval_batches(source, data, batch_size=1) if b.indices == [0])
        assert np.allclose(batch.boxes_xyxy[0], expected[:most], atol=1e-4)
        assert batch.labels[0].tolist() == [i % 2 for i in range(most)]
    assert [a["bbox"] for a in source.truth["annotations"]] == boxes
    found = [{"image_id": 1, "category_id": 3, "bbox": box, "score": 0.9} for box in boxes[:200:2]]
    scores = evaluate_coco(source.truth, found, [1]).summary
    assert scores["AR100"] == pytest.approx(100 / 5000 / 2, rel=0.01)  # Each of them is right.


def named(folder: Path, file_name: str) -> Source:
    """A data set of one image of 64x48 pixels, called so."""
    content = document()
    content["images"][0]["file_name"] = file_name
    return read_coco(*write_coco(folder, content))


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
    "a pipe": (make_pipe, "must be a regular file"),
    "a socket": (make_socket, "No such device"),
    "a device without end": (lambda path: path.symlink_to("/dev/zero"), "must be a regular file"),
    "a terminal": (lambda path: path.symlink_to("/dev/tty"), "regular file|No such device"),
    "a link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "of 20 GiB": (make_huge, f"it has {20 * 2**30} bytes; at most {largest_file(64 * 48)} are read"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_image_file_is_named_and_not_waited_for(tmp_path: Path, what: str) -> None:
    make, says = NO_FILES[what]
    source = named(tmp_path, "sub/one.jpg")
    (tmp_path / "images" / "sub").mkdir()
    make(tmp_path / "images" / "sub" / "one.jpg")
    with pytest.raises(BadImage, match=says) as raised:
        source.read(0)
    assert_named(raised.value, f"{tmp_path / 'images' / 'sub' / 'one.jpg'}: cannot be read: ")


@pytest.mark.parametrize("name", ["a" * 300, "b/" * 2000 + "c", "one.jpg/two.jpg", "no such", "con", "~/x", "%s.jpg"])
def test_names_that_no_file_has_are_bad_images(tmp_path: Path, name: str) -> None:
    source = named(tmp_path, name)
    (tmp_path / "images" / "one.jpg").write_bytes(b"")
    with pytest.raises(BadImage) as raised:
        source.read(0)
    assert_named(raised.value, ": cannot be read: ")


@pytest.mark.parametrize("name", ["\ud800", "a\0b"])
def test_names_beyond_the_file_system_are_os_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match="no file can have this name"):
        read_file(tmp_path / name, 10)


def test_symbolic_links_lead_where_they_lead(tmp_path: Path) -> None:
    """Data sets made of links, of files and of folders, are common."""
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
    with pytest.raises(OSError, match="it has 100 bytes; at most 99 are read"):
        read_file(tmp_path / "file", 99)


def test_annotations_that_change_under_a_run_are_named(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path, document())
    for changed in ({}, {"annotations": [3]}, {"annotations": [{"bbox": [1]}]}, {"annotations": []}, []):
        path.write_text(json.dumps(document()))
        source = read_coco(path, images)
        path.write_text(json.dumps(changed))
        with pytest.raises(DataError) as raised:
            _ = source.truth
        assert_named(raised.value, f"{path}: has changed since it was opened")


# ---- memory


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def tiff(width: int, height: int, **tags: int) -> bytes:
    """A TIFF of RGB without its pixels; `tags` are numbers, 4 bytes each."""
    entries = {256: width, 257: height, 258: 8, 259: 5, 262: 2, 277: 3, 273: 8, 279: 100}
    entries |= {int(tag[1:]): value for tag, value in tags.items()}
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + body + bytes(200)


def bombs() -> dict[str, bytes]:
    """Kilobytes that ask for gigabytes."""
    zeros = zlib.compress(bytes(2**28), 9)  # 256 MiB
    gif = bytearray(encode(np.zeros((2, 2), np.uint8), "GIF"))
    at = gif.find(b",", 13) + 5
    gif[6:10] = gif[at : at + 4] = struct.pack("<HH", 65_535, 65_535)
    bmp = bytearray(encode(np.zeros((2, 2, 3), np.uint8), "BMP"))
    bmp[18:26] = struct.pack("<II", 100_000, 100_000)
    webp = bytearray(encode(np.zeros((2, 2, 3), np.uint8), "WEBP", lossless=True))
    webp[21:25] = struct.pack("<I", 16_382 | 16_382 << 14)
    jpeg = bytearray(encode(np.zeros((16, 16, 3), np.uint8)))
    jpeg[(sof := jpeg.find(b"\xff\xc0") + 5) : sof + 4] = struct.pack(">HH", 65_500, 65_500)
    text = PngImagePlugin.PngInfo()
    for number in range(100):
        text.add_text(f"key {number}", "0" * 10**6, zip=True)
    stream = io.BytesIO()
    Image.new("RGB", (2, 2)).save(stream, "PNG", pnginfo=text)
    return {
        "PNG of 10 gigapixels": png(100_000, 100_000, chunk(b"IDAT", zeros)),
        "PNG of one endless line": png(2**31 - 1, 1, chunk(b"IDAT", zeros)),
        "PNG whose pixels go on": png(2, 2, chunk(b"IDAT", zeros)),
        "PNG with one long text": png(2, 2, chunk(b"zTXt", b"key\0\0" + zeros)),
        "PNG with many texts": stream.getvalue(),
        "PNG with a colour profile": png(2, 2, chunk(b"iCCP", b"name\0\0" + zeros)),
        "GIF": bytes(gif),
        "BMP": bytes(bmp),
        "WEBP": bytes(webp),
        "JPEG": bytes(jpeg),
        "TIFF": tiff(100_000, 100_000),
        "TIFF of tiles": tiff(16, 16, t322=60_000, t323=60_000, t324=8, t325=100),
        "TIFF of strips": tiff(16, 16, t278=2**31),
    }


MEASURE = r"""
import re, sys, threading
from pathlib import Path
from retina_jax.data import decoding
from retina_jax.data.decoding import to_rgb
from retina_jax.data.source import BadImage
def peak():
    # Not ru_maxrss, which begins at that of the process that started this one.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
files = sorted(Path(sys.argv[1]).iterdir())
start = peak()
"""


def measured(folder: Path, code: str) -> str:
    """What a fresh process prints; it may not say anything else, warnings least of all."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"} | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # What is freed goes back: else glibc keeps up to 64 MB a thread.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE + code, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    said = [line for line in done.stderr.splitlines() if "absl::" not in line and "port.cc" not in line]
    assert done.returncode == 0 and not said, done.stderr
    return done.stdout


def test_bombs_are_named_and_take_no_memory(tmp_path: Path) -> None:
    made = bombs()
    for name, encoded in made.items():
        (tmp_path / name).write_bytes(encoded)
        assert len(encoded) < 2**19
    # 100 megapixels, more than PIL likes, and EXIF that it cannot read: neither is worth a warning.
    corrupt = Image.new("RGB", (64, 48))
    corrupt.save(tmp_path / "with broken EXIF", "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0")
    (tmp_path / "PNG of 100 megapixels without data").write_bytes(png(10_000, 10_000))
    printed = measured(
        tmp_path,
        """
for file in files:
    try:
        shape = to_rgb(file.read_bytes()).shape
        print(file.name, "is", shape, sep="|")
    except BadImage as error:
        print(file.name, "refused", error, sep="|")
    print("peak", file.name, peak() - start, sep="|")
""",
    )
    lines = [line.split("|") for line in printed.splitlines()]
    outcomes = {name: (how, what) for name, how, what in lines if name != "peak"}
    assert set(outcomes) == {*made, "with broken EXIF", "PNG of 100 megapixels without data"}
    assert outcomes.pop("with broken EXIF") == ("is", "(48, 64, 3)")
    harmless = {"PNG whose pixels go on": "(2, 2, 3)"}
    assert {name: what for name, (how, what) in outcomes.items() if how == "is"} == harmless
    for name in ("PNG of 10 gigapixels", "PNG of one endless line", "GIF", "BMP", "WEBP", "JPEG", "TIFF"):
        assert str(MAX_PIXELS) in outcomes[name][1], outcomes[name]
    (most,) = [float(megabytes) for first, *_, megabytes in lines[-1:] if first == "peak"]
    assert most < 600, printed  # The pixels of 100 megapixels that PIL makes room for are most of it.


def test_large_images_are_decoded_within_the_budget(tmp_path: Path) -> None:
    """Five images of 16 megapixels and five threads: with a budget for one, the memory of one."""
    encoded = encode(np.full((4000, 4000, 3), 90, np.uint8), "PNG")
    content = document()
    content["images"] = [{"id": i, "file_name": f"{i}.png", "width": 4000, "height": 4000} for i in range(1, 6)]
    path, images = write_coco(tmp_path, content)
    for i in range(1, 6):
        (images / f"{i}.png").write_bytes(encoded)
    code = f"""
import time
from retina_jax.config import DataConfig
from retina_jax.data import pipeline
from retina_jax.data.budget import Budget
from retina_jax.data.coco import read_coco
def slowly(*arguments, **options):
    image = to_rgb(*arguments, **options)
    time.sleep(0.8)  # So that threads that may decode at once do, however few cores there are.
    return image
pipeline.to_rgb = slowly
start = peak()
source = read_coco({str(path)!r}, {str(images)!r})
data = DataConfig(batch_size=5, short_side=64, long_side=64, workers=5)
for at_once in (1, 5):
    pipeline.DECODING = Budget(at_once * 4000 * 4000)
    (batch,) = pipeline.eval_batches(source, data, batch_size=5)
    assert batch.valid.all() and (batch.images == 90).all()
    print(peak() - start)
"""
    one, five = map(float, measured(tmp_path, code).split())
    assert one < 250 < five, (one, five)


def test_budget_is_never_overdrawn_and_comes_back() -> None:
    budget, held, most = Budget(10), [0], [0]
    lock = threading.Lock()

    def work(size: int) -> None:
        for _ in range(50):
            with budget.share(size):
                with lock:
                    held[0] += min(size, 10)
                    most[0] = max(most[0], held[0])
                with lock:
                    held[0] -= min(size, 10)

    threads = [threading.Thread(target=work, args=(size,)) for size in (1, 3, 5, 7, 10, 99)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads) and 0 < most[0] <= 10
    with pytest.raises(KeyError), budget.share(10):
        raise KeyError
    with budget.share(10):
        pass


@pytest.mark.parametrize("bad_images", ["stop", "skip"])
def test_bombs_in_a_data_set_stop_or_are_skipped(tmp_path: Path, bad_images: str) -> None:
    source = rectangles(tmp_path, [(80, 60)] * 8)
    path = Path(source.where(3))
    path.write_bytes(png(100_000, 100_000))
    batches = train_batches(source, dataclasses.replace(DATA, bad_images=bad_images), seed=0)
    if bad_images == "stop":
        with pytest.raises(BadImage) as raised:
            list(itertools.islice(batches, 2))
        assert_named(raised.value, f"{path}: ", str(MAX_PIXELS))
    else:
        found = list(itertools.islice(batches, 2))
        assert [b.valid[b.indices == 3].any() for b in found].count(True) == 0 and batches.skipped == {str(path): 1}


# ---- slow and failing reads


def reading(source: Source, index: int, instead: Callable[[], object]) -> Source:
    """The source, but reading one image does `instead` first."""

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
    """`read_file`, but the first `times` reads in the folder raise; when there were any.

    Other folders are read as ever: batches of earlier tests may still be fetching theirs.
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
def test_a_read_that_fails_in_passing_is_tried_again(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("retina_jax.data.reading.PAUSES", (0.01, 0.02, 0.08))
    source = named(tmp_path, "one.jpg")
    (tmp_path / "images" / "one.jpg").write_bytes(b"content")
    number = getattr(errno, name)
    read, calls = failing(tmp_path, 3, OSError(number, os.strerror(number)))
    monkeypatch.setattr("retina_jax.data.coco.read_file", read)
    assert source.read(0) == b"content" and len(calls) == 4
    assert np.all(np.diff(calls) >= [0.01, 0.02, 0.08])
    lines = [record.getMessage() for record in caplog.records if str(tmp_path) in record.getMessage()]
    assert lines == [
        f"{source.where(0)}: cannot be read: {os.strerror(number)}; tried again in {pause} s"
        for pause in (0.01, 0.02, 0.08)
    ]
    # A fourth failure is the image's.
    read, calls = failing(tmp_path, 4, OSError(number, os.strerror(number)))
    monkeypatch.setattr("retina_jax.data.coco.read_file", read)
    with pytest.raises(BadImage) as raised:
        source.read(0)
    assert_named(raised.value, f"{source.where(0)}: cannot be read: {os.strerror(number)}")
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "EISDIR", "EINVAL", "EFBIG", "ELOOP", "ENAMETOOLONG", "ENXIO"])
def test_a_read_that_will_not_mend_is_not_tried_again(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = named(tmp_path, "one.jpg")
    number = getattr(errno, name)
    read, calls = failing(tmp_path, 1, OSError(number, os.strerror(number)))
    monkeypatch.setattr("retina_jax.data.coco.read_file", read)
    with pytest.raises(BadImage):
        source.read(0)
    assert len(calls) == 1 and not any("again" in record.getMessage() for record in caplog.records)


def test_an_image_that_comes_at_the_second_try_is_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_read_that_hangs_is_named_and_its_batch_still_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", 0.3)
    plain = rectangles(tmp_path, [(80, 60)] * 8)
    goes_on, taken = threading.Event(), []
    source = reading(plain, 5, lambda: goes_on.wait(50))

    def take() -> None:
        taken.extend(itertools.islice(train_batches(source, DATA, seed=0), 2))

    with caplog.at_level(logging.WARNING, "retina_jax"):
        thread = threading.Thread(target=take)
        thread.start()
        deadline = time.monotonic() + 30
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.05)
        assert thread.is_alive() and len(taken) < 2
        goes_on.set()
        thread.join(30)
    expected = list(itertools.islice(train_batches(plain, DATA, seed=0), 2))
    assert all(
        np.array_equal(a, b) for one, two in zip(taken, expected, strict=True) for a, b in zip(one, two, strict=True)
    )
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("batch ") and f"being read: {plain.where(5)} (" in line and "\n" not in line


def test_batches_that_come_in_time_are_not_spoken_of(
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
    monkeypatch.setattr(waiting, "PATIENCE", 0.2)
    before = set(threading.enumerate())
    reads = waiting.Reads(str)
    for step in range(100):
        with reads.waiting(step):
            watchers = set(threading.enumerate()) - before
            assert len(watchers) == 1
    (thread,) = watchers
    thread.join(5)
    assert thread.daemon and not thread.is_alive() and not caplog.records
    for step in (100, 101):  # Another thread now; each batch is spoken of once.
        with reads.reading(7), reads.waiting(step):
            time.sleep(0.7)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in lines] == ["batch 100", "batch 101"]
    assert all("being read: 7 (" in line for line in lines)


def test_batches_that_nobody_asks_for_are_not_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOOKS", 0.1)
    before = set(threading.enumerate())
    batches = train_batches(rectangles(tmp_path, [(80, 60)] * 8), DATA, seed=0)
    next(batches)
    for thread in set(threading.enumerate()) - before:
        if thread.name == "slow files":
            thread.join(5)
            assert not thread.is_alive()
    assert next(batches).indices.shape == (4,)


def test_the_sizes_lie_on_both_sides_of_large() -> None:
    pixels = [width * height for width, height in SIZES]
    assert LARGE in pixels and max(pixels) > LARGE and min(pixels) == 1
    assert to_rgb(encode(np.zeros((1, 1, 3), np.uint8), "PNG")).shape == (1, 1, 3)
