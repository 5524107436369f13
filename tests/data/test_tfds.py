"""A TFDS dataset reads as the COCO files it was made from."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from small_sets import encode, rectangles, write_coco
from tfds_sets import example, store

from retina_jax.config import DataConfig
from retina_jax.config_io import load_config, override
from retina_jax.data.classes import COCO_CATEGORIES
from retina_jax.data.datasets import open_source, open_sources, read_coco
from retina_jax.data.pipeline import eval_batches
from retina_jax.data.source import BadImage, DataError, Source
from retina_jax.data.tfds import TFRecordExamples, read_tfds

SIZES = [(96, 72), (72, 96), (61, 60), (60, 45)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, str]:
    """Returns the same images as a COCO source and as a TFDS folder; one has a crowd in addition to its box, one has no
    box."""
    folder = tmp_path_factory.mktemp("tfds")
    source = rectangles(folder, SIZES)
    document = source.ground_truth
    crowd = {"id": 9, "image_id": 11, "category_id": 2, "bbox": [0, 0, 30, 20], "area": 600, "iscrowd": 1}
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != 12] + [crowd]
    source = read_coco(*write_coco(folder, document))
    return source, store(folder / "sets", [example(source, i) for i in range(4)])


def test_tfds_reads_as_its_coco_files(pair: tuple[Source, str]) -> None:
    coco, folder = pair
    source = read_tfds(folder, "", "train")
    assert source.class_names == coco.class_names == ("red", "green") and source.category_ids == (1, 2)
    assert source.counts == coco.counts and source.counts["crowd"] == 1 and source.counts["images_without_boxes"] == 1
    for index, (found, expected) in enumerate(zip(source.records, coco.records, strict=True)):
        for field in ("image_id", "file_name", "width", "height"):
            assert getattr(found, field) == getattr(expected, field)
        assert np.array_equal(found.labels, expected.labels)
        assert np.abs(found.boxes_xyxy - expected.boxes_xyxy).max(initial=0) < 1e-4
        assert source.read(index) == coco.read(index)
    ground_truth = {a["image_id"]: a for a in source.ground_truth["annotations"] if not a["iscrowd"]}
    assert [a["area"] for a in source.ground_truth["annotations"] if a["iscrowd"]] == [600]
    for a in coco.ground_truth["annotations"]:
        if not a["iscrowd"]:
            assert np.allclose(ground_truth[a["image_id"]]["bbox"], a["bbox"], atol=1e-4)
            assert ground_truth[a["image_id"]]["category_id"] == a["category_id"]
    assert len(read_tfds(folder, "", "train", images_without_boxes="drop")) == 3


def test_tfds_gives_the_batches_of_its_coco_files(pair: tuple[Source, str]) -> None:
    coco, folder = pair
    data = DataConfig(batch_size=2, short_side=64, long_side=96, max_boxes=3)
    for found, expected in zip(
        *[list(eval_batches(s, data, batch_size=2)) for s in (read_tfds(folder, "", "train"), coco)], strict=True
    ):
        assert all(np.allclose(a, b, atol=1e-3) for a, b in zip(found, expected, strict=True))


def test_the_ground_truth_is_the_original_file_if_it_is_given(pair: tuple[Source, str]) -> None:
    coco, folder = pair
    source = read_tfds(folder, "", "train", ground_truth_annotations=coco.name)
    assert source.ground_truth == coco.ground_truth and source.category_ids == coco.category_ids
    data = DataConfig(
        source="tfds", tfds_name=folder, tfds_train_split="train", tfds_val_split="train", val_annotations=coco.name
    )
    assert open_source(data, "val").ground_truth == coco.ground_truth and len(open_source(data, "train")) == 3


def test_ground_truth_of_other_images_or_classes_is_refused(pair: tuple[Source, str], tmp_path: Path) -> None:
    coco, folder = pair
    fewer = {**coco.ground_truth, "images": coco.ground_truth["images"][:3]}
    fewer["annotations"] = [a for a in fewer["annotations"] if a["image_id"] != 13]
    path, _ = write_coco(tmp_path, fewer)
    with pytest.raises(DataError, match=r"annotations.json: images .*13 .*003.jpeg"):
        read_tfds(folder, "", "train", ground_truth_annotations=str(path))
    renamed = [{"id": 1, "name": "red"}, {"id": 2, "name": "verde"}]
    path, _ = write_coco(tmp_path, {**coco.ground_truth, "categories": renamed})
    with pytest.raises(DataError, match=r"annotations.json: categories .*verde.*green"):
        read_tfds(folder, "", "train", ground_truth_annotations=str(path))


@pytest.mark.parametrize(
    "unused", [[], [{"id": 9, "name": "x"}], [{"id": 0, "name": "things", "supercategory": "none"}]]
)
def test_categories_of_the_ground_truth_are_matched_by_name(
    pair: tuple[Source, str], tmp_path: Path, unused: list[dict[str, Any]]
) -> None:
    coco, folder = pair
    renamed = [*unused, {"id": 1, "name": "green"}, {"id": -2, "name": "red"}]
    boxes = [{**a, "category_id": {1: -2, 2: 1}[a["category_id"]]} for a in coco.ground_truth["annotations"]]
    path, _ = write_coco(tmp_path, {**coco.ground_truth, "annotations": boxes, "categories": renamed})
    source = read_tfds(folder, "", "train", ground_truth_annotations=str(path))
    assert (source.class_names, source.category_ids) == (("red", "green"), (-2, 1))
    for found, expected in zip(source.records, coco.records, strict=True):
        assert np.array_equal(found.labels, expected.labels)


def test_a_class_without_boxes_may_be_missing_from_the_ground_truth(pair: tuple[Source, str], tmp_path: Path) -> None:
    coco, _ = pair
    folder = store(tmp_path / "sets", [example(coco, i) for i in range(4)], names=("red", "green", "blue"))
    source = read_tfds(folder, "", "train", ground_truth_annotations=coco.name)
    assert source.categories == coco.categories
    for found, expected in zip(source.records, coco.records, strict=True):
        assert np.array_equal(found.labels, expected.labels)


def test_the_index_is_written_once_and_rewritten_if_it_is_damaged(
    pair: tuple[Source, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = pair
    records = read_tfds(folder, "", "train").records
    (index,) = Path(folder).glob("retina_jax_index_*.npz")
    with monkeypatch.context() as patch:
        patch.setattr("retina_jax.data.tfds._make_index", lambda *_: pytest.fail("made twice"))
        again = read_tfds(folder, "", "train").records
        with pytest.raises(pytest.fail.Exception, match="made twice"):  # Another split has a separate index.
            read_tfds(folder, "", "train[:2]")
    assert [r.image_id for r in again] == [r.image_id for r in records]
    index.write_bytes(index.read_bytes()[:100])
    assert [r.width for r in read_tfds(folder, "", "train").records] == [size[0] for size in SIZES]
    assert len(read_tfds(folder, "", "train[:2]")) == 2


def test_progress_is_reported_while_the_index_is_made(
    pair: tuple[Source, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("retina_jax.console.SECONDS_IN_LOG", 0.0)
    _, folder = pair
    read_tfds(folder, "", "train[1:]")
    rows = [
        int(row) for row in re.findall(rf"indexing, once: examples (\d+)/{len(SIZES) - 1}", capsys.readouterr().out)
    ]
    assert rows == list(range(1, len(SIZES)))


def test_the_index_is_in_the_home_folder_if_the_data_folder_is_read_only(
    pair: tuple[Source, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = pair
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("os.access", lambda *_: False)
    before = sorted(Path(folder).iterdir())
    assert len(read_tfds(folder, "", "train[1:3]")) == 2
    assert len(list((tmp_path / ".cache" / "retina_jax").iterdir())) == 1 and sorted(Path(folder).iterdir()) == before


def test_only_image_and_boxes_are_required(pair: tuple[Source, str], tmp_path: Path) -> None:
    coco, _ = pair
    folder = store(tmp_path, [example(coco, i, extras=False) for i in (0, 2)], extras=False)
    source = read_tfds(folder, "", "train")
    assert [record.image_id for record in source.records] == [0, 1] and source.counts["crowd"] == 0
    (annotation,) = source.ground_truth["annotations"]
    assert np.isclose(annotation["area"], annotation["bbox"][2] * annotation["bbox"][3])
    assert source.ground_truth["images"][1]["width"] == 61


def test_coco_has_its_own_names_and_ids(pair: tuple[Source, str], tmp_path: Path) -> None:
    coco, _ = pair
    store(tmp_path, [example(coco, 0)], name="coco", names=tuple(map(str, range(80))))
    source = read_tfds(str(tmp_path / "coco" / "1.2.3"), "", "train")
    assert tuple(zip(source.category_ids, source.class_names, strict=True)) == COCO_CATEGORIES
    assert source.ground_truth["annotations"][0]["category_id"] == COCO_CATEGORIES[source.records[0].labels[0]][0]


@pytest.fixture(scope="module")
def tfrecord(pair: tuple[Source, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same dataset in TFDS's default format."""
    coco, _ = pair
    folder = tmp_path_factory.mktemp("tfrecord")
    return store(folder, [example(coco, i) for i in range(4)], name="records", file_format="tfrecord")


def test_tfrecord_reads_as_array_record(pair: tuple[Source, str], tfrecord: str) -> None:
    source, expected = (read_tfds(folder, "", "train") for folder in (tfrecord, pair[1]))
    assert source.sha256 == expected.sha256 and len(source) == 4
    assert [source.read(i) for i in range(4)] == [expected.read(i) for i in range(4)]
    assert source.ground_truth == expected.ground_truth


def test_tfrecord_finds_an_example_in_any_part_of_its_files(tfrecord: str) -> None:
    info = tfds.builder_from_directory(tfrecord).info
    everything = [example["image/id"] for example in TFRecordExamples(info, "train")]
    examples = TFRecordExamples(info, "train[2:]+train[:3]+train[1:2]")
    assert [examples[row]["image/id"] for row in range(6)] == [everything[i] for i in (2, 3, 0, 1, 2, 1)]
    assert len(examples) == 6
    for row in (6, -1):
        with pytest.raises(IndexError):
            examples[row]


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda content: content[:-5],
    "longer": lambda content: content + b"x",
    "empty": lambda content: b"",
    "overwritten": lambda content: content[:12] + b"\xff" * 40 + content[52:],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_tfrecord_file_is_named(tfrecord: str, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(tfrecord, tmp_path / "records" / "1.2.3", ignore=shutil.ignore_patterns("*.npz")))
    (file,) = folder.glob("*.tfrecord*")
    file.write_bytes(DAMAGED[damage](file.read_bytes()))
    with pytest.raises(DataError, match=file.name) as raised:
        read_tfds(str(folder), "", "train")
    assert "\n" not in str(raised.value)


def test_the_papers_config_trains_on_tfds_without_coco_files(
    pair: tuple[Source, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This is the README's command for a user without COCO's files; the config names their paths nevertheless."""
    monkeypatch.chdir(tmp_path)
    store(tmp_path, [example(pair[0], i) for i in range(4)], name="coco", names=tuple(map(str, range(80))),
          file_format="tfrecord")  # fmt: skip
    config = load_config(Path(__file__).parents[2] / "configs" / "paper_r50_600.py")
    tfds_alone = {"data.source": "tfds", "data.tfds_name": "coco/1.2.3", "data.tfds_val_split": "train"}
    train, val, resolved = open_sources(override(config, tfds_alone))
    assert (len(train), len(val), resolved.model.num_classes) == (3, 4, 80)
    assert [c["name"] for c in val.ground_truth["categories"]] == [name for _, name in COCO_CATEGORIES]
    printed = capsys.readouterr()
    assert "data.val_annotations: data/coco/annotations/instances_val2017.json" in printed.out + printed.err


def test_dataset_by_name_and_folder(pair: tuple[Source, str]) -> None:
    _, folder = pair
    assert len(read_tfds("tiny", str(Path(folder).parents[1]), "train")) == 4


def test_a_bad_image_of_tfds_is_named_when_the_index_is_written(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(encode(np.zeros((8, 8, 3), np.uint8))[:6])
    objects = [{"bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0), "label": 0}]
    folder = store(tmp_path / "sets", [{"image": str(broken), "objects": objects}], extras=False)
    with pytest.raises(BadImage, match=r"tiny.*\[train\] example 0: "):
        read_tfds(folder, "", "train")


def test_errors_name_the_mistake(pair: tuple[Source, str], tmp_path: Path) -> None:
    _, folder = pair
    with pytest.raises(DataError, match=r"\[test\]: .*train") as raised:
        read_tfds(folder, "", "test")
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match=r"data.tfds_name no_such_set: ") as raised:
        read_tfds("no_such_set", str(tmp_path), "train")
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match=f"data.tfds_name {tmp_path}: "):
        read_tfds(str(tmp_path), "", "train")
    builder = tfds.dataset_builders.store_as_tfds_dataset(
        "boxless",
        "1.0.0",
        tfds.features.FeaturesDict({"image": tfds.features.Image()}),
        {"train": [(0, {"image": np.zeros((4, 4, 3), np.uint8)})]},
        data_dir=str(tmp_path),
        file_format="array_record",
    )
    with pytest.raises(DataError, match="objects/bbox"):
        read_tfds(str(builder.data_dir), "", "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objects": [{"bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0), "label": -1}]},
            "example 1: objects/label .*-1.* 0 to 1",
        ),
        ({"image/id": 10}, "image/id "),
    ],
)
def test_invalid_examples_are_named(
    pair: tuple[Source, str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    coco, _ = pair
    extras = "image/id" in changes
    folder = store(tmp_path, [example(coco, i, extras=extras) | (changes if i else {}) for i in (0, 3)], extras=extras)
    with pytest.raises(DataError, match=message):
        read_tfds(folder, "", "train")


def test_training_on_no_box_is_refused(pair: tuple[Source, str], tmp_path: Path) -> None:
    coco, _ = pair
    folder = store(tmp_path, [example(coco, 2)])
    with pytest.raises(DataError, match=rf"{folder}.*box"):
        open_source(DataConfig(source="tfds", tfds_name=folder), "train")


def test_unreadable_example_is_a_bad_image(pair: tuple[Source, str]) -> None:
    coco, folder = pair
    source = read_tfds(folder, "", "train")
    assert source.where(1).startswith(f"{folder} [train] example 1 (001.jpeg)")
    assert dataclasses.replace(source, name="x").read(1) == coco.read(1)
