"""What people's annotation files hold besides plain boxes: each is read as its tool shows it, or left out and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_formats import convert, rows

from retina_jax.conversion import formats
from retina_jax.conversion.annotated import Annotated, Reading
from retina_jax.conversion.locating import complete_sizes, locate

Boxes = dict[str, list[tuple[str, tuple[float, ...]]]]


def picture(file: Path, size: tuple[int, int] = (40, 20), **options: Any) -> Path:
    """Writes an image; different paths have different pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(abs(hash(str(file))) % 2**32).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(file, **options)
    return file


def text(file: Path, content: str | bytes) -> Path:
    """Writes a file of annotations."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def read(path: Path, reading: Reading | None = None, images: Path | None = None) -> Annotated:
    """Reads and locates annotations of a recognised format."""
    found = formats.read(path, formats.recognise(path), reading or Reading(), images)
    locate(found, images)
    complete_sizes(found.pictures, "turned")
    return found


def boxes(found: Annotated) -> Boxes:
    """Returns the classes and rounded corners of the boxes of each image, by the image's file name."""
    return {
        (p.path.name if p.path else p.name): [(b.label, tuple(round(n, 3) for n in b.corners)) for b in p.boxes]
        for p in found.pictures
    }


def voc(*objects: str, name: str = "a.png", size: str = "<width>40</width><height>20</height>") -> str:
    parts = "".join(f"<object>{each}</object>" for each in objects)
    return f"<annotation><filename>{name}</filename><size>{size}</size>{parts}</annotation>"


def voc_box(x1: object, y1: object, x2: object, y2: object) -> str:
    return f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"


def test_voc_edges_flags_and_parts(tmp_path: Path) -> None:
    """The box of a part (head) is not the object's, a difficult object is a crowd, the other flags change nothing."""
    head = f"<part><name>head</name>{voc_box(0, 0, 1, 1)}</part>"
    person = (
        f"<name> person </name><truncated>1</truncated><occluded>1</occluded>{head}{voc_box('1', '2.5', '1e1', 20)}"
    )
    difficult = f"<name>dog</name><difficult>1</difficult>{voc_box(5, 5, 6, 6)}"
    text(tmp_path / "a.xml", b"\xef\xbb\xbf" + voc(person, difficult, name="C:\\photos\\other.JPG").encode())
    picture(tmp_path / "a.PNG")
    found = read(tmp_path)
    assert boxes(found) == {"a.PNG": [("person", (1, 2.5, 10, 20)), ("dog", (5, 5, 6, 6))]}
    assert [box.crowd for box in found.pictures[0].boxes] == [False, True]
    found = read(tmp_path, Reading(voc_one_based=True, difficult="objects"))
    assert boxes(found) == {"a.PNG": [("person", (0, 1.5, 10, 20)), ("dog", (4, 4, 6, 6))]}
    assert not any(box.crowd for box in found.pictures[0].boxes)


def test_voc_lists_are_the_splits(tmp_path: Path) -> None:
    for name in "abcd":
        text(tmp_path / f"Annotations/{name}.xml", voc(name=f"{name}.jpg", size="<width>0</width><height>0</height>"))
        picture(tmp_path / f"JPEGImages/{name}.jpg")
    for name, stems in {"train": "a\nb\n", "val": "c\n", "trainval": "a\nb\nc\n", "test": "x\n"}.items():
        text(tmp_path / f"ImageSets/Main/{name}.txt", stems)
    for path in (tmp_path, tmp_path / "Annotations"):
        found = read(path)
        assert [(p.path and p.path.stem, p.split, p.size) for p in found.pictures] == [
            ("a", "train", (40, 20)), ("b", "train", (40, 20)), ("c", "val", (40, 20)),
        ]  # fmt: skip
        assert sum(found.skipped.values()) == 2


def test_folders_named_as_splits_are_splits_and_equal_names_stay_apart(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        text(tmp_path / split / "1.xml", voc(f"<name>{split}</name>{voc_box(1, 1, 2, 2)}", name="1.png"))
        picture(tmp_path / split / "1.png")
    found = read(tmp_path)
    shown = {p.split: (str(p.path.relative_to(tmp_path)), p.boxes[0].label) for p in found.pictures if p.path}
    assert shown == {
        "train": ("train/1.png", "train"),
        "val": ("valid/1.png", "valid"),
        "test": ("test/1.png", "test"),
    }


def yolo(folder: Path, yaml: str, labels: dict[str, str], *negatives: str) -> Path:
    """Writes a data set of YOLO, images of 40 x 20 pixels."""
    for name, lines in labels.items():
        picture(folder / "images" / name)
        text(folder / "labels" / Path(name).with_suffix(".txt"), lines)
    for name in negatives:
        picture(folder / "images" / name)
    return text(folder / "data.yaml", yaml)


def test_yolo_names_with_gaps_polygons_and_negatives(tmp_path: Path) -> None:
    lines = "\ufeff0 0.5 0.5 0.5 0.5\r\n\r\n7 0.1 0.1 0.9 0.1 0.9 0.6\n7.0 0.5 0.5 0.25 1 0.875\n"
    labels = {"train/a.b.JPG": lines, "val/c.png": "", "train/sub/a.png": "0 .25 .25 .5 .5"}
    yaml = (
        "path: /content/elsewhere\ntrain: images/train\nval: [images/val]\ntest: images/none\nnames: {7: b ü, 0: a}\n"
    )
    file = yolo(tmp_path, yaml, labels, "train/empty.jpeg")
    for path in (file, tmp_path):
        found = read(path)
        assert boxes(found) == {
            "a.b.JPG": [("a", (10, 5, 30, 15)), ("b ü", (4, 2, 36, 12)), ("b ü", (15, 0, 25, 20))],
            "a.png": [("a", (0, 0, 20, 10))],
            "empty.jpeg": [],
            "c.png": [],
        }
        assert found.classes == ["a", "b ü"] and [p.split for p in found.pictures] == ["train"] * 3 + ["val"]


def test_yolo_keypoints_lists_of_images_and_repeated_training_sets(tmp_path: Path) -> None:
    pose = "0 0.5 0.5 0.5 0.5 0.1 0.1 2 0.2 0.2 1\n"
    file = yolo(tmp_path, "train: train.txt\nval: train.txt\nkpt_shape: [2, 3]\nnames: [a]\n", {"a.png": pose})
    text(tmp_path / "train.txt", "./images/a.png\n\nimages/a.png\n")
    found = read(file)
    assert boxes(found) == {"a.png": [("a", (10, 5, 30, 15))]} and found.splits == ["train"]
    assert dict(found.skipped) == {"images of val, which are those of train": 1}


def test_yolo_folders_of_roboflow_and_text_files_alone(tmp_path: Path) -> None:
    picture(tmp_path / "train/images/a.jpg")
    text(tmp_path / "train/labels/a.txt", "1 0.5 0.5 1 1")
    text(tmp_path / "train/labels/lost.txt", "1 0.5 0.5 1 1")
    file = text(tmp_path / "data.yaml", "train: ../train/images\nnc: 2\nnames: ['a', 'b']\n")
    found = read(file)
    assert boxes(found) == {"a.jpg": [("b", (0, 0, 40, 20))]}
    assert dict(found.skipped) == {"text files without an image (lost.txt)": 1}
    text(tmp_path / "train/labels/classes.txt", "a\nb\n")
    assert boxes(read(tmp_path / "train/labels")) == boxes(found)
    assert boxes(read(tmp_path / "train")) == boxes(found)


def test_yolo_images_without_a_text_file_and_splits_without_boxes_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = "train: images/train\nval: images/val\ntest: images/test\nnames: [Star, star]\n"
    labels = {"train/a.png": "0 .25 .25 .5 .5", "train/b.png": "", "val/c.png": ""}
    yolo(tmp_path, yaml, labels, "train/d.png", "train/e.png", "test/f.png")
    convert(monkeypatch, "--annotations", tmp_path, "--out", tmp_path / "out")
    lines = capsys.readouterr().out
    assert "train: 4 images (3 without boxes, 2 of them without a label file), 1 boxes" in lines
    assert "val: 1 images (1 without boxes), 0 boxes" in lines
    assert all(f"warning: {split}: no boxes: AP cannot be computed\n" in lines for split in ("val", "test"))
    assert "warning: train: no boxes" not in lines and "warning: classes 'Star' and 'star' differ" in lines


def test_yolo_boxes_lie_on_photographs_as_viewers_show_them(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = yolo(tmp_path, "train: images\nnames: [a]\n", {"a.jpg": "0 0.5 0.5 0.5 0.5"})
    picture(tmp_path / "images/a.jpg", exif=exif)
    found = read(file)
    assert found.pictures[0].size == (20, 40) and boxes(found) == {"a.jpg": [("a", (5, 10, 15, 30))]}
    found = formats.read(file, "yolo", Reading(), None)
    complete_sizes(found.pictures, "stored")
    assert found.pictures[0].size == (40, 20) and boxes(found) == {"a.jpg": [("a", (10, 5, 30, 15))]}


@pytest.mark.parametrize(
    "content",
    [
        "{0}/a.png,1,2,3,4.5,b\n{0}/empty.png,,,,,\n",
        "a.png,1,2,3,4.5,b\r\nempty.png,,,,,\r\n",
        "C:\\x\\a.png,1,2,3,4.5,b\nC:\\x\\empty.png,,,,,\n",
        "\ufeffimage_path,xmin,ymin,xmax,ymax,label\na.png,1,2,3,4.5,b\nempty.png,0,0,0,0,b\n",
        'filename;width;height;class;xmin;ymin;xmax;ymax\na.png;40;20;"b";1;2;3;4.5\nempty.png;40;20;;;;;\n',
        "xmin,ymin,xmax,ymax,label,image_path\n1,2,3,4.5,b,./a.png\n0,0,0,0,b,./empty.png\n",
    ],
)
def test_csv_forms(tmp_path: Path, content: str) -> None:
    for name in ("a.png", "empty.png"):
        picture(tmp_path / name)
    file = text(tmp_path / "boxes.csv", content.format(tmp_path))
    assert boxes(read(file)) == {"a.png": [("b", (1, 2, 3, 4.5))], "empty.png": []}


def test_labelme_shapes(tmp_path: Path) -> None:
    shapes = [
        {"label": "r", "points": [[30, 15], [10.5, 5]], "shape_type": "rectangle", "flags": {}},
        {"label": "p", "points": [[1, 1], [5, 2], [3, 9]]},
        {"label": "c", "points": [[10, 10], [13, 14]], "shape_type": "circle"},
        {"label": "m", "points": [[2, 3], [4, 6]], "shape_type": "mask", "mask": "iVBORw0KGgo="},
        {"label": "x", "points": [[2, 3]], "shape_type": "point"},
        {"label": "x", "points": [[2, 3], [4, 5]], "shape_type": "line"},
    ]
    content = {"version": "5", "shapes": shapes, "imagePath": "..\\photos\\a.png", "imageData": "A" * 1000}
    text(tmp_path / "labels/other.json", json.dumps(content | {"imageHeight": 20, "imageWidth": None}))
    picture(tmp_path / "photos/a.png")
    found = read(tmp_path / "labels")
    expected = [("r", (10.5, 5, 30, 15)), ("p", (1, 1, 5, 9)), ("c", (5, 5, 15, 15)), ("m", (2, 3, 5, 7))]
    assert boxes(found) == {"a.png": expected}
    assert dict(found.skipped) == {"point shapes": 1, "line shapes": 1} and found.pictures[0].size == (40, 20)


def region(kind: str = "rectanglelabels", **value: Any) -> dict[str, Any]:
    return {"type": kind, "original_width": 40, "original_height": 20, "value": {kind: ["a"], **value}}


def test_label_studio_regions_and_annotators(tmp_path: Path) -> None:
    """A rotation turns about the upper left corner, clockwise, in pixels: in percent the box would be sheared."""
    plain = region(x=25, y=50, width=25, height=25, rotation=0)
    turned = region(x=50, y=0, width=25, height=50, rotation=90)
    polygon = region("polygonlabels", points=[[0, 0], [50, 10], [25, 100]])
    ellipse = region("ellipselabels", x=50, y=50, radiusX=10, radiusY=25)
    others = [{"type": "choices", "value": {"choices": ["x"]}}, {"type": "relation", "from_id": "a"}]
    early, late = ({"result": [each], "updated_at": f"2026-0{n}-01"} for n, each in ((1, plain), (2, polygon)))
    tasks = [
        {"data": {"image": "/data/upload/3/0a1b2c3d-a.png"}, "annotations": [{"result": [plain, turned, *others]}]},
        {"data": {"img": "/data/local-files/?d=sub%2Fb%20c.png"}, "annotations": [early, late]},
        {"data": {"image": "s3://bucket/x/c.png?sig=1"}, "annotations": [early | {"ground_truth": True}, late]},
        {"data": {"image": "http://host/d.png"}, "completions": [{"result": [ellipse]}]},
        {"data": {"image": "http://host/e.png"}, "annotations": [{"result": []}], "predictions": [early]},
        {"data": {"image": "http://host/f.png"}, "annotations": [{"result": [plain], "was_cancelled": True}]},
        {"data": {"image": "http://host/g.png"}, "annotations": []},
    ]
    file = text(tmp_path / "export.json", json.dumps(tasks))
    for name in ("a.png", "sub/b c.png", "c.png", "d.png", "e.png", "f.png", "g.png"):
        picture(tmp_path / "images" / name)
    found = read(file)
    assert boxes(found) == {
        "a.png": [("a", (10, 10, 20, 15)), ("a", (10, 0, 20, 10))],
        "b c.png": [("a", (0, 0, 20, 20))],
        "c.png": [("a", (10, 10, 20, 15))],
        "d.png": [("a", (16, 5, 24, 15))],
        "e.png": [],
    }
    assert found.skipped["tasks without a finished annotation"] == 2 and found.skipped.total() == 6


def test_cvat_shapes_subsets_and_labels(tmp_path: Path) -> None:
    labels = "".join(f"<label><name>{name}</name></label>" for name in ("b", "a, b", "unused"))
    labels += "<label><name>joint</name><parent>b</parent></label>"
    shapes = """
      <box label="b" xtl="10" ytl="5" xbr="20" ybr="9" rotation="90" occluded="1"><attribute name="x">1</attribute></box>
      <polygon label="a, b" points="1,1;5.5,2;3,9"/> <ellipse label="b" cx="10" cy="10" rx="2" ry="4"/>
      <mask label="b" left="3" top="4" width="5" height="6" rle="1, 29"/> <points label="b" points="1,1"/>
      <skeleton label="b"><points label="joint" points="1,1"/></skeleton> <tag label="b"/>"""
    images = f'<image id="0" name="s/a.png" subset="Validation" width="40" height="20">{shapes}</image>'
    images += '<image id="1" name="b.png" width="40" height="20"/>'
    meta = f"<meta><task><labels>{labels}</labels></task></meta>"
    text(tmp_path / "annotations.xml", f"<annotations><version>1.1</version>{meta}{images}</annotations>")
    for name in ("s/a.png", "b.png"):
        picture(tmp_path / "images" / name)
    for path in (tmp_path, tmp_path / "annotations.xml"):
        found = read(path)
        around = [("b", (13, 2, 17, 12)), ("a, b", (1, 1, 5.5, 9)), ("b", (8, 6, 12, 14)), ("b", (3, 4, 8, 10))]
        assert boxes(found) == {"a.png": around, "b.png": []}
        assert [p.split for p in found.pictures] == ["val", "train"] and found.classes == ["b", "a, b", "unused"]
        assert dict(found.skipped) == {"points shapes": 1, "skeleton shapes": 1, "tag shapes": 1}


def test_boxes_that_training_drops_are_converted_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "a.png")
    reversed_, outside, across, good = "5,5,3,9", "50,5,60,9", "-3,5,9,30", "1,1,9,9"
    file = text(tmp_path / "a.csv", "".join(f"a.png,{each},b\n" for each in (reversed_, outside, across, good)))
    convert(monkeypatch, "--annotations", file, "--out", tmp_path / "out")
    found = rows(json.loads((tmp_path / "out/train.json").read_text()))
    assert [box for _, _, box in found] == [(-3, 5, 12, 25), (1, 1, 8, 8), (5, 5, -2, 4), (50, 5, 10, 4)]
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("1 without area or reversed", "1 outside", "1 partly outside"))


def test_images_that_share_an_annotation_file_are_refused(tmp_path: Path) -> None:
    found = formats.read(text(tmp_path / "a.csv", "a.png,,,,,\na.jpg,,,,,\n"), "csv", Reading(), None)
    for picture_ in found.pictures:
        picture_.size = (4, 4)
    for to in ("voc", "yolo", "labelme"):
        with pytest.raises(formats.DataError, match=r"a\.png.*a\.jpg"):
            formats.write(found, [], to, Reading(), tmp_path)
