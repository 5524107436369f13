"""Reads a COCO dataset, a JSON file of annotations and a folder of images; every entry is checked here and never again."""

import json
from pathlib import Path
from typing import Any, Literal

import msgspec

from retina_jax.data.coco_document import Content, parse_document
from retina_jax.data.coco_entries import CocoFile
from retina_jax.data.decoding import largest_file
from retina_jax.data.reading import read_again, read_file
from retina_jax.data.source import BadImage, DataError, Source
from retina_jax.errors import reason

LARGEST_JSON = 2**33  # bytes of an annotation file; the largest of COCO has half a gigabyte


def read_coco(
    annotations: str | Path,
    images: str | Path,
    *,
    images_without_boxes: Literal["keep", "drop"] = "keep",
    unlabelled: bool = False,
    **options: Any,
) -> Source:
    """Returns the dataset of a COCO JSON file. "drop" (for training) leaves out images without a usable box. With
    `unlabelled`, the key `annotations` may be missing. `options` are those of `parse_document`. Only images without a size
    are opened. Raises DataError for anything in the file that cannot be used, boxes that look as if in another format, and
    no images at all. An absolute `file_name` or one with `..` is not followed, but a file of that base name in `images` is
    used if it is the only one (`find_images`). Symbolic links are followed."""
    path, folder = Path(annotations), Path(images)
    document = load_json(path, CocoFile)
    labelled = not (unlabelled and isinstance(document, dict) and "annotations" not in document)
    if not labelled:
        document["annotations"] = []
    content = parse_document(path, document, folder=folder, **options)
    records, rows, counts = content.make_records(images_without_boxes)
    if content.without_box:
        counts["without_box"] = len(content.without_box)
    paths = [content.paths[row] for row in rows]
    missing = {index: content.missing[row] for index, row in enumerate(rows) if row in content.missing}

    def read(index: int) -> bytes:
        try:
            return read_image(Path(paths[index]), records[index].width, records[index].height)
        except OSError as error:
            place = f"; {missing[index]}" if missing.get(index) else ""
            raise BadImage(f"{paths[index]}: cannot be read: {reason(error)}{place}") from None

    return Source(
        name=str(path),
        records=records,
        categories=content.categories,
        counts=counts,
        read=read,
        where=paths.__getitem__,
        make_ground_truth=content.ground_truth,
        notes=tuple(note.text for note in content.notes),
        missing=missing,
        unsized=frozenset(index for index, row in enumerate(rows) if row in content.unsized),
        labelled=labelled,
        annotated=content.annotated,
        left_out=content.left_out,
    )


def read_image(path: Path, width: int, height: int) -> bytes:
    """Reads the file of an image that has this size in its annotations; raises OSError if it cannot be read."""
    return read_again(lambda: read_file(path, largest_file(width * height)), str(path))


def parse_coco(path: Path, **options: Any) -> Content:
    """Returns the content of a file, every entry checked, without looking for its images; raises as `read_coco` does."""
    return parse_document(path, load_json(path, CocoFile), **options)


def load_json(path: Path, expected: Any = Any) -> Any:
    """Decodes a file as `expected`, else as any JSON value; raises DataError with the line and column of malformed JSON."""
    try:
        encoded = read_file(path, LARGEST_JSON)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}; it must be a COCO JSON") from None
    try:
        return msgspec.json.decode(encoded, type=expected)
    except (ValueError, RecursionError):
        # json reads more (NaN, other encodings), and names the line and column of a mistake.
        try:
            return json.loads(encoded)
        except (ValueError, RecursionError) as error:
            why = reason(error)
            if isinstance(error, json.JSONDecodeError):
                why = f"line {error.lineno}, column {error.colno}: {error.msg}"
            raise DataError(f"{path}: is not JSON: {why}") from None
