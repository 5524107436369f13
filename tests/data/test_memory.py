"""Images that need more memory than available: decompression bombs are refused, large images are decoded within a
budget."""

from __future__ import annotations

import dataclasses
import io
import itertools
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import processes
import pytest
from fuzzing import assert_named
from PIL import Image, PngImagePlugin
from small_sets import document, encode, rectangles, write_coco

from retina_jax.config import DataConfig
from retina_jax.data.decoding import MAX_PIXELS, Budget
from retina_jax.data.pipeline import train_batches
from retina_jax.data.source import BadImage

DATA = DataConfig(batch_size=4, short_side=64, long_side=128, max_boxes=5, workers=2)


# ---- memory


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def tiff(width: int, height: int, **tags: int) -> bytes:
    """Returns an RGB TIFF without its pixels; `tags` are numbers of 4 bytes each."""
    entries = {256: width, 257: height, 258: 8, 259: 5, 262: 2, 277: 3, 273: 8, 279: 100}
    entries |= {int(tag[1:]): value for tag, value in tags.items()}
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + body + bytes(200)


def bombs() -> dict[str, bytes]:
    """Writes files of kilobytes that would decode to gigabytes."""
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
import ctypes, re, sys, threading
from pathlib import Path
from retina_jax.data import decoding
from retina_jax.data.decoding import to_rgb
from retina_jax.data.source import BadImage
def peak():
    # Not ru_maxrss, which begins at that of the process that started this one.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: otherwise glibc keeps up to 64 MB per thread that were freed
files = sorted(Path(sys.argv[1]).iterdir())
start = peak()
"""


def measured(folder: Path, code: str) -> str:
    """Runs a fresh process and returns what it prints; it must not print anything else, such as warnings."""
    script = folder.with_suffix(".py")
    script.write_text(MEASURE + code)
    done = processes.run(script, folder)
    others = ("absl::", "port.cc", "one colour")  # Some of the images are black on purpose.
    said = [line for line in done.stderr.splitlines() if not any(other in line for other in others)]
    assert done.returncode == 0 and not said, done.stderr
    return done.stdout


def test_bombs_are_reported_by_name_and_take_no_memory(tmp_path: Path) -> None:
    made = bombs()
    for name, encoded in made.items():
        (tmp_path / name).write_bytes(encoded)
        assert len(encoded) < 2**19
    # 100 megapixels, more than PIL's limit, and EXIF that it cannot read: neither gives a warning.
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
    assert most < 600, printed  # Most of it are the 100 megapixels that PIL allocates.


def test_large_images_are_decoded_within_the_budget(tmp_path: Path) -> None:
    """With five threads and a budget for one image, five images of 16 megapixels take the memory of one."""
    encoded = encode(np.full((4000, 4000, 3), 90, np.uint8), "PNG")
    content = document()
    content["images"] = [{"id": i, "file_name": f"{i}.png", "width": 4000, "height": 4000} for i in range(1, 6)]
    path, images = write_coco(tmp_path, content)
    for i in range(1, 6):
        (images / f"{i}.png").write_bytes(encoded)
    code = f"""
from retina_jax.config import DataConfig
from retina_jax.data import pipeline
from retina_jax.data.decoding import Budget
from retina_jax.data.datasets import read_coco
def together(*arguments, **options):
    image = to_rgb(*arguments, **options)
    all_here.wait(100)  # Threads that may decode at once do, however few cores there are.
    return image
pipeline.to_rgb = together
pipeline.tf.constant(0)  # TensorFlow itself is no part of what is measured.
start = peak()
source = read_coco({str(path)!r}, {str(images)!r})
data = DataConfig(batch_size=5, short_side=64, long_side=64, workers=5)
for at_once in (1, 5):
    pipeline.DECODING, all_here = Budget(at_once * 4000 * 4000), threading.Barrier(at_once)
    (batch,) = pipeline.eval_batches(source, data, batch_size=5)
    assert batch.valid.all() and (batch.images == 90).all()
    print(peak() - start)
"""
    one, five = map(float, measured(tmp_path, code).split())
    assert one < 300 < five, (one, five)  # 240 with Python 3.11, 256 with 3.13


def test_the_budget_is_never_exceeded_and_is_released() -> None:
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
def test_bombs_in_a_dataset_stop_or_are_skipped(tmp_path: Path, bad_images: str) -> None:
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
