"""What the image files of a data set leave open, decided once per data set: which way up they are, and the range of 16 bits.

A file with an EXIF orientation has pixels as stored, and pixels turned as a viewer shows them. Annotations are drawn on one
of the two, and their sizes show on which wherever turning swaps two different sides (orientations 5 to 8). Those images
decide for the others of the data set (orientations 2 to 4, and squares).

A file of 16 bits per value may hold the output of a sensor of 8, 10, 12 or 14 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

Orientation = Literal["stored", "turned"]
RANGES = (8, 10, 12, 14, 16)
"""Bits that a data set of 16-bit files can use."""
OUTLIERS = 0.001
"""Share of the values that may lie far above the others before the range is doubted."""


@dataclass(frozen=True)
class Decoding:
    """How the image files of a data set are decoded where the files and the annotated sizes leave it open."""

    orientation: Orientation = "turned"
    """Pixels that boxes lie on: as stored, or turned as the EXIF orientation says. Only for images whose sides do not show
    it; the others follow their annotated sizes."""
    bits: int | None = None
    """Bits that 16-bit images use: value 2^bits - 1 is white. None: not known, as the data set has no such image; one
    that comes up later is taken as 16."""


class Header(NamedTuple):
    """What an image file shows before its pixels are decoded."""

    size: tuple[int, int]
    """Width and height as stored."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 where there is none."""
    deep: bool
    """Whether it has 16 bits per value."""

    @property
    def turned_size(self) -> tuple[int, int]:
        """Width and height once turned."""
        return self.size[::-1] if self.orientation >= 5 else self.size

    def shown_by(self, annotated: tuple[int, int]) -> Orientation | Literal["open"] | None:
        """Which pixels the annotated (width, height) belongs to; open: to either. None: to neither, or the same pixels."""
        if self.orientation == 1 or annotated not in (self.size, self.turned_size):
            return None
        if self.size == self.turned_size:
            return "open"
        return "stored" if annotated == self.size else "turned"


@dataclass
class Votes:
    """Images of a data set with an EXIF orientation other than 1, by what their annotated sizes show."""

    stored: list[str] = field(default_factory=list)
    turned: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    """Names of the images whose size is the same either way."""

    def add(self, name: str, header: Header, annotated: tuple[int, int]) -> None:
        """Counts an image."""
        shown = header.shown_by(annotated)
        if shown is not None:
            getattr(self, shown).append(name)

    def decide(self, choice: Orientation | Literal["auto"]) -> tuple[Orientation, str, bool]:
        """The convention, one line that explains it (empty: there is nothing to decide), and whether it is in doubt.

        `choice` is data.orientation. With auto the images that show the convention decide, the majority where they differ.
        If there are none, or as many of either, the pixels are turned, as viewers show them. These cases are in doubt, and
        so is a choice that an image contradicts.
        """
        stored, turned, unknown = len(self.stored), len(self.turned), len(self.open)
        found: Orientation = "stored" if stored > turned else "turned"
        if choice != "auto":
            found = choice
        if not stored + turned + unknown:
            return found, "", False
        some = f" ({self.open[0]}{', ...' if unknown > 1 else ''}), read as {found}" if unknown else ""
        line = (
            f"images annotated as stored: {stored}, as turned: {turned}, of the same size either way: {unknown}{some}"
        )
        if stored and turned:
            named = f"{self.stored[0]} is annotated as stored, {self.turned[0]} as turned"
            ask = "; check the boxes of the others, and set data.orientation stored or turned" if unknown else ""
            return found, f"EXIF orientation is mixed: {line}; {named}{ask if choice == 'auto' else ''}", True
        if choice == "auto" and not stored + turned:
            ask = "if their boxes lie on the pixels as stored, set data.orientation stored"
            return found, f"EXIF orientation is undecidable: {line}, as viewers show them; {ask}", True
        against = self.turned if found == "stored" else self.stored
        doubt = f"; {against[0]} is annotated otherwise and follows its own size" if against else ""
        return found, f"EXIF orientation: {line}{doubt}", bool(against)


AS_VIEWERS = Decoding()
"""Turned as the EXIF orientation says; 16-bit images use all bits."""


class Range(NamedTuple):
    """Values of the 16-bit images of a sample."""

    images: int
    largest: int
    bits: int
    """Fewest of RANGES that hold all values."""
    most: int
    """Fewest of RANGES that hold all but OUTLIERS of them."""

    @property
    def doubt(self) -> str:
        """A warning where few values lie far above the others, else empty."""
        if self.bits - self.most < 4:
            return ""
        return (
            f"{1 - OUTLIERS:.1%} of the values of 16-bit images are below {2**self.most}, so images are dark in a range of "
            f"{self.bits} bits; if the others are outliers, set data.bits {self.most}"
        )


def find_range(images: Iterable[np.ndarray]) -> Range | None:
    """The range of the integer values of these images; None where there is no image."""
    number, largest, total = 0, 0, 0
    within = np.zeros(len(RANGES), np.int64)
    for values in images:
        number, total, largest = number + 1, total + values.size, max(largest, int(values.max(initial=0)))
        within += [np.count_nonzero(values < 2**bits) for bits in RANGES]
    if not number:
        return None
    most = RANGES[int(np.argmax(within >= (1 - OUTLIERS) * total))]
    return Range(number, largest, next(bits for bits in RANGES if largest < 2**bits), most)
