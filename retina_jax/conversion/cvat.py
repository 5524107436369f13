"""CVAT for images 1.1: one XML file. Boxes may be rotated about their centres; subsets are splits."""

from pathlib import Path
from xml.etree.ElementTree import Element

from retina_jax.conversion.annotated import (
    Annotated,
    Box,
    Corners,
    Files,
    Picture,
    around,
    around_rotated,
    child,
    class_name,
    number,
    plain,
    read_xml,
    side,
    split_of,
    to_xml,
)
from retina_jax.data.source import DataError

EDGES = ("xtl", "ytl", "xbr", "ybr")
SUBSETS = {"train": "Train", "val": "Validation", "test": "Test"}
WITHOUT_BOX = ("points", "polyline", "cuboid", "skeleton", "tag")


def read_cvat(path: Path) -> Annotated:
    """Reads a file, or annotations.xml in a folder. A polygon, ellipse or mask is read as the box around it."""
    file = path / "annotations.xml" if path.is_dir() else path
    root = read_xml(file, "annotations", "CVAT for images 1.1")
    if root.find("track") is not None:
        raise DataError(f"{file}: has <track> elements, CVAT for video; export the task as CVAT for images 1.1")
    found = Annotated([], [file.parent / "images", file.parent])
    try:
        for n, label in enumerate(root.iterfind("meta//labels/label"), 1):
            if label.find("parent") is None:  # the others are the points of a skeleton
                found.classes.append(class_name(label.findtext("name"), f"label {n} of meta"))
    except ValueError as error:
        raise DataError(f"{file}: {error}") from None
    found.classes = list(dict.fromkeys(found.classes))
    for n, image in enumerate(root.iterfind("image"), 1):
        try:
            found.pictures.append(read_image(file, n, image, found))
        except ValueError as error:
            raise DataError(f"{file}: image {n} ({image.get('name', 'without name')}): {error}") from None
    return found


def read_image(file: Path, n: int, image: Element, found: Annotated) -> Picture:
    """Reads the n-th image; ValueError says what is wrong."""
    name = class_name(image.get("name"), "name")
    size = side(image.get("width"), "width"), side(image.get("height"), "height")
    boxes = []
    for k, shape in enumerate(image, 1):
        if shape.tag in WITHOUT_BOX:
            found.skipped[f"{shape.tag} shapes"] += 1
            continue
        try:
            boxes.append(Box(class_name(shape.get("label"), "label"), corners_of_shape(shape)))
        except ValueError as error:
            raise ValueError(f"shape {k} ({shape.tag}): {error}") from None
    subset = image.get("subset")
    return Picture((name,), boxes, size, split_of(f"{subset}/") if subset else split_of(name), f"{file}: image {n}")


def corners_of_shape(shape: Element) -> Corners:
    """Returns the box around a shape; ValueError for an unknown one."""

    def numbers(*names: str) -> list[float]:
        return [number(shape.get(name), name) for name in names]

    if shape.tag == "polygon":
        pairs = [pair.split(",") for pair in (shape.get("points") or "").split(";")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("points must be x,y;x,y;...")
        return around((number(x, "x"), number(y, "y")) for x, y in pairs)
    if shape.tag == "box":
        x1, y1, x2, y2 = numbers(*EDGES)
    elif shape.tag == "ellipse":
        x, y, rx, ry = numbers("cx", "cy", "rx", "ry")
        x1, y1, x2, y2 = x - rx, y - ry, x + rx, y + ry
    elif shape.tag == "mask":
        left, top, width, height = numbers("left", "top", "width", "height")
        x1, y1, x2, y2 = left, top, left + width, top + height
    else:
        raise ValueError("is no shape of CVAT for images 1.1")
    turn = number(shape.get("rotation", 0), "rotation")
    return around_rotated((x1, y1, x2, y2), turn, ((x1 + x2) / 2, (y1 + y2) / 2))


def write_cvat(pictures: list[Picture], classes: list[str]) -> Files:
    """Returns annotations.xml, with the splits as subsets if there are several."""
    root = Element("annotations")
    child(root, "version", "1.1")
    labels = child(child(child(root, "meta"), "task"), "labels")
    for name in classes:
        child(child(labels, "label"), "name", name)
    alone = {picture.split for picture in pictures} == {"train"}
    for n, picture in enumerate(pictures):
        width, height = picture.size
        subset = {} if alone else {"subset": SUBSETS[picture.split]}
        image = child(root, "image", id=n, name=picture.name, **subset, width=width, height=height)
        for label, corners, _ in picture.boxes:
            edges = dict(zip(EDGES, map(plain, corners), strict=True))
            child(image, "box", label=label, source="manual", occluded=0, **edges, z_order=0)
    return {"annotations.xml": to_xml(root)}
