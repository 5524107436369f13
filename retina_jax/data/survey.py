"""Reads the headers of all image files of a data set: their sizes, and what decides how they are decoded (`conventions`).

All, because a single image can decide. With 16 threads COCO's take 0.06 to 0.1 ms each from a local disk: ten seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from retina_jax.config import DataConfig
from retina_jax.console import cache_folder, log, warn
from retina_jax.data.conventions import Decoding, Header, Votes
from retina_jax.data.decoding import FORMATS, MAX_PIXELS, largest_file, open_image, read_header
from retina_jax.data.reading import open_file, read_again, read_file
from retina_jax.data.sixteen_bits import Range, Values, colours, find_range, is_deep, samples
from retina_jax.data.source import Source
from retina_jax.errors import reason

SAMPLE = 64  # number of 16-bit images that are decoded to find their range, spread evenly over the data set
MANY = 5_000  # number of images from which on a line is logged before their headers are read
READERS = 16  # threads, which mostly wait for files


@dataclass(frozen=True)
class Survey:
    """What the headers of a data set's image files show."""

    votes: Votes
    range: Range | None  # range of its 16-bit images; None without such images

    def decide(self, data: DataConfig) -> tuple[Decoding, list[tuple[str, bool]]]:
        """How to decode the files, and log lines, each with whether it is a warning."""
        orientation, line, in_doubt = self.votes.decide(data.orientation, data.undecided_orientation)
        lines = [(line, in_doubt)] if line else []
        bits = None if data.bits == "auto" else data.bits
        if self.range is None:
            return Decoding(orientation, bits), lines
        return Decoding(orientation, bits or self.range.bits), lines + self.range.lines(bits)


def with_decoding(source: Source, data: DataConfig) -> Source:
    """Returns the source with the decoding of its images, and logs what decided it."""
    if data.source == "scenes":
        return source
    shown = None
    if data.source == "tfds":
        # Its boxes are relative to the sides as stored, and TensorFlow does not turn images.
        orientation = "stored" if data.orientation == "auto" else data.orientation
        decoding, lines = Survey(Votes(), range_of(source.read, range(len(source)))).decide(
            replace(data, orientation=orientation)
        )
    else:
        names = [record.file_name for record in source.records]
        paths = [Path(source.where(row)) for row in range(len(source))]
        sizes = [(record.width, record.height) for record in source.records]
        survey = survey_files(names, paths, [None if row in source.unsized else size for row, size in enumerate(sizes)])
        decoding, lines = survey.decide(data)
        shown = survey.votes.shown
    for line, in_doubt in lines:
        (warn if in_doubt else log)(f"{source.name}: {line}")
    return replace(source, decoding=decoding, shown=shown)


def decoding_of_files(paths: Sequence[Path], data: DataConfig) -> Decoding:
    """How a detector of this config decodes image files without annotations: turned as in image viewers, unless
    data.orientation is stored; 16-bit images with the range of the training images, or without one their own."""
    orientation = "turned" if data.orientation == "auto" else data.orientation
    found = survey_files([path.name for path in paths], paths, [(0, 0)] * len(paths))
    decoding, lines = found.decide(replace(data, orientation=orientation))
    for line, in_doubt in lines:
        (warn if in_doubt else log)(line)
    return decoding


def survey_files(names: Sequence[str], paths: Sequence[Path], sizes_wh: Sequence[tuple[int, int] | None]) -> Survey:
    """Reads the headers of image files with these annotated sizes (None: without). Unreadable files are left out."""
    votes, deep = read_votes(names, paths, sizes_wh)
    return Survey(votes, range_of(lambda row: read_file(paths[row], largest_file(MAX_PIXELS)), deep))


def read_votes(
    names: Sequence[str], paths: Sequence[Path], sizes_wh: Sequence[tuple[int, int] | None]
) -> tuple[Votes, list[int]]:
    """The orientation that the headers show, and the rows of the 16-bit images; see `survey_files`."""
    votes, deep = Votes(), []
    for row, header in enumerate(read_headers(paths)):
        if isinstance(header, Header) and (shown := header.shown_by(sizes_wh[row])):
            getattr(votes, shown).append(names[row])
        if isinstance(header, Header) and header.deep:
            deep.append(row)
    return votes, deep


def read_headers(paths: Sequence[Path]) -> list[Header | str]:
    """The header of each image file, or in one line why it cannot be read."""
    if len(paths) > MANY:
        log(f"reading the headers of {len(paths)} images ...")

    def read(path: Path) -> Header:
        with open_file(path) as file:
            return read_header(Image.open(file, formats=FORMATS))

    def header_or_reason(path: Path) -> Header | str:
        try:
            header = read_again(partial(read, path), str(path))
        except UnidentifiedImageError:
            return f"it is not an image in one of the formats {', '.join(FORMATS)}"
        except Exception as error:  # PIL raises nearly anything for a broken header
            return reason(error)
        width, height = header.size
        return header if 0 < width * height <= MAX_PIXELS else f"it has {width} x {height} pixels"

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(header_or_reason, paths))


def read_sizes(annotations: Path, paths: Sequence[str]) -> list[Header | str]:
    """`read_headers` of images whose annotations have no size, cached in ~/.cache/retina_jax/image_sizes.

    There is one file per annotation file, with the headers by an image's path, length and time of change.
    """
    digest = hashlib.sha256(str(annotations.absolute()).encode(errors="surrogatepass")).hexdigest()[:24]
    cache, stamps = cache_folder() / "image_sizes" / f"{digest}.json", {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(path)
            stamps[path] = [status.st_size, status.st_mtime_ns]
    known: dict[str, Header] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # missing or damaged
        entries = json.loads(cache.read_bytes())
        known = {
            path: Header((width, height), orientation, deep)
            for path, (stamp, width, height, orientation, deep) in entries.items()
            if stamp == stamps.get(path)
        }
    unread = [path for path in dict.fromkeys(paths) if path not in known]
    found = dict(zip(unread, read_headers([Path(path) for path in unread]), strict=True))
    headers = known | found
    if unread:
        entries = {path: [stamps[path], *headers[path].size, *headers[path][1:]] for path in stamps
                   if isinstance(headers[path], Header)}  # fmt: skip
        with contextlib.suppress(OSError):  # without the cache the headers are read again
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
            temporary.write_text(json.dumps(entries))
            temporary.replace(cache)
    return [headers[path] for path in paths]


def range_of(read: Callable[[int], bytes], rows: Sequence[int]) -> Range | None:
    """The range of the 16-bit images among these rows, without those that cannot be read or decoded.

    Decodes at most SAMPLE of them, evenly spread.
    """
    found, number = [], min(SAMPLE, len(rows))
    for row in (rows[i * len(rows) // number] for i in range(number)):
        with contextlib.suppress(Exception):  # training reports what is wrong with the image
            image = open_image(encoded := read(row))
            if is_deep(image):
                found.append(Values.of(colours(samples(image, partial(open_image, encoded)))))
    return find_range(found)
