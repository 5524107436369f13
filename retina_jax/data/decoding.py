"""Decodes image files to 8-bit RGB as a viewer shows them, and recognises images of one colour."""

import contextlib
import io
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageMode, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from retina_jax.data.reading import read_again, read_file
from retina_jax.data.sixteen_bits import is_deep, samples, to_eight_bits
from retina_jax.data.source import AS_VIEWERS, BadImage, Decoding, Orientation, Size, Source, WrongSize
from retina_jax.errors import reason

RGB = UInt8[np.ndarray, "h w 3"]
Pixels = UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"]
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")  # PIL has more; some of them start other programs
# PIL's own limit. Larger images are refused before they are decoded: a file of kilobytes can ask for gigabytes.
MAX_PIXELS = 178_956_970
# PIL warns of images that it reads nevertheless (broken EXIF, many pixels). `catch_warnings` is not safe with threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Budget:
    """A limit on what threads hold at the same time: those that need more than is left of `total` wait."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._left = total
        self._returned = threading.Condition()

    @contextlib.contextmanager
    def share(self, size: int) -> Iterator[None]:
        """Holds min(size, total) of the budget. Shares must not be nested."""
        size = min(size, self.total)
        with self._returned:
            self._returned.wait_for(lambda: self._left >= size)
            self._left -= size
        try:
            yield
        finally:
            with self._returned:
                self._left += size
                self._returned.notify_all()


# Pixels that threads decode and resize at once. Each takes 14 to 24 bytes (16 bits with transparency): 3 to 4 GB.
DECODING = Budget(MAX_PIXELS)
# A scan of a dozen bytes takes as long as one with content. Progressive JPEGs have 10 or so; libtiff's limit is 100 too.
MAX_SCANS = 100
SCAN, MARKER = b"\xff\xda", re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
ORIENTATION_TAG = 0x0112
# The transposition that turns an image of an EXIF orientation upright; from 5 on it swaps width and height.
_NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = {orientation: Image.Transpose[name] for orientation, name in enumerate(_NAMES.split(), 2)}
UNDO = {**TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # the inverse transpositions
GRID = 64  # largest number of rows and columns of an image that `is_one_colour` looks at, evenly spread
# An image has one colour if at least SHARE of its pixels are within LEVELS (of 255) of the median, in each channel.
LEVELS, SHARE = 2, 0.999
NO_BOXES = np.zeros((0, 4), np.float32)


class Header(NamedTuple):
    """Header of an image file."""

    size: Size  # width and height as stored
    orientation: int  # EXIF orientation, 1 to 8; 1 without one
    deep: bool  # whether it has 16 bits per value

    @property
    def sizes(self) -> dict[Orientation, Size]:
        """Width and height of the pixels as stored and as turned."""
        return {"stored": self.size, "turned": self.size[::-1] if self.orientation >= 5 else self.size}

    def fitting(self, annotated: Size | None) -> list[Orientation]:
        """Returns the conventions in which the image has the annotated (width, height); both if it is None."""
        return [convention for convention, size in self.sizes.items() if annotated in (None, size)]


def to_rgb(encoded: bytes, decoding: Decoding = AS_VIEWERS, *, expected_size: Size | None = None) -> RGB:
    """Decodes an image file to 8-bit RGB.

    Transparency becomes white. CMYK, palettes and grey become RGB. 16-bit images keep the upper 8 of `decoding.bits`. The
    first of several frames is used. Colour profiles are not applied. An EXIF orientation (in a TIFF, its orientation tag) is
    applied if only the turned size is `expected_size`, the annotated (width, height), and not if only the stored size is. If
    both are, or it is None, `decoding.orientation` decides. Raises BadImage, without the file's name, if the file is not an
    image of FORMATS, is truncated or broken, has more than MAX_PIXELS, or has neither of the two sizes.
    """
    image = open_image(encoded)
    try:
        header = read_header(image)
        turn = upright(header, expected_size, decoding)
        if header.deep:
            image = open_image(encoded)  # reading EXIF after the pixels of a PNG has loaded it
            eight = to_eight_bits(samples(image, lambda: open_image(encoded)), decoding.bits or 16)
        else:
            image.load()
            eight = image
        if image.format == "TIFF" and header.orientation in TURNS and ORIENTATION_TAG not in image.getexif():
            # Newer versions of PIL turn TIFFs when they load them.
            turn = None if turn is not None else UNDO[header.orientation]
        return opaque(eight if turn is None else eight.transpose(turn))
    except BadImage:
        raise
    except Exception as error:
        # PIL's decoders raise nearly anything for a broken file: OSError, SyntaxError, struct.error, IndexError.
        raise BadImage(f"cannot be decoded: {reason(error)}") from None


def opaque(image: Image.Image) -> RGB:
    """Returns the pixels of an 8-bit image as RGB, transparency as white. Raises BadImage for floating-point pixels."""
    if ImageMode.getmode(image.mode).basetype == "F":
        raise BadImage("has floating-point pixels of unknown range; 8 or 16 bits are supported")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(image.convert("RGB"))


def read_rgb(path: Path, decoding: Decoding = AS_VIEWERS) -> RGB:
    """Reads and decodes an image file without annotations. Raises BadImage, which names the file."""
    try:
        return to_rgb(read_file(path, largest_file(MAX_PIXELS)), decoding)
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None
    except OSError as error:
        raise BadImage(f"{path}: cannot be read: {reason(error)}") from None


def image_of(source: Source, index: int) -> RGB:
    """Reads and decodes an image of a dataset as training does. Raises BadImage, or OSError if it cannot be read."""
    record = source.records[index]
    return to_rgb(source.read(index), source.decoding, expected_size=(record.width, record.height))


def largest_file(pixels: int) -> int:
    """Returns the largest bytes of a file with so many pixels: 16-bit RGBA, and 64 MiB for frames, previews and EXIF."""
    return 2**26 + 8 * min(pixels, MAX_PIXELS)


def read_image(path: Path, width: int, height: int) -> bytes:
    """Reads the file of an image that has this size in its annotations; raises OSError if it cannot be read."""
    return read_again(lambda: read_file(path, largest_file(width * height)), str(path))


def is_plain_jpeg(encoded: bytes, decoding: Decoding = AS_VIEWERS, *, expected_size: Size | None = None) -> bool:
    """Returns whether any JPEG decoder gives the pixels of `to_rgb`: grey or three components, complete, not to be
    turned. Reads only the header. Raises BadImage for faults that it shows."""
    image = open_image(encoded)
    complete = image.format == "JPEG" and image.mode in ("RGB", "L") and encoded.endswith(b"\xff\xd9")
    return complete and upright(read_header(image), expected_size, decoding) is None


def is_one_colour(image: Pixels, boxes_xyxy: Float32[np.ndarray, "n 4"] = NO_BOXES) -> bool:
    """Returns whether the pixels (0 to 255) have one colour: a grid of the image, and of each box and a pixel around it."""
    starts = np.maximum(np.floor(boxes_xyxy[:, :2]).astype(int) - 1, 0).tolist()
    ends = (np.ceil(boxes_xyxy[:, 2:]).astype(int) + 1).tolist()
    inside = (image[y1:y2, x1:x2] for (x1, y1), (x2, y2) in zip(starts, ends, strict=True))
    return _is_flat(image) and all(map(_is_flat, inside))


def _is_flat(image: Pixels) -> bool:
    height, width = image.shape[:2]
    grid = image[:: -(-height // GRID), :: -(-width // GRID)].astype(np.uint8).reshape(-1, image.shape[2])
    for values in grid.T:  # a histogram is ten times as fast as a median
        upto = np.cumsum(np.bincount(values, minlength=256))
        median = int(np.searchsorted(upto, len(values) / 2))
        below = upto[median - LEVELS - 1] if median > LEVELS else 0
        if upto[min(median + LEVELS, 255)] - below < SHARE * len(values):
            return False
    return True


def open_image(encoded: bytes) -> Image.Image:
    """Opens an image without decoding its pixels. Raises BadImage."""
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadImage(f"has more than {MAX_PIXELS} pixels") from None
    except Exception as error:
        why = "" if isinstance(error, UnidentifiedImageError) else f": {reason(error)}"
        raise BadImage(f"is not an image in one of the formats {', '.join(FORMATS)}{why}") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"has {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
    if isinstance(image, JpegImageFile) and not _has_few_scans(image, encoded):
        raise BadImage(f"is a JPEG with more than {MAX_SCANS} scans, whose decoding might take hours")
    return image


def _has_few_scans(image: JpegImageFile, encoded: bytes) -> bool:
    """Returns whether a JPEG has at most MAX_SCANS. PIL has read the header of the first, most often the only one."""
    length = 6 + 2 * image.layers  # of the header of a scan of all components
    of_all = encoded.startswith(SCAN + bytes([0, length, image.layers]), image.fp.tell() - length - 2)
    if (of_all and not image.info.get("progressive")) or encoded.count(SCAN) <= MAX_SCANS:
        return True
    scans, place = 0, 2
    while (marker := MARKER.search(encoded, place)) and marker[0] != b"\xff\xd9":  # the end of the image
        scans += marker[0] == SCAN
        place = marker.end() + int.from_bytes(encoded[marker.end() : marker.end() + 2])
        if scans > MAX_SCANS:
            return False
    return True


def read_header(image: Image.Image) -> Header:
    """Returns the header of an image that is not loaded. The pixels of a PNG are skipped, not decoded."""
    if image.format == "TIFF":  # PIL's size of a TIFF is that after turning
        width, height = image.tag_v2[256], image.tag_v2[257]
    else:
        width, height = image.size
    deep = is_deep(image)
    try:
        # PIL decodes a PNG without EXIF before its pixels to look for it after them.
        loads = image.format == "PNG" and "exif" not in image.info and not _has_late_exif(image)
        exif = Image.Image.getexif(image) if loads else image.getexif()
        orientation = exif.get(ORIENTATION_TAG, 1)
    except Exception:
        orientation = 1  # EXIF that cannot be parsed
    known = isinstance(orientation, int) and orientation in TURNS
    return Header((width, height), orientation if known else 1, deep)


def upright(header: Header, expected_size: Size | None, decoding: Decoding = AS_VIEWERS) -> Image.Transpose | None:
    """Returns the transposition of the stored image by the rule of `to_rgb`, or None. Raises WrongSize for other sizes."""
    fitting = header.fitting(expected_size)
    if not fitting:
        width, height = header.size
        raise WrongSize(f"is {width}x{height} pixels, but {expected_size[0]}x{expected_size[1]} in the annotations")
    orientation = fitting[0] if len(fitting) == 1 else decoding.orientation
    return TURNS.get(header.orientation) if orientation == "turned" else None


def _has_late_exif(image: Image.Image) -> bool:
    """Returns whether a PNG has an EXIF chunk after its pixels."""
    file, found = image.fp, False
    before = file.tell()
    file.seek(8)
    while len(head := file.read(8)) == 8 and not found:
        length, kind = struct.unpack(">I4s", head)
        found = kind == b"eXIf"
        file.seek(length + 4, io.SEEK_CUR)
    file.seek(before)
    return found
