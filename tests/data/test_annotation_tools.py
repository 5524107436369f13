"""COCO files as annotation tools write them: read correctly, with a note, or refused with the option that accepts them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_sets import encode, write_coco

from retina_jax.config import Config, DataConfig
from retina_jax.config_io import override
from retina_jax.data import survey
from retina_jax.data.datasets import open_source, read_coco
from retina_jax.data.source import BadImage, DataError, Source
from retina_jax.data.survey import with_decoding
from retina_jax.data_check.check import check_data

WIDTH, HEIGHT = 128, 96
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the home folder, in which the cache of image sizes is written."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def plain() -> dict[str, Any]:
    """Returns four images, 0.png to 3.png, with a box of each class in each."""
    rng = np.random.default_rng(0)
    annotations = [
        {"id": n + 1, "image_id": n // 2, "category_id": 1 + n % 2, "bbox": box, "area": 900, "iscrowd": 0}
        for n, box in enumerate([[10 + 60 * (n % 2), int(rng.integers(40, 60)), 30, 30] for n in range(8)])
    ]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(4)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}],
    }


def written(folder: Path, edit: Edit, size: tuple[int, int] = (HEIGHT, WIDTH)) -> tuple[Path, Path]:
    """The plain dataset after `edit`, with its images."""
    content = plain()
    edit(content)
    path, images = write_coco(folder, content)
    for i in range(4):
        (images / f"{i}.png").write_bytes(encode(np.full((*size, 3), 40 * i, np.uint8), "PNG"))
    return path, images


def each_box(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Edit:
    return lambda content: content.update(annotations=[change(a) for a in content["annotations"]])


def each_image(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Edit:
    return lambda content: content.update(images=[change(i) for i in content["images"]])


def fractions(a: dict[str, Any]) -> dict[str, Any]:
    x, y, w, h = a["bbox"]
    return a | {"bbox": [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT], "area": w * h / WIDTH / HEIGHT}


def corners(a: dict[str, Any]) -> dict[str, Any]:
    x, y, w, h = a["bbox"]
    return a | {"bbox": [x, y, x + w, y + h]}


def polygon(a: dict[str, Any]) -> dict[str, Any]:
    x, y, w, h = a.pop("bbox")
    return a | {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}


def no_area(a: dict[str, Any]) -> dict[str, Any]:
    return polygon(dict(a)) | {"bbox": [0, 0, 0, 0], "area": 0}


def mixed(
    change: Callable[[dict[str, Any]], dict[str, Any]], other: Callable[[dict[str, Any]], dict[str, Any]]
) -> Edit:
    """Returns an edit that writes every second annotation in the first form and the others in the second."""
    return each_box(lambda a: change(a) if a["id"] % 2 else other(a))


def text_values(a: dict[str, Any]) -> dict[str, Any]:
    return a | {"bbox": [str(number) for number in a["bbox"]], "area": "900.0", "iscrowd": "0"}


def as_text(a: dict[str, Any]) -> dict[str, Any]:
    return a | {key: str(a[key]) for key in ("id", "image_id", "category_id", "width") if key in a}


def all_as_text(content: dict[str, Any]) -> None:
    each_box(as_text)(content)
    each_image(as_text)(content)


def renamed(pattern: str) -> Edit:
    return each_image(lambda i: i | {"file_name": pattern.format(i["file_name"])})


RIGHT: dict[str, tuple[Edit, dict[str, Any], str | None]] = {
    "as COCO has it": (lambda content: None, {}, None),
    "fractions": (each_box(fractions), {"box_format": "xywh_fractions"}, None),
    "corners": (each_box(corners), {"box_format": "xyxy"}, None),
    "all crowds": (each_box(lambda a: a | {"iscrowd": 1}), {"crowds": "objects"}, None),
    "polygons": (each_box(polygon), {}, None),
    "polygons in fractions": (each_box(lambda a: polygon(fractions(a))), {"box_format": "xywh_fractions"}, None),
    "no sizes": (each_image(lambda i: {"id": i["id"], "file_name": i["file_name"]}), {}, None),
    "sizes null and 0": (each_image(lambda i: i | {"width": None, "height": 0}), {}, None),
    "corners and polygons": (mixed(corners, polygon), {"box_format": "xyxy"}, None),
    "fractions and polygons in pixels": (mixed(fractions, polygon), {"box_format": "xywh_fractions"}, None),
    "boxes without area": (each_box(no_area), {}, None),
    "values as text": (each_box(text_values), {}, "text_numbers"),
    "values null": (each_box(lambda a: a | {"area": None, "iscrowd": None}), {}, None),
    "a format that others fit": (lambda content: None, {"box_format": "xywh"}, None),
    "ids as text": (all_as_text, {}, "text_numbers"),
    "backslashes": (renamed("images\\{}"), {}, "moved"),
    "a folder too many": (renamed("default/{}"), {}, "moved"),
    "another machine": (renamed("C:\\Users\\me\\{}"), {}, "moved"),
    "no areas": (each_box(lambda a: {k: v for k, v in a.items() if k != "area"}), {}, None),
}


@pytest.mark.parametrize("case", RIGHT)
def test_a_readable_variant_gives_the_same_dataset(tmp_path: Path, case: str) -> None:
    """Compares records, ground truth and files; the data check also reports what training notes."""
    (tmp_path / "plain").mkdir()
    expected = read_coco(*written(tmp_path / "plain", lambda content: None))
    edit, options, kind = RIGHT[case]
    path, images = written(tmp_path, edit)
    source = read_coco(path, images, images_without_boxes="drop", data=DataConfig(**options))
    for record, same in zip(source.records, expected.records, strict=True):
        assert (record.image_id, record.width, record.height) == (same.image_id, same.width, same.height)
        assert np.allclose(record.boxes_xyxy, same.boxes_xyxy) and record.labels.tolist() == same.labels.tolist()
    for a, b in zip(source.ground_truth["annotations"], expected.ground_truth["annotations"], strict=True):
        assert np.allclose(a.pop("bbox"), b.pop("bbox")) and a.pop("area") == pytest.approx(b.pop("area")) and a == b
    assert [Path(source.where(i)).read_bytes() for i in range(4)] == [source.read(i) for i in range(4)]
    assert [Path(source.where(i)) for i in range(4)] == [images / f"{i}.png" for i in range(4)]
    config = override(Config(), {f"data.{name}": value for name, value in options.items()})
    kinds = {group.kind for group in check_data(config, {"train": (path, images)}).groups}
    assert len(source.notes) == (kind is not None) and (kind is None or kind in kinds)
    assert not kinds & {"missing", "refused_boxes", "refused_images", "nothing_to_learn"}


REFUSED: dict[str, tuple[Edit, str, str]] = {
    "fractions": (each_box(fractions), "box_format", "data.box_format xywh_fractions"),
    "corners": (each_box(corners), "box_format", "data.box_format xyxy"),
    "corners and polygons": (mixed(corners, polygon), "box_format", "data.box_format xyxy"),
    "fractions and polygons": (mixed(fractions, polygon), "box_format", "data.box_format xywh_fractions"),
    "polygons in fractions": (mixed(dict, lambda a: polygon(fractions(a))), "box_format", "polygons"),
    "boxes outside": (each_box(lambda a: a | {"bbox": [12 * WIDTH, 9, 30, 30]}), "box_format", "check the sizes"),
    "all crowds": (each_box(lambda a: a | {"iscrowd": 1}), "all_crowds", "data.crowds objects"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_error_names_the_option_that_accepts_the_file(tmp_path: Path, case: str) -> None:
    edit, kind, option = REFUSED[case]
    path, images = written(tmp_path, edit)
    paths = {
        f"data.{s}_{what}": str(at)
        for s in ("train", "val")
        for what, at in (("annotations", path), ("images", images))
    }
    config = override(Config(), paths)
    with pytest.raises(DataError, match=option):
        open_source(config.data, "train")
    check = check_data(config, {"train": (path, images)})
    found = {group.kind: group.findings for group in check.groups}
    assert option in found[kind][0].text and not check.ready


def test_an_option_keeps_correct_boxes_that_look_wrong(tmp_path: Path) -> None:
    source = read_coco(*written(tmp_path, each_box(corners)), data=DataConfig(box_format="xywh"))
    assert source.counts["clipped"] == 8 and source.notes == ()


def test_a_chosen_format_that_does_not_fit_is_noted(tmp_path: Path) -> None:
    path, images = written(tmp_path, lambda content: None)
    for chosen in ("xyxy", "xywh_fractions"):
        (note,) = read_coco(path, images, data=DataConfig(box_format=chosen)).notes
        assert chosen in note and "set data.box_format xywh" in note
        groups = check_data(override(Config(), {"data.box_format": chosen}), {"train": (path, images)}).groups
        assert "likely_format" in {group.kind for group in groups}


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        del content["annotations"][2]["bbox"]
        content["annotations"][2]["segmentation"] = {
            "size": [HEIGHT // 2, WIDTH // 2],
            "counts": [9, HEIGHT * WIDTH // 4 - 9],
        }

    path, images = written(tmp_path, edit)
    with pytest.raises(DataError, match=r"annotations\[2\] \(id 3\)"):
        read_coco(path, images)
    (group,) = (g for g in check_data(Config(), {"train": (path, images)}).groups if g.kind == "refused_boxes")
    assert [finding.name for finding in group.findings] == ["annotations[2] (id 3)"]


def test_a_class_with_only_crowds_is_reported_and_an_option_reads_them_as_objects(tmp_path: Path) -> None:
    edit = each_box(lambda a: a | {"iscrowd": int(a["category_id"] == 2)})
    path, images = written(tmp_path, edit)
    source = read_coco(path, images)
    (note,) = source.notes
    assert "'blue'" in note and "'red'" not in note and "4 in all" in note
    taken = read_coco(path, images, data=DataConfig(crowds="objects"))
    assert [a["iscrowd"] for a in source.ground_truth["annotations"]] == [0, 1] * 4
    assert not any(a["iscrowd"] for a in taken.ground_truth["annotations"]) and taken.notes == ()


def test_annotations_without_a_box_are_dropped_and_counted(tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        del content["annotations"][0]["bbox"]
        content["annotations"][1].update(bbox=[], keypoints=[4, 4, 2], num_keypoints=1)
        content["annotations"][2].update(bbox=None, segmentation=[])

    path, images = written(tmp_path, edit)
    source = read_coco(path, images)
    assert source.counts["without_box"] == 3 and "3 without bbox" in str(source)
    assert [a["id"] for a in source.ground_truth["annotations"]] == [4, 5, 6, 7, 8]
    groups = {group.kind: group for group in check_data(Config(), {"train": (path, images)}).groups}
    assert [f.name for f in groups["without_box"].findings] == ["annotation 1", "annotation 2", "annotation 3"]


def no_sizes(i: dict[str, Any]) -> dict[str, Any]:
    return {"id": i["id"], "file_name": i["file_name"]}


def test_missing_sizes_are_read_from_the_files_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    read: list[str] = []
    from_files = survey.read_headers
    monkeypatch.setattr(survey, "read_headers", lambda paths: read.extend(p.name for p in paths) or from_files(paths))
    path, images = written(tmp_path, each_image(no_sizes))

    def sizes() -> list[tuple[int, int]]:
        return [(record.width, record.height) for record in read_coco(path, images).records]

    read_coco(path, images)
    assert sorted(read[:4]) == [f"{i}.png" for i in range(4)]
    read.clear()
    assert sizes() == [(WIDTH, HEIGHT)] * 4 and not read
    (images / "2.png").write_bytes(encode(np.zeros((70, 50, 3), np.uint8), "PNG"))
    assert sizes()[2] == (50, 70) and read == ["2.png"]
    (cache,) = (home / ".cache/retina_jax/image_sizes").iterdir()
    for damage in ("[", "[1]", '{"a": 1}', "[" * 200_000):
        cache.write_text(damage)
        read.clear()
        assert sizes()[2] == (50, 70) and len(read) == 4
    cache.unlink()
    cache.parent.rmdir()
    cache.parent.write_text("no folder")
    assert sizes()[2] == (50, 70)


def test_the_size_of_a_rotated_image_is_that_of_the_displayed_image(tmp_path: Path) -> None:
    path, images = written(tmp_path, each_image(no_sizes))
    exif = Image.Exif()
    exif[0x0112] = 6
    (images / "1.png").write_bytes(encode(np.zeros((HEIGHT, WIDTH, 3), np.uint8), "PNG", exif=exif))
    source = read_coco(path, images)
    assert (source.records[1].width, source.records[1].height) == (HEIGHT, WIDTH)
    assert 1 in source.unsized and with_decoding(source, DataConfig()).annotated_orientation == "open"


def test_a_size_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path, images = written(tmp_path, each_image(no_sizes))
    (images / "2.png").write_bytes(b"404 not found")
    os.mkfifo(images / "pipe")
    for name in ("2.png", "pipe", "absent.png"):
        content = json.loads(path.read_text())
        content["images"][2]["file_name"] = name
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=rf"images\[2\] \(id 2\): width and height .*/{name}"):
            read_coco(path, images)
        (group,) = (g for g in check_data(Config(), {"train": (path, images)}).groups if g.kind == "refused_images")
        assert group.findings[0].name == "images[2] (id 2)"


def test_the_error_for_a_missing_file_names_similar_files(tmp_path: Path) -> None:
    path, images = written(tmp_path, lambda content: None)
    (tmp_path / "other").mkdir()
    config = override(Config(), {"data.train_annotations": str(path), "data.train_images": str(tmp_path / "other")})
    source: Source = open_source(config.data, "train")
    assert str(images / "0.png") in source.missing[0] and len(source.missing) == 4
    with pytest.raises(BadImage, match=f"{images}/0.png"):
        source.read(0)
    check = check_data(config, {"train": (path, tmp_path / "other")})
    (missing,) = (group for group in check.groups if group.kind == "missing")
    assert str(images / "0.png") in missing.findings[0].text
