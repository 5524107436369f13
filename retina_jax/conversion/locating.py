"""Finds the image files of annotations and their sizes, and makes a validation set by the content of the images."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from retina_jax.config import ConfigError
from retina_jax.console import cores, log, track, warn
from retina_jax.conversion.annotated import Annotated, Picture, files_below
from retina_jax.data.decoding import MAX_PIXELS, largest_file
from retina_jax.data.image_paths import SUFFIXES, find_images
from retina_jax.data.reading import read_again, read_file
from retina_jax.data.source import BadImage, DataError, Orientation
from retina_jax.data.survey import read_headers
from retina_jax.errors import quoted, reason, shortened


def locate(found: Annotated, images: Path | None) -> None:
    """Sets the paths of the images, which are in `images` or in the most fitting of the folders that the reader proposes.
    DataError if none is found; images that are missing are counted in a warning, and keep their names."""
    if images is not None and not images.is_dir():
        raise ConfigError(f"--images {images}: no such folder")
    lost = [picture for picture in found.pictures if picture.path is None or (images and not picture.fractions)]
    folders = [images] if images else [folder for folder in dict.fromkeys(found.folders) if folder.is_dir()]
    places: dict[int, Path] = {}
    for folder in folders:
        here = find_in(folder, lost)
        places = here if len(here) > len(places) else places
        if len(places) == len(lost):
            break
    for row, path in places.items():
        lost[row].path = path
    missing = [picture for picture in lost if picture.path is None]
    if missing:
        searched = ", ".join(map(str, folders)) or "any folder"
        first = f"{quoted(missing[0].name)} ({missing[0].place})"
        advice = f"{len(missing)} of {len(found.pictures)} images are not in {searched}, such as {first}"
        if len(missing) == len(found.pictures):
            raise DataError(f"{advice}; name their folder with --images DIR")
        warn(advice)
    renamed = [p for p in lost if p.path and p.path.suffix.lower() not in {Path(n).suffix.lower() for n in p.names}]
    if renamed:
        first = f"{renamed[0].path} for {renamed[0].name}"
        warn(f"images with another suffix than in the annotations: {len(renamed)}, such as {first}")


def report_unused(folder: Path, pictures: Iterable[Picture]) -> None:
    """Logs how many images of a folder have no annotations, which may be an oversight: they are not trained on."""
    used = {os.path.abspath(picture.path) for picture in pictures if picture.path}
    unused = [path for path in files_below(folder, *SUFFIXES) if os.path.abspath(path) not in used]
    if unused:
        example = shortened(unused[0].name)
        log(f"images in {folder} without annotations, which are not used: {len(unused)}, such as {example}")


def find_in(folder: Path, pictures: Sequence[Picture]) -> dict[int, Path]:
    """Returns the rows of the images that are below a folder, with their paths. The first name that leads to a file
    decides (`find_images`), at last with any suffix of an image."""
    places: dict[int, Path] = {}
    for rank in range(max((len(picture.names) for picture in pictures), default=0)):
        rows = [row for row, p in enumerate(pictures) if row not in places and len(p.names) > rank]
        here = find_images(folder, [pictures[row].names[rank] for row in rows])
        places |= {row: Path(here.paths[k]) for k, row in enumerate(rows) if k not in here.missing}
    if len(places) < len(pictures):
        stems: dict[str, set[Path]] = defaultdict(set)
        for path in files_below(folder, *SUFFIXES):
            inside = path.relative_to(folder).with_suffix("")
            for key in (inside.as_posix().casefold(), inside.name.casefold()):
                stems[key].add(path)
        for row, picture in enumerate(pictures):
            names = [Path(name.replace("\\", "/")).with_suffix("") for name in picture.names if row not in places]
            keys = [key.casefold() for name in names for key in (name.as_posix(), name.name)]
            if path := next((path for key in keys if len(stems[key]) == 1 for path in stems[key]), None):
                places[row] = path
    users = Counter(path for path, _ in {(path, pictures[row].names) for row, path in places.items()})
    return {row: path for row, path in places.items() if users[path] == 1}


def common_folder(pictures: Iterable[Picture], images: Path | None) -> Path:
    """Makes the names of the images relative to one folder, which is returned: `images`, or the deepest that has all."""
    located = [(picture, os.path.abspath(picture.path)) for picture in pictures if picture.path]
    folder = os.path.commonpath([os.path.dirname(path) for _, path in located]) if located else os.curdir
    if images is not None and all(path.startswith(os.path.join(os.path.abspath(images), "")) for _, path in located):
        folder = os.path.abspath(images)
    for picture, path in located:
        picture.names = (Path(os.path.relpath(path, folder)).as_posix(),)
    shown = os.path.relpath(folder)
    return Path(folder if shown.startswith(os.pardir) else shown)


def merge_repeated(found: Annotated) -> None:
    """Merges the entries of one image in one split, which formats with a file per image cannot keep apart."""
    kept: dict[tuple[str, str, bool], Picture] = {}
    merged = []
    for picture in found.pictures:
        first = kept.setdefault((picture.split, picture.name, picture.path is None), picture)
        if first is picture:
            continue
        if first.size != picture.size:
            sizes = " and ".join("{}x{} ({})".format(*each.size, each.place) for each in (first, picture))
            raise DataError(f"{quoted(picture.name)} has two sizes, {sizes}; correct one of them")
        first.boxes += picture.boxes
        merged.append(picture)
    if merged:
        warn(f"entries of images that have another entry, merged: {len(merged)}, such as {merged[0].place}")
    found.pictures = list(kept.values())


def complete_sizes(pictures: Iterable[Picture], orientation: Orientation) -> None:
    """Reads the sizes that the annotations lack from the image files, and converts boxes in fractions to pixels."""
    unsized = [picture for picture in pictures if not all(picture.size)]
    if absent := [picture for picture in unsized if picture.path is None]:
        raise DataError(
            f"{absent[0].place}: {quoted(absent[0].name)} is not found, and its size is not in the annotations"
        )
    headers = read_headers([picture.path for picture in unsized if picture.path])
    for picture, header in zip(unsized, headers, strict=True):
        if isinstance(header, str):
            raise DataError(f"{picture.path}: its size cannot be read: {header}")
        picture.size = width, height = header.sizes[orientation]
        if picture.fractions:
            scale = (width, height, width, height)
            scaled = [tuple(x * side for x, side in zip(box.corners, scale, strict=True)) for box in picture.boxes]
            picture.boxes = [box._replace(corners=c) for box, c in zip(picture.boxes, scaled, strict=True)]
            picture.fractions = False


def digests_of(pictures: Sequence[Picture]) -> dict[str, str]:
    """Returns the SHA-256 of the files of images, by name. Raises BadImage for one that cannot be read."""

    def digest(picture: Picture) -> str:
        path = picture.path
        if path is None:
            raise BadImage(f"{picture.place}: {quoted(picture.name)} is not found; its content decides its split")
        try:
            return hashlib.sha256(read_again(lambda: read_file(path, largest_file(MAX_PIXELS)), str(path))).hexdigest()
        except OSError as error:
            raise BadImage(f"{path}: cannot be read: {reason(error)}") from None

    with ThreadPoolExecutor(cores()) as pool:
        hashed = list(track("hashing images", pool.map(digest, pictures), len(pictures)))
    return {picture.name: value for picture, value in zip(pictures, hashed, strict=True)}


def split_by_content(pictures: Sequence[Picture], share: float) -> None:
    """Moves images to val, by the SHA-256 of their files: those whose first 64 bits, as a fraction, are `share` or more. An
    image stays on its side on every machine, in any order, and when others are added; equal files are on one side.
    Raises ConfigError if a side would be empty, with a share that works."""
    places = {name: int(digest[:16], 16) / 2**64 for name, digest in digests_of(pictures).items()}
    for picture in pictures:
        picture.split = "train" if places[picture.name] < share else "val"
    sides = Counter(picture.split for picture in pictures)
    if len(sides) < 2:
        values = sorted(set(places.values()))
        if len(values) < 2:
            raise ConfigError(f"--split: {len(pictures)} images with one content cannot be split")
        works = (values[0] + values[1]) / 2 if share <= values[0] else (values[-2] + values[-1]) / 2
        empty = "train" if sides["val"] else "val"
        raise ConfigError(
            f"--split {share:g}: {empty} would be empty; use {works:.6g} for these {len(pictures)} images"
        )


def leakage(found: Annotated) -> dict[tuple[str, str], list[str]]:
    """Returns, for each pair of splits, the images of the second whose files have the content of one of the first. Files
    whose length is in one split only are not read."""
    lengths: dict[int, set[str]] = defaultdict(set)
    sized = [(picture, picture.path.stat().st_size) for picture in found.pictures if picture.path]
    for picture, length in sized:
        lengths[length].add(picture.split)
    digests = digests_of([picture for picture, length in sized if len(lengths[length]) > 1])
    contents = {name: {digests[p.name] for p in found.split(name) if p.name in digests} for name in found.splits}
    pairs = [(first, second) for k, first in enumerate(found.splits) for second in found.splits[k + 1 :]]
    shared = {
        (first, second): [p.name for p in found.split(second) if digests.get(p.name) in contents[first]]
        for first, second in pairs
    }
    return {pair: names for pair, names in shared.items() if names}
