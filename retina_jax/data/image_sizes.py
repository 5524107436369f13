"""Sizes of images whose annotations have none: read from the headers of the files, once, and kept in a cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from retina_jax.console import log
from retina_jax.data.conventions import Orientation
from retina_jax.data.decoding import FORMATS, MAX_PIXELS, read_header
from retina_jax.data.reading import open_file
from retina_jax.errors import reason

THREADS = 16
"""Headers read at once: most of the time is spent waiting for the files."""
MANY = 2000
"""Files that take long enough for a line to be printed before."""


class Size(NamedTuple):
    """Of an image as stored."""

    width: int
    height: int
    turned: bool
    """Whether its EXIF orientation swaps width and height."""

    def shown(self, orientation: Orientation) -> tuple[int, int]:
        """Width and height of the pixels that boxes lie on."""
        swapped = self.turned and orientation == "turned"
        return (self.height, self.width) if swapped else (self.width, self.height)


def read_sizes(annotations: Path, paths: Sequence[str]) -> list[Size | str]:
    """The size of each image, or why it cannot be read, one line.

    Sizes are kept in ~/.cache/retina_jax, in a file for each file of annotations, by the image's path, its length and its
    time of change.
    """
    cache = Path.home() / ".cache" / "retina_jax" / "image_sizes"
    digest = hashlib.sha256(str(annotations.absolute()).encode(errors="surrogatepass")).hexdigest()
    path = cache / f"{digest[:24]}.json"
    known = _load(path)
    stamps = {name: _stamp(name) for name in paths}
    unread = [name for name in stamps if known.get(name, [None])[0] != stamps[name] or stamps[name] is None]
    if len(unread) >= MANY:
        log(f"reading the sizes of {len(unread)} images, which their annotations lack ...")
    with ThreadPoolExecutor(THREADS) as pool:
        read = dict(zip(unread, pool.map(_read_size, unread), strict=True))
    fresh = {name: [stamps[name], *size] for name, size in read.items() if isinstance(size, Size)}
    sizes = {name: Size(*entry[1:]) for name, entry in (known | fresh).items()} | read
    if fresh:
        _save(path, {name: entry for name, entry in (known | fresh).items() if name in stamps})
    return [sizes[name] for name in paths]


def _read_size(path: str) -> Size | str:
    try:
        with open_file(Path(path)) as file:
            header = read_header(Image.open(file, formats=FORMATS))
    except UnidentifiedImageError:
        return f"it is not an image in one of the formats {', '.join(FORMATS)}"
    except Exception as error:  # a broken header can make PIL raise nearly anything
        return reason(error)
    width, height = header.size
    if not 0 < width * height <= MAX_PIXELS:
        return f"it has {width} x {height} pixels"
    return Size(width, height, header.orientation >= 5)


def _stamp(path: str) -> list[int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def _load(path: Path) -> dict[str, list]:
    """The entries of the cache, path to [[bytes, time of change], width, height, turned]; none where it is damaged."""
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    sound = isinstance(entries, dict) and all(isinstance(e, list) and len(e) == 4 for e in entries.values())
    return entries if sound else {}


def _save(path: Path, entries: dict[str, list]) -> None:
    """A cache that cannot be written costs the time of reading the sizes again, nothing else."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        unfinished.write_text(json.dumps(entries))
        unfinished.replace(path)
