"""COCO files: what is read, what is cleaned, and one line for every mistake."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from small_sets import document, write_coco

from retina_jax.data.classes import COCO_CATEGORIES
from retina_jax.data.coco import parse_coco, read_coco
from retina_jax.data.source import BadImage, DataError, clean_boxes


def edited(**changes: Any) -> dict[str, Any]:
    """The small file with values at dotted places changed; a value of ... removes the place."""
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


def test_images_without_annotations_are_accepted_only_on_request(tmp_path: Path) -> None:
    """COCO's image_info_test-dev2017.json has no such key; an invalid value of it is never accepted."""
    path, images = write_coco(tmp_path, edited(annotations=...))
    with pytest.raises(DataError, match="annotations must be a list of objects, but is missing"):
        read_coco(path, images)
    source = read_coco(path, images, unlabelled=True)
    assert not source.labelled and [record.image_id for record in source.records] == [1, 2]
    assert source.truth["annotations"] == [] and len(source.truth["images"]) == len(source.truth["categories"]) == 2
    path, images = write_coco(tmp_path, edited(annotations=None))
    with pytest.raises(DataError, match="annotations must be a list of objects, but is null"):
        read_coco(path, images, unlabelled=True)
    path, images = write_coco(tmp_path, document())
    labelled = read_coco(path, images, unlabelled=True)
    assert labelled.labelled and labelled.truth == read_coco(path, images).truth


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
    assert len(source.truth["annotations"]) == len(boxes)


def test_truth_is_the_file_plus_what_pycocotools_needs(tmp_path: Path) -> None:
    content = document()
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    del content["annotations"][1]["area"], content["annotations"][1]["iscrowd"]
    truth = read_coco(*write_coco(tmp_path, content)).truth
    assert truth["annotations"] == document()["annotations"]
    assert truth["images"] == document()["images"]
    assert truth["categories"] == document()["categories"]
    api = COCO()
    api.dataset = truth
    api.createIndex()
    assert sorted(api.getAnnIds()) == [1, 2]


@pytest.mark.parametrize("ids", [(0, 1), (5, 5), (-1, 2), (None, 4)])
def test_truth_ids_are_renumbered_where_they_cannot_serve(tmp_path: Path, ids: tuple[int | None, int]) -> None:
    content = edited(annotations__0__id=ids[0] if ids[0] is not None else ..., annotations__1__id=ids[1])
    truth = read_coco(*write_coco(tmp_path, content)).truth
    assert [annotation["id"] for annotation in truth["annotations"]] == [1, 2]


MISTAKES: dict[str, tuple[Any, str]] = {
    "broken JSON": ('{"images": [\n  1,,]}', r"is not JSON: line 2, column 5"),
    "endless nesting": ("[" * 100_000, r"is not JSON"),
    "a list": ([1], r"must be an object"),
    "no images": (edited(images=...), r"images must be a list of objects, but is missing"),
    "no annotations": (edited(annotations=...), r"annotations must be a list of objects, but is missing"),
    "no categories": (edited(categories=...), r"categories must be a list of objects, but is missing"),
    "images null": (edited(images=None), r"images must be a list of objects, but is null"),
    "image is text": (edited(images__1="two.jpg"), r"images\[1\]: must be an object, not 'two.jpg'"),
    "images empty": (edited(images=[], annotations=[]), r"images is empty"),
    "categories empty": (edited(categories=[], annotations=[]), r"categories is empty"),
    "image id twice": (edited(images__1__id=1), r"images\[1\] \(id 1\): id is used twice"),
    "category id twice": (edited(categories__1__id=7), r"categories\[1\] \(id 7\): id is used twice"),
    "image id text": (edited(images__0__id="1a"), r"images\[0\] \(id '1a'\): id must be an integer, not '1a'"),
    "image id twice, as text": (edited(images__1__id="01"), r"images\[1\] \(id '01'\): id is used twice"),
    "image id missing": (edited(images__0__id=...), r"images\[0\]: id must be an integer, but is missing"),
    "image id true": (edited(images__0__id=True), r"id must be an integer, not True"),
    "width missing": (
        edited(images__0__width=...),
        r"images\[0\] \(id 1\): width and height are missing, and .*/one.jpg",
    ),
    "height null": (edited(images__0__height=None), r"width and height are missing, and .*/one.jpg cannot be read"),
    "width zero": (edited(images__0__width=0), r"width and height are missing, and .*/one.jpg cannot be read"),
    "width text": (edited(images__0__width="wide"), r"width must be an integer, not 'wide'"),
    "height negative": (edited(images__0__height=-4), r"height must be a positive number of pixels, not -4"),
    "width huge": (edited(images__0__width=10**400), r"width must be an integer, not 1000"),
    "file name missing": (edited(images__0__file_name=...), r"file_name must be text, but is missing"),
    "file name a number": (edited(images__0__file_name=3), r"file_name must be text, not 3"),
    "file name empty": (edited(images__0__file_name=""), r"file_name must be text, not ''"),
    "file name absolute": (edited(images__0__file_name="/etc/passwd"), r"file_name must be a path inside the image"),
    "file name climbs": (edited(images__0__file_name="a/../../b.jpg"), r"file_name must be a path inside the image"),
    "file name of Windows": (edited(images__0__file_name="C:\\b.jpg"), r"file_name must be a path inside the image"),
    "file name with NUL": (
        edited(images__0__file_name="a\0b.jpg"),
        r"file_name must be text on one line.*'a\\x00b.jpg'",
    ),
    "category name null": (edited(categories__0__name=None), r"categories\[0\] \(id 7\): name must be text, not null"),
    "unknown image": (edited(annotations__0__image_id=9), r"annotations\[0\] \(id 1\): image_id must be .*, not 9"),
    "unknown category": (
        edited(annotations__1__category_id=1),
        r"annotations\[1\] \(id 2\): category_id must be one of \[3, 7\], not 1",
    ),
    "image_id a list": (edited(annotations__0__image_id=[1]), r"image_id must be an integer, not \[1\]"),
    "category_id 3.5": (edited(annotations__0__category_id=3.5), r"category_id must be an integer, not 3.5"),
    "annotation null": (edited(annotations__0=None), r"annotations\[0\]: must be an object, not null"),
    "annotation id text": (edited(annotations__0__id="x"), r"annotations\[0\] \(id 'x'\): id must be an integer"),
    "bbox of three": (edited(annotations__0__bbox=[1, 2, 3]), r"bbox must be four finite numbers.*not \[1, 2, 3\]"),
    "no bbox and no polygon": (
        edited(annotations__0__bbox=..., annotations__0__segmentation=[[1, 2, 3]]),
        r"annotations\[0\] \(id 1\): has no bbox, and its segmentation is not polygons",
    ),
    "bbox of text": (edited(annotations__0__bbox=["one", 2, 3, 4]), r"bbox must be four finite numbers"),
    "bbox NaN": (edited(annotations__0__bbox=[1, float("nan"), 3, 4]), r"bbox must be four finite numbers.*nan"),
    "bbox infinite": (edited(annotations__0__bbox=[1, 2, float("inf"), 4]), r"bbox must be four finite numbers.*inf"),
    "bbox nested": (edited(annotations__0__bbox=[[1, 2], [3, 4]]), r"bbox must be four finite numbers"),
    "bbox an object": (edited(annotations__0__bbox={"x": 1}), r"bbox must be four finite numbers"),
    "iscrowd text": (edited(annotations__0__iscrowd="no"), r"iscrowd must be 0 or 1, not 'no'"),
    "iscrowd list": (edited(annotations__0__iscrowd=[]), r"iscrowd must be 0 or 1, not \[\]"),
    "area text": (edited(annotations__0__area="big"), r"area must be a number of pixels, not 'big'"),
    "area NaN": (edited(annotations__0__area=float("nan")), r"area must be a number of pixels, not nan"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named_in_one_line(tmp_path: Path, mistake: str) -> None:
    content, message = MISTAKES[mistake]
    path, images = write_coco(tmp_path, content)
    with pytest.raises(DataError, match=message) as raised:
        read_coco(path, images)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_not_text_is_refused(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path, document())
    path.write_bytes(b"\xff\xfe\x00\x81 not text")
    with pytest.raises(DataError, match="is not JSON"):
        read_coco(path, images)


def test_missing_paths_are_named(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path, document())
    with pytest.raises(DataError, match=rf"{tmp_path}/no\.json: cannot be read"):
        read_coco(tmp_path / "no.json", images)
    with pytest.raises(DataError, match=r"images: cannot be read"):
        read_coco(images, images)
    with pytest.raises(DataError, match=rf"{tmp_path}/none: no such folder"):
        read_coco(path, tmp_path / "none")


def test_training_on_no_box_is_refused(tmp_path: Path) -> None:
    paths = write_coco(tmp_path, edited(annotations=[]))
    with pytest.raises(DataError, match="annotations has no usable box"):
        read_coco(*paths, images_without_boxes="drop")
    assert len(read_coco(*paths)) == 2


def test_missing_image_is_a_bad_image_named_by_its_path(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path, document())
    (images / "two.jpg").mkdir()
    source = read_coco(path, images)
    for i, name in enumerate(("one.jpg", "two.jpg")):
        with pytest.raises(BadImage, match=rf"{images / name}: cannot be read"):
            source.read(i)


coordinate = st.floats(-100, 200, width=32) | st.integers(-2, 110)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(*[coordinate] * 4, st.booleans()), max_size=12))
def test_every_box_is_kept_or_counted(found: list[tuple]) -> None:
    columns = np.array(found, np.float64).reshape(-1, 5)
    sizes = np.tile(np.array([[100, 60]]), (len(columns), 1))
    cleaned, usable, counts = clean_boxes(columns[:, :4], columns[:, 4] > 0, sizes)
    assert usable.sum() + counts["crowd"] + counts["zero_size"] + counts["outside"] == len(columns)
    kept = cleaned[usable]
    assert (kept[:, :2] >= 0).all() and (kept[:, 2:] <= [100, 60]).all() and (kept[:, :2] < kept[:, 2:]).all()
    whole = columns[usable, :4]
    untouched = (whole[:, :2] >= 0).all(1) & (whole[:, 2:] <= [100, 60]).all(1)
    assert np.array_equal(kept[untouched], whole[untouched].astype(np.float32))


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
        assert len(source.truth["annotations"]) >= sum(len(r.labels) for r in source.records)


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
    assert source.counts["crowd"] == int(content.boxes[:, 2].sum()) > 0
    dropped = sum(source.counts[kind] for kind in ("crowd", "zero_size", "outside"))
    assert sum(len(record.labels) for record in source.records) == len(content.boxes) - dropped
    assert len(source) == len(content.images) - source.counts["images_without_boxes"]
    assert np.diff([category for category, _ in COCO_CATEGORIES]).min() > 0
    assert source.read(0)[:2] == b"\xff\xd8"
