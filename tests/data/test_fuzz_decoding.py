"""Any bytes decode to exactly the expected size, or are refused in one line; an intact file decodes to exactly PIL's
pixels."""

from __future__ import annotations

import functools
import io
import itertools
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from fuzzing import assert_named, both_shares, run_cases
from hypothesis import strategies as st
from PIL import Image, ImageOps

from retina_jax.data.decoding import FORMATS, MAX_PIXELS, is_plain_jpeg, to_rgb
from retina_jax.data.pipeline import decode_jpeg
from retina_jax.data.source import BadImage

# As outside of tests, with the warning filter that decoding.py sets.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")
SIZES = [(1, 1), (7, 5), (40, 24), (1, 60), (64, 2)]
"""Width and height of the stored images."""
HEADER_SIZES = [
    (0, 0),
    (1, 70_000),
    (100_000, 100_000),
    (65_535, 65_535),
    (2**31 - 1, 1),
    (2**31 - 1, 2**31 - 1),
    (3, 2),
]
GARBAGE = [
    b"\0" * 40,
    b"\xff" * 9,
    b"\xff\xd9",
    b"\xff\xd8",
    b"\xff\xda",
    b"IEND",
    b";",
    b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
]


@dataclass(frozen=True)
class Stored:
    """An intact image file and its pixels."""

    kind: str
    mode: str
    encoded: bytes
    size: tuple[int, int]
    """Width and height as stored."""
    orientation: int
    frames: int


def pixels(mode: str, size: tuple[int, int], seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    width, height = size
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), np.uint16))
    coloured = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8), "RGBA")
    if mode in ("RGBA", "LA"):
        return coloured.convert(mode)
    return coloured.convert("RGB").convert(mode)


@functools.cache
def stored_files() -> list[Stored]:
    """Returns every format in every mode that PIL can write, in every orientation, with one frame and with three."""
    made = []
    combinations = itertools.product(FORMATS, MODES, SIZES, (1, 2, 3))
    for number, (kind, mode, size, turn) in enumerate(combinations):
        frames = 3 if turn == 3 and kind in ("GIF", "PNG", "WEBP", "TIFF") else 1
        orientation = 1 if turn == 1 or kind in ("GIF", "BMP") else 2 + number % 7
        exif = Image.Exif()
        exif[0x0112] = orientation
        options: dict[str, Any] = {"exif": exif} if orientation > 1 else {}
        if frames > 1:
            options |= {"save_all": True, "append_images": [pixels(mode, size, k) for k in (1, 2)]}
        if kind == "WEBP":
            options |= {"lossless": True}
        if kind == "TIFF":
            options |= {"compression": ("raw", "tiff_lzw", "tiff_adobe_deflate")[number % 3]}
        stream = io.BytesIO()
        try:
            pixels(mode, size, 0).save(stream, kind, **options)
        except (OSError, ValueError, KeyError):
            continue  # This format has no such mode.
        made.append(Stored(kind, mode, stream.getvalue(), size, orientation, frames))
    return made


def with_size(stored: Stored, size: tuple[int, int]) -> bytes:
    """Returns the file with another size in its header, and the matching checksum of the header."""
    data, (width, height) = bytearray(stored.encoded), size
    if stored.kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif stored.kind == "BMP":
        data[18:26] = struct.pack("<II", width, height)
    elif stored.kind == "GIF":
        short = struct.pack("<HH", min(width, 65_535), min(height, 65_535))
        at = data.find(b",", 13) + 5
        data[6:10] = data[at : at + 4] = short
    elif stored.kind == "JPEG":
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
        data[at : at + 4] = struct.pack(">HH", min(height, 65_535), min(width, 65_535))
    elif stored.kind == "TIFF":
        (at,) = struct.unpack("<I", data[4:8])
        (count,) = struct.unpack("<H", data[at : at + 2])
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            (tag,) = struct.unpack("<H", data[entry : entry + 2])
            if tag in (256, 257):
                data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, size[tag - 256])
    elif data[12:16] == b"VP8X":
        data[24:30] = (
            struct.pack("<I", min(width, 2**24) - 1 & 0xFFFFFF)[:3]
            + struct.pack("<I", min(height, 2**24) - 1 & 0xFFFFFF)[:3]
        )
    else:  # Lossless WEBP: 14 bits each.
        data[21:25] = struct.pack("<I", (width - 1 & 0x3FFF) | (height - 1 & 0x3FFF) << 14 | data[24] & 0xF0 << 24)
    return bytes(data)


@dataclass(frozen=True)
class Case:
    stored: Stored
    encoded: bytes
    changed: bool
    expected_size: tuple[int, int] | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    stored = draw(st.sampled_from(stored_files()))
    encoded = stored.encoded
    how = draw(st.sampled_from(["complete", "bytes", "bytes", "header", "trailing"]))
    if how == "header":
        encoded = with_size(stored, draw(st.sampled_from([*HEADER_SIZES, (stored.size[0] + 1, stored.size[1])])))
    if how == "trailing":
        encoded += draw(st.sampled_from(GARBAGE))
    for _ in range(draw(st.integers(1, 4)) if how == "bytes" else 0):
        # Half of the changes are in the header, which decides how the file is read.
        at = draw(st.integers(0, min(len(encoded), 80)) | st.integers(0, len(encoded)))
        change = draw(st.sampled_from(["cut", "flip", "flip", "flip", "insert", "drop", "zero"]))
        if change == "cut":
            encoded = encoded[:at]
        elif change == "flip":
            encoded = (
                encoded[:at] + bytes(b ^ draw(st.integers(1, 255)) for b in encoded[at : at + 1]) + encoded[at + 1 :]
            )
        elif change == "insert":
            encoded = encoded[:at] + draw(st.sampled_from(GARBAGE)) + encoded[at:]
        elif change == "drop":
            encoded = encoded[:at] + encoded[at + draw(st.integers(1, 16)) :]
        else:
            encoded = encoded[:at] + bytes(len(encoded[at : at + 8])) + encoded[at + 8 :]
    expected_size = draw(st.sampled_from([None, stored.size, stored.size, stored.size[::-1], (3, 3)]))
    return Case(stored, encoded, encoded != stored.encoded, expected_size)


def plain(stored: Stored, expected_size: tuple[int, int] | None) -> np.ndarray | None:
    """Returns the pixels by PIL's simplest route; None if the size is neither the upright nor the stored one."""
    image: Image.Image = Image.open(io.BytesIO(stored.encoded))
    upright = ImageOps.exif_transpose(image)
    if expected_size is None or upright.size == expected_size:
        image = upright
    elif stored.size != expected_size:
        return None
    elif stored.kind == "TIFF":  # PIL has rotated it.
        turn = Image.Transpose
        back = {5: turn.TRANSPOSE, 6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}
        image = upright.transpose(back[stored.orientation])
    if image.mode.startswith("I"):  # Some formats store 16 bits as 8.
        return np.repeat((np.asarray(image).astype(np.int64) // 256).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        layers = np.asarray(image.convert("RGBA")).astype(np.float64)
        share = layers[..., 3:] / 255
        return share * layers[..., :3] + (1 - share) * 255
    return np.asarray(image.convert("RGB"))


def check(case: Case) -> str:
    try:
        found = to_rgb(case.encoded, expected_size=case.expected_size)
    except BadImage as error:
        assert_named(error)
        refused: BadImage | None = error
    else:
        refused = None
        assert found.dtype == np.uint8 and found.shape[2:] == (3,) and 0 < found.shape[0] * found.shape[1] <= MAX_PIXELS
        assert case.expected_size is None or found.shape[1::-1] == case.expected_size
    try:
        plain_jpeg = is_plain_jpeg(case.encoded, expected_size=case.expected_size)
    except BadImage as error:
        assert_named(error)
        assert refused is not None
        plain_jpeg = False
    if plain_jpeg:
        # An image decoded by TensorFlow has the size that the boxes were scaled for, or is an error there too.
        try:
            by_tensorflow = decode_jpeg(case.encoded).numpy()
        except tf.errors.OpError:
            assert case.changed
        else:
            assert case.expected_size is None or by_tensorflow.shape == (*case.expected_size[::-1], 3)
            assert case.changed or np.array_equal(by_tensorflow, found)
    if not case.changed:
        expected = plain(case.stored, case.expected_size)
        if expected is None:
            assert refused is not None and "in the annotations" in str(refused)
            return "complete, of another size"
        assert refused is None, refused
        assert found.shape == expected.shape
        assert np.abs(found - expected.astype(np.float64)).max() <= (1 if expected.dtype == np.float64 else 0)
        return "complete, exact"
    return "changed, decoded" if refused is None else "changed, refused"


@both_shares
def test_any_bytes_are_decoded_to_their_size_or_refused_by_name(share: int) -> None:
    stored = stored_files()
    assert {s.kind for s in stored} == set(FORMATS) and {s.mode for s in stored} == set(MODES)
    assert {s.orientation for s in stored} == set(range(1, 9)) and {s.frames for s in stored} == {1, 3}
    ended = run_cases("decoder", share, cases(), check)
    assert min(ended[how] for how in ("complete, exact", "changed, decoded", "changed, refused")) > ended.total() / 30


def test_every_stored_file_is_exact() -> None:
    """Goes through all formats, modes, orientations and numbers of frames, without random choice."""
    for stored in stored_files():
        for expected_size in (None, stored.size, stored.size[::-1]):
            check(Case(stored, stored.encoded, False, expected_size))
    assert len(stored_files()) > 300
