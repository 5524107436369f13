"""Label Studio: one JSON file of tasks, coordinates in percent, boxes rotated about their upper left corner."""

import posixpath
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import msgspec

from retina_jax.conversion.annotated import (
    Annotated,
    Box,
    Corners,
    Files,
    Picture,
    around,
    around_rotated,
    class_name,
    is_image_name,
    number,
    read_json,
    side,
    xml_text,
)
from retina_jax.data.image_paths import PREFIX, SUFFIXES
from retina_jax.data.source import DataError, Size

LABELS = ("rectanglelabels", "polygonlabels", "ellipselabels", "labels")
CONFIG = """<View>
  <Image name="image" value="$image"/>
  <RectangleLabels name="label" toName="image">
{labels}
  </RectangleLabels>
</View>
"""


class Region(msgspec.Struct):
    """A region, or another result of a task."""

    type: str = ""
    value: dict[str, Any] = {}
    original_width: float | None = None
    original_height: float | None = None
    image_rotation: float | None = None


class Annotation(msgspec.Struct):
    """The work of one annotator on a task."""

    result: list[Region] = []
    was_cancelled: bool | None = False
    ground_truth: bool | None = False
    id: int | str | None = None
    created_at: str | None = None
    updated_at: str | None = None


class Task(msgspec.Struct):
    """An image; `completions` is the old name of its annotations."""

    data: dict[str, Any]
    annotations: list[Annotation] = []
    completions: list[Annotation] = []


def read_label_studio(path: Path) -> Annotated:
    """Reads an export in the format JSON. Of several annotations of a task that were not cancelled, the ground truth is
    read, else the newest. Tasks without one are left out: whether they have objects is unknown."""
    found = Annotated([], [path.parent / "images", path.parent])
    for n, task in enumerate(read_json(path, list[Task], "Label Studio's JSON (not its JSON-MIN)")):
        done = [each for each in task.annotations or task.completions if not each.was_cancelled]
        if not done:
            found.skipped["tasks without a finished annotation"] += 1
            continue
        if len(done) > 1:
            found.skipped["annotations of which the task has a newer one, or a ground truth"] += len(done) - 1
        chosen = max(done, key=lambda each: (bool(each.ground_truth), each.updated_at or each.created_at or ""))
        place = f"{path}: task {n}"
        try:
            names, (boxes, size) = names_of(task.data), read_regions(chosen.result, found)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
        found.pictures.append(Picture(names, boxes, size, place=place))
    return found


def names_of(data: dict[str, Any]) -> tuple[str, ...]:
    """Returns paths that the image of a task may have: that of its URL, and without what Label Studio adds to a name."""
    texts = [data["image"]] if "image" in data else list(data.values())
    for url in filter(lambda text: isinstance(text, str), texts):
        parts = urlsplit(url)
        name = (parse_qs(parts.query).get("d") or [unquote(parts.path)])[0].lstrip("/")
        if is_image_name(name):
            base = posixpath.basename(name)
            return tuple(dict.fromkeys((class_name(name, "the image"), base, PREFIX.sub("", base))))
    raise ValueError(f"data names no image ({', '.join(SUFFIXES)})")


def read_regions(regions: list[Region], found: Annotated) -> tuple[list[Box], Size]:
    """Returns the boxes around the regions, and the image's size; ValueError names the region."""
    boxes, size = [], (0, 0)
    for n, region in enumerate(regions):
        value = region.value
        names = next((value[key] for key in LABELS if value.get(key)), None)
        if region.image_rotation or names is None or not ({"width", "points", "radiusX"} & value.keys()):
            found.skipped["regions on a rotated image" if region.image_rotation else f"{region.type} results"] += 1
            continue
        try:
            size = side(region.original_width, "original_width"), side(region.original_height, "original_height")
            if not all(size):
                raise ValueError(
                    "original_width or original_height is missing, so that its percent are of unknown pixels"
                )
            names = names if isinstance(names, list) else [names]
            boxes += [Box(class_name(name), corners_of_region(value, size)) for name in names]
        except ValueError as error:
            raise ValueError(f"result {n} ({region.type}): {error}") from None
    return boxes, size


def corners_of_region(value: dict[str, Any], size: Size) -> Corners:
    """Returns the box around a region in pixels."""
    width, height = size[0] / 100, size[1] / 100
    if "points" in value:
        points = value["points"]
        if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
            raise ValueError("points must be a list of pairs")
        return around((number(x, "points") * width, number(y, "points") * height) for x, y in points)
    x, y = number(value.get("x"), "x") * width, number(value.get("y"), "y") * height
    turn = number(value.get("rotation") or 0, "rotation")
    if "radiusX" in value:
        rx, ry = number(value["radiusX"], "radiusX") * width, number(value.get("radiusY"), "radiusY") * height
        return around_rotated((x - rx, y - ry, x + rx, y + ry), turn, (x, y))
    x2, y2 = x + number(value["width"], "width") * width, y + number(value.get("height"), "height") * height
    return around_rotated((x, y, x2, y2), turn, (x, y))


def write_label_studio(pictures: list[Picture], classes: list[str]) -> Files:
    """Returns one file of tasks per split, and the labelling configuration. The images are expected in local storage."""
    tasks: dict[str, list[Any]] = {}
    for picture in pictures:
        width, height = picture.size
        scale = 100 / width, 100 / height
        result = [
            {
                "id": f"{n}", "type": "rectanglelabels", "from_name": "label", "to_name": "image",
                "original_width": width, "original_height": height, "image_rotation": 0,
                "value": {
                    "x": x1 * scale[0], "y": y1 * scale[1], "width": (x2 - x1) * scale[0],
                    "height": (y2 - y1) * scale[1], "rotation": 0, "rectanglelabels": [label],
                },
            }
            for n, (label, (x1, y1, x2, y2), _) in enumerate(picture.boxes)
        ]  # fmt: skip
        data = {"image": f"/data/local-files/?d={quote(picture.name)}"}
        done = {"result": result, "was_cancelled": False, "ground_truth": False}
        listed = tasks.setdefault(picture.split, [])
        listed.append({"id": len(listed) + 1, "data": data, "annotations": [done]})
    labels = "\n".join(f'    <Label value="{escape(xml_text(name))}"/>' for name in classes)
    files = {f"{split}.json": msgspec.json.encode(listed) for split, listed in tasks.items()}
    return files | {"label_config.xml": CONFIG.format(labels=labels).encode()}
