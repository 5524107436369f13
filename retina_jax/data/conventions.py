"""What the image files of a data set leave open, decided once per data set: which way up they are, and the range of 16 bits.

A file with an EXIF orientation has pixels as stored, and pixels turned as a viewer shows them. Annotations are drawn on one
of the two, and their sizes show on which wherever turning swaps two different sides (orientations 5 to 8). Those images
decide for the others of the data set (orientations 2 to 4, and squares).

A file of 16 bits per value may hold the output of a sensor of 8, 10, 12 or 14 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Orientation = Literal["stored", "turned"]


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

    def shown_by(self, annotated: tuple[int, int] | None) -> Orientation | Literal["open"] | None:
        """Which pixels the annotated (width, height) belongs to; open: to either, or there is no annotated size. None: to
        neither, or the same pixels."""
        if self.orientation == 1 or annotated not in (None, self.size, self.turned_size):
            return None
        if annotated is None or self.size == self.turned_size:
            return "open"
        return "stored" if annotated == self.size else "turned"


@dataclass
class Votes:
    """Images of a data set with an EXIF orientation other than 1, by what their annotated sizes show."""

    stored: list[str] = field(default_factory=list)
    turned: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    """Names of the images whose size is the same either way, or not annotated."""

    @property
    def shown(self) -> Orientation | Literal["open"] | None:
        """What most of the images that show the convention show. If there are none, or as many of either: open where there
        are images whose convention is to be decided, None where there are not."""
        if len(self.stored) == len(self.turned):
            return "open" if self.open else None
        return "stored" if len(self.stored) > len(self.turned) else "turned"

    def add(self, name: str, header: Header, annotated: tuple[int, int] | None) -> None:
        """Counts an image."""
        shown = header.shown_by(annotated)
        if shown is not None:
            getattr(self, shown).append(name)

    def convention(self, undecided: Orientation) -> Orientation:
        """What the images show, `undecided` where they do not."""
        return undecided if self.shown in ("open", None) else self.shown

    def decide(
        self, choice: Orientation | Literal["auto"], undecided: Orientation = "turned"
    ) -> tuple[Orientation, str, bool]:
        """The convention, one line that explains it (empty: there is nothing to decide), and whether it is in doubt.

        `choice` is data.orientation. With auto the images that show the convention decide, the majority where they differ.
        If there are none, or as many of either, it is `undecided`. These cases are in doubt, unless `undecided` is stored,
        which another data set has shown; so is a choice that an image contradicts.
        """
        stored, turned, unknown = len(self.stored), len(self.turned), len(self.open)
        found = self.convention(undecided) if choice == "auto" else choice
        if not stored + turned + unknown:
            return found, "", False
        some = f" ({self.open[0]}{', ...' if unknown > 1 else ''}), read as {found}" if unknown else ""
        line = (
            f"images annotated as stored: {stored}, as turned: {turned}, of the same size either way or without one: "
            f"{unknown}{some}"
        )
        if stored and turned:
            named = f"{self.stored[0]} is annotated as stored, {self.turned[0]} as turned"
            ask = "; check the boxes of the others, and set data.orientation stored or turned" if unknown else ""
            return found, f"EXIF orientation is mixed: {line}; {named}{ask if choice == 'auto' else ''}", True
        if choice == "auto" and not stored + turned:
            if undecided == "stored":
                return found, f"EXIF orientation: {line}, as the other images of the run are", False
            ask = "if their boxes lie on the pixels as stored, set data.orientation stored"
            return found, f"EXIF orientation is undecidable: {line}, as viewers show them; {ask}", True
        against = self.turned if found == "stored" else self.stored
        doubt = f"; {against[0]} is annotated otherwise and follows its own size" if against else ""
        return found, f"EXIF orientation: {line}{doubt}", bool(against)


AS_VIEWERS = Decoding()
"""Turned as the EXIF orientation says; 16-bit images use all bits."""
