"""The range of values that 16-bit images use, found on a sample of a data set, and what makes it doubtful."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt16

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
