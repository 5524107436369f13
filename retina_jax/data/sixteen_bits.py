"""Image files of 16 bits per value, all of them: PIL keeps 16 bits of grey, but only the upper 8 of colours."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8, UInt16
from PIL import Image

from retina_jax.data.source import BadImage

log = logging.getLogger(__name__)
BITS_TAG, PHOTOMETRIC_TAG, CHANNELS_TAG, PLANES_TAG = 258, 262, 277, 284
"""Of a TIFF."""
NATIVE = "L" if sys.byteorder == "little" else "B"
GREY_ALPHA = "LA;16B"
"""How PIL reads 16-bit grey with transparency; taken as four bytes per pixel instead."""
COLOURS = {f"{mode};16{order}" for mode in ("RGB", "RGBA") for order in "LBN"}
"""Raw modes of 16-bit colours, low byte first, high byte first or as the machine has it."""


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is open and not loaded has more than 8 bits per value."""
    coloured = image.format in ("PNG", "TIFF") and _raw_mode(image) in {*COLOURS, GREY_ALPHA}
    deep_tiff = image.format == "TIFF" and image.mode != "F" and 16 in image.tag_v2.get(BITS_TAG, ())
    return image.mode.startswith("I") or coloured or deep_tiff


def samples(image: Image.Image, reopen: Callable[[], Image.Image]) -> UInt16[np.ndarray, "h w c"]:
    """All 16 bits of an image that `is_deep` and is not loaded, oriented as PIL loads it; c: 1 grey, 2 grey and alpha,
    3 RGB, 4 RGB and alpha. Values below 0 become 0.

    `reopen` opens the file once more: PIL reads the upper bytes of colours, and the lower ones if the file's byte order is
    given the other way round. Raises BadImage for values above 65535 and for TIFFs with separate planes or with white as 0,
    and whatever PIL raises.
    """
    raw = _raw_mode(image)
    if image.format == "TIFF":
        _check_layout(image)
    if image.mode.startswith("I"):
        image.load()
        values = np.asarray(image)[..., None]
        if values.max(initial=0) > 65535:
            raise BadImage(f"has values up to {values.max()}; it must have 8 or 16 bits")
        return values.clip(0).astype(np.uint16)
    if raw == GREY_ALPHA:
        image.load()  # for its orientation alone
        high_low = np.asarray(_loaded_as(reopen(), "RGBA"))
        return _combined(high_low[..., ::2], high_low[..., 1::2])
    image.load()
    order = NATIVE if raw[-1] == "N" else raw[-1]
    low = _loaded_as(reopen(), raw[:-1] + ("B" if order == "L" else "L"))
    return _combined(np.asarray(image), np.asarray(low))


def colours(values: UInt16[np.ndarray, "h w c"]) -> UInt16[np.ndarray, "h w _"]:
    """Without alpha."""
    return values[..., : 3 if values.shape[2] > 2 else 1]


def to_eight_bits(values: UInt16[np.ndarray, "h w c"], bits: int) -> Image.Image:
    """The upper 8 of `bits` bits, as PIL's L, LA, RGB or RGBA; larger values become white, which is logged once
    unless they are SATURATED.

    `values` are overwritten. Alpha has 16 bits, or `bits` where none of its values needs more.
    """
    shown = colours(values)
    if shown.max(initial=0) >= 2**bits and shown.max(initial=0, where=shown < SATURATED) >= 2**bits:
        _warn_once(bits)
    shifts = np.full(values.shape[2], bits - 8, np.uint16)
    if values.shape[2] in (2, 4) and values[..., -1].max(initial=0) >= 2**bits:
        shifts[-1] = 8
    values >>= shifts
    eight = np.minimum(values, 255, out=values).astype(np.uint8)
    return Image.fromarray(eight[..., 0] if eight.shape[2] == 1 else eight)


def from_bytes(encoded: bytes, open_image: Callable[[bytes], Image.Image]) -> UInt16[np.ndarray, "h w c"] | None:
    """`samples` of a file; None where it has 8 bits."""
    image = open_image(encoded)
    return samples(image, lambda: open_image(encoded)) if is_deep(image) else None


@functools.cache
def _warn_once(bits: int) -> None:
    log.warning("a 16-bit image has values above the range of %d bits; they are cut off at white; set data.bits", bits)


def _check_layout(image: Image.Image) -> None:
    tags = image.tag_v2
    if tags.get(PLANES_TAG, 1) != 1 and tags.get(CHANNELS_TAG, 1) > 1:
        raise BadImage(
            "is a 16-bit TIFF with separate planes; save it with interleaved channels (planar configuration 1)"
        )
    if tags.get(PHOTOMETRIC_TAG) == 0:
        raise BadImage("is a 16-bit TIFF in which 0 is white; save it with 0 as black (photometric interpretation 1)")
    if not image.mode.startswith("I") and _raw_mode(image) not in {*COLOURS, GREY_ALPHA}:
        raise BadImage(f"is a 16-bit TIFF of a layout that is not supported ({image.mode}); save it as grey or RGB")


def _combined(high: UInt8[np.ndarray, "h w c"], low: UInt8[np.ndarray, "h w c"]) -> UInt16[np.ndarray, "h w c"]:
    values = high.astype(np.uint16)
    values <<= 8
    values |= low
    return values


def _raw_mode(image: Image.Image) -> str:
    """How the bytes of the pixels are laid out, as PIL names it; empty if it does not."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _loaded_as(image: Image.Image, raw: str) -> Image.Image:
    def replaced(arguments: str | tuple) -> str | tuple:
        return raw if isinstance(arguments, str) else (raw, *arguments[1:])

    image.tile = [tile._replace(args=replaced(tile.args)) for tile in image.tile]
    image.load()
    return image


# The range of values that 16-bit images use, found on a sample of a data set, and what makes it doubtful.

RANGES = (8, 10, 12, 14, 16)
"""Bits that a data set of 16-bit files can use."""
SATURATED = 65535
"""What cameras and converters write for saturated and for missing pixels, whatever the range of the others."""
SHARE = 0.99
"""Of the values: fewer than 1 % are taken as outliers."""
DARK = 3
"""Images come out dark where their values need this number of bits less than the range has: below 32 of 255."""


class Values(NamedTuple):
    """Values of one 16-bit image."""

    below: Int64[np.ndarray, " 17"]
    """How many are below 2^k, for k from 0 to 16, without those that are SATURATED."""
    largest: int
    """Of those that are not SATURATED; 0 where there are none."""
    saturated: int
    """How many are SATURATED."""

    @classmethod
    def of(cls, values: UInt16[np.ndarray, "h w c"]) -> Values:
        """Counts them."""
        saturated = np.count_nonzero(values == SATURATED)
        below = np.array([np.count_nonzero(values < 2**k) for k in range(16)] + [values.size - saturated])
        return cls(below, int(values.max(initial=0, where=values < SATURATED)), saturated)


class Range(NamedTuple):
    """The range of the 16-bit images of a sample."""

    images: list[Values]
    largest: int
    """Without values that are SATURATED, if these are fewer than 1 % and the others need fewer bits."""
    bits: int
    """Fewest of RANGES that hold `largest`."""

    def lines(self, configured: int | None) -> list[tuple[str, bool]]:
        """What is logged of images that are decoded with the range, or with the `configured` bits instead: lines, each with
        whether it is a warning."""
        bits = configured or self.bits
        line = f"16-bit images: values up to {self.largest} in {len(self.images)} of them, a range of {self.bits} bits"
        if configured and (self.bits > bits or self.bits <= bits - DARK):
            effect = "cut off at white" if self.bits > bits else "dark"
            set_by = "set, or found in the training images"
            return [(f"{line}, but data.bits is {bits} ({set_by}): images come out {effect}", True)]
        doubts = (
            [self._disagreement(bits)] if configured else [self._excluded(), self._dark(), self._disagreement(bits)]
        )
        return [(line, False), *((doubt, True) for doubt in doubts if doubt)]

    def _excluded(self) -> str:
        saturated = sum(image.saturated for image in self.images)
        if not saturated or self.largest == SATURATED:
            return ""
        return (
            f"{saturated} values of 16-bit images are {SATURATED}, as of saturated or missing pixels, and the others at "
            f"most {self.largest}: white is {2**self.bits - 1}; if they are measured values, set data.bits 16"
        )

    def _dark(self) -> str:
        below = np.sum([image.below for image in self.images], axis=0)
        most = int(np.argmax(below >= SHARE * below[-1]))
        if not below[-1] or self.bits == RANGES[0] or most > self.bits - DARK:
            return ""
        return (
            f"{SHARE:.0%} of the values of 16-bit images, apart from {SATURATED}, are below {2**most}, so images are dark "
            f"in a range of {self.bits} bits; if the others are outliers, set data.bits {_smallest(2**most - 1)}"
        )

    def _disagreement(self, bits: int) -> str:
        dark = [image.largest for image in self.images if image.largest and _smallest(image.largest) <= bits - DARK]
        if not dark:
            return ""
        return (
            f"{len(dark)} of {len(self.images)} 16-bit images have values up to {max(dark)} at most, so they come out "
            f"nearly black in a range of {bits} bits; if they use another range than other images, convert "
            "them to the same one"
        )


def find_range(images: Iterable[UInt16[np.ndarray, "h w c"]]) -> Range | None:
    """The range of these images; None where there is no image."""
    found = [Values.of(values) for values in images]
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
