"""Writes image files that PIL cannot write: 16 bits per colour, and an EXIF orientation."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def deep_png(values: np.ndarray) -> bytes:
    """Returns a 16-bit PNG of uint16 values [h w c]; c: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha."""
    height, width, channels = values.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_tiff(
    values: np.ndarray,
    order: str = "<",
    compressed: bool = False,
    orientation: int = 1,
    photometric: int | None = None,
    planes: int = 1,
) -> bytes:
    """Returns a 16-bit TIFF of uint16 values [h w c], c 1 or 3; bytes in `order`. With `planes` 2 only its header is
    valid."""
    height, width, channels = values.shape
    photometric = (1 if channels == 1 else 2) if photometric is None else photometric
    content = values.astype(order + "u2").tobytes()
    content = zlib.compress(content) if compressed else content
    content += b"\0" * (len(content) % 2)
    tags = {
        **{256: [width], 257: [height], 258: [16] * channels, 259: [8 if compressed else 1]},
        **{262: [photometric], 273: [8], 274: [orientation]},
        **{277: [channels], 278: [height], 279: [len(content)], 284: [planes]},
    }
    start = 8 + len(content)
    after = start + 2 + 12 * len(tags) + 4
    entries, tail = struct.pack(order + "H", len(tags)), b""
    for tag, numbers in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        place = packed if len(packed) == 4 else struct.pack(order + "I", after + len(tail))
        tail += packed if len(packed) > 4 else b""
        entries += struct.pack(order + "HHI", tag, 4, len(numbers)) + place
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, start)
    return head + content + entries + struct.pack(order + "I", 0) + tail


def oriented(pixels: np.ndarray, orientation: int, kind: str) -> bytes:
    """Returns a file that stores these pixels and an EXIF orientation."""
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    Image.fromarray(pixels).save(stream, kind, exif=exif, **options)
    return stream.getvalue()


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns the pixels that a viewer shows for pixels stored with this EXIF orientation; the standard defines where
    row 0 and column 0 are."""
    if orientation >= 5:  # Row 0 is the left or right side.
        pixels = pixels.swapaxes(0, 1)
    across = {2: -1, 3: -1, 6: -1, 7: -1}.get(orientation, 1)
    down = {3: -1, 4: -1, 7: -1, 8: -1}.get(orientation, 1)
    return pixels[::down, ::across]
