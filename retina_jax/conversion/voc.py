"""Pascal VOC: one XML file per image. Corners are read as edges, x2 - x1 is the width, as labelImg, CVAT and DeepForest
write them. The challenge's own files count pixels from 1 and include the last one: with `voc_one_based` 1 is subtracted from
the upper left corner, as detectron2 does. A difficult object becomes a crowd, as in mmdetection's converter."""

from pathlib import Path
from xml.etree.ElementTree import Element

from retina_jax.conversion.annotated import (
    Annotated,
    Box,
    Files,
    Picture,
    Reading,
    by_stem,
    child,
    class_name,
    files_below,
    is_image_name,
    number,
    plain,
    read_lines,
    read_xml,
    side,
    split_of,
    to_xml,
)
from retina_jax.data.source import DataError

EDGES = ("xmin", "ymin", "xmax", "ymax")


def read_voc(root: Path, reading: Reading) -> Annotated:
    """Reads a file, a folder of XML files, or a folder with Annotations and ImageSets/Main, whose lists are the splits."""
    home = root.parent if root.is_file() or root.name == "Annotations" else root
    folder = home / "Annotations" if (home / "Annotations").is_dir() else root
    files = [root] if root.is_file() else files_below(folder, ".xml")
    stems = [file.relative_to(folder).with_suffix("").as_posix() if root.is_dir() else file.stem for file in files]
    around = [place / name for place in (home, home.parent) for name in ("JPEGImages", "images", ".")]
    found = Annotated([], around[:-1])
    listed = image_sets(home)
    for file, stem in zip(files, stems, strict=True):
        split = listed.get(stem, "") if listed else split_of(f"{stem}.xml")
        if split:
            found.pictures.append(read_picture(file, stem, split, reading))
        else:
            found.skipped["XML files that no list in ImageSets/Main names"] += 1
    if absent := len(listed.keys() - set(stems)):
        found.skipped["images in ImageSets/Main without an XML file"] += absent
    return found


def image_sets(home: Path) -> dict[str, str]:
    """Returns the split of each stem in ImageSets/Main; empty without such lists."""
    lists = home / "ImageSets" / "Main"
    names = [name for name in ("train", "val", "test") if (lists / f"{name}.txt").is_file()]
    if names in ([], ["test"]) and (lists / "trainval.txt").is_file():
        names.append("trainval")
    found: dict[str, str] = {}
    for name in names:
        for line in filter(str.strip, read_lines(lists / f"{name}.txt")):
            stem, split = line.strip(), "train" if name == "trainval" else name
            if found.setdefault(stem, split) != split:
                raise DataError(f"{lists}: {stem} is in {found[stem]}.txt and in {name}.txt; keep it in one of them")
    return found


def read_picture(file: Path, stem: str, split: str, reading: Reading) -> Picture:
    """Reads one XML file. Its image is that of its stem, as in the challenge; `filename` may be of another machine."""
    root = read_xml(file, "annotation", "Pascal VOC")
    name = (root.findtext("filename") or "").strip()
    suffix = Path(name).suffix if is_image_name(name) else ".jpg"
    try:
        width, height = (side(root.findtext(f"size/{name}"), f"size/{name}") for name in ("width", "height"))
        boxes = [read_object(n, each, reading) for n, each in enumerate(root.findall("object"), 1)]
        class_name(stem + suffix, "the file name")
    except ValueError as error:
        raise DataError(f"{file}: {error}") from None
    names = (stem + suffix, name) if name else (stem + suffix,)
    return Picture(names, boxes, (width, height), split, str(file))


def read_object(n: int, element: Element, reading: Reading) -> Box:
    """Reads the n-th object; ValueError names it. The boxes of its parts (head, hand) are not its box."""
    name = class_name(element.findtext("name"), f"object {n}: name")
    x1, y1, x2, y2 = (number(element.findtext(f"bndbox/{edge}"), f"object {n}: bndbox/{edge}") for edge in EDGES)
    first = int(reading.voc_one_based)
    difficult = (element.findtext("difficult") or "").strip() == "1" and reading.difficult == "ignore"
    return Box(name, (x1 - first, y1 - first, x2, y2), difficult)


def write_voc(pictures: list[Picture], reading: Reading) -> Files:
    """Returns one XML file per image and ImageSets/Main. Coordinates keep their fractions."""
    files: Files = {}
    lists: dict[str, list[str]] = {}
    for path, picture in by_stem(pictures, "Annotations/{stem}.xml"):
        root = Element("annotation")
        child(root, "filename", picture.name)
        size = child(root, "size")
        for tag, value in zip(("width", "height", "depth"), (*picture.size, 3), strict=True):
            child(size, tag, value)
        for label, (x1, y1, x2, y2), crowd in picture.boxes:
            element = child(root, "object")
            child(element, "name", label)
            child(element, "difficult", int(crowd))
            edges, first = child(element, "bndbox"), int(reading.voc_one_based)
            for edge, value in zip(EDGES, (x1 + first, y1 + first, x2, y2), strict=True):
                child(edges, edge, plain(value))
        files[path] = to_xml(root)
        lists.setdefault(picture.split, []).append(path.removeprefix("Annotations/").removesuffix(".xml"))
    return files | {f"ImageSets/Main/{name}.txt": "\n".join([*stems, ""]).encode() for name, stems in lists.items()}
