"""JPEGs that lack data in their middle, as far as a decoder can show it.

libjpeg fills what it misses with grey. It only writes a warning to the standard error, which names no file and which PIL
does not pass on. Two things show without it:

- The decoder reads on where it should have ended. Bytes put in front of the next marker are skipped if the image is
  complete, and change pixels if blocks are missing.
- Restart markers are numbered 0 to 7 in turns, so a missing one breaks the order.

With 2 to 15 % of the data cut out, 59 of 60 baseline files are found, 57 of 60 with restart markers and 42 of 60
progressive ones; of 254 intact photographs of COCO none is reported. If the decoder happens to find as many blocks as it
needs, or a scan of a progressive file is missing altogether, nothing shows.
"""

from __future__ import annotations

import io
import itertools
import re

from PIL import Image

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
