"""A broken or hostile file of each format ends in one line that names the file and the place, and nothing is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import convert_data
import pytest
from fuzzing import assert_named
from test_conventions_of_formats import picture, region, text, voc, voc_box
from test_formats import convert

from retina_jax.conversion import yolo
from retina_jax.conversion.output import write_folder
from retina_jax.errors import PlainError, ending
from retina_jax.runs.files import DiskError

BOMB = "<!DOCTYPE a [" + "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12)) + "]>"
CVAT = '<annotations><image name="a.png" width="40" height="20">{}</image></annotations>'
CVAT_BOX = '<box label="{}" xtl="{}" ytl="1" xbr="2" ybr="2"/>'
LABELME = {"shapes": [{"label": "a", "points": [[1, 2], [3, 4]], "shape_type": "rectangle"}], "imagePath": "a.png"}
TASK = {"data": {"image": "a.png"}, "annotations": [{"result": [region(x=1, y=1, width=5, height=5)]}]}


def labelme(**changes: object) -> str:
    return json.dumps(LABELME | {"shapes": [LABELME["shapes"][0] | changes]})


def task(value: dict[str, object], **changes: object) -> str:
    result = region(x=1, y=1, width=5, height=5) | changes
    return json.dumps([TASK, TASK | {"annotations": [{"result": [result | {"value": result["value"] | value}]}]}])


BROKEN: dict[str, tuple[str, str, str]] = {
    "voc cut off": ("a.xml", voc("<name>a</name>")[:60], "line 1, column"),
    "voc of CVAT's root": ("a.xml", "<annotation2/>", "root element must be <annotation>"),
    "voc without a box": ("a.xml", voc("<name>a</name>"), "object 1: bndbox/xmin is missing"),
    "voc without a name": ("a.xml", voc(voc_box(1, 2, 3, 4)), "object 1: name must be"),
    "voc with NaN": ("a.xml", voc(f"<name>a</name>{voc_box('nan', 2, 3, 4)}"), "object 1: bndbox/xmin must be a number"),
    "voc with 1e400": ("a.xml", voc(f"<name>a</name>{voc_box(1, 2, '1e400', 4)}"), "bndbox/xmax must be a number"),
    "voc with 1e12": ("a.xml", voc(f"<name>a</name>{voc_box(1, 2, 3, '9' * 5000)}"), "bndbox/ymax must be a number"),
    "voc with words": ("a.xml", voc(size="<width>wide</width>"), "size/width must be a number"),
    "voc of -5 pixels": ("a.xml", voc(size="<width>-5</width>"), "size/width must be a number of pixels"),
    "an entity bomb": ("a.xml", BOMB + voc("<name>&e11;</name>"), "has a DOCTYPE"),
    "an entity of a file": ("a.xml", '<!DOCTYPE a [<!ENTITY f SYSTEM "/etc/passwd">]>' + voc("&f;"), "has a DOCTYPE"),
    "an unknown encoding": ("a.xml", '<?xml version="1.0" encoding="klingon"?><annotation/>', "klingon"),
    "cvat with words": ("a.xml", CVAT.format(CVAT_BOX.format("a", "left")), "image 1 (a.png): shape 1 (box): xtl must be"),
    "cvat without a label": ("a.xml", CVAT.format(CVAT_BOX.format("", 1)), "shape 1 (box): label must be"),
    "cvat of an unknown shape": ("a.xml", CVAT.format("<blob label='a'/>"), "shape 1 (blob): is no shape"),
    "cvat polygon": ("a.xml", CVAT.format("<polygon label='a' points='1;2'/>"), "points must be x,y;x,y"),
    "cvat without a name": ("a.xml", "<annotations><image/></annotations>", "image 1 (without name): name must be"),
    "cvat for video": ("a.xml", "<annotations><track/></annotations>", "CVAT for images 1.1"),
    "cvat bomb": ("a.xml", BOMB + CVAT.format("&e11;"), "has a DOCTYPE"),
    "csv with words": ("a.csv", "a.png,1,2,3,4,a\na.png,1,2,x,4,a\n", "line 2: x1, y1, x2, y2 must be four numbers"),
    "csv with NaN": ("a.csv", "a.png,1,2,3,nan,a\n", "line 1: x1, y1, x2, y2 must be four numbers"),
    "csv with few columns": ("a.csv", "a.png,1,2,3,4,a\n\na.png,1,2\n", "line 3: has 3 columns"),
    "csv without classes": ("a.csv", "image_path,xmin,ymin,xmax,ymax\n", "line 1: the header has no column label"),
    "csv with an open quote": ("a.csv", 'a.png,1,2,3,4,"a\n', "line 1: unexpected end of data"),
    "csv without a class": ("a.csv", "a.png,1,2,3,4,\n", "line 1: the class must be text"),
    "csv in another encoding": ("a.csv", "\udcff", "UTF-8"),
    "labelme cut off": ("a.json", labelme()[:-9], "line 1, column"),
    "labelme without points": ("a.json", labelme(points=[[1]]), "$.shapes[0].points[0]"),
    "labelme with one point": ("a.json", labelme(points=[[1, 2]]), "shapes[0] (rectangle): has 1 points"),
    "labelme with NaN": ("a.json", labelme(points=[[1, float("nan")], [2, 3]]), "points[0][1]"),
    "labelme with 1e400": ("a.json", labelme().replace("[1,", "[1e400,"), "a.json"),
    "labelme without a label": ("a.json", labelme(label=" "), "shapes[0] (rectangle): label must be"),
    "labelme, nested": ("a.json", '{"shapes": ' + "[" * 100_000, "a.json"),
    "label studio with words": ("a.json", task({"x": "left"}), "task 1: result 0 (rectanglelabels): x must be a number"),
    "label studio without size": ("a.json", task({}, original_width=None), "original_width or original_height is missing"),
    "label studio without image": ("a.json", '[{"data": {"text": "a"}}]', "error: {}: no task"),
    "label studio's JSON-MIN": ("a.json", '[{"image": "a.png", "id": 1}]', "missing required field `data` - at `$[0]`"),
    "label studio's points": ("a.json", task({"points": [[1]]}), "result 0 (rectanglelabels): points must be"),
    "yolo: no YAML": ("data.yaml", "names: [a\ntrain: x", "line 2, column"),
    "yolo: an object": ("data.yaml", "!!python/object/apply:os.system ['true']", "is not YAML: line 1"),
    "yolo: a list": ("data.yaml", "[a]", "must have the keys names and train"),
    "yolo without names": ("data.yaml", "train: images\n", "names must be a list"),
    "yolo without images": ("data.yaml", "names: [a]\ntrain: nowhere\n", "nowhere does not exist"),
    "yolo: aliases": ("data.yaml", "a: &a [1]\n" + "b: &b [*a, *a]\nnames: [*b, *b]\ntrain: images\n", "names"),
}  # fmt: skip
BROKEN["label studio without image"] = (*BROKEN["label studio without image"][:2], "a.json")


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_in_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    name, content, expected = BROKEN[case]
    picture(tmp_path / "a.png")
    file = text(tmp_path / name, content.encode(errors="surrogateescape"))
    with pytest.raises(PlainError) as caught:
        convert(monkeypatch, "--annotations", file, "--images", tmp_path, "--out", tmp_path / "out")
    assert_named(caught.value, str(file), expected)
    assert {path.name for path in tmp_path.iterdir()} == {name, "a.png"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0 0.5 0.5 0.5", "has 4 numbers"),
        ("0 0.5 0.5 0.5 0.5 0.5 0.5 0.5", "has 8 numbers"),
        ("2 0.5 0.5 0.5 0.5", "class 2 is not in names (0, 1)"),
        ("0.5 0.5 0.5 0.5 0.5", "class 0.5 is not in names"),
        ("dog 0.5 0.5 0.5 0.5", "number 0 must be a number"),
        ("0 0.5 0.5 nan 0.5", "number 3 must be a number"),
        ("0 0.5 0.5 1e999 0.5", "number 3 must be a number"),
    ],
)
def test_a_broken_line_of_yolo_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: str
) -> None:
    picture(tmp_path / "images/a.png")
    file = text(tmp_path / "labels/a.txt", f"0 0.5 0.5 0.5 0.5\n{line}\n")
    text(tmp_path / "data.yaml", "train: images\nnames: [a, b]\n")
    with pytest.raises(PlainError) as caught:
        convert(monkeypatch, "--annotations", tmp_path, "--out", tmp_path / "out")
    assert_named(caught.value, f"{file}: line 2: {expected}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("yaml", ["train: images/train\nval: images/val\nnames: [a]\n", "names: [a]\n"])
def test_a_split_of_yolo_without_any_text_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yaml: str
) -> None:
    for name in ("train/a.png", "val/b.png", "val/c.png"):
        picture(tmp_path / "images" / name)
    text(tmp_path / "labels/train/a.txt", "0 0.5 0.5 0.5 0.5\n")
    text(tmp_path / "labels/valid/c2.txt", "0 0.5 0.5 0.5 0.5\n")  # a wrong name
    text(tmp_path / "data.yaml", yaml)
    with pytest.raises(PlainError) as caught:
        convert(monkeypatch, "--annotations", tmp_path, "--out", tmp_path / "out")
    assert_named(caught.value, "no image of split val has a file of labels", str(tmp_path / "labels/val/b.txt"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "refused"), [(["0 90 60 40 20", "0 30 20 9 8"], True), (["0 0.5 0.5 0.2 0.2", "0 90 60 40 20"], False)]
)
def test_boxes_of_yolo_in_pixels_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], refused: bool
) -> None:
    """Unless most boxes are fractions: then the others are wrong, and reported."""
    picture(tmp_path / "images/a.png")
    file = text(tmp_path / "labels/a.txt", "\n".join(lines))
    text(tmp_path / "data.yaml", "train: images\nnames: [a, b]\n")
    given = ("--annotations", tmp_path, "--out", tmp_path / "out")
    if refused:
        with pytest.raises(PlainError) as caught:
            convert(monkeypatch, *given)
        assert_named(caught.value, str(file), "110", "not pixels")
    else:
        convert(monkeypatch, *given)
    assert (tmp_path / "out").exists() != refused


@pytest.mark.parametrize("depth", [1_000, 300_000])
def test_deeply_nested_xml_ends_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    picture(tmp_path / "a.png")
    text(tmp_path / "a.xml", voc("<part>" * depth + "</part>" * depth))
    with pytest.raises(PlainError, match="object 1: name must be"):
        convert(monkeypatch, "--annotations", tmp_path, "--out", tmp_path / "out")


WRONG: dict[str, tuple[list[str], str]] = {
    "nothing there": (["--annotations", "absent"], "no such file or folder"),
    "no format": (["--annotations", "empty"], "--format"),
    "a wrong format": (["--annotations", "a.csv", "--format", "voc"], "Pascal VOC"),
    "no images": (["--annotations", "lost.csv", "--images", "empty"], "--images DIR"),
    "no image folder": (["--annotations", "a.csv", "--images", "absent"], "no such folder"),
    "a share of 80": (["--annotations", "a.csv", "--split", "80"], "between 0 and 1"),
    "one image": (["--annotations", "a.csv", "--split", "0.5"], "cannot be split"),
    "another class": (["--annotations", "a.csv", "--classes", "b"], "'a' is not in --classes"),
    "COCO to COCO": (["--annotations", "a.json"], "COCO JSON already"),
    "a folder in use": (["--annotations", "a.csv", "--out", "."], "--out"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_is_one_line_that_names_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    words, expected = WRONG[case]
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    text(tmp_path / "a.csv", "a.png,1,2,3,4,a\n")
    text(tmp_path / "lost.csv", "lost.png,1,2,3,4,a\n")
    image = {"id": 1, "file_name": "a.png", "width": 40, "height": 20}
    coco = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    text(tmp_path / "a.json", json.dumps(coco))
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["convert_data.py", *words, *(["--out", "out"] if "--out" not in words else [])])
    with pytest.raises(PlainError) as caught:
        convert_data.main()
    assert_named(caught.value, expected)
    assert ending(caught.value)[1] == 2 and not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(PlainError, match=r"PyYAML; pip install 'retina-jax\[convert\]'"):
        yolo.read_yaml(tmp_path / "data.yaml")


def test_output_is_complete_or_absent_and_never_over_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(DiskError):
        write_folder(out, {"a.txt": b"1"}, {"images/a.png": tmp_path / "absent"}, copy=True)
    assert list(tmp_path.iterdir()) == []
    write_folder(out, {"train.json": b"1"}, {}, copy=False)
    write_folder(out, {"train.json": b"1"}, {}, copy=False)
    for files in ({"train.json": b"2"}, {"a/b.txt": b"3"}, {"val.json": b"3"}):
        with pytest.raises(PlainError, match=r"train\.json"):
            write_folder(out, files, {}, copy=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "train.json"]
    assert (out / "train.json").read_bytes() == b"1"
