"""Reads the headers of all image files of a dataset: sizes, and how to decode what the files leave open. Annotations of a
file with an EXIF orientation belong to the pixels as stored or as turned; their sizes show which if turning swaps two
different sides (orientations 5 to 8). These images, if only one, decide for the others (orientations 2 to 4, and squares).
A 16-bit file may contain values of a sensor with 8, 10, 12 or 14 bits. COCO's headers take ten seconds."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError

from retina_jax.config import DataConfig
from retina_jax.console import cache_folder, log, warn
from retina_jax.data.decoding import FORMATS, MAX_PIXELS, Header, largest_file, open_image, read_header
from retina_jax.data.reading import open_file, read_again, read_file
from retina_jax.data.sixteen_bits import Range, Values, colours, find_range, is_deep, samples
from retina_jax.data.source import Decoding, Orientation, Size, Source
from retina_jax.errors import reason

SAMPLE = 64  # number of 16-bit images that are decoded to find their range, spread evenly over the dataset
ANNOUNCED = 5_000  # number of images from which on a line is logged before their headers are read
READERS = 16  # threads, which mostly wait for files


@dataclass
class Votes:
    """Names of the images with an EXIF orientation other than 1, by the convention that their annotated sizes show."""

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
        """Returns the convention that the images show; `undecided` if they do not."""
        return undecided if self.shown in ("open", None) else self.shown

    def decide(self, choice: Orientation | Literal["auto"], undecided: Orientation) -> tuple[Orientation, str, bool]:
        """Returns the convention, a line that explains it (empty: nothing to decide), and whether it is in doubt. `choice`
        is data.orientation; with "auto", the majority of the images decides, and `undecided` without one. It is in doubt if
        images contradict it, and if none decides, unless `undecided` is "stored", as another dataset showed."""
        stored, turned, unknown = len(self.stored), len(self.turned), len(self.open)
        found = self.convention(undecided) if choice == "auto" else choice
        if not stored + turned + unknown:
            return found, "", False
        some = f" ({self.open[0]}{', ...' if unknown > 1 else ''}), read as {found}" if unknown else ""
        line = f"images annotated as stored: {stored}, as turned: {turned}, of a size that fits both or without one: "
        line += f"{unknown}{some}"
        if stored and turned:
            line += f"; {self.stored[0]} is annotated as stored, {self.turned[0]} as turned"
            if unknown and choice == "auto":
                line += "; check the boxes of the others, and set data.orientation stored or turned"
            return found, f"EXIF orientation is mixed: {line}", True
        if choice == "auto" and not stored + turned:
            if undecided == "stored":
                return found, f"EXIF orientation: {line}, as the other images of the run are", False
            line += ", as image viewers show them; if boxes are on the pixels as stored, set data.orientation stored"
            return found, f"EXIF orientation is undecided: {line}", True
        against = self.turned if found == "stored" else self.stored
        doubt = f"; {against[0]} is annotated otherwise and follows its own size" if against else ""
        return found, f"EXIF orientation: {line}{doubt}", bool(against)


@dataclass(frozen=True)
class Survey:
    """Results of reading the headers of a dataset's image files."""

    votes: Votes
    range: Range | None  # range of its 16-bit images; None without such images

    def decide(self, data: DataConfig) -> tuple[Decoding, list[tuple[str, bool]]]:
        """Returns how to decode the files, and log lines, each with whether it is a warning."""
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
    if data.source == "tfds":
        # Its boxes are relative to the sides as stored, and TensorFlow does not turn images.
        data = replace(data, orientation="stored" if data.orientation == "auto" else data.orientation)
        survey = Survey(Votes(), range_of(source.read, range(len(source))))
    else:
        names = [record.file_name for record in source.records]
        paths = [Path(source.where(row)) for row in range(len(source))]
        sizes = [(record.width, record.height) for record in source.records]
        survey = survey_files(names, paths, [None if row in source.unsized else size for row, size in enumerate(sizes)])
    decoding = _decide(survey, data, f"{source.name}: ")
    return replace(source, decoding=decoding, annotated_orientation=survey.votes.shown)


def decoding_of_files(paths: Sequence[Path], data: DataConfig) -> Decoding:
    """Returns how a detector of this config decodes files without annotations, and logs what decided it: turned as in image
    viewers unless data.orientation is stored; 16-bit images have the range of the training images, or else their own."""
    data = replace(data, orientation="turned" if data.orientation == "auto" else data.orientation)
    return _decide(survey_files([path.name for path in paths], paths, [(0, 0)] * len(paths)), data)


def _decide(survey: Survey, data: DataConfig, prefix: str = "") -> Decoding:
    decoding, lines = survey.decide(data)
    for line, in_doubt in lines:
        (warn if in_doubt else log)(prefix + line)
    return decoding


def survey_files(names: Sequence[str], paths: Sequence[Path], sizes_wh: Sequence[Size | None]) -> Survey:
    """Reads the headers of image files with these annotated sizes (None: without). Unreadable files are left out."""
    votes, deep = Votes(), []
    for row, header in enumerate(read_headers(paths)):
        if isinstance(header, str):
            continue
        fitting = header.fitting(sizes_wh[row])
        if header.orientation != 1 and fitting:
            getattr(votes, fitting[0] if len(fitting) == 1 else "open").append(names[row])
        if header.deep:
            deep.append(row)
    return Survey(votes, range_of(lambda row: read_file(paths[row], largest_file(MAX_PIXELS)), deep))


def read_headers(paths: Sequence[Path]) -> list[Header | str]:
    """Returns the header of each image file, or in one line why it cannot be read."""
    if len(paths) > ANNOUNCED:
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

    size = 8  # paths per task of a thread: a task costs as much time as reading one header
    blocks = (paths[start : start + size] for start in range(0, len(paths), size))
    with ThreadPoolExecutor(READERS) as pool:
        return list(chain.from_iterable(pool.map(lambda block: list(map(header_or_reason, block)), blocks)))


def read_sizes(annotations: Path, paths: Sequence[Path]) -> list[Header | str]:
    """Returns `read_headers` of images; cached by path, length and time of change, in one file per annotation file."""
    digest = hashlib.sha256(str(annotations.absolute()).encode(errors="surrogatepass")).hexdigest()[:24]
    cache, stamps = cache_folder() / "image_sizes" / f"{digest}.json", {}
    for path in map(str, paths):
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(path)
            stamps[path] = [status.st_size, status.st_mtime_ns]
    headers: dict[str, Header | str] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):  # missing or damaged
        for path, (stamp, size, *others) in json.loads(cache.read_bytes()).items():
            if stamp == stamps.get(path):
                headers[path] = Header(tuple(map(int, size)), *others)
    if unread := [path for path in dict.fromkeys(map(str, paths)) if path not in headers]:
        headers |= zip(unread, read_headers(list(map(Path, unread))), strict=True)
        entries = {path: [stamps[path], *headers[path]] for path in stamps if isinstance(headers[path], Header)}
        with contextlib.suppress(OSError):  # without the cache the headers are read again
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
            temporary.write_text(json.dumps(entries))
            temporary.replace(cache)
    return [headers[str(path)] for path in paths]


def range_of(read: Callable[[int], bytes], rows: Sequence[int]) -> Range | None:
    """Returns the range of the 16-bit images among these rows; decodes at most SAMPLE rows, evenly spread, that it can."""
    found, number = [], min(SAMPLE, len(rows))
    for row in (rows[i * len(rows) // number] for i in range(number)):
        with contextlib.suppress(Exception):  # training reports what is wrong with the image
            image = open_image(encoded := read(row))
            if is_deep(image):
                found.append(Values.of(colours(samples(image, partial(open_image, encoded)))))
    return find_range(found)
