"""A conversion keeps its inputs and every box, and what it writes can be read back; otherwise it is refused in one line."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import convert_data
import numpy as np
import pytest
from test_broken_annotations import LABELME
from test_conventions_of_formats import boxes, picture, read, text
from test_formats import convert

from retina_jax.config import ConfigError
from retina_jax.conversion import formats
from retina_jax.conversion.annotated import Annotated, Box, Picture, Reading
from retina_jax.conversion.formats import Format
from retina_jax.conversion.yolo import LongLines
from retina_jax.errors import PlainError

CSV = "a.png,1,2,3,4,a\nb.png,1,2,3,4,a\n"


def coco(*names: str, size: tuple[int, int] = (40, 20)) -> str:
    """Returns a COCO JSON with an image entry per name, each with one box; the k-th box starts at x = k."""
    numbered = list(enumerate(names, 1))
    images = [{"id": k, "file_name": name, "width": size[0], "height": size[1]} for k, name in numbered]
    found = [{"id": k, "image_id": k, "category_id": 1, "bbox": [k, 2, 3, 4]} for k, _ in numbered]
    return json.dumps({"images": images, "annotations": found, "categories": [{"id": 1, "name": "a"}]})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.json", coco("a.png", "b.png"), ["--split", "share"]),
        ("train.csv", CSV, ["--to", "csv"]),
        ("val.csv", CSV, ["--to", "csv", "--val-annotations", "data/val.csv"]),
        (
            "annotations.xml",
            '<annotations><image name="a.png" width="40" height="20"/></annotations>',
            ["--to", "cvat"],
        ),
        ("train.json", json.dumps(LABELME), []),
    ],
)
@pytest.mark.parametrize("given", ["data/{}", "data/../data/{}", "link/{}", "linked-{}", "data"])
def test_an_input_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, words: list[str], given: str
) -> None:
    if given == "data" and not (name.endswith(".xml") or "shapes" in content):
        pytest.skip("this format is one file per split")
    monkeypatch.chdir(tmp_path)
    for image in "ab":
        picture(tmp_path / f"images/{image}.png")
    file = text(tmp_path / "data" / name, content)
    text(tmp_path / "other.csv", CSV)
    (tmp_path / "link").symlink_to("data")
    (tmp_path / f"linked-{name}").symlink_to(file)
    larger = max(hashlib.sha256(image.read_bytes()).hexdigest() for image in (tmp_path / "images").iterdir())
    words = [str(int(larger[:8], 16) / 2**32) if word == "share" else word for word in words]  # one image on each side
    path = "other.csv" if "--val-annotations" in words else given.format(name)
    for out in ("data", "link"):
        with pytest.raises(ConfigError, match="is an input; choose another folder"):
            convert(monkeypatch, "--annotations", path, "--images", "images", "--classes", "a", "--out", out, *words)
    assert file.read_text() == content and [each.name for each in file.parent.iterdir()] == [name]


def test_results_are_replaced_and_an_empty_working_folder_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text(tmp_path / "train.csv", CSV)
    for image in "ab":
        picture(tmp_path / f"{image}.png")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["retina-jax convert-data", "--annotations", "../train.csv", "--out", "."])
        convert_data.main()
        assert [path.name for path in Path.cwd().iterdir()] == ["train.json"] and Path("train.json").is_file()
    printed = capsys.readouterr().out
    assert "retina-jax check-data \\\n" in printed and "--out checks/mine" in printed and "_data " not in printed


@pytest.mark.parametrize("to", ["voc", "yolo", "labelme", "coco", "csv"])
@pytest.mark.parametrize("kind", ["coco", "labelme", "csv"])
def test_entries_of_one_image_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, to: str
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    picture(data / "a.png")
    if kind == "coco":
        if to == "coco":
            pytest.skip("COCO JSON is only split")
        given = text(data / "in.json", coco("a.png", "a.png"))
    elif kind == "csv":
        given = text(data / "in.csv", "a.png,1,2,4,6,a\n./a.png,2,2,5,6,a\n")
    else:
        given = data
        for n in (1, 2):
            shape = {"label": "a", "points": [[n, 2], [n + 3, 6]]}
            content = LABELME | {"shapes": [shape], "imageWidth": 40, "imageHeight": 20}
            text(data / f"{n}.json", json.dumps(content))
    convert(monkeypatch, "--annotations", given, "--to", to, "--out", out)
    assert "merged: 1, such as" in capsys.readouterr().out
    written = out / f"train.{'csv' if to == 'csv' else 'json'}" if to in ("csv", "coco") else out
    assert boxes(read(written, images=data if to != "yolo" else None)) == {
        "a.png": [("a", (1, 2, 4, 6)), ("a", (2, 2, 5, 6))]
    }


def test_entries_of_one_image_with_two_sizes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    document = json.loads(coco("a.png", "a.png"))
    document["images"][1]["width"] = 41
    file = text(tmp_path / "in.json", json.dumps(document))
    with pytest.raises(PlainError, match=r"'a.png' has two sizes, 40x20 .* and 41x20 "):
        convert(monkeypatch, "--annotations", file, "--to", "csv", "--out", tmp_path / "out")


def test_an_image_that_yolo_lists_by_two_paths_is_read_once(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.png")
    text(tmp_path / "labels/a.txt", "0 0.5 0.5 0.5 0.5\n")
    text(tmp_path / "list.txt", "images/a.png\nimages/../images/a.png\n")
    text(tmp_path / "data.yaml", "train: list.txt\nnames: [a]\n")
    assert [len(found.boxes) for found in read(tmp_path).pictures] == [1]


@pytest.mark.parametrize("to", ["voc", "yolo", "labelme"])
def test_one_file_never_holds_images_of_two_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Format) -> None:
    picture(tmp_path / "a.png")
    words: list[object] = []
    for split in ("", "val-"):
        words += [f"--{split}annotations", text(tmp_path / f"{split}in.json", coco("a.png"))]
    words += ["--to", to, "--out", tmp_path / "out"]
    if to == "voc":
        with pytest.raises(PlainError, match=r"'a.png' \(train\) and 'a.png' \(val\) would share one annotation file"):
            convert(monkeypatch, *words)
        assert not (tmp_path / "out").exists()
    else:
        convert(monkeypatch, *words)
        found = read(tmp_path / "out").pictures
        assert sorted((p.split, len(p.boxes)) for p in found) == [("train", 1), ("val", 1)]
    repeated = Annotated([Picture(("a.png",), [], (4, 4)) for _ in range(2)], [])
    with pytest.raises(PlainError, match="would share one annotation file"):
        formats.write(repeated, [], to, Reading(), tmp_path)


@pytest.mark.parametrize("where", ["labels", "data.yaml"])
def test_keypoints_are_not_taken_for_polygons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The refusal gives advice that works."""
    picture(tmp_path / "images/a.png")
    content = "0 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.1 0.1 0.2 0.2 2 0.3 0.3 2\n"
    file = text(tmp_path / "labels/a.txt", content)
    if where == "data.yaml":
        text(tmp_path / "data.yaml", "names: [a]\n")
    with pytest.raises(PlainError, match=r"line 2: has the coordinate 2, but a polygon .* kpt_shape") as caught:
        convert(monkeypatch, "--annotations", tmp_path, "--classes", "a", "--out", tmp_path / "out")
    assert str(caught.value).startswith(str(file))
    text(tmp_path / "data.yaml", "names: [a]\nkpt_shape: [2, 3]\n")
    assert boxes(read(tmp_path)) == {"a.png": [("a", (10, 5, 30, 15)), ("a", (18, 9, 22, 11))]}
    text(file, "0 -0.1 0.5 1.2 0.5 1.2 1.1\n")  # a polygon that is partly outside the image
    text(tmp_path / "data.yaml", "names: [a]\n")
    assert boxes(read(tmp_path)) == {"a.png": [("a", (-4, 10, 48, 22))]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.xml", "<annotation><filename>a.png</filename></annotation>"),
        ("a.csv", "a.png,,,,,\n"),
        ("annotations.xml", '<annotations><image name="a.png"/></annotations>'),
        ("a.json", json.dumps(LABELME | {"shapes": []})),
    ],
)
def test_a_set_without_objects_needs_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    picture(tmp_path / "a.png")
    words = ("--annotations", text(tmp_path / name, content), "--out", tmp_path / "out")
    with pytest.raises(PlainError, match="no list of classes in the files; give --classes"):
        convert(monkeypatch, *words)
    for wrong in ("", "a\nb"):
        with pytest.raises(PlainError, match="--classes: the class must be text"):
            convert(monkeypatch, *words, "--classes", wrong)
    convert(monkeypatch, *words, "--classes", "b")
    written = json.loads((tmp_path / "out/train.json").read_text())
    assert written["categories"] == [{"id": 1, "name": "b"}]


@pytest.mark.parametrize("character", ["\ufffe", "\uffff", "\x01", "\x0b"])
@pytest.mark.parametrize("to", ["voc", "cvat", "labelstudio"])
def test_text_that_xml_excludes_is_refused(to: Format, character: str) -> None:
    wrong = f"a{character}"
    for label, name in ((wrong, "a.png"), ("a", f"{wrong}.png")):
        if to == "labelstudio" and label == "a":
            continue  # its images are in JSON
        found = Annotated([Picture((name,), [Box(label, (1, 2, 3, 4))], (4, 4))], [])
        with pytest.raises(PlainError, match="which XML excludes"):
            formats.write(found, [label], to, Reading(), Path("out"))


def pose(rng: np.random.Generator, keypoints: int, third: str, confidence: bool = False) -> list[float]:
    """Draws the numbers after a class: a box and keypoints, one in fifty of them outside, one in fifty not labelled."""
    size = rng.uniform(0.05, 0.5, 2)
    centre, numbers = rng.uniform(size / 2, 1 - size / 2), []
    for _ in range(keypoints):
        point = rng.uniform(centre - size / 2, centre + size / 2) + (rng.random() < 0.02) * 0.6 * size
        point = point if rng.random() > 0.02 else np.zeros(2)
        numbers += [*point, *{"": [], "flag": [rng.integers(2)], "confidence": [rng.random()]}[third]]
    return [float(number) for number in (*centre, *size, *numbers, *[0.9] * confidence)]


@pytest.mark.parametrize(
    ("keypoints", "third", "confidence"),
    [
        (1, "", False),
        (4, "", False),
        (2, "flag", False),
        (4, "flag", False),
        (4, "confidence", False),
        (1, "confidence", True),
    ],
)
@pytest.mark.parametrize("where", ["labels", "data.yaml"])
def test_keypoints_within_the_image_are_not_taken_for_polygons(
    tmp_path: Path, where: str, keypoints: int, third: str, confidence: bool
) -> None:
    """Other lines hold a box alone, or a polygon."""
    rng = np.random.default_rng(keypoints)
    drawn = [pose(rng, keypoints, third, confidence) for _ in range(20)]
    lines = ["0 0.5 0.5 0.2 0.2", *(" ".join(map(str, [0, *numbers])) for numbers in drawn)]
    expected = [(0.4, 0.4, 0.6, 0.6), *((x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h, *_ in drawn)]
    picture(tmp_path / "images/a.png")
    file = text(tmp_path / "labels/a.txt", "\n".join([*lines, "0 0.1 0.1 0.9 0.1 0.9 0.6 0.1 0.6 0 0.4 0 0.3 0 0.2"]))
    text(tmp_path / "labels/classes.txt", "a\n")
    if where == "data.yaml":
        text(tmp_path / "data.yaml", "names: [a]\n")
    length = len(drawn[0]) + 1
    with pytest.raises(PlainError, match=rf"of 20 lines with {length} numbers .* kpt_shape: ") as caught:
        read(tmp_path)
    assert f"write {tmp_path / 'data.yaml'} with names and kpt_shape" in str(caught.value)
    text(file, "\n".join(lines))
    each = 3 if third else 2
    text(tmp_path / "data.yaml", f"names: [a]\nkpt_shape: [{keypoints}, {each}]\n")
    found = [corners for _, corners in boxes(read(tmp_path))["a.png"]]
    np.testing.assert_allclose(found, np.array(expected) * (40, 20, 40, 20), atol=1e-3)
    text(tmp_path / "data.yaml", "names: [a]\nkpt_shape: [7, 3]\n")
    with pytest.raises(PlainError, match=rf"line 2: has {length} numbers, .* by kpt_shape, 21 of keypoints"):
        read(tmp_path)
    text(tmp_path / "data.yaml", "names: [a]\nkpt_shape: 0\n")  # polygons, whatever they look like
    if length % 2 and min(map(min, drawn)) > -0.5:
        assert len(boxes(read(tmp_path))["a.png"]) == 21
    text(tmp_path / "data.yaml", "names: [a]\nkpt_shape: [2, 4]\n")
    with pytest.raises(PlainError, match="kpt_shape must be"):
        read(tmp_path)


def rectangle(rng: np.random.Generator) -> np.ndarray:
    """Draws the corners of a turned rectangle around 0."""
    long, turn = rng.uniform(0.05, 0.6), rng.uniform(0, 2 * np.pi)
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])[:: rng.choice([-1, 1])]
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return (corners * [long / 2, long * rng.uniform(0.1, 1) / 2]) @ turned.T


def polygon(corners: int, rng: np.random.Generator) -> np.ndarray:
    """Draws the corners of a polygon around 0."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    points = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * rng.uniform(0.4, 1, (corners, 1))
    return np.roll(rng.uniform(0.05, 0.45) * points, rng.integers(corners), axis=0)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("shape", ["rectangle", "triangle", "quadrilateral", "heptagon"])
def test_polygons_are_not_taken_for_keypoints(shape: str, centred: bool) -> None:
    """Anywhere, or near the image's centre. Of 300 sets of 5 to 30 polygons at most three are refused."""
    rng, refused = np.random.default_rng(7), 0
    kinds = {"triangle": 3, "quadrilateral": 4, "heptagon": 7}
    for _ in range(300):
        long = LongLines(None)
        for _ in range(rng.integers(5, 31)):
            points = rectangle(rng) if shape == "rectangle" else polygon(kinds[shape], rng)
            low, high = -points.min(axis=0), 1 - points.max(axis=0)
            points = points + (0.5 + rng.normal(0, 0.1, 2) if centred else low + rng.random(2) * (high - low))
            long.add([0.0, *np.clip(points, 0, 1).ravel().tolist()])
        try:
            long.check("labels", "")
        except PlainError:
            refused += 1
    assert refused <= 3
