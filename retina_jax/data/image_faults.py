"""Images that decode to one colour, wholly or nearly: too long a range, a damaged file, a covered lens."""

from __future__ import annotations

import io
import itertools
import logging
import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8
from PIL import Image

log = logging.getLogger(__name__)
NAMED = 5
"""Images that are named when they are met; all are counted."""

GRID = 64
"""Rows and columns that are looked at, at most, evenly spread."""
NO_BOXES = np.zeros((0, 4), np.float32)
LEVELS, SHARE = 2, 0.999
"""An image has one colour if, in each channel, at least this share of its pixels is within so many of 255 levels of the
median."""


def is_one_colour(
    image: UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"], boxes_xyxy: Float32[np.ndarray, "n 4"] = NO_BOXES
) -> bool:
    """Whether the pixels (0 to 255) are of one colour, as far as a grid of GRID x GRID of them shows, and another such grid
    in each box and the pixels next to it."""
    if not _is_flat(image):
        return False
    starts = np.maximum(np.floor(boxes_xyxy[:, :2]).astype(int) - 1, 0).tolist()
    ends = np.ceil(boxes_xyxy[:, 2:]).astype(int) + 1
    return all(_is_flat(image[y1:y2, x1:x2]) for (x1, y1), (x2, y2) in zip(starts, ends.tolist(), strict=True))


def _is_flat(image: UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"]) -> bool:
    height, width = image.shape[:2]
    grid = image[:: -(-height // GRID), :: -(-width // GRID)].astype(np.uint8).reshape(-1, image.shape[2])
    for values in grid.T:  # A histogram is ten times as fast as a median.
        upto = np.cumsum(np.bincount(values, minlength=256))
        median = int(np.searchsorted(upto, len(values) / 2))
        below = upto[median - LEVELS - 1] if median > LEVELS else 0
        if upto[min(median + LEVELS, 255)] - below < SHARE * len(values):
            return False
    return True


class OneColourImages:
    """Names of the images of a data set that came out with one colour. Each image is looked at once."""

    def __init__(self, where: Callable[[int], str], images: int) -> None:
        self._where = where
        self._seen = np.zeros(images, bool)
        self.names: list[str] = []

    def look(
        self,
        images: UInt8[np.ndarray, "b H W 3"] | Float32[np.ndarray, "b H W 3"],
        sizes_hw: Int32[np.ndarray, "b 2"],
        boxes_xyxy: Float32[np.ndarray, "b G 4"],
        indices: Int64[np.ndarray, " b"],
        valid: Bool[np.ndarray, " b"],
    ) -> None:
        """Adds the images of a batch, with boxes as in `Batch`, that have one colour, and logs the first NAMED of them."""
        for row in np.flatnonzero(valid & ~self._seen[indices]).tolist():
            index, (height, width) = int(indices[row]), sizes_hw[row]
            if self._seen[index]:
                continue
            self._seen[index] = True
            boxes = boxes_xyxy[row]
            if is_one_colour(images[row, :height, :width], boxes[boxes[:, 2] > boxes[:, 0]]):
                self.names.append(self._where(index))
                if len(self.names) <= NAMED:
                    log.warning("one colour, wholly or nearly: %s", self.names[-1])


# JPEGs that lack data in their middle, as far as a decoder can show it.
#
# libjpeg fills what it misses with grey. It only writes a warning to the standard error, which names no file and which PIL
# does not pass on. Two things show without it:
#
# - The decoder reads on where it should have ended. Bytes put in front of the next marker are skipped if the image is
#   complete, and change pixels if blocks are missing.
# - Restart markers are numbered 0 to 7 in turns, so a missing one breaks the order.
#
# With 2 to 15 % of the data cut out, 59 of 60 baseline files are found, 57 of 60 with restart markers and 42 of 60
# progressive ones; of 254 intact photographs of COCO none is reported. If the decoder happens to find as many blocks as it
# needs, or a scan of a progressive file is missing altogether, nothing shows.

FILLER = bytes(range(1, 255))
"""Bytes that no marker begins in."""
SCAN_END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""A marker that ends the data of a scan: no escaped byte and no restart."""
RESTART = re.compile(rb"\xff([\xd0-\xd7])")
START_OF_SCAN, END = 0xDA, 0xD9


def missing_part(encoded: bytes) -> str:
    """What is missing in a JPEG that can be decoded; empty where nothing is, or the file is no JPEG."""
    ends = []
    at = 2 if encoded.startswith(b"\xff\xd8") else len(encoded)
    while encoded[at : at + 1] == b"\xff" and (marker := encoded[at + 1]) != END:
        at += 1 if marker == 0xFF else 2 + int.from_bytes(encoded[at + 2 : at + 4])
        if marker == START_OF_SCAN and (end := SCAN_END.search(encoded, at)):
            restarts = [number[0] - 0xD0 for number in RESTART.findall(encoded, at, end.start())]
            if restarts != [i % 8 for i in range(len(restarts))]:
                return "a part is missing: its restart markers are out of order"
            at = end.start()
            ends.append(at)
    filled = FILLER.join(encoded[start:end] for start, end in itertools.pairwise([0, *ends, len(encoded)]))
    # A block's mean is enough, unless a scan that refines it could be the one that lacks data.
    if ends and _pixels(encoded, means=len(ends) == 1) != _pixels(filled, means=len(ends) == 1):
        return "a part is missing: it ends before its last row"
    return ""


def _pixels(encoded: bytes, means: bool) -> bytes:
    image = Image.open(io.BytesIO(encoded), formats=["JPEG"])
    if means:
        image.draft("L", (1, 1))  # One pixel per block: a quarter of the time.
    return image.tobytes()
