"""Encoded image to the RGB that a person sees, whatever the file holds. Training, evaluation and prediction share it."""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import warnings
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageMode, UnidentifiedImageError

from retina_jax.data.conventions import AS_VIEWERS, Decoding, Header
from retina_jax.data.sixteen_bits import is_deep, samples, to_eight_bits
from retina_jax.data.source import BadImage, Source
from retina_jax.errors import reason

# A bound on what threads hold at once.


class Budget:
    """Shares out `total`: what its holders have never adds up to more, and who asks for more than is left waits."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._left = total
        self._returned = threading.Condition()

    @contextlib.contextmanager
    def share(self, size: int) -> Iterator[None]:
        """Holds `size` of the budget; of more than there is at all, the whole. Never take a second share inside one."""
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


# PIL warns of images it reads all the same (broken EXIF, many pixels). What matters is said here, by exceptions.
# `catch_warnings` would not do: it is not safe where several threads decode.
warnings.filterwarnings("ignore", module=r"PIL\.")

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
"""File formats read. PIL has more; some of those start other programs."""
MAX_PIXELS = 178_956_970
"""Images of more pixels are refused before they are decoded: a file of kilobytes can ask for gigabytes. PIL's own limit."""
DECODING = Budget(MAX_PIXELS)
"""Pixels that threads decode and resize at once. Each takes 14 bytes, with transparency 16, and of a file with
16 bits per value 20 and 24: 3 to 4 GB in all."""
ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what makes the image upright; from 5 on width and height change places."""
UNDO = {**TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""EXIF orientation to what makes an upright image the stored one again."""
START_OF_FRAME, START_OF_SCAN, QUANTISATION, HUFFMAN, RESTARTS, COMMENT = (0xC0, 0xC2), 0xDA, 0xDB, 0xC4, 0xDD, 0xFE
"""Markers of a JPEG; the frames are of baseline and of progressive ones."""
NAMED = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0"}
"""Markers of segments for applications, and what those begin with that say nothing about the pixels."""
HEAD, FRAME = struct.Struct(">BBH"), struct.Struct(">BHHB")
"""What a segment begins with, and what a frame does after it."""


def to_rgb(
    encoded: bytes, decoding: Decoding = AS_VIEWERS, *, expected_size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image file to RGB, 8 bits.

    Transparency shows white behind it; of 16-bit images the upper 8 of `decoding.bits` are taken; CMYK, palettes and grey
    become RGB; of several frames the first is taken; colour profiles are not applied.

    An EXIF orientation (in a TIFF, its orientation tag) is applied where `expected_size`, the (width, height) that the
    annotations name, is the size after turning only; it is not where that is the size as stored only, because the boxes
    then lie on the image as stored. Where it is both, or None (prediction), `decoding.orientation` decides.

    Raises BadImage (one line, without the file's name, which the caller knows) where the file is no image of FORMATS, is
    truncated or broken, has more than MAX_PIXELS, or has neither of the two sizes.
    """
    image = open_image(encoded)
    try:
        header = read_header(image)
        if header.deep:
            image = open_image(encoded)  # To read EXIF behind the pixels of a PNG is to load it.
            eight = to_eight_bits(samples(image, lambda: open_image(encoded)), decoding.bits or 16)
        else:
            image.load()
            eight = image
        turn = upright(header, expected_size, decoding)
        if is_turned_by_pil(image, header):
            turn = None if turn is not None else UNDO[header.orientation]
        return np.asarray(_eight_bit_rgb(eight if turn is None else eight.transpose(turn)))
    except BadImage:
        raise
    except Exception as error:
        # A broken file can make PIL's decoders raise nearly anything: OSError, SyntaxError, struct.error, IndexError.
        raise BadImage(f"cannot be decoded: {reason(error)}") from None


def image_of(source: Source, index: int) -> UInt8[np.ndarray, "h w 3"]:
    """An image of a data set, as training and evaluation decode it; BadImage where it cannot be read or decoded."""
    record = source.records[index]
    return to_rgb(source.read(index), source.decoding, expected_size=(record.width, record.height))


def largest_file(pixels: int) -> int:
    """Bytes that a file of so many pixels may have: 64 MiB for other frames, previews and EXIF, and 16 bits of RGBA each."""
    return 2**26 + 8 * min(pixels, MAX_PIXELS)


def is_plain_jpeg(
    encoded: bytes, decoding: Decoding = AS_VIEWERS, *, expected_size: tuple[int, int] | None = None
) -> bool:
    """Whether any JPEG decoder gives what `to_rgb` does: grey or three components, whole, upright as stored.

    Only the header is read. Raises BadImage as `to_rgb` does, for what the header can show.
    """
    if _is_plainest_jpeg(encoded, expected_size):
        return True
    image = open_image(encoded)
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not encoded.endswith(b"\xff\xd9"):
        return False
    return upright(read_header(image), expected_size, decoding) is None


def _is_plainest_jpeg(encoded: bytes, expected_size: tuple[int, int] | None) -> bool:
    """Whether a JPEG has nothing in its header but what every plain one has, all of it in order: most are like that.

    False says nothing: PIL then looks. Between images PIL's code falls out of the processor's caches, and costs 0.5 ms.
    """
    if not (encoded.startswith(b"\xff\xd8") and encoded.endswith(b"\xff\xd9")):
        return False
    at, size = 2, None
    while at + 20 < len(encoded):
        start, marker, length = HEAD.unpack_from(encoded, at)
        if start != 0xFF or length < 2 or at + 2 + length > len(encoded):
            return False
        if marker == START_OF_SCAN:
            return size is not None and expected_size in (size, None) and 0 < size[0] * size[1] <= MAX_PIXELS
        if marker in START_OF_FRAME:
            bits, height, width, components = FRAME.unpack_from(encoded, at + 4)
            if size or bits != 8 or components not in (1, 3) or length != 8 + 3 * components:
                return False
            size = width, height
        elif marker == QUANTISATION:
            # Tables of 64 bytes, each after a byte whose upper half is 0.
            if (length - 2) % 65 or any(table > 15 for table in encoded[at + 4 : at + 2 + length : 65]):
                return False
        elif marker in NAMED:
            if length < 16 or not encoded.startswith(NAMED[marker], at + 4):
                return False
        elif marker not in (HUFFMAN, RESTARTS, COMMENT):
            return False
        at += 2 + length
    return False


def open_image(encoded: bytes) -> Image.Image:
    """The image with its header read and its pixels not yet; BadImage where that fails."""
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadImage(f"has more than {MAX_PIXELS} pixels") from None
    except Exception as error:
        why = "" if isinstance(error, UnidentifiedImageError) else f": {reason(error)}"
        raise BadImage(f"is not an image in one of the formats {', '.join(FORMATS)}{why}") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"has {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
    return image


def read_header(image: Image.Image) -> Header:
    """The header of an open image that is not loaded. The pixels of a PNG are skipped, not decoded."""
    if image.format == "TIFF":  # Of a TIFF that is to be turned, PIL names the size after it.
        width, height = image.tag_v2[256], image.tag_v2[257]
    else:
        width, height = image.size
    deep = is_deep(image)
    try:
        # PIL decodes a PNG without EXIF before its pixels to look behind them.
        loads = image.format == "PNG" and "exif" not in image.info and not _has_late_exif(image)
        exif = Image.Image.getexif(image) if loads else image.getexif()
        orientation = exif.get(ORIENTATION_TAG, 1)
    except Exception:
        orientation = 1  # EXIF that cannot be parsed shows nothing about the pixels.
    known = isinstance(orientation, int) and orientation in TURNS
    return Header((width, height), orientation if known else 1, deep)


def upright(
    header: Header, expected_size: tuple[int, int] | None, decoding: Decoding = AS_VIEWERS
) -> Image.Transpose | None:
    """How to turn the image as stored, None for not at all; the rule is in `to_rgb`."""
    turn, turned = TURNS.get(header.orientation), header.turned_size
    if expected_size is None or header.size == turned == expected_size:
        return turn if decoding.orientation == "turned" else None
    if turned == expected_size:
        return turn
    if header.size == expected_size:
        return None
    width, height = header.size
    raise BadImage(f"is {width}x{height} pixels where its annotations say {expected_size[0]}x{expected_size[1]}")


def is_turned_by_pil(image: Image.Image, header: Header) -> bool:
    """Whether PIL has turned the image while loading it: it does so with TIFFs, from some version on."""
    return image.format == "TIFF" and header.orientation in TURNS and ORIENTATION_TAG not in image.getexif()


def _has_late_exif(image: Image.Image) -> bool:
    """Whether a PNG has a chunk of EXIF behind its pixels."""
    file, found = image.fp, False
    before = file.tell()
    file.seek(8)
    while len(head := file.read(8)) == 8 and not found:
        length, kind = struct.unpack(">I4s", head)
        found = kind == b"eXIf"
        file.seek(length + 4, io.SEEK_CUR)
    file.seek(before)
    return found


def _eight_bit_rgb(image: Image.Image) -> Image.Image:
    if ImageMode.getmode(image.mode).basetype == "F":
        raise BadImage("has floating-point pixels, whose range is unknown; it must have 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
