"""The data check finds every planted mistake, by id or name, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import CONFIG, MISTAKES, Splits, clean
from pycocotools.coco import COCO
from small_sets import write_coco
from test_coco import PLACES, anything, edited

from retina_jax.config_io import override
from retina_jax.data.coco_document import parse_coco
from retina_jax.data.datasets import read_coco
from retina_jax.data.source import DataError
from retina_jax.data_check.check import Check, check_data
from retina_jax.data_check.findings import KINDS, SHOWN, Finding, grouped
from retina_jax.data_check.split import REFUSED, read_split, split_findings

ERRORS = {
    "refused_categories",
    "refused_images",
    "refused_boxes",
    "refused_config",
    "missing",
    "unreadable",
    "wrong_size",
}


def found(check: Check) -> set[tuple[str, str, str]]:
    findings = [finding for group in check.groups for finding in group.findings]
    names = {(finding.kind, finding.split, finding.name) for finding in findings}
    assert len(names) == len(findings), "reported twice"
    return names


def check_of(splits: Splits, folder: Path) -> Check:
    return check_data(CONFIG, splits.write(folder))


def test_nothing_is_found_in_the_clean_dataset(tmp_path: Path) -> None:
    check = check_of(clean(), tmp_path)
    assert found(check) == set() and check.ready and check.suggestion is None
    assert check.shares.total.by_iou == check.shares.total.boxes == 12
    assert [tuple(count) for count in check.counts["val"]] == [("cell", 3, 3, 0), ("dust", 3, 3, 0)]


@pytest.mark.parametrize("name", MISTAKES)
def test_only_the_planted_mistake_is_found(tmp_path: Path, name: str) -> None:
    plant, expected = MISTAKES[name]
    splits = clean()
    plant(splits)
    check = check_of(splits, tmp_path)
    assert found(check) == expected
    assert check.ready == (not {kind for kind, _, _ in expected} & ERRORS)


def test_all_planted_mistakes_are_found_at_once(tmp_path: Path) -> None:
    assert len(MISTAKES) >= 10
    splits, expected = clean(), set()
    for plant, named in MISTAKES.values():
        plant(splits)
        expected |= named
    check = check_of(splits, tmp_path)
    assert expected <= found(check)
    # The additional finding follows from two of them: boxes 8 and 9 were the only ones of image 004.jpg.
    assert found(check) - expected == {("no_boxes", "train", "004.jpg")}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_an_error_exactly_if_training_refuses_it(tmp_path: Path, name: str) -> None:
    """Compares with the strict reader of training."""
    splits = clean()
    MISTAKES[name][0](splits)
    pairs = splits.write(tmp_path)
    refused = []
    for pair in pairs.values():
        try:
            read_coco(*pair)
        except DataError as error:
            refused.append(str(error))
    kinds = {kind for kind, _, _ in MISTAKES[name][1]}
    assert bool(refused) == bool(kinds & {"refused_images", "refused_boxes", "refused_categories"})
    if refused:
        (place,) = (place for kind, _, place in MISTAKES[name][1] if kind.startswith("refused"))
        assert place in refused[0]


def test_the_lenient_reader_accepts_what_the_strict_one_accepts(tmp_path: Path) -> None:
    pairs = clean().write(tmp_path)
    split, content = read_split("train", *pairs["train"], "keep"), parse_coco(pairs["train"][0])
    assert split.images == content.images and split.mistakes == []
    api = COCO(pairs["train"][0])
    names = [split.box_name(m) for m in range(len(split.labels))]
    assert names == [f"annotation {i}" for i in api.getAnnIds()]
    trained = split.trained_boxes()
    at = 0
    for record in split.records:
        for box in record.boxes_xyxy.tolist():
            assert split.boxes_xyxy[trained[at]].tolist() == box
            at += 1
    assert at == len(trained)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(PLACES), anything)
def test_any_value_is_reported_exactly_if_training_refuses_it(
    tmp_path_factory: pytest.TempPathFactory, place: str, value: object
) -> None:
    """The strict reader raises exactly if the lenient one reports something, and its error is among the reports."""
    folder = tmp_path_factory.mktemp("any")
    path, images = write_coco(folder, json.dumps(edited(**{place: value})))
    try:
        read_coco(path, images)
        refused = None
    except DataError as error:
        refused = str(error)
    try:
        split = read_split("train", path, images, "keep")
    except DataError as error:
        assert refused == str(error)
        return
    found = split_findings(split, CONFIG)
    lines = [f"{path}: {f.name}: {f.text}" for f in found if f.kind in ("orphaned", *REFUSED.values())]
    assert refused in lines if refused else not lines
    assert all(finding.name.isprintable() and finding.text.isprintable() for finding in found)


def test_skipped_bad_images_are_warnings(tmp_path: Path) -> None:
    splits = clean()
    del splits.files["train"]["000.jpg"]
    check = check_data(override(CONFIG, {"data.bad_images": "skip"}), splits.write(tmp_path))
    assert check.ready and [(g.kind, g.severity) for g in check.groups] == [("missing", "warning")]


def test_classes_that_differ_between_the_splits_are_an_error(tmp_path: Path) -> None:
    splits = clean()
    splits.documents["val"]["categories"][1]["name"] = "smut"
    check = check_of(splits, tmp_path)
    assert found(check) == {("refused_config", "val", "data.val_annotations")} and not check.ready


def test_a_training_split_without_boxes_is_an_error(tmp_path: Path) -> None:
    splits = clean()
    splits.documents["train"]["annotations"] = []
    check = check_of(splits, tmp_path)
    assert "nothing_to_learn" in {group.kind for group in check.groups} and not check.ready
    assert check.suggestion is None and check.shares.positives_per_image == 0


def test_evaluation_images_without_boxes_of_all_or_of_one_class_are_a_warning(tmp_path: Path) -> None:
    splits = clean()
    every = splits.documents["val"]["annotations"]
    for name, kept, kind, what in (
        ("none", [], "nothing_to_score", "val.json"),
        ("cells", [box for box in every if box["category_id"] == 1], "empty_class", "dust"),
    ):
        splits.documents["val"]["annotations"] = kept
        check = check_of(splits, tmp_path / name)
        assert {f for f in found(check) if f[0] != "no_boxes"} == {(kind, "val", what)} and check.ready


def test_a_file_with_a_mistake_in_every_entry_is_reported_completely(tmp_path: Path) -> None:
    splits = clean()
    for entry in splits.documents["train"]["images"]:
        entry["width"] = -1
    check = check_of(splits, tmp_path)
    counts = {group.kind: len(group.findings) for group in check.groups}
    assert counts["refused_images"] == 6 and counts["orphaned"] == 12


def test_a_file_that_is_not_coco_json_ends_in_one_line(tmp_path: Path) -> None:
    pairs = clean().write(tmp_path)
    pairs["train"][0].write_text("[1, 2")
    with pytest.raises(DataError, match="is not JSON: line 1"):
        check_data(CONFIG, pairs)
    document = clean().documents["train"]
    del document["annotations"]
    pairs["train"][0].write_text(json.dumps(document))
    with pytest.raises(DataError, match="annotations must be a list of objects, but is missing"):
        check_data(CONFIG, pairs)


def test_a_line_names_the_first_findings_and_counts_the_others() -> None:
    (group,) = grouped([Finding("missing", "train", f"{i}.jpg") for i in range(SHOWN + 2)])
    assert group.line() == f"error: {KINDS['missing'].title}: 7: 0.jpg; 1.jpg; 2.jpg; 3.jpg; 4.jpg; 2 more"


def test_the_boxes_of_bccd_without_area_are_named(shared_data: Path) -> None:
    folder = shared_data / "bccd"
    named = []
    for name in ("train", "val"):
        split = read_split(name, folder / f"annotations/instances_{name}.json", folder / "images", "keep")
        named += [split.box_name(int(m)) for m in split.rules["zero_size"].nonzero()[0]]
    assert named == ["annotation 2288", "annotation 3692"]
