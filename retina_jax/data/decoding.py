"""Decodes image files to 8-bit RGB as a viewer shows them. Training, evaluation and prediction share it."""

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

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
"""Supported file formats. PIL has more; some of them start other programs."""
MAX_PIXELS = 178_956_970
"""Larger images are refused before they are decoded: a file of kilobytes can ask for gigabytes. PIL's own limit."""
# PIL warns of images that it reads nevertheless (broken EXIF, many pixels); what matters raises an exception here.
# `catch_warnings` is not safe with several decoding threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Budget:
    """Limits what threads hold at the same time to `total`; who asks for more than is left waits."""

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


DECODING = Budget(MAX_PIXELS)
"""Pixels that threads decode and resize at once. Each takes 14 to 24 bytes (16 bits with transparency): 3 to 4 GB."""
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
"""The transposition that turns an image of an EXIF orientation upright; from 5 on it swaps width and height."""
UNDO = {**TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""The inverse transpositions."""
START_OF_FRAME, START_OF_SCAN, QUANTISATION, HUFFMAN, RESTARTS, COMMENT = (0xC0, 0xC2), 0xDA, 0xDB, 0xC4, 0xDD, 0xFE
"""JPEG markers; frames are baseline or progressive."""
NAMED = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0"}
"""JPEG markers of application segments that do not affect the pixels, with the segments' first bytes."""
HEAD, FRAME = struct.Struct(">BBH"), struct.Struct(">BHHB")
"""Head of a JPEG segment, and of a frame after it."""


def to_rgb(
    encoded: bytes, decoding: Decoding = AS_VIEWERS, *, expected_size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image file to 8-bit RGB.

    Transparency becomes white. CMYK, palettes and grey become RGB. 16-bit images keep the upper 8 of `decoding.bits`. The
    first of several frames is used. Colour profiles are not applied.

    An EXIF orientation (in a TIFF, its orientation tag) is applied if only the turned size is `expected_size`, the annotated
    (width, height); not if only the stored size is, because the boxes then lie on the stored pixels. If both are, or it is
    None (prediction), `decoding.orientation` decides.

    Raises BadImage, one line without the file's name, if the file is not an image of FORMATS, is truncated or broken, has
    more than MAX_PIXELS, or has neither of the two sizes.
    """
    image = open_image(encoded)
    try:
        header = read_header(image)
        if header.deep:
            image = open_image(encoded)  # reading EXIF after the pixels of a PNG has loaded it
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
        # PIL's decoders raise nearly anything for a broken file: OSError, SyntaxError, struct.error, IndexError.
        raise BadImage(f"cannot be decoded: {reason(error)}") from None


def image_of(source: Source, index: int) -> UInt8[np.ndarray, "h w 3"]:
    """Reads and decodes an image of a data set as training does. Raises BadImage, or OSError if it cannot be read."""
    record = source.records[index]
    return to_rgb(source.read(index), source.decoding, expected_size=(record.width, record.height))


def largest_file(pixels: int) -> int:
    """Largest size in bytes of a file with so many pixels: 16-bit RGBA, and 64 MiB for other frames, previews and EXIF."""
    return 2**26 + 8 * min(pixels, MAX_PIXELS)


def is_plain_jpeg(
    encoded: bytes, decoding: Decoding = AS_VIEWERS, *, expected_size: tuple[int, int] | None = None
) -> bool:
    """Whether any JPEG decoder gives the pixels of `to_rgb`: grey or three components, complete, not to be turned.

    Reads only the header, and raises BadImage for faults that it shows.
    """
    if _is_plainest_jpeg(encoded, expected_size):
        return True
    image = open_image(encoded)
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not encoded.endswith(b"\xff\xd9"):
        return False
    return upright(read_header(image), expected_size, decoding) is None


def _is_plainest_jpeg(encoded: bytes, expected_size: tuple[int, int] | None) -> bool:
    """Whether a JPEG's header has only the segments of every plain JPEG, as most have. If not, PIL must decide.

    PIL takes 0.5 ms for it, since its code leaves the processor's caches between images.
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
    return image


def read_header(image: Image.Image) -> Header:
    """The header of an image that is not loaded. The pixels of a PNG are skipped, not decoded."""
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


def upright(
    header: Header, expected_size: tuple[int, int] | None, decoding: Decoding = AS_VIEWERS
) -> Image.Transpose | None:
    """The transposition of the stored image by the rule of `to_rgb`; None: none. Raises BadImage for other sizes."""
    turn, turned = TURNS.get(header.orientation), header.turned_size
    if expected_size is None or header.size == turned == expected_size:
        return turn if decoding.orientation == "turned" else None
    if turned == expected_size:
        return turn
    if header.size == expected_size:
        return None
    width, height = header.size
    raise BadImage(f"is {width}x{height} pixels, but {expected_size[0]}x{expected_size[1]} in the annotations")


def is_turned_by_pil(image: Image.Image, header: Header) -> bool:
    """Whether PIL turned the image while loading it, as newer versions do with TIFFs."""
    return image.format == "TIFF" and header.orientation in TURNS and ORIENTATION_TAG not in image.getexif()


def _has_late_exif(image: Image.Image) -> bool:
    """Whether a PNG has an EXIF chunk after its pixels."""
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
        raise BadImage("has floating-point pixels of unknown range; 8 or 16 bits are supported")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
