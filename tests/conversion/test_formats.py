"""Annotations of seven tools are read as their tools write them, and written so that they are read back the same."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import convert_data
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retina_jax.conversion import formats
from retina_jax.conversion.annotated import Annotated, Box, Picture, Reading
from retina_jax.conversion.formats import Format
from retina_jax.conversion.locating import complete_sizes

GOLDEN = Path(__file__).parent / "golden"
Row = tuple[str, str, tuple[float, ...]]  # file name, class, x, y, width, height


def rows(document: dict[str, Any]) -> list[Row]:
    """Returns the boxes of a COCO document, sorted, with its images without boxes."""
    names = {image["id"]: image["file_name"] for image in document["images"]}
    classes = {category["id"]: category["name"] for category in document["categories"]}
    found = [(names[a["image_id"]], classes[a["category_id"]], tuple(a["bbox"])) for a in document["annotations"]]
    return sorted(found + [(name, "", ()) for name in set(names.values()) - {row[0] for row in found}])


def assert_same(found: list[Row], expected: list[Row], tolerance: float = 0.01) -> None:
    """Asserts that images and classes are equal, and boxes to `tolerance` pixels."""
    found, expected = ([(*row[:2], np.round(row[2], 1).tolist(), row[2]) for row in each] for each in (found, expected))
    assert [row[:2] for row in sorted(found)] == [row[:2] for row in sorted(expected)]
    for one, other in zip(sorted(found), sorted(expected), strict=True):
        np.testing.assert_allclose(one[3], other[3], rtol=0, atol=tolerance)


def convert(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Runs the command."""
    monkeypatch.setattr(sys, "argv", ["scripts/convert_data.py", *map(str, words)])
    convert_data.main()


def source_images(folder: Path, document: dict[str, Any]) -> Path:
    """Writes an image for each entry of a COCO document."""
    for image in document["images"]:
        file = folder / image["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (image["width"], image["height"]), image["id"]).save(file)
    return folder


@pytest.mark.parametrize(
    ("annotations", "format"),
    [
        ("voc", "voc"),
        ("yolo", "yolo"),
        ("yolo/labels", "yolo"),
        ("yolo_darknet", "yolo"),
        ("keras_retinanet.csv", "csv"),
        ("deepforest.csv", "csv"),
        ("labelme", "labelme"),
        ("label_studio.json", "labelstudio"),
        ("cvat.xml", "cvat"),
    ],
)
def test_files_of_each_tool_are_recognised_and_read_as_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, annotations: str, format: str
) -> None:
    """golden/README.md names the tool and version that wrote each file from source.json."""
    source = json.loads((GOLDEN / "source.json").read_text())
    images = source_images(tmp_path / "images", source)
    assert formats.recognise(GOLDEN / annotations) == format
    words = ["--classes", *(c["name"] for c in source["categories"])] if annotations == "yolo/labels" else []
    convert(monkeypatch, "--annotations", GOLDEN / annotations, "--images", images, "--out", tmp_path / "out", *words)
    expected = rows(source)
    if annotations == "voc":  # datumaro writes no XML for an image without objects
        expected = [row for row in expected if row[0] != "empty.png"]
    assert_same(rows(json.loads((tmp_path / "out/train.json").read_text())), expected)


texts = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn"), exclude_characters="\u2028\u2029"), min_size=1)
names = texts.map(str.strip).filter(bool)
numbers = st.integers(-20, 80).map(float) | st.floats(-20, 80, width=32)
lengths = st.integers(0, 90).map(float) | st.floats(0, 90, width=32)
stems = texts.map(lambda text: "".join(c for c in text if c not in "/\\.:%\0")[:20].strip() or "x")


corners = st.tuples(numbers, numbers, lengths, lengths).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
boxes = st.lists(st.tuples(st.integers(0, 3), corners, st.booleans()), max_size=4)
places = st.sampled_from(["{}.png", "a/{}.png", "a b/ü/{}.PNG"])


def datasets(sides: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[list[str], list[Any]]]:
    """Draws class names, and images with boxes."""
    images = st.tuples(stems, places, boxes, st.tuples(sides, sides), st.sampled_from(["train", "val", "test"]))
    some = st.lists(images, min_size=1, max_size=3, unique_by=lambda image: image[0].casefold())
    return st.tuples(st.lists(names, min_size=1, max_size=4, unique=True), some)


def annotated(drawn: tuple[list[str], list[Any]]) -> Annotated:
    """Returns images with boxes anywhere, some of them crowds."""
    classes, pictures = drawn
    made = [
        Picture((place.format(stem),), [Box(classes[k % len(classes)], *rest) for k, *rest in boxes], size, split)
        for stem, place, boxes, size, split in pictures
    ]
    return Annotated(made, [])


def rows_of(pictures: list[Picture], crowds: bool = True) -> list[Row]:
    """Returns the same as `rows`, with the split and crowd in the class."""
    found: list[Row] = []
    for picture in pictures:
        boxes = [box for box in picture.boxes if crowds or not box.crowd]
        found += [(picture.name, f"{picture.split} {box.crowd} {box.label}", box.corners) for box in boxes]
        found += [(picture.name, picture.split, ())] if not boxes else []
    return found


@pytest.mark.parametrize("to", ["voc", "yolo", "csv", "csv-header", "labelme", "labelstudio", "cvat"])
def test_every_format_is_read_back_as_it_was_written(to: Format) -> None:
    # In YOLO, boxes that are far outside most images are taken for pixels.
    sides = st.integers(120, 150) if to == "yolo" else st.integers(1, 60)

    @settings(max_examples=25, database=None, derandomize=True)
    @given(datasets(sides), st.booleans())
    def one(drawn: tuple[list[str], list[Any]], voc_one_based: bool) -> None:
        found, classes = annotated(drawn), drawn[0]
        with tempfile.TemporaryDirectory() as folder:
            out, reading, back = Path(folder), Reading(voc_one_based), []
            for name, content in formats.write(found, classes, to, reading, out).items():
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).write_bytes(content)
            per_split = {name: out / f"{name}.{'json' if to == 'labelstudio' else 'csv'}" for name in found.splits}
            if to == "yolo":
                for picture in found.pictures:
                    file = out / "images" / picture.split / picture.name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("L", picture.size).save(file)
                read = formats.read(out, to, reading, None)
                assert read.classes == classes
                complete_sizes(read.pictures, "turned")
                for picture in read.pictures:
                    picture.names = (Path(picture.name).relative_to(out / "images" / picture.split).as_posix(),)
                back = read.pictures
            elif to in ("voc", "labelme", "cvat"):
                back = formats.read(out, to, reading, None).pictures
            else:
                for split, file in per_split.items():
                    part = formats.read(file, to, reading, None).pictures
                    for picture in part:
                        picture.split = split
                    back += part
        assert_same(rows_of(back), rows_of(found.pictures, crowds=to == "voc"))
        if to not in ("csv", "csv-header", "labelstudio"):  # sizes are not in CSV, nor in tasks without boxes
            assert {p.name: p.size for p in back} == {p.name: p.size for p in found.pictures}

    one()


def test_a_split_coco_file_keeps_its_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = json.loads((GOLDEN / "source.json").read_text()) | {"info": {"year": 2026}}
    source["annotations"][0] |= {"segmentation": [[1, 2, 3, 4, 5, 6]], "area": 7, "id": 99}
    images = source_images(tmp_path / "images", source)
    (tmp_path / "source.json").write_text(json.dumps(source))
    hashes = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in images.iterdir())
    share = int(hashes[1][:8], 16) / 2**32  # the first image in this order is trained on, and two are in val
    convert(monkeypatch, "--annotations", tmp_path / "source.json", "--out", tmp_path / "out", "--split", share)
    parts = [json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("train", "val")]
    for key in ("images", "annotations"):
        assert sorted(parts[0][key] + parts[1][key], key=str) == sorted(source[key], key=str)
    assert all(part["info"] == source["info"] and part["categories"] == source["categories"] for part in parts)
    assert [len(part["images"]) for part in parts] == [1, 2]


def test_images_of_one_name_in_two_splits_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Roboflow writes a folder per split, each with its COCO JSON and its images."""
    words: list[object] = []
    for option, split in (("--annotations", "train"), ("--val-annotations", "valid")):
        image = {"id": len(split), "file_name": "1.png", "width": len(split), "height": 9}
        box = {"id": 1, "image_id": len(split), "category_id": 1, "bbox": [0, 1, len(split), 2]}
        document = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
        source_images(tmp_path / split, document)
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(document))
        words += [option, tmp_path / split / "_annotations.coco.json"]
    convert(monkeypatch, *words, "--to", "csv", "--out", tmp_path / "out")
    assert (tmp_path / "out/train.csv").read_text() == "train/1.png,0,1,5,3,a\n"
    assert (tmp_path / "out/val.csv").read_text() == "valid/1.png,0,1,5,3,a\n"


def test_voc_and_csv_of_deepforest_have_the_same_boxes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_data: Path
) -> None:
    for name in ("OSBS_029.xml", "OSBS_029.csv"):
        out = tmp_path / name
        convert(monkeypatch, "--annotations", shared_data / "aerial" / name, "--out", out)
    voc, csv = (json.loads((tmp_path / f"OSBS_029.{end}" / "train.json").read_text()) for end in ("xml", "csv"))
    assert voc == csv and len(voc["annotations"]) == 61 and voc["images"][0]["file_name"] == "OSBS_029.png"
