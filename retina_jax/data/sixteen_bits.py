"""Image files of 16 bits per value, all of them: PIL keeps 16 bits of grey, but only the upper 8 of colours."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image

from retina_jax.data.source import BadImage
from retina_jax.data.value_range import SATURATED

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
