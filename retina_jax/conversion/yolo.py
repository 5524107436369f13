"""YOLO: one text file per image, a line per box: class, centre x, centre y, width, height as fractions of the image. The
classes, and the splits, are in a YAML file. Images without a text file have no objects, as Ultralytics reads them."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from retina_jax.config import ConfigError
from retina_jax.conversion.annotated import (
    SPLITS,
    Annotated,
    Box,
    Corners,
    Files,
    Picture,
    Reading,
    around,
    by_stem,
    class_name,
    files_below,
    is_image,
    number,
    read_bytes,
    read_lines,
    split_of,
)
from retina_jax.data.classes import unique_names
from retina_jax.data.coco_entries import short
from retina_jax.data.image_paths import SUFFIXES
from retina_jax.data.source import DataError
from retina_jax.errors import reason

NAMES = ("classes.txt", "obj.names", "names.txt")
OTHERS = {*NAMES, "labels.txt", "train.txt", "val.txt", "test.txt"}  # text files that hold no boxes
Names = dict[int, str]
KEYPOINTS = "[keypoints, 2 or 3 numbers of each]"
FEWEST_LINES, MARGIN = 5, 0.01
"""Lines, and fraction of the image, for `LongLines`."""
LARGEST_FRACTION = 1.5
"""What is partly outside the image may exceed 1; pixels, and the flags of keypoints (2), exceed this."""


@dataclass
class LongLines:
    """What the lines with more numbers than a box are. `keypoints` is `kpt_shape`: how many keypoints follow a box, and how
    many numbers each has; () if the lines are polygons. None: it is not given, and they are read as polygons, but `check`
    refuses the dataset if most lines of one length look like a box with keypoints."""

    keypoints: tuple[int, ...] | None
    lines: Counter[int] = field(default_factory=Counter)  # by their number of numbers
    alike: Counter[int] = field(default_factory=Counter)  # those of them that look like a box with keypoints

    def add(self, numbers: Sequence[float]) -> None:
        """Notes the numbers of a line that was read as a polygon."""
        if self.keypoints is None:
            self.lines[len(numbers)] += 1
            self.alike[len(numbers)] += with_keypoints(numbers[1:])

    def check(self, where: str, how: str) -> None:
        """Raises DataError if most lines of one length look like a box with keypoints. `how` begins the advice."""
        for length, lines in self.lines.items():
            if lines >= FEWEST_LINES and 2 * self.alike[length] >= lines:
                found = (
                    f"{self.alike[length]} of {lines} lines with {length} numbers look like a box with keypoints in it"
                )
                raise DataError(f"{where}: {found}; {how} kpt_shape: {KEYPOINTS}, or 0 if they are polygons")


def with_keypoints(numbers: Sequence[float]) -> bool:
    """Returns whether the numbers after a class look like a box with keypoints, and not like a polygon.

    As a box with keypoints, the box is in the image and all labelled keypoints (not 0 0 or below) are in the box. Each may
    have a flag or a confidence, and one of the box may follow. As a polygon, the second corner would be the box's size: that
    is a strange corner if it is outside the box. Flags, 0 or 1 in each third number, are no corners at all.
    """
    x, y, width, height, *rest = numbers

    def inside(px: float, py: float) -> bool:
        return abs(px - x) <= width / 2 + MARGIN and abs(py - y) <= height / 2 + MARGIN

    if min(x - width / 2, y - height / 2) < -MARGIN or max(x + width / 2, y + height / 2) > 1 + MARGIN:
        return False
    for stride, points in ((2, rest), (3, rest), (3, rest[:-1])):
        thirds = points[2::stride] if stride == 3 else []
        if len(points) % stride or not all(0 <= third <= 1 for third in thirds):
            continue
        labelled = [(px, py) for px, py in zip(points[::stride], points[1::stride], strict=True) if px > 0 or py > 0]
        flagged = stride == 3 and set(thirds) <= {0, 1}
        if labelled and all(inside(*point) for point in labelled) and (flagged or not inside(width, height)):
            return True
    return False


def read_yolo(path: Path, reading: Reading, images: Path | None = None) -> Annotated:
    """Reads a data.yaml, a folder with one, or a folder of text files with the classes in classes.txt or `reading`."""
    file = yaml_in(path)
    if file is None:
        return read_folder(path, reading.classes or listed_names(path), images)
    content = read_yaml(file)
    names = names_of(content, file)
    listed = {
        SPLITS[key]: list({os.path.abspath(image): image for image in images_of(key, content, file)}.values())
        for key in SPLITS
        if content.get(key)
    }
    if not listed:  # supervision writes the names alone
        return read_folder(file.parent, tuple(names.values()), images, keypoints_of(content, file))
    found, long = Annotated([], [], list(names.values())), LongLines(keypoints_of(content, file))
    if listed.get("val") and listed["val"] == listed.get("train"):  # there is no validation set
        found.skipped["images of val, which are those of train"] += len(listed.pop("val"))
    for split, paths in listed.items():
        for image in paths:
            found.pictures.append(picture_of(image, label_file(image), split, names, long))
    long.check(str(file), "add")
    check_labels(found, str(file))
    return found


def yaml_in(path: Path) -> Path | None:
    """Returns the data.yaml that `path` is or has; None for a folder without one."""
    if path.is_file():
        return path
    files = sorted(file for ending in ("yaml", "yml") for file in path.glob(f"*.{ending}"))
    if len(files) > 1 and path / "data.yaml" not in files:
        raise DataError(f"{path}: has several YAML files ({files[0].name}, {files[1].name}); name one of them")
    return path / "data.yaml" if path / "data.yaml" in files else next(iter(files), None)


def pyyaml() -> ModuleType:
    """Returns the package that reads and writes data.yaml, which only this format needs."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise ConfigError("data.yaml needs the package PyYAML; pip install 'retina-jax[convert]'") from None
    return yaml


def read_yaml(file: Path) -> dict[str, Any]:
    """Returns the content of a YAML file."""
    yaml = pyyaml()
    try:
        content = yaml.safe_load(read_bytes(file))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}" if mark else reason(error)
        raise DataError(f"{file}: is not YAML: {place}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: must have the keys names and train, not be {short(content)}")
    return content


def names_of(content: dict[str, Any], file: Path) -> Names:
    """Returns the name of each class id; `names` is a list, or maps ids to names, with gaps or not."""
    names = content.get("names")
    entries = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(entries, dict) or not entries:
        raise DataError(f"{file}: names must be a list of class names, or map ids to names, not {short(names)}")
    try:
        found = {int(number(key, "id")): class_name(name, f"names[{key}]") for key, name in sorted(entries.items())}
    except (ValueError, TypeError) as error:
        raise DataError(f"{file}: names: {reason(error)}") from None
    return dict(zip(found, unique_names(list(found.items())), strict=True))


def keypoints_of(content: dict[str, Any], file: Path) -> tuple[int, ...] | None:
    """Returns `kpt_shape`: how many keypoints a line has and how many numbers each; () for none, None if it is not given."""
    shape = content.get("kpt_shape")
    if not shape:
        return () if "kpt_shape" in content else None
    if (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(n) is int and n > 0 for n in shape)
        and shape[1] in (2, 3)
    ):
        return tuple(shape)
    raise DataError(f"{file}: kpt_shape must be {KEYPOINTS}, not {short(shape)}")


def images_of(key: str, content: dict[str, Any], file: Path) -> Iterator[Path]:
    """Yields the images of a split: of folders, or named by lists in text files. Roboflow writes ../train/images for
    train/images, and a test that it did not export; a `path` of another machine is ignored."""
    root = file.parent / str(content.get("path") or "")
    roots = [root, file.parent] if root.is_dir() else [file.parent]
    for part in content[key] if isinstance(content[key], list) else [content[key]]:
        text = str(part)
        tried = [base / name for base in roots for name in (text, text.removeprefix("../"))]
        place = next((path for path in tried if path.exists()), None)
        if place is None and SPLITS[key] == "test":
            continue
        if place is None:
            raise DataError(f"{file}: {key}: {tried[0]} does not exist; it must be a folder or a list of images")
        if place.is_dir():
            yield from files_below(place, *SUFFIXES)
            continue
        for n, line in enumerate(map(str.strip, read_lines(place)), 1):
            bases = [place.parent] if line.startswith("./") else [*roots, place.parent]
            image = next(filter(is_image, (base / line for base in bases)), None)
            if line and image is None:
                raise DataError(f"{place}: line {n}: no such image: {bases[0] / line}")
            if image is not None:
                yield image


def label_file(image: Path) -> Path:
    """Returns where the boxes of an image are: in labels/ instead of the last images/ of its path, else next to it. If
    there is no such file, returns the first of these places."""
    parts, adjacent = list(image.parts), image.with_suffix(".txt")
    places = [n for n, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
        if (elsewhere := Path(*parts).with_suffix(".txt")).is_file() or not adjacent.is_file():
            return elsewhere
    return adjacent


def listed_names(root: Path) -> tuple[str, ...]:
    """Returns the class names in a text file in the folder of the labels, or above; DataError without one."""
    for file in (base / name for base in (root, root / "labels", root.parent) for name in NAMES):
        if file.is_file():
            return tuple(filter(None, map(str.strip, read_lines(file))))
    raise DataError(f"{root}: the class names are missing; give --classes, or write them into {root / NAMES[0]}")


def read_folder(
    root: Path, names: Sequence[str], images: Path | None, keypoints: tuple[int, ...] | None = None
) -> Annotated:
    """Reads the text files of a folder; the images are in `images`, in images/ next to it, or in it, and have the paths of
    the text files there, or other ones and a stem that no other image has."""
    labels = root / "labels" if (root / "labels").is_dir() else root
    if images is None:
        places = (labels.parent / "images", labels.parent / "JPEGImages", labels)
        images = next((place for place in places if place.is_dir()), labels)
    known = dict(enumerate(unique_names(list(enumerate(names)))))
    found, long = Annotated([], [images], list(known.values())), LongLines(keypoints)
    paths, files = files_below(images, *SUFFIXES), {*files_below(labels, ".txt")}
    stems = Counter(path.stem for path in paths), Counter(file.stem for file in files)
    alone = {file.stem: file for file in files if stems[0][file.stem] == stems[1][file.stem] == 1}
    for image in paths:
        inside = image.relative_to(images).with_suffix(".txt")
        file = labels / inside if labels / inside in files else alone.get(image.stem, labels / inside)
        found.pictures.append(picture_of(image, file, split_of(file.relative_to(labels).as_posix()), known, long))
    long.check(str(labels), f"write {root / 'data.yaml'} with names and")
    check_labels(found, str(labels), files)
    return found


def picture_of(image: Path, labels: Path, split: str, names: Names, long: LongLines) -> Picture:
    """Returns an image with the boxes of its text file, if there is one."""
    boxes, unlabelled = [], not labels.is_file()
    for n, line in enumerate(() if unlabelled else read_lines(labels), 1):
        if words := line.split():
            try:
                boxes.append(read_line(words, names, long))
            except ValueError as error:
                raise DataError(f"{labels}: line {n}: {error}") from None
    place = str(labels)
    return Picture((image.as_posix(),), boxes, (0, 0), split, place, unlabelled=unlabelled, fractions=True, path=image)


def read_line(words: list[str], names: Names, long: LongLines) -> Box:
    """Returns the box of a line: four numbers, or with a confidence or keypoints after them, or those of a polygon."""
    numbers = [number(word, f"number {n}") for n, word in enumerate(words)]
    if numbers[0] not in names:
        listed = ", ".join(map(str, list(names)[:5])) + (", ..." if len(names) > 5 else "")
        raise ValueError(f"class {words[0][:20]} is not in names ({listed})")
    corners: Corners
    more = math.prod(long.keypoints) if long.keypoints else 0
    if len(numbers) - more in (5, 6) or len(numbers) in (5, 6):
        x, y, width, height = numbers[1:5]
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    elif more:
        raise ValueError(
            f"has {len(numbers)} numbers, but must be a class with 4 and, by kpt_shape, {more} of keypoints"
        )
    elif len(numbers) >= 7 and len(numbers) % 2:
        far = max(numbers[1:], key=lambda value: abs(value - 0.5))
        if abs(far - 0.5) > LARGEST_FRACTION - 0.5:
            kinds = "a polygon has fractions of the image; keypoints need names and kpt_shape in a data.yaml"
            raise ValueError(f"has the coordinate {far:g}, but {kinds}")
        long.add(numbers)
        corners = around(zip(numbers[1::2], numbers[2::2], strict=True))
    else:
        kinds = "a class with 4 numbers (a box), 5 (with confidence) or pairs (a polygon)"
        raise ValueError(f"has {len(numbers)} numbers, but must be {kinds}; keypoints need kpt_shape in the YAML file")
    return Box(names[int(numbers[0])], corners)


def check_labels(found: Annotated, where: str, files: set[Path] | None = None) -> None:
    """Raises DataError if there is no image, if no image of a split has a text file (of test only without other splits), or
    if most boxes are in pixels; counts text files without an image."""
    used = {Path(picture.place) for picture in found.pictures}
    if not used:
        raise DataError(f"{where}: has no images; name their folder with --images DIR")
    for split in found.splits:
        pictures = found.split(split)
        if all(picture.unlabelled for picture in pictures) and (split != "test" or found.splits == ["test"]):
            expected = min(picture.place for picture in pictures)
            raise DataError(f"{where}: no image of split {split} has a file of labels; expected for example {expected}")
    corners = [(max(map(abs, box.corners)), picture.place) for picture in found.pictures for box in picture.boxes]
    large = [(number, place) for number, place in corners if number > LARGEST_FRACTION]
    if 2 * len(large) > len(corners):
        number, place = large[0]
        message = f"{place}: has a corner at {number:g}, and most boxes have such numbers"
        raise DataError(f"{message}; they must be fractions of the image, not pixels")
    files = files or {file for folder in {path.parent for path in used} for file in folder.glob("*.txt")}
    if alone := sorted(file for file in files - used if file.name not in OTHERS):
        found.skipped[f"text files without an image ({alone[0].name})"] += len(alone)


def write_yolo(pictures: list[Picture], classes: list[str]) -> Files:
    """Returns data.yaml and a text file per image."""
    ids, files = {name: k for k, name in enumerate(classes)}, {}
    for path, picture in by_stem(pictures, "labels/{split}/{stem}.txt"):
        width, height = picture.size
        lines = []
        for label, (x1, y1, x2, y2), _ in picture.boxes:
            fractions = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(" ".join([str(ids[label]), *(f"{value:.10g}" for value in fractions)]) + "\n")
        files[path] = "".join(lines).encode()
    described = {split: f"images/{split}" for split in dict.fromkeys(picture.split for picture in pictures)}
    described |= {"names": dict(enumerate(classes))}
    return files | {"data.yaml": pyyaml().safe_dump(described, allow_unicode=True, sort_keys=False).encode()}
