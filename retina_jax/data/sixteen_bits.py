"""Reads all bits of 16-bit image files (PIL keeps only the upper 8 of colours), and finds the range that they use."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8, UInt16
from PIL import Image

from retina_jax.data.source import BadImage

log = logging.getLogger(__name__)
BITS_TAG, PHOTOMETRIC_TAG, CHANNELS_TAG, PLANES_TAG = 258, 262, 277, 284  # TIFF tags
NATIVE = "L" if sys.byteorder == "little" else "B"
GREY_ALPHA = "LA;16B"  # PIL's raw mode of 16-bit grey with transparency; read as four bytes per pixel instead
# PIL's raw modes of 16-bit colours (low byte first, high byte first or native) and of grey with transparency.
COLOURS = {GREY_ALPHA, *(f"{mode};16{order}" for mode in ("RGB", "RGBA") for order in "LBN")}
RANGES = (8, 10, 12, 14, 16)  # possible numbers of bits that the 16-bit files of a dataset use
SATURATED = 65535  # saturated and missing pixels of many cameras and converters, whatever the range of the others
SHARE = 0.99  # share of the values that must be in a range; up to 1 % are outliers
DARK = 3  # images are dark if their values need this many bits fewer than the range has: all are below 32 of 255


def is_deep(image: Image.Image) -> bool:
    """Returns whether an image that is not loaded has more than 8 bits per value."""
    coloured = image.format in ("PNG", "TIFF") and _raw_mode(image) in COLOURS
    deep_tiff = image.format == "TIFF" and image.mode != "F" and 16 in image.tag_v2.get(BITS_TAG, ())
    return image.mode.startswith("I") or coloured or deep_tiff


def samples(image: Image.Image, reopen: Callable[[], Image.Image]) -> UInt16[np.ndarray, "h w c"]:
    """Returns all 16 bits of an image that `is_deep` and is not loaded, oriented as by PIL, negative values as 0; c is 1 for
    grey, 2 with alpha, 3 for RGB, 4 with alpha. `reopen` opens the file again, to read the lower bytes of colours with the
    byte order exchanged. Raises BadImage for what is not supported, and what PIL raises."""
    raw = _raw_mode(image)
    if image.format == "TIFF":
        tags = image.tag_v2
        if tags.get(PLANES_TAG, 1) != 1 and tags.get(CHANNELS_TAG, 1) > 1:
            raise BadImage("is a 16-bit TIFF with separate planes; save it with planar configuration 1")
        if tags.get(PHOTOMETRIC_TAG) == 0:
            raise BadImage("is a 16-bit TIFF in which 0 is white; save it with photometric interpretation 1")
        if not image.mode.startswith("I") and raw not in COLOURS:
            raise BadImage(f"is a 16-bit TIFF with an unsupported layout ({image.mode}); save it as grey or RGB")
    image.load()
    if image.mode.startswith("I"):
        values = np.asarray(image)[..., None]
        if values.max(initial=0) > 65535:
            raise BadImage(f"has values up to {values.max()}; 8 or 16 bits are supported")
        return values.clip(0).astype(np.uint16)
    if raw == GREY_ALPHA:
        high_low = _loaded_as(reopen(), "RGBA")
        return _combined(high_low[..., ::2], high_low[..., 1::2])
    order = NATIVE if raw[-1] == "N" else raw[-1]
    return _combined(np.asarray(image), _loaded_as(reopen(), raw[:-1] + ("B" if order == "L" else "L")))


def colours(values: UInt16[np.ndarray, "h w c"]) -> UInt16[np.ndarray, "h w _"]:
    """Returns the values without alpha."""
    return values[..., : 3 if values.shape[2] > 2 else 1]


def to_eight_bits(values: UInt16[np.ndarray, "h w c"], bits: int) -> Image.Image:
    """Returns the upper 8 of `bits` bits, in PIL's mode L, LA, RGB or RGBA. Overwrites `values`. Larger values become
    white, logged once unless they are SATURATED. Alpha has `bits` bits if they suffice for all its values, else 16."""
    shown = colours(values)
    if shown.max(initial=0) >= 2**bits and shown.max(initial=0, where=shown < SATURATED) >= 2**bits:
        _warn_once(bits)
    shifts = np.full(values.shape[2], bits - 8, np.uint16)
    if values.shape[2] in (2, 4) and values[..., -1].max(initial=0) >= 2**bits:
        shifts[-1] = 8
    values >>= shifts
    eight = np.minimum(values, 255, out=values).astype(np.uint8)
    return Image.fromarray(eight[..., 0] if eight.shape[2] == 1 else eight)


@functools.cache
def _warn_once(bits: int) -> None:
    log.warning("warning: a 16-bit image has values above %d bits, which become white; set data.bits", bits)


def _combined(high: UInt8[np.ndarray, "h w c"], low: UInt8[np.ndarray, "h w c"]) -> UInt16[np.ndarray, "h w c"]:
    values = high.astype(np.uint16)
    values <<= 8  # in place
    values |= low
    return values


def _raw_mode(image: Image.Image) -> str:
    """Returns PIL's raw mode, the layout of the pixels' bytes; empty if unknown."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _loaded_as(image: Image.Image, raw: str) -> np.ndarray:
    arguments = [raw if isinstance(tile.args, str) else (raw, *tile.args[1:]) for tile in image.tile]
    image.tile = [tile._replace(args=args) for tile, args in zip(image.tile, arguments, strict=True)]
    return np.asarray(image)


class Values(NamedTuple):
    """Statistics of one 16-bit image."""

    below: Int64[np.ndarray, " 17"]  # number of values below 2^k, for k from 0 to 16, without SATURATED ones
    largest: int  # largest value that is not SATURATED; 0 without one
    saturated: int  # number of SATURATED values

    @classmethod
    def of(cls, values: UInt16[np.ndarray, "h w c"]) -> "Values":
        """Returns the statistics of these values."""
        saturated = np.count_nonzero(values == SATURATED)
        below = np.array([np.count_nonzero(values < 2**k) for k in range(16)] + [values.size - saturated])
        return cls(below, int(values.max(initial=0, where=values < SATURATED)), saturated)


class Range(NamedTuple):
    """The range of a sample of 16-bit images."""

    images: list[Values]
    largest: int  # largest value; SATURATED ones are ignored if they are fewer than 1 % and the others need fewer bits
    bits: int  # smallest of RANGES that contains `largest`

    def lines(self, configured: int | None) -> list[tuple[str, bool]]:
        """Returns log lines about images of this range, or of `configured` bits, each with whether it is a warning."""
        bits, number = configured or self.bits, len(self.images)
        line = f"16-bit images: values up to {self.largest} in a sample of {number}, a range of {self.bits} bits"
        if configured and (self.bits > bits or self.bits <= bits - DARK):
            effect = "cut off at white" if self.bits > bits else "too dark"
            found = f"data.bits is {bits} (your option, or found in the training images), so images are {effect}"
            return [(f"{line}, but {found}; convert them or set data.bits", True)]
        doubts = []
        saturated = sum(image.saturated for image in self.images)
        if not configured and saturated and self.largest != SATURATED:
            doubts.append(
                f"{saturated} values of 16-bit images are {SATURATED}, like saturated or missing pixels, and the others at "
                f"most {self.largest}: white is {2**self.bits - 1}; if {SATURATED} is a measured value, set data.bits 16"
            )
        below = np.sum([image.below for image in self.images], axis=0)
        needed = int(np.argmax(below >= SHARE * below[-1]))
        if not configured and below[-1] and self.bits > RANGES[0] and needed <= self.bits - DARK:
            doubts.append(
                f"{SHARE:.0%} of the values of 16-bit images, except {SATURATED}, are below {2**needed}: images are dark in "
                f"a range of {self.bits} bits; if larger values are outliers, set data.bits {_smallest(2**needed - 1)}"
            )
        dark = [image.largest for image in self.images if image.largest and _smallest(image.largest) <= bits - DARK]
        if dark:
            doubts.append(
                f"{len(dark)} of {number} 16-bit images have values of at most {max(dark)} and are nearly black "
                f"in a range of {bits} bits; if they use another range than the others, convert all images to the same one"
            )
        return [(line, False), *((doubt, True) for doubt in doubts)]


def find_range(found: list[Values]) -> Range | None:
    """Returns the range of these images; None without images."""
    if not found:
        return None
    largest = max(image.largest for image in found)
    saturated, others = sum(image.saturated for image in found), sum(int(image.below[-1]) for image in found)
    few = saturated < (1 - SHARE) * (saturated + others)
    if saturated and not (few and _smallest(largest) < 16):
        largest = SATURATED
    return Range(found, largest, _smallest(largest))


def _smallest(value: int) -> int:
    return next(bits for bits in RANGES if value < 2**bits)
