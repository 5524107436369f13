"""Decoding choices that image files leave open and that are made once per data set: orientation, and the range of 16 bits.

Annotations of a file with an EXIF orientation belong to the pixels as stored or as turned; their sizes show which if turning
swaps two different sides (orientations 5 to 8). These images decide for the others of the data set (orientations 2 to 4,
and squares). A 16-bit file may contain values of a sensor with 8, 10, 12 or 14 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Orientation = Literal["stored", "turned"]


@dataclass(frozen=True)
class Decoding:
    """How to decode the image files of a data set if the files and the annotated sizes leave it open."""

    # Pixels that boxes lie on: stored, or turned by the EXIF orientation. Images follow annotated sizes that show it.
    orientation: Orientation = "turned"
    bits: int | None = None  # that 16-bit images use: 2^bits - 1 is white. None: 16; the data set has no such image


class Header(NamedTuple):
    """Header of an image file."""

    size: tuple[int, int]  # width and height as stored
    orientation: int  # EXIF orientation, 1 to 8; 1 without one
    deep: bool  # whether it has 16 bits per value

    @property
    def turned_size(self) -> tuple[int, int]:
        """Width and height after turning."""
        return self.size[::-1] if self.orientation >= 5 else self.size

    def shown_by(self, annotated: tuple[int, int] | None) -> Orientation | Literal["open"] | None:
        """The pixels of an annotated (width, height). "open": both, or none is given; None: neither, or nothing to turn."""
        if self.orientation == 1 or annotated not in (None, self.size, self.turned_size):
            return None
        if annotated is None or self.size == self.turned_size:
            return "open"
        return "stored" if annotated == self.size else "turned"


@dataclass
class Votes:
    """Names of the images with an EXIF orientation other than 1, by what their annotated sizes show."""

    stored: list[str] = field(default_factory=list)
    turned: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    @property
    def shown(self) -> Orientation | Literal["open"] | None:
        """The majority of stored and turned; without one, "open" if there are open images, else None."""
        if len(self.stored) == len(self.turned):
            return "open" if self.open else None
        return "stored" if len(self.stored) > len(self.turned) else "turned"

    def convention(self, undecided: Orientation) -> Orientation:
        """The convention that the images show; `undecided` if they do not."""
        return undecided if self.shown in ("open", None) else self.shown

    def decide(
        self, choice: Orientation | Literal["auto"], undecided: Orientation = "turned"
    ) -> tuple[Orientation, str, bool]:
        """Returns the convention, a line that explains it (empty: nothing to decide), and whether it is in doubt.

        `choice` is data.orientation; with "auto", the majority of the images decides, and `undecided` without one. It is in
        doubt if images contradict it, and if none decides, unless `undecided` is "stored", as another data set showed.
        """
        stored, turned, unknown = len(self.stored), len(self.turned), len(self.open)
        found = self.convention(undecided) if choice == "auto" else choice
        if not stored + turned + unknown:
            return found, "", False
        some = f" ({self.open[0]}{', ...' if unknown > 1 else ''}), read as {found}" if unknown else ""
        either = f"of the same size either way or without one: {unknown}{some}"
        line = f"images annotated as stored: {stored}, as turned: {turned}, {either}"
        if stored and turned:
            named = f"{self.stored[0]} is annotated as stored, {self.turned[0]} as turned"
            ask = "; check the boxes of the others, and set data.orientation stored or turned" if unknown else ""
            return found, f"EXIF orientation is mixed: {line}; {named}{ask if choice == 'auto' else ''}", True
        if choice == "auto" and not stored + turned:
            if undecided == "stored":
                return found, f"EXIF orientation: {line}, as the other images of the run are", False
            ask = "if their boxes lie on the pixels as stored, set data.orientation stored"
            return found, f"EXIF orientation is undecided: {line}, as image viewers show them; {ask}", True
        against = self.turned if found == "stored" else self.stored
        doubt = f"; {against[0]} is annotated otherwise and follows its own size" if against else ""
        return found, f"EXIF orientation: {line}{doubt}", bool(against)


AS_VIEWERS = Decoding()  # as image viewers: turned by the EXIF orientation; 16-bit images use all bits
