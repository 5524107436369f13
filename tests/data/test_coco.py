"""COCO files: what is read and what is cleaned, and one line for every mistake."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from small_sets import document, write_coco

from retina_jax.config import DataConfig
from retina_jax.data import coco_document
from retina_jax.data.classes import COCO_CATEGORIES
from retina_jax.data.coco_document import parse_coco, parse_document
from retina_jax.data.coco_entries import Mistake
from retina_jax.data.datasets import open_source, read_coco
from retina_jax.data.source import BadImage, DataError, classify_boxes


def edited(**changes: Any) -> dict[str, Any]:
    """Returns the small file with values at dotted paths changed; a value of ... removes the entry."""
    content = document()
    for place, value in changes.items():
        *path, last = [int(part) if part.isdigit() else part for part in place.split("__")]
        at = content
        for part in path:
            at = at[part]
        if value is ...:
            del at[last]
        else:
            at[last] = value
    return content


def test_labels_follow_the_order_of_the_file(tmp_path: Path) -> None:
    source = read_coco(*write_coco(tmp_path, document()))
    assert (source.category_ids, source.class_names) == ((7, 3), ("dog", "cat"))
    assert [record.labels.tolist() for record in source.records] == [[0], [1]]
    assert [record.image_id for record in source.records] == [1, 2]
    assert source.records[0].boxes_xyxy.tolist() == [[4, 5, 24, 15]]
    assert source.records[1].boxes_xyxy.tolist() == [[1.5, 2, 4.5, 6.25]]


@pytest.mark.parametrize(
    ("key", "refused"),
    [(b'"\xe9mage_id"', "image_id must be an integer, but is missing"), (b'"n": "\xe9", "image_id"', "")],
)
def test_bytes_of_another_encoding_in_an_annotation_are_named_or_not_read(
    tmp_path: Path, key: bytes, refused: str
) -> None:
    path, images = write_coco(tmp_path, document())
    path.write_bytes(path.read_bytes().replace(b'"image_id"', key, 1))
    with pytest.raises(DataError, match=refused) if refused else contextlib.nullcontext():
        assert len(read_coco(path, images)) == 2


def test_images_without_annotations_are_accepted_only_on_request(tmp_path: Path) -> None:
    """COCO's image_info_test-dev2017.json has no such key; an invalid value of it is never accepted."""
    path, images = write_coco(tmp_path, edited(annotations=...))
    with pytest.raises(DataError, match=r"annotations must .*missing"):
        read_coco(path, images)
    source = read_coco(path, images, unlabelled=True)
    assert not source.labelled and [record.image_id for record in source.records] == [1, 2]
    assert (
        source.ground_truth["annotations"] == []
        and len(source.ground_truth["images"]) == len(source.ground_truth["categories"]) == 2
    )
    path, images = write_coco(tmp_path, edited(annotations=None))
    with pytest.raises(DataError, match=r"annotations must .*null"):
        read_coco(path, images, unlabelled=True)
    path, images = write_coco(tmp_path, document())
    labelled = read_coco(path, images, unlabelled=True)
    assert labelled.labelled and labelled.ground_truth == read_coco(path, images).ground_truth


def test_cleaning_counts_each_box_once(tmp_path: Path) -> None:
    boxes = {
        "crowd": ([0, 0, 9, 9], 1),
        "zero width": ([5, 5, 0, 9], 0),
        "negative height": ([5, 5, 9, -1], 0),
        "nothing left in float32": ([40, 5, 1e-9, 9], 0),
        "touches the right edge from outside": ([64, 5, 9, 9], 0),
        "above": ([5, -10, 9, 10], 0),
        "sticks out": ([-4, 40, 10, 20], 0),
        "sticks out by rounding": ([54, 5, 10.004, 9], 0),
        "fits exactly": ([0, 0, 64, 48], 0),
    }
    content = edited(
        annotations=[
            {"id": i + 1, "image_id": 1, "category_id": 3, "bbox": box, "iscrowd": crowd}
            for i, (box, crowd) in enumerate(boxes.values())
        ]
    )
    source = read_coco(*write_coco(tmp_path, content))
    assert source.counts == {"crowd": 1, "zero_size": 3, "outside": 2, "clipped": 1, "images_without_boxes": 1}
    kept = [[0, 40, 6, 48], [54, 5, 64, 14], [0, 0, 64, 48]]
    assert source.records[0].boxes_xyxy.tolist() == kept
    assert len(source) == 2 and len(read_coco(*write_coco(tmp_path, content), images_without_boxes="drop")) == 1
    assert len(source.ground_truth["annotations"]) == len(boxes)


def test_the_ground_truth_is_the_file_plus_the_fields_that_pycocotools_needs(tmp_path: Path) -> None:
    content = document()
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    del content["annotations"][1]["area"], content["annotations"][1]["iscrowd"]
    ground_truth = read_coco(*write_coco(tmp_path, content)).ground_truth
    assert ground_truth["annotations"] == document()["annotations"]
    assert ground_truth["images"] == document()["images"]
    assert ground_truth["categories"] == document()["categories"]
    api = COCO()
    api.dataset = ground_truth
    api.createIndex()
    assert sorted(api.getAnnIds()) == [1, 2]


@pytest.mark.parametrize("ids", [(0, 1), (5, 5), (-1, 2), (None, 4)])
def test_annotation_ids_that_pycocotools_cannot_use_are_renumbered(tmp_path: Path, ids: tuple[int | None, int]) -> None:
    content = edited(annotations__0__id=ids[0] if ids[0] is not None else ..., annotations__1__id=ids[1])
    ground_truth = read_coco(*write_coco(tmp_path, content)).ground_truth
    assert [annotation["id"] for annotation in ground_truth["annotations"]] == [1, 2]


MISTAKES: dict[str, tuple[Any, str]] = {
    "broken JSON": ('{"images": [\n  1,,]}', r"line 2, column 5"),
    "endless nesting": ("[" * 100_000, r"JSON"),
    "a list": ([1], r"object.*\[1\]"),
    "no images": (edited(images=...), r"images must .*missing"),
    "no annotations": (edited(annotations=...), r"annotations must .*missing"),
    "no categories": (edited(categories=...), r"categories must .*missing"),
    "images null": (edited(images=None), r"images must .*null"),
    "image is text": (edited(images__1="two.jpg"), r"images\[1\]: .*object, not 'two.jpg'"),
    "images empty": (edited(images=[], annotations=[]), r"images is empty"),
    "categories empty": (edited(categories=[], annotations=[]), r"categories is empty"),
    "image id twice": (edited(images__1__id=1), r"images\[1\] \(id 1\): id .*twice"),
    "category id twice": (edited(categories__1__id=7), r"categories\[1\] \(id 7\): id .*twice"),
    "image id text": (edited(images__0__id="1a"), r"images\[0\] \(id '1a'\): id .*integer, not '1a'"),
    "image id twice, as text": (edited(images__1__id="01"), r"images\[1\] \(id .*1'?\): id .*twice"),
    "image id missing": (edited(images__0__id=...), r"images\[0\]: id .*integer.*missing"),
    "image id true": (edited(images__0__id=True), r"images\[0\].* id must be .*integer, not True"),
    "width missing": (edited(images__0__width=...), r"images\[0\] \(id 1\): width and height .*/one.jpg"),
    "height null": (edited(images__0__height=None), r"width and height .*/one.jpg"),
    "width zero": (edited(images__0__width=0), r"width and height .*/one.jpg"),
    "width text": (edited(images__0__width="wide"), r"images\[0\] \(id 1\): width .*integer.*'wide'"),
    "width of a fraction": (edited(images__0__width=4.5), r"images\[0\] \(id 1\): width .*integer.*4.5"),
    "height negative": (edited(images__0__height=-4), r"height .*positive.*pixels.*-4"),
    "width huge": (edited(images__0__width=10**400), r"width .*integer.*1000"),
    "file name missing": (edited(images__0__file_name=...), r"file_name .*text.*missing"),
    "file name a number": (edited(images__0__file_name=3), r"file_name .*text.*not 3"),
    "file name empty": (edited(images__0__file_name=""), r"file_name .*text.*''"),
    "file name absolute": (edited(images__0__file_name="/etc/passwd"), r"images\[0\].*file_name .*'/etc/passwd'"),
    "file name climbs": (edited(images__0__file_name="a/../../b.jpg"), r"images\[0\].*file_name .*'a/../../b.jpg'"),
    "file name of Windows": (edited(images__0__file_name="C:\\b.jpg"), r"images\[0\].*file_name .*b.jpg"),
    "file name with NUL": (edited(images__0__file_name="a\0b.jpg"), r"file_name .*text.*'a\\x00b.jpg'"),
    "category name null": (edited(categories__0__name=None), r"categories\[0\] \(id 7\): name .*text.*null"),
    "unknown image": (edited(annotations__0__image_id=9), r"annotations\[0\] \(id 1\): image_id .*not 9"),
    "unknown category": (
        edited(annotations__1__category_id=1),
        r"annotations\[1\] \(id 2\): category_id .*\[3, 7\], not 1",
    ),
    "image_id a list": (edited(annotations__0__image_id=[1]), r"image_id .*integer, not \[1\]"),
    "category_id 3.5": (edited(annotations__0__category_id=3.5), r"category_id .*integer, not 3.5"),
    "annotation null": (edited(annotations__0=None), r"annotations\[0\]: .*object, not null"),
    "annotation id text": (edited(annotations__0__id="x"), r"annotations\[0\] \(id 'x'\): id .*integer"),
    "bbox of three": (edited(annotations__0__bbox=[1, 2, 3]), r"bbox .*four .*not \[1, 2, 3\]"),
    "no bbox and no polygon": (
        edited(annotations__0__bbox=..., annotations__0__segmentation=[[1, 2, 3]]),
        r"annotations\[0\] \(id 1\): .*bbox.*segmentation",
    ),
    "bbox of text": (edited(annotations__0__bbox=["one", 2, 3, 4]), r"bbox .*four.*'one'"),
    "bbox NaN": (edited(annotations__0__bbox=[1, float("nan"), 3, 4]), r"bbox .*finite.*nan"),
    "bbox infinite": (edited(annotations__0__bbox=[1, 2, float("inf"), 4]), r"bbox .*finite.*inf"),
    "bbox nested": (edited(annotations__0__bbox=[[1, 2], [3, 4]]), r"bbox .*four"),
    "bbox an object": (edited(annotations__0__bbox={"x": 1}), r"bbox .*four"),
    "iscrowd text": (edited(annotations__0__iscrowd="no"), r"iscrowd .*0 or 1, not 'no'"),
    "iscrowd 2": (edited(annotations__0__iscrowd=2), r"iscrowd .*0 or 1, not 2"),
    "iscrowd list": (edited(annotations__0__iscrowd=[]), r"iscrowd .*0 or 1, not \[\]"),
    "area text": (edited(annotations__0__area="big"), r"area .*number.*'big'"),
    "area NaN": (edited(annotations__0__area=float("nan")), r"area .*number.*nan"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named_in_one_line(tmp_path: Path, mistake: str) -> None:
    content, message = MISTAKES[mistake]
    path, images = write_coco(tmp_path, content)
    with pytest.raises(DataError, match=message) as raised:
        read_coco(path, images)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_every_mistake_is_collected_on_request(tmp_path: Path) -> None:
    """The data check collects them; the entries without a mistake are kept."""
    content = edited(images__1__id="x", annotations__0__bbox=[1], categories__0__name="")
    content["annotations"].append({"id": 3, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]})
    mistakes: list[Mistake] = []
    found = parse_document(tmp_path / "a.json", content, mistakes)
    named = [(m.key, m.index, m.entry) for m in mistakes]
    assert named == [(key, i, content[key][i]) for key, i in
                     [("categories", 0), ("images", 1), ("annotations", 0), ("annotations", 1)]]  # fmt: skip
    assert (found.categories, found.ids.tolist(), found.rows.tolist()) == ([(3, "cat")], [3], [2])


VALUES_AS_TEXT = {"id": "1", "image_id": "1", "category_id": "7.0", "bbox": ["4", "5.0", "2e1", 10], "area": "200"}
TOLERATED: dict[str, dict[str, Any]] = {
    "numbers as text": VALUES_AS_TEXT,
    "integers as floats": {"id": 1.0, "image_id": 1.0, "category_id": 7.0, "iscrowd": 0.0},
    "a crowd as false": {"iscrowd": False},
    "a crowd as text": {"iscrowd": "0"},
    "nulls": {"area": None, "iscrowd": None},
    "NaN where nobody looks": {"score": float("nan")},
    "polygons as text": {"segmentation": "x"},
    "polygons of NaN": {"segmentation": [[float("nan")]]},
}


@pytest.mark.parametrize("case", TOLERATED)
def test_an_unusual_value_changes_nothing(tmp_path: Path, case: str) -> None:
    expected = read_coco(*write_coco(tmp_path, document()))
    content = document()
    content["annotations"][0] |= TOLERATED[case]
    source = read_coco(*write_coco(tmp_path, content))
    assert source.sha256 == expected.sha256 and source.ground_truth == expected.ground_truth
    assert bool(source.notes) == ("as text" in case and "polygons" not in case)


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_a_correct_file_is_decoded_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Decoding entry by entry takes ten times as long; only files with unusual values or mistakes need it."""
    monkeypatch.setattr("retina_jax.data.coco_entries.CHUNK", chunk)
    content = document()
    content["annotations"][0]["segmentation"] = [[4, 5, 24, 5, 24, 15, 4, 15]]
    content["annotations"][1] |= {"bbox": [0, 0, 0, 0], "segmentation": [[1.5, 2, 4.5, 6.25]]}
    expected = parse_document(tmp_path, content)
    monkeypatch.setattr("retina_jax.data.coco_entries.parse_entry", None)
    found = parse_coco(write_coco(tmp_path, content)[0])
    for field, value in vars(expected).items():
        assert np.array_equal(getattr(found, field), value), field
    assert found.boxes_xywh[1].tolist() == [1.5, 2, 3, 4.25]


def test_reading_a_large_file_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_coco(tmp_path, document())[0]
    parse_coco(path)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(coco_document, "SLOW_JSON", path.stat().st_size)
    parse_coco(path)
    assert re.fullmatch(rf"reading {path.name} \(\d+ MB\) \.\.\.\n", capsys.readouterr().out)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path, document())
    path.write_bytes(b"\xff\xfe\x00\x81 not text")
    with pytest.raises(DataError, match="JSON"):
        read_coco(path, images)


def test_missing_paths_are_named(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path, document())
    with pytest.raises(DataError, match=rf"{tmp_path}/no\.json"):
        read_coco(tmp_path / "no.json", images)
    with pytest.raises(DataError, match="images"):
        read_coco(images, images)
    with pytest.raises(DataError, match=rf"{tmp_path}/none"):
        read_coco(path, tmp_path / "none")


def test_training_on_no_box_is_refused(tmp_path: Path) -> None:
    paths = write_coco(tmp_path, edited(annotations=[]))
    data = DataConfig(train_annotations=str(paths[0]), train_images=str(paths[1]))
    with pytest.raises(DataError, match=rf"{paths[0]}.*box"):
        open_source(data, "train")
    assert len(read_coco(*paths)) == 2


def test_missing_image_is_a_bad_image_named_by_its_path(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path, document())
    (images / "two.jpg").mkdir()
    source = read_coco(path, images)
    for i, name in enumerate(("one.jpg", "two.jpg")):
        with pytest.raises(BadImage, match=rf"{images / name}"):
            source.read(i)


coordinate = st.floats(-100, 200, width=32) | st.integers(-2, 110)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(*[coordinate] * 4, st.booleans()), max_size=12))
def test_every_box_is_kept_or_counted(found: list[tuple]) -> None:
    columns = np.array(found, np.float64).reshape(-1, 5)
    sizes = np.tile(np.array([[100, 60]]), (len(columns), 1))
    cleaned, kinds = classify_boxes(columns[:, :4], columns[:, 4] > 0, sizes)
    usable = kinds["usable"]
    assert (sum(kinds[kind].astype(int) for kind in ("usable", "crowd", "zero_size", "outside")) == 1).all()
    assert not (kinds["clipped"] & ~usable).any()
    kept = cleaned[usable]
    assert (kept[:, :2] >= 0).all() and (kept[:, 2:] <= [100, 60]).all() and (kept[:, :2] < kept[:, 2:]).all()
    original = columns[usable, :4]
    untouched = (original[:, :2] >= 0).all(1) & (original[:, 2:] <= [100, 60]).all(1)
    assert np.array_equal(kept[untouched], original[untouched].astype(np.float32))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)
PLACES = [
    f"{part}__0__{key}"
    for part, keys in {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
        "categories": ("id", "name"),
    }.items()
    for key in keys
] + ["images", "annotations", "categories", "images__0", "annotations__0", "categories__0"]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(PLACES), anything)
def test_any_value_anywhere_is_read_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, place: str, value: object
) -> None:
    folder = tmp_path_factory.mktemp("any")
    path, images = write_coco(folder, json.dumps(edited(**{place: value})))
    try:
        source = read_coco(path, images)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert all((r.boxes_xyxy[:, 2:] > r.boxes_xyxy[:, :2]).all() for r in source.records)
        assert len(source.ground_truth["annotations"]) >= sum(len(r.labels) for r in source.records)


def test_bccd_has_two_boxes_of_zero_size(shared_data: Path) -> None:
    folder = shared_data / "bccd"
    sources = [
        read_coco(folder / f"annotations/instances_{s}.json", folder / "images") for s in ("train", "val", "test")
    ]
    assert sum(source.counts["zero_size"] for source in sources) == 2
    assert [len(source) for source in sources] == [205, 87, 72]
    assert sum(len(record.labels) for source in sources for record in source.records) == 4888 - 2
    assert sources[0].class_names == ("RBC", "WBC", "Platelets")


def test_coco_subset_has_coco_classes_and_crowds(shared_data: Path) -> None:
    folder = shared_data / "coco_subset"
    source = read_coco(
        folder / "annotations/instances_train2017.json", folder / "train2017", images_without_boxes="drop"
    )
    content = parse_coco(folder / "annotations/instances_train2017.json")
    assert tuple(zip(source.category_ids, source.class_names, strict=True)) == COCO_CATEGORIES
    assert source.counts["crowd"] == int(content.crowd.sum()) > 0
    dropped = sum(source.counts[kind] for kind in ("crowd", "zero_size", "outside"))
    assert sum(len(record.labels) for record in source.records) == len(content.ids) - dropped
    assert len(source) == len(content.images) - source.counts["images_without_boxes"]
    assert np.diff([category for category, _ in COCO_CATEGORIES]).min() > 0
    assert source.read(0)[:2] == b"\xff\xd8"
