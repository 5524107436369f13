"""Converts annotations of other tools to the COCO JSON that training reads, and back.

python scripts/convert_data.py --annotations FILE_OR_FOLDER --out DIR [--images DIR] [--split 0.8] [--to yolo]

Reads Pascal VOC, YOLO, CSV (of keras-retinanet and DeepForest), LabelMe, Label Studio, CVAT for images and COCO JSON, and
recognises which of them it is. Writes a file per split (train.json, val.json, test.json), reports counts per split and
class, and prints the commands that check the data and train on it. The images stay where they are.
docs/annotation_formats.md lists the conventions of each format.
"""

from __future__ import annotations

import retina_jax.interrupts  # noqa: F401  handles signals during the imports below

# isort: split

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from retina_jax.cli import one_line_errors, parse_command_line
from retina_jax.config import ConfigError
from retina_jax.console import log, warn
from retina_jax.conversion import formats
from retina_jax.conversion.annotated import Annotated, Reading
from retina_jax.conversion.formats import Format
from retina_jax.conversion.locating import (
    common_folder,
    complete_sizes,
    leakage,
    locate,
    merge_repeated,
    report_unused,
    split_by_content,
)
from retina_jax.conversion.output import check_inputs_kept, commands, images_in, summary, write_folder
from retina_jax.data.classes import similar_names
from retina_jax.data.coco_document import load_json
from retina_jax.errors import shortened


@dataclass(frozen=True)
class Arguments:
    """Options of this script."""

    annotations: Path
    """File or folder of annotations; a folder or a YAML file may hold several splits."""
    out: Path
    """Folder for the converted files; created if it is missing."""
    images: Path | None = None
    """Folder of the images; None: searched next to the annotations."""
    val_annotations: Path | None = None
    """Annotations of the validation images, if they are in another file or folder."""
    test_annotations: Path | None = None
    """Annotations of the test images, if they are in another file or folder."""
    format: Format | None = None
    """Format of the annotations; None: recognised by their content."""
    to: Format = "coco"
    """Format to write. csv is the form of keras-retinanet, csv-header that of DeepForest."""
    split: float | None = None
    """Share of the images to train on; the others become the validation set, by a hash of the image files."""
    classes: tuple[str, ...] = ()
    """Class names in the order of their ids; needed for YOLO text files without classes.txt. Empty: those of the files."""
    voc_one_based: bool = False
    """Pascal VOC: pixels count from 1, as in the challenge's own files; 1 is subtracted from xmin and ymin."""
    difficult: Literal["ignore", "objects"] = "ignore"
    """Pascal VOC: difficult objects are crowds, neither trained on nor scored, or objects like the others."""
    orientation: Literal["turned", "stored"] = "turned"
    """YOLO, CSV: pixels that the boxes of photographs with an EXIF orientation are on, as image viewers show them or not."""
    copy_images: bool = False
    """Output in YOLO or VOC: copy the images instead of linking to them."""


def main() -> None:
    """Reads, splits, writes, and reports."""
    arguments = parse_command_line(Arguments, Arguments(tyro.MISSING, tyro.MISSING), sys.argv[1:], __doc__)
    if arguments.split is not None and not 0 < arguments.split < 1:
        raise ConfigError(f"--split {arguments.split:g}: must be between 0 and 1, for example 0.8")
    reading = Reading(arguments.voc_one_based, arguments.difficult, arguments.classes)
    found = read_all(arguments, reading)
    complete_sizes(found.pictures, arguments.orientation)
    classes = formats.classes_of(found, arguments.classes)
    folder = common_folder(found.pictures, arguments.images)
    report_unused(folder, found.pictures)
    if found.document is None:
        merge_repeated(found)
    if arguments.split is not None:
        if "val" in found.splits or "train" not in found.splits:
            raise ConfigError(f"--split: the annotations have the splits {', '.join(found.splits)} already")
        split_by_content(found.split("train"), arguments.split)
    files = formats.write(found, classes, arguments.to, reading, arguments.out)
    inputs = (arguments.annotations, arguments.val_annotations, arguments.test_annotations)
    check_inputs_kept(arguments.out, files, found, filter(None, inputs))
    write_folder(arguments.out, files, images_in(arguments.to, found.pictures), arguments.copy_images)
    for what, count in found.skipped.items():
        warn(f"left out: {count} {what}")
    log(f"{len(classes)} classes: {', '.join(map(shortened, classes))}\n{summary(found, classes)}")
    for split in found.splits:
        if not any(picture.boxes for picture in found.split(split)):
            result = "there is nothing to train on" if split == "train" else "AP cannot be computed"
            warn(f"{split}: no boxes: {result}")
    for names in similar_names(classes):
        warn(f"classes {names} differ only in case or spaces; each is a separate class")
    leaks = leakage(found)
    for (first, second), names in leaks.items():
        warn(
            f"images of {second} that are in {first} too: {len(names)}, such as {names[0]}; scores on them are too high"
        )
    if len(found.splits) > 1 and not leaks:
        log(f"no image file is in two of {', '.join(found.splits)}")
    log(f"images: {folder}\nwritten: {arguments.out} ({arguments.to})")
    if arguments.to == "coco" and "train" in found.splits:
        log(commands(arguments.out, found.splits, folder))


def read_all(arguments: Arguments, reading: Reading) -> Annotated:
    """Reads the annotations of all splits, and locates their images."""
    parts = {"train": arguments.annotations, "val": arguments.val_annotations, "test": arguments.test_annotations}
    found = Annotated([], [])
    for split, path in parts.items():
        if path is None:
            continue
        format = arguments.format or formats.recognise(path)
        log(f"reading {path} ({format}) ...")
        part = formats.read(path, format, reading, arguments.images)
        locate(part, arguments.images)
        if split != "train" or arguments.val_annotations or arguments.test_annotations:
            for picture in part.pictures:
                picture.split = split
        if format == arguments.to == "coco":
            if arguments.split is None:
                raise ConfigError(f"--annotations {path}: is COCO JSON already; --split splits it, --to converts it")
            part.document = load_json(path)
        found.pictures += part.pictures
        found.classes += [name for name in part.classes if name not in found.classes]
        found.skipped += part.skipped
        found.document = part.document
    return found


if __name__ == "__main__":
    with one_line_errors():
        main()
