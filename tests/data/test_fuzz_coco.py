"""Any COCO file is read as a simple reference implementation reads it, or refused in one line that names the file."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import assert_named, both_shares, run_cases, test_the_full_shares_are_ten_thousand_cases  # noqa: F401
from hypothesis import strategies as st

from retina_jax.config import DataConfig
from retina_jax.data.datasets import read_coco
from retina_jax.data.source import BadImage, DataError, Source

NAMES = [
    "", ".", "..", "../../etc/passwd", "a/../../b.jpg", "..\\b.jpg", "/etc/passwd", "C:\\b.jpg", "C:b.jpg", "\\\\host\\b",
    "a\0.jpg", "a\nb.jpg", "\x1b[2J", "\u2028", "\ud800.jpg", "\udcff", "é.jpg", "画像.jpg", "\u202e.jpg", "a" * 300,
    "d/" * 3000 + "b.jpg", "...", "..a", "~", "%s", "{}", " ", "sub/one.jpg",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 7, 2**31, 2**53, -(2**53), 2**63, 2**64, 10**30, 10**400, True, False, 0.0, -0.0, 0.5, 1.0, 3.0, 1e-9,
    1e-40, 5e-324, 1e9, 1e10, 1e308, -1e308, math.nan, math.inf, -math.inf,
]  # fmt: skip
VALUES = [None, [], {}, [[]], [1, 2, 3, 4], [None] * 4, {"id": 1}, "1", *NUMBERS, *NAMES]
HOSTILE = st.sampled_from(VALUES).map(copy.deepcopy)
GARBAGE = [
    b"\0",
    b"\xff",
    b"\xff\xfe",
    b"{",
    b"}",
    b"[",
    b",",
    b'"',
    b"\\",
    b"\\ud800",
    b"1" * 5000,
    b"[" * 5000,
    b"NaN",
]
KEYS = ["id", "image_id", "category_id", "bbox", "iscrowd", "area", "width", "height", "file_name", "name", "images"]


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """Returns valid files with boxes anywhere: inside, across the edges, outside, without area, of 1e9 pixels."""
    sides = st.integers(1, 3000) | st.sampled_from([1, 2, 20_000, 10**9])
    images = [
        {
            "id": i,
            "file_name": draw(
                st.sampled_from([*NAMES] if draw(st.integers(0, 15)) == 0 else ["one.jpg", "sub/two.png"])
            ),
            "width": draw(sides),
            "height": draw(sides),
        }
        for i in draw(st.lists(st.integers(-5, 2**40), min_size=1, max_size=3, unique=True))
    ]
    categories = [
        {"id": i, "name": f"class {i}"}
        for i in draw(st.lists(st.integers(-3, 100), min_size=1, max_size=3, unique=True))
    ]
    annotations = []
    for number in range(draw(st.sampled_from([0, 1, 2, 4, 8]))):
        image = draw(st.sampled_from(images))
        width, height = image["width"], image["height"]
        corner = st.integers(-2, min(width, height)) | st.floats(-0.5 * width, 1.5 * width)
        side = (
            st.integers(1, 2 * height) | st.floats(0, 2.0 * height) | st.sampled_from([0, -1, 1e-9, 1e-40, 1e9, width])
        )
        annotation = {
            "id": number + 1,
            "image_id": image["id"],
            "category_id": draw(st.sampled_from(categories))["id"],
            "bbox": [draw(corner), draw(corner), draw(side), draw(side)],
        }
        extra = draw(st.sampled_from([{}, {"iscrowd": 0}, {"iscrowd": 1}, {"area": 4.5, "iscrowd": 0}]))
        annotations.append(annotation | extra)
    return {"images": images, "annotations": annotations, "categories": categories}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Returns every container of the document with each of its keys or indices."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Returns encoded files: valid ones, ones with changed values, and ones with changed bytes."""
    document = draw(documents())
    how = draw(st.sampled_from(["valid", "valid", "values", "values", "bytes"]))
    for _ in range(draw(st.sampled_from([1, 1, 2, 3])) if how == "values" else 0):
        found = places(document)
        container, key = found[draw(st.integers(0, len(found) - 1))]
        change = draw(st.sampled_from(["replace", "replace", "remove", "repeat", "add", "wrap"]))
        if change == "replace":
            # Mostly of the same kind, because a value of another kind is refused early.
            alike = (
                NAMES if isinstance(container[key], str) else NUMBERS if type(container[key]) in (int, float) else []
            )
            container[key] = draw(st.sampled_from(alike)) if alike and draw(st.integers(0, 3)) else draw(HOSTILE)
        elif change == "remove":
            del container[key]
        elif change == "repeat" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif change == "wrap":
            container[key] = [container[key]]
        elif isinstance(container, dict):
            container[draw(st.sampled_from(KEYS))] = draw(HOSTILE)
        if not found or not places(document):
            break
    try:
        text = json.dumps(document, ensure_ascii=draw(st.booleans()))
    except ValueError:  # 10^400 has more digits than Python prints by default.
        text = "[]"
    encoded = text.encode(draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-32-be"])), "surrogatepass")
    for _ in range(draw(st.integers(1, 3)) if how == "bytes" else 0):
        at = draw(st.integers(0, len(encoded)))
        change = draw(st.sampled_from(["cut", "flip", "insert", "drop"]))
        if change == "cut":
            encoded = encoded[:at]
        elif change == "flip":
            encoded = (
                encoded[:at] + bytes([b ^ draw(st.integers(1, 255)) for b in encoded[at : at + 1]]) + encoded[at + 1 :]
            )
        elif change == "insert":
            encoded = encoded[:at] + draw(st.sampled_from(GARBAGE)) + encoded[at:]
        else:
            encoded = encoded[:at] + encoded[at + draw(st.integers(1, 8)) :]
    return encoded


def is_integer(value: Any) -> bool:
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,16}", value, re.ASCII):
        value = int(value)
    return type(value) in (int, float) and value == value and abs(value) < 2**53 and int(value) == value


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e9 <= value <= 1e9


def is_line(value: Any) -> bool:
    forbidden = {*range(32), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0xD800, 0xE000)}
    return isinstance(value, str) and 0 < len(value) <= 4096 and not forbidden & set(map(ord, value))


def box_of(annotation: dict[str, Any]) -> Any:
    """Returns the box in the file, texts as numbers; a box without area if the entry has none, as for a point."""
    box = annotation.get("bbox")
    return [0, 0, 0, 0] if box in (None, []) else list(map(as_number, box)) if isinstance(box, list) else box


def as_number(value: Any) -> Any:
    return float(value) if value == "1" else value  # the only such text among VALUES


def filled(annotation: dict[str, Any], key: str, default: Any) -> Any:
    value = as_number(annotation.get(key))
    return default if value is None else value


def acceptable(document: Any) -> bool:
    """Applies the reader's rules again, as simply as possible."""
    if not isinstance(document, dict):
        return False
    lists = [document.get(key) for key in ("categories", "images", "annotations")]
    if not all(isinstance(entries, list) and all(isinstance(e, dict) for e in entries) for entries in lists):
        return False
    categories, images, annotations = lists
    for entries in (categories, images):
        if (
            not entries
            or not all(is_integer(e.get("id")) for e in entries)
            or len({int(e["id"]) for e in entries}) < len(entries)
        ):
            return False
    for image in images:
        if not all(is_integer(image.get(side)) and 0 < int(image[side]) <= 1e9 for side in ("width", "height")):
            return False
        name = image.get("file_name")
        if (
            not is_line(name)
            or name[0] in "/\\"
            or re.match(r"[A-Za-z]:[/\\]", name)
            or ".." in re.split(r"[/\\]", name)
        ):
            return False
    for annotation in annotations:
        box = box_of(annotation)
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            return False
        for key, entries in (("image_id", images), ("category_id", categories)):
            if not is_integer(annotation.get(key)) or int(annotation[key]) not in {int(e["id"]) for e in entries}:
                return False
        if filled(annotation, "iscrowd", 0) not in (0, 1) or not is_integer(filled(annotation, "id", 0)):
            return False
        if not is_number(filled(annotation, "area", 0)):
            return False
    return all(is_line(category.get("name")) for category in categories)


def plain_records(document: dict[str, Any]) -> list[tuple[int, list[list[float]], list[int]]]:
    """Returns the id, the usable boxes clipped to the image, and their labels for each image: one box after the other,
    in pure Python."""
    order = [int(category["id"]) for category in document["categories"]]
    records = []
    for image in document["images"]:
        boxes, labels = [], []
        for annotation in document["annotations"]:
            if int(annotation["image_id"]) != int(image["id"]) or filled(annotation, "iscrowd", 0):
                continue
            x, y, w, h = map(float, box_of(annotation))
            cut = []
            for start, end, side in ((x, x + w, int(image["width"])), (y, y + h, int(image["height"]))):
                if end > start and start < side and end > 0:
                    cut.append((float(np.float32(max(start, 0))), float(np.float32(min(end, side)))))
            if len(cut) == 2 and all(end > start for start, end in cut):
                boxes.append([cut[0][0], cut[1][0], cut[0][1], cut[1][1]])
                labels.append(order.index(int(annotation["category_id"])))
        records.append((int(image["id"]), boxes, labels))
    return records


def compare(source: Source, document: dict[str, Any]) -> None:
    expected = plain_records(document)
    assert [r.image_id for r in source.records] == [image_id for image_id, _, _ in expected]
    for record, (_, boxes, labels) in zip(source.records, expected, strict=True):
        assert record.boxes_xyxy.tolist() == boxes and record.labels.tolist() == labels
    ground_truth = source.ground_truth["annotations"]
    assert [t["bbox"] for t in ground_truth] == [
        box_of(a) for a in document["annotations"] if a.get("bbox") not in (None, [])
    ]
    ids = [t["id"] for t in ground_truth]
    assert len(set(ids)) == len(ids) and all(i >= 1 for i in ids)


@both_shares
def test_any_file_is_read_as_plainly_or_refused_by_name(tmp_path: Path, share: int) -> None:
    path, images = tmp_path / "annotations.json", tmp_path / "images"
    images.mkdir()

    def case(encoded: bytes) -> str:
        path.write_bytes(encoded)
        try:
            document = json.loads(encoded)
        except (ValueError, RecursionError):
            document = None
        try:
            source = read_coco(path, images, data=DataConfig(box_format="xywh"))
        except DataError as error:
            assert_named(error, f"{path}: ")
            assert not acceptable(document), str(error)
            return "refused"
        if document is None:  # the mistake is in a field that is not read
            document = json.loads(encoded.decode(errors="replace"), parse_int=lambda digits: int(digits[:400]))
        assert acceptable(document)
        compare(source, document)
        for index in range(len(source)):
            with pytest.raises(BadImage) as raised:
                source.read(index)
            assert_named(raised.value, str(images))
        return "read, with boxes" if any(len(r.labels) for r in source.records) else "read, without boxes"

    ended = run_cases("COCO reader", share, files(), case)
    # hypothesis also draws constants of the modules that are imported, so the shares depend on the other tests.
    assert min(ended["refused"], ended["read, with boxes"]) > ended.total() / 50


@pytest.mark.parametrize("number", [b"1" * 5000, b"1e999", b"-Infinity", b"1" * 400 + b".5"])
def test_numbers_that_json_dumps_does_not_write(tmp_path: Path, number: bytes) -> None:
    path = tmp_path / "annotations.json"
    path.write_bytes(b'{"images": [{"id": 1, "file_name": "1.jpg", "width": %b, "height": 1}]}' % number)
    with pytest.raises(DataError) as raised:
        read_coco(path, tmp_path)
    assert_named(raised.value, f"{path}: ")
