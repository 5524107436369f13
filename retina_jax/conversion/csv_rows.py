"""CSV: a row per box. keras-retinanet's form has no header: path,x1,y1,x2,y2,class, with path,,,,, for an image without
objects; DeepForest's has one: image_path,xmin,ymin,xmax,ymax,label, with zeros for such an image."""

import csv
import io
from pathlib import Path

from retina_jax.conversion.annotated import (
    Annotated,
    Box,
    Files,
    Picture,
    class_name,
    is_image,
    number,
    plain,
    read_lines,
)
from retina_jax.data.coco_entries import short
from retina_jax.data.source import DataError

COLUMNS = {
    "image": ("image_path", "filename", "file_name", "path", "image"),
    "x1": ("xmin", "x1", "x_min"),
    "y1": ("ymin", "y1", "y_min"),
    "x2": ("xmax", "x2", "x_max"),
    "y2": ("ymax", "y2", "y_max"),
    "label": ("label", "class", "class_name", "name"),
}
HEADER = [names[0] for names in COLUMNS.values()]


def read_csv(path: Path) -> Annotated:
    """Reads a file; the columns of a header may be in any order."""
    lines = read_lines(path)
    first = lines[0] if lines else ""
    delimiter = ";" if first.count(";") >= 5 > first.count(",") else ","
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    found, pictures = Annotated([], [path.parent, path.parent / "images"]), {}
    header = [word.strip().lower() for word in next(csv.reader([first], delimiter=delimiter))] if first else []
    has_header = any(word in header for word in COLUMNS["x1"])
    places = columns_of(header, path) if has_header else dict(zip(COLUMNS, range(6), strict=True))
    try:
        for row in rows:
            if (rows.line_num > 1 or not has_header) and any(row):
                read_row([word.strip() for word in row], places, pictures, path, rows.line_num)
    except (csv.Error, ValueError) as error:
        raise DataError(f"{path}: line {rows.line_num}: {error}") from None
    found.pictures = list(pictures.values())
    return found


def columns_of(header: list[str], path: Path) -> dict[str, int]:
    """Returns the place of each column; DataError for a missing one."""
    places = {
        key: next((header.index(name) for name in names if name in header), None) for key, names in COLUMNS.items()
    }
    if missing := [COLUMNS[key][0] for key, place in places.items() if place is None]:
        raise DataError(f"{path}: line 1: the header has no column {missing[0]}; expected {','.join(HEADER)}")
    return {key: place for key, place in places.items() if place is not None}


def read_row(row: list[str], places: dict[str, int], pictures: dict[str, Picture], path: Path, line: int) -> None:
    """Adds the box of a row to its image."""
    if len(row) <= max(places.values()):
        raise ValueError(f"has {len(row)} columns, but must be path,x1,y1,x2,y2,class, or path,,,,, without objects")
    values = {key: row[place] for key, place in places.items()}
    name = class_name(values["image"], "the path")
    if name not in pictures:
        own = path.parent / name.replace("\\", "/")
        known = own if is_image(own) else None
        pictures[name] = Picture((name,), [], place=f"{path}: line {line}", path=known)
    edges = [values[key] for key in ("x1", "y1", "x2", "y2")]
    if not any([*edges, values["label"]]):
        return
    try:
        x1, y1, x2, y2 = (number(text, key) for key, text in zip(("x1", "y1", "x2", "y2"), edges, strict=True))
    except ValueError:
        raise ValueError(f"x1, y1, x2, y2 must be four numbers, not {short(','.join(edges))}") from None
    if any((x1, y1, x2, y2)):
        pictures[name].boxes.append(Box(class_name(values["label"]), (x1, y1, x2, y2)))


def write_csv(pictures: list[Picture], header: bool) -> Files:
    """Returns one file per split, in DeepForest's form with a header, else in that of keras-retinanet."""
    texts: dict[str, io.StringIO] = {}
    for picture in pictures:
        text = texts.setdefault(picture.split, io.StringIO())
        writer = csv.writer(text, lineterminator="\n")
        if header and not text.tell():
            writer.writerow(HEADER)
        writer.writerows([picture.name, *map(plain, corners), label] for label, corners, _ in picture.boxes)
        if not picture.boxes:
            writer.writerow([picture.name, *([0, 0, 0, 0, ""] if header else [""] * 5)])
    return {f"{split}.csv": text.getvalue().encode() for split, text in texts.items()}
