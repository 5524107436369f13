"""The formats: which one files have, and their reading and writing."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from retina_jax.config import ConfigError
from retina_jax.console import log, warn
from retina_jax.conversion import csv_rows, cvat, label_studio, labelme, voc, yolo
from retina_jax.conversion.annotated import Annotated, Box, Files, Picture, Reading, class_name, read_bytes
from retina_jax.data.classes import unique_names
from retina_jax.data.coco_document import load_json, parse_document
from retina_jax.data.coco_entries import CocoFile, as_number
from retina_jax.data.source import DataError
from retina_jax.errors import quoted, shortened

Format = Literal["coco", "voc", "yolo", "csv", "csv-header", "labelme", "labelstudio", "cvat"]
SUFFIXES = ("xml", "json", "txt", "csv")
DECIMALS = 6  # of pixels in COCO JSON
KEPT_CROWDS = ("coco", "voc")  # formats that mark crowds


def recognise(path: Path) -> Format:
    """Returns the format of a file or folder, by its content; ConfigError if it is none of them."""
    if not path.exists():
        raise ConfigError(f"--annotations {path}: no such file or folder")
    sample = path if path.is_file() else sample_of(path)
    if sample is not None:
        kind = sample.suffix.lower()
        if kind in (".yaml", ".yml", ".txt"):
            return "yolo"
        if kind == ".csv":
            return "csv"
        if kind == ".xml":
            return "cvat" if b"<annotations" in read_bytes(sample)[:1000] else "voc"
        if kind == ".json" and (found := kind_of_json(read_bytes(sample))):
            return found
    raise ConfigError(f"--annotations {path}: no known format was recognised; name it with --format")


def sample_of(folder: Path) -> Path | None:
    """Returns a file that shows the format of a folder: a YAML file in it, else the first annotation file below it."""
    for pattern in ("*.y*ml", "Annotations/*.xml", "*.xml", "*.json", "*.csv", *(f"**/*.{s}" for s in SUFFIXES)):
        if files := [file for file in folder.glob(pattern) if not file.name.startswith(".")]:
            return min(files)
    return None


def kind_of_json(content: bytes) -> Format | None:
    """Returns the format of a JSON file; None if it is none."""
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return "labelstudio"
    return "labelme" if b'"shapes"' in content else "coco" if b'"images"' in content else None


def read(path: Path, format: Format, reading: Reading, images: Path | None) -> Annotated:
    """Reads annotations; DataError or ConfigError for what cannot be read."""
    readers: dict[str, Callable[[], Annotated]] = {
        "coco": lambda: read_coco_json(path),
        "voc": lambda: voc.read_voc(path, reading),
        "yolo": lambda: yolo.read_yolo(path, reading, images),
        "csv": lambda: csv_rows.read_csv(path),
        "csv-header": lambda: csv_rows.read_csv(path),
        "labelme": lambda: labelme.read_labelme(path),
        "labelstudio": lambda: label_studio.read_label_studio(path),
        "cvat": lambda: cvat.read_cvat(path),
    }
    if path.is_dir() and format in ("coco", "csv", "csv-header", "labelstudio"):
        raise ConfigError(f"--annotations {path}: name the file; {format} is one file per split")
    found = readers[format]()
    if not found.pictures:
        raise DataError(f"{path}: has no annotated images in the format {format}; --format names another")
    return found


def read_coco_json(path: Path) -> Annotated:
    """Reads a COCO JSON as training does; annotations without a box are left out and counted."""
    content = parse_document(path, load_json(path, CocoFile))
    for (category_id, name), why in content.left_out.items():
        log(f"{path}: category {shortened(name)} ({category_id}) is left out: {why}")
    for note in content.notes:
        warn(f"{path}: {note.text}")
    names = unique_names(content.categories)
    pictures = [
        Picture((name,), [], (width, height), place=f"{path}: image id {image_id}", image_id=image_id)
        for image_id, name, width, height in content.images
    ]
    columns = content.owners, content.labels, content.boxes_xyxy, content.crowd
    for owner, label, corners, crowd in zip(*(column.tolist() for column in columns), strict=True):
        pictures[owner].boxes.append(Box(names[label], tuple(corners), crowd))
    found = Annotated(pictures, [path.parent / "images", path.parent, path.parent.parent / "images"], list(names))
    if content.without_box:
        found.skipped["annotations without a box"] += len(content.without_box)
    return found


def classes_of(found: Annotated, classes: Sequence[str]) -> list[str]:
    """Returns the classes in order: `classes`, of which no box may have another one, else those that the files list, with
    the others by name."""
    places = {box.label: picture.place for picture in found.pictures for box in picture.boxes}
    if not classes:
        listed = found.classes + sorted(places.keys() - set(found.classes))
        if not listed:
            raise DataError(f"{found.pictures[0].place}: no box, and no list of classes in the files; give --classes")
        return listed
    try:
        for name in classes:
            class_name(name)
    except ValueError as error:
        raise ConfigError(f"--classes: {error}") from None
    if others := sorted(places.keys() - set(classes)):
        raise DataError(f"{places[others[0]]}: class {quoted(others[0])} is not in --classes")
    return list(dict.fromkeys(classes))


def write(found: Annotated, classes: list[str], to: Format, reading: Reading, out: Path) -> Files:
    """Returns the files of a format, by their paths in `out`."""
    pictures = found.pictures
    if to not in KEPT_CROWDS and (crowds := sum(box.crowd for picture in pictures for box in picture.boxes)):
        warn(f"{crowds} crowds are left out: {to} cannot mark them")
        pictures = [without_crowds(picture) for picture in pictures]
    document = found.document
    writers: Mapping[str, Callable[[], Files]] = {
        "coco": lambda: write_coco(found, classes) if document is None else partition(found, document),
        "voc": lambda: voc.write_voc(pictures, reading),
        "yolo": lambda: yolo.write_yolo(pictures, classes),
        "csv": lambda: csv_rows.write_csv(pictures, header=False),
        "csv-header": lambda: csv_rows.write_csv(pictures, header=True),
        "labelme": lambda: labelme.write_labelme(pictures, out),
        "labelstudio": lambda: label_studio.write_label_studio(pictures, classes),
        "cvat": lambda: cvat.write_cvat(pictures, classes),
    }
    return writers[to]()


def without_crowds(picture: Picture) -> Picture:
    """Returns the image without its crowds."""
    boxes = [box for box in picture.boxes if not box.crowd]
    return Picture(picture.names, boxes, picture.size, picture.split, picture.place, path=picture.path)


def write_coco(found: Annotated, classes: list[str]) -> Files:
    """Returns a COCO JSON per split; ids count from 1, those of the classes in their order."""
    ids = {name: k for k, name in enumerate(classes, 1)}
    files: Files = {}
    for split in found.splits:
        images, annotations = [], []
        for image_id, picture in enumerate(found.split(split), 1):
            width, height = picture.size
            images.append({"id": image_id, "file_name": picture.name, "width": width, "height": height})
            for label, (x1, y1, x2, y2), crowd in picture.boxes:
                bbox = [round(number, DECIMALS) for number in (x1, y1, x2 - x1, y2 - y1)]
                entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[label], "bbox": bbox}
                annotations.append(entry | {"area": abs(bbox[2] * bbox[3]), "iscrowd": int(crowd)})
        categories = [{"id": k, "name": name} for name, k in ids.items()]
        document = {"images": images, "annotations": annotations, "categories": categories}
        files[f"{split}.json"] = msgspec.json.encode(document) + b"\n"
    return files


def partition(found: Annotated, document: dict[str, Any]) -> Files:
    """Returns a COCO JSON per split with the entries of `document` as they are, but for the names of the images."""
    files: Files = {}
    for split in found.splits:
        names = {picture.image_id: picture.name for picture in found.split(split)}
        images = [
            entry | {"file_name": names[i]} for entry in document["images"] if (i := as_number(entry["id"])) in names
        ]
        annotations = [entry for entry in document["annotations"] if as_number(entry["image_id"]) in names]
        files[f"{split}.json"] = msgspec.json.encode(document | {"images": images, "annotations": annotations}) + b"\n"
    return files
