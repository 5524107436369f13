"""Finds images of one colour (a wrong range, a damaged file, a covered lens) and JPEGs with missing data."""

from __future__ import annotations

import io
import itertools
import re

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

GRID = 64  # largest number of rows and columns that are checked, evenly spread
NO_BOXES = np.zeros((0, 4), np.float32)
# An image has one colour if at least SHARE of its pixels are within LEVELS (of 255) of the median, in each channel.
LEVELS, SHARE = 2, 0.999
FILLER = bytes(range(1, 255))  # bytes in which no marker begins
SCAN_END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # ends the data of a scan: neither an escaped byte nor a restart
RESTART = re.compile(rb"\xff([\xd0-\xd7])")
START_OF_SCAN, END = 0xDA, 0xD9


def is_one_colour(
    image: UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"], boxes_xyxy: Float32[np.ndarray, "n 4"] = NO_BOXES
) -> bool:
    """Whether the pixels (0 to 255) have one colour: a grid of the image, and one of each box and a pixel around it."""
    if not _is_flat(image):
        return False
    starts = np.maximum(np.floor(boxes_xyxy[:, :2]).astype(int) - 1, 0).tolist()
    ends = np.ceil(boxes_xyxy[:, 2:]).astype(int) + 1
    return all(_is_flat(image[y1:y2, x1:x2]) for (x1, y1), (x2, y2) in zip(starts, ends.tolist(), strict=True))


def _is_flat(image: UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"]) -> bool:
    height, width = image.shape[:2]
    grid = image[:: -(-height // GRID), :: -(-width // GRID)].astype(np.uint8).reshape(-1, image.shape[2])
    for values in grid.T:  # a histogram is ten times as fast as a median
        upto = np.cumsum(np.bincount(values, minlength=256))
        median = int(np.searchsorted(upto, len(values) / 2))
        below = upto[median - LEVELS - 1] if median > LEVELS else 0
        if upto[min(median + LEVELS, 255)] - below < SHARE * len(values):
            return False
    return True


def missing_part(encoded: bytes) -> str:
    """Describes what is missing in a JPEG that can be decoded; empty for complete files and other formats.

    libjpeg fills missing blocks with grey. Two things show it. Bytes inserted before the next marker are skipped if the
    image is complete, but change pixels if blocks are missing. Restart markers are numbered 0 to 7 in turn, so a missing
    one breaks the order. With 2 to 15 % of the data cut out, this finds 59 of 60 baseline files, 57 of 60 with restart
    markers and 42 of 60 progressive ones, and none of 254 intact photographs of COCO.
    """
    ends = []
    at = 2 if encoded.startswith(b"\xff\xd8") else len(encoded)
    while encoded[at : at + 1] == b"\xff" and (marker := encoded[at + 1]) != END:
        at += 1 if marker == 0xFF else 2 + int.from_bytes(encoded[at + 2 : at + 4])
        if marker == START_OF_SCAN and (end := SCAN_END.search(encoded, at)):
            restarts = [number[0] - 0xD0 for number in RESTART.findall(encoded, at, end.start())]
            if restarts != [i % 8 for i in range(len(restarts))]:
                return "data are missing: its restart markers are out of order"
            at = end.start()
            ends.append(at)
    filled = FILLER.join(encoded[start:end] for start, end in itertools.pairwise([0, *ends, len(encoded)]))

    def pixels(encoded: bytes) -> bytes:
        image = Image.open(io.BytesIO(encoded), formats=["JPEG"])
        # The mean of a block, in a quarter of the time, is enough unless the data are missing in a scan that refines it.
        if len(ends) == 1:
            image.draft("L", (1, 1))
        return image.tobytes()

    return "data are missing: it ends before its last row" if ends and pixels(encoded) != pixels(filled) else ""
