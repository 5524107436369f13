"""LabelMe: one JSON file per image. Every shape with an area is read as the box around it."""

import os
from math import dist
from pathlib import Path

import msgspec

from retina_jax.conversion.annotated import (
    Annotated,
    Box,
    Corners,
    Files,
    Picture,
    around,
    by_stem,
    class_name,
    files_below,
    is_image,
    read_json,
    split_of,
)
from retina_jax.data.coco_entries import Number, Side, Text
from retina_jax.data.source import DataError

WITHOUT_BOX = ("point", "points", "line", "linestrip")


class Shape(msgspec.Struct):
    """A shape; files of old versions lack the type of polygons."""

    label: str
    points: list[tuple[Number, Number]]
    shape_type: str | None = "polygon"


class LabelMeFile(msgspec.Struct):
    """The fields that are read; imageData, the embedded image, is skipped."""

    shapes: list[Shape]
    imagePath: Text
    imageWidth: Side | None = None
    imageHeight: Side | None = None


def read_labelme(root: Path) -> Annotated:
    """Reads a file, or all JSON files of a folder."""
    folder = root if root.is_dir() else root.parent
    files = files_below(root, ".json") if root.is_dir() else [root]
    found = Annotated([], [folder, folder.parent / "images", folder.parent / "JPEGImages", folder.parent])
    for file in files:
        content = read_json(file, LabelMeFile, "LabelMe JSON")
        boxes = []
        for n, shape in enumerate(content.shapes):
            kind = shape.shape_type or "polygon"
            if kind in WITHOUT_BOX:
                found.skipped[f"{kind} shapes"] += 1
                continue
            try:
                boxes.append(Box(class_name(shape.label, "label"), corners_of_points(kind, shape.points)))
            except ValueError as error:
                raise DataError(f"{file}: shapes[{n}] ({kind}): {error}") from None
        stem = file.relative_to(folder).with_suffix("").as_posix()
        own = stem + (Path(content.imagePath).suffix or ".jpg")
        size = content.imageWidth or 0, content.imageHeight or 0
        image = file.parent / content.imagePath.replace("\\", "/")
        path = image if is_image(image) else None
        found.pictures.append(Picture((content.imagePath, own), boxes, size, split_of(own), str(file), path=path))
    return found


def corners_of_points(kind: str, points: list[tuple[float, float]]) -> Corners:
    """Returns the box around a shape. A circle has its centre and a point of its edge, a mask its first and last pixel."""
    needed = {"circle": 2, "mask": 2}.get(kind, 0)
    if len(points) < max(2, needed) or (needed and len(points) != needed):
        raise ValueError(f"has {len(points)} points; {needed or 'at least 2'} are needed")
    if kind == "circle":
        (x, y), radius = points[0], dist(*points)
        return x - radius, y - radius, x + radius, y + radius
    x1, y1, x2, y2 = around(points)
    return (x1, y1, x2 + 1, y2 + 1) if kind == "mask" else (x1, y1, x2, y2)


def write_labelme(pictures: list[Picture], out: Path) -> Files:
    """Returns one file per image, in a folder per split; `imagePath` leads from the file in `out` to the image."""
    files: Files = {}
    for path, picture in by_stem(pictures, "{split}/{stem}.json"):
        image = os.path.relpath(picture.path, (out / path).parent) if picture.path else picture.name
        shapes = [
            {"label": label, "points": [[x1, y1], [x2, y2]], "group_id": None, "shape_type": "rectangle", "flags": {}}
            for label, (x1, y1, x2, y2), _ in picture.boxes
        ]
        width, height = picture.size
        content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image, "imageData": None}
        files[path] = msgspec.json.encode(content | {"imageHeight": height, "imageWidth": width})
    return files
