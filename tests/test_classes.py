"""A class is identified by its category id: training and scores do not depend on ids, repeated names, or unused
categories."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_sets import rectangles, write_coco

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import override
from retina_jax.data.classes import (
    Category,
    category_ids,
    class_indices,
    excluded_categories,
    similar_names,
    unique_names,
)
from retina_jax.data.coco_entries import LARGEST_ID
from retina_jax.data.datasets import check_classes, open_sources, read_coco
from retina_jax.data.source import Source
from retina_jax.detector import Detector, ImageDetections
from retina_jax.evaluate import evaluate
from retina_jax.runs.folder import Run
from retina_jax.training.opening import open_run

ROOT = Path(__file__).parents[1]
CONFIG = override(Config(), {"data.buckets": 1, "data.short_side": 64, "data.long_side": 64, "training.pictures": 0})
IDS = st.integers(1 - LARGEST_ID, LARGEST_ID - 1)


class Answers(Detector):
    """A detector that returns given detections."""

    def __init__(self, found: dict[int, ImageDetections]) -> None:
        object.__setattr__(self, "driver", SimpleNamespace(num_devices=1, config=CONFIG))
        object.__setattr__(self, "found", found)

    def detect_batches(self, batches: Any, sizes_hw: Any) -> Iterator[tuple[int, ImageDetections]]:
        return iter(self.found.items())


def entries(categories: list[Category], above: str | None = None) -> list[dict[str, Any]]:
    return [{"id": i, "name": name} | ({"supercategory": above} if above else {}) for i, name in categories]


def coco(categories: list[Category], boxes: list[tuple[int, int, list[float]]], images: int) -> dict[str, Any]:
    """Writes a COCO file of (image, category id, box)."""
    return {
        "images": [{"id": i + 1, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(images)],
        "annotations": [
            {"id": n + 1, "image_id": i + 1, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
            for n, (i, c, b) in enumerate(boxes)
        ],
        "categories": entries(categories),
    }


def by_pycocotools(document: dict[str, Any], results: list[dict[str, Any]]) -> tuple[float, dict[int, float]]:
    """Returns AP and the AP of each category id; -1 if it has no box."""
    truth, found = COCO(), COCO()
    truth.dataset, found.dataset = document, {**document, "annotations": results}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    means = [values[values > -1].mean() if (values > -1).any() else -1 for values in precision.transpose(2, 0, 1)]
    return evaluation.stats[0], dict(zip(evaluation.params.catIds, means, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classes")


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(0, 2**32 - 1))
def test_scores_do_not_depend_on_ids_names_and_order(folder: Path, draw: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = draw.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), "names")
    unused = draw.draw(st.lists(st.sampled_from("abyz"), max_size=3), "unused in training")
    unused_val = draw.draw(st.lists(st.sampled_from("abyz"), max_size=2), "unused in evaluation")
    most = 2 * len(names) + len(unused) + len(unused_val)
    ids = draw.draw(st.lists(IDS, min_size=most, max_size=most, unique=True), "ids")
    in_train = [ids.pop() for _ in names]
    other = [ids.pop() for _ in names]
    in_val = (
        other if len(set(names)) == len(names) and draw.draw(st.booleans(), "other ids in evaluation") else in_train
    )
    extra = [(ids.pop(), name) for name in unused]
    used = list(zip(in_train, names, strict=True))

    box = [5.0, 5.0, 20.0, 20.0]
    listed = draw.draw(st.permutations([*used, *extra]))
    content = coco(listed, [(0, i, box) for i in in_train], 1)
    train = read_coco(*write_coco(folder, content))
    new = dict(zip([i for i, _ in listed], draw.draw(st.lists(IDS, min_size=7, max_size=7, unique=True)), strict=False))
    renumbered = coco([(new[i], name) for i, name in listed], [(0, new[i], box) for i in in_train], 1)
    again = read_coco(*write_coco(folder, renumbered))
    assert (again.sha256, again.class_names) == (train.sha256, train.class_names)

    boxes = [
        (i, int(rng.integers(len(names))), rng.uniform((0, 0, 4, 4), (30, 30, 34, 34)).round(2))
        for i in range(4)
        for _ in range(rng.integers(4))
    ]
    kept = {c for _, c, _ in boxes} if rng.integers(2) else set(range(len(names)))  # classes may be missing
    val_used = [(in_val[c], names[c]) for c in sorted(kept)]
    every = draw.draw(st.permutations([*val_used, *((ids.pop(), name) for name in unused_val)]))
    if not every:
        return
    document = coco(every, [(i, in_val[c], b.tolist()) for i, c, b in boxes], 4)
    val = read_coco(*write_coco(folder, document), known=train.categories)

    label_of = [train.categories.index(category) for category in used]
    found, results = {}, []
    for i in range(4):
        near = [(c, b + rng.normal(0, 2, 4)) for j, c, b in boxes if j == i]
        near += [(int(rng.integers(len(names))), b) for _, b in near]
        scores = np.sort(rng.random(len(near)).astype(np.float32))[::-1]
        xyxy = np.array([[*b[:2], *(b[:2] + b[2:])] for _, b in near], np.float32).reshape(-1, 4)
        found[i] = ImageDetections(xyxy, scores, np.array([label_of[c] for c, _ in near], np.int32))
        sides = xyxy[:, 2:].astype(float) - xyxy[:, :2]
        for (c, _), corner, side, score in zip(near, xyxy.tolist(), sides.tolist(), scores.tolist(), strict=True):
            if c in kept:
                one = {"image_id": i + 1, "category_id": in_val[c], "bbox": [*corner[:2], *side], "score": score}
                results.append({**one, "id": len(results) + 1, "area": side[0] * side[1], "iscrowd": 0})
    run = Run(folder, CONFIG, train.class_names, train.category_ids)
    scores = evaluate(run, Answers(found), val, 1)
    expected, of_class = by_pycocotools(document, results)
    assert (scores.summary["AP"] if boxes else -1) == expected
    by_name = dict(zip(unique_names(val.categories), val.category_ids, strict=True))
    assert set(by_name) == set(scores.per_class)
    for name, value in scores.per_class.items():
        assert (-1 if value is None else value) == of_class[by_name[name]], name


def test_classes_are_matched_by_unique_name_or_by_id_and_name() -> None:
    assert class_indices([(1, "a"), (2, "b")], [(2, "a"), (1, "b")]) == [0, 1]
    assert class_indices([(1, "a"), (2, "a"), (3, "b")], [(9, "b"), (2, "a"), (1, "a")]) == [2, 1, 0]
    assert class_indices([(1, "a"), (2, "a")], [(2, "a"), (3, "a")]) == [None, 0]
    assert (
        class_indices([(1, "a")], [(3, "a"), (4, "a")]) == class_indices([(1, "a"), (2, "a")], [(3, "a")])[:1] == [None]
    )
    assert class_indices([(-1, "a"), (0, "c")], [(5, "a"), (-1, "d")]) == [0, None]


@pytest.mark.parametrize(
    ("boxes_of", "named"),
    [
        ((3, "c"), "detector lacks: c \\(3\\); its classes are a \\(1\\), a \\(2\\); remove"),
        ((3, "a"), "boxes of a \\(3\\) .* a \\(1\\), a \\(2\\)"),
        ((3, "A "), "detector lacks: A  \\(3\\); .*; 'A ' differs from 'a' only in case or spaces"),
    ],
)
def test_boxes_of_an_unknown_class_are_refused_by_name(boxes_of: Category, named: str) -> None:
    annotated = frozenset([boxes_of[0]])
    data = Source("data", [], [boxes_of, (9, "z")], {}, str.encode, str, dict, annotated=annotated)
    with pytest.raises(ConfigError, match=f"^here: .*{named}"):
        category_ids([(1, "a"), (2, "a")], data, "here")


def test_names_that_differ_only_in_case_or_spaces_are_grouped() -> None:
    names = ["Star", "ring", "star", "STRASSE", " star", "Straße", "bar  code", "bar code", "ring", "rings"]
    assert similar_names(names) == [
        "'Star' and 'star' and ' star'",
        "'STRASSE' and 'Straße'",
        "'bar  code' and 'bar code'",
    ]


def test_validation_data_that_cannot_score_every_class_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, classes = {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}, [(1, "cat"), (2, "dog")]
    document = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    val = read_coco(*write_coco(tmp_path, document))
    check_classes(classes, val)
    one, two = capsys.readouterr().out.splitlines()
    assert one.endswith("has no category for dog: 1 of 2 classes are not scored")
    assert two.endswith("no usable box: AP cannot be computed")
    check_classes(classes[:1], replace(val, labelled=False))  # images without annotations, to detect in
    assert not capsys.readouterr().out


def test_repeated_names_are_shown_with_ids_and_stay_unique() -> None:
    assert unique_names([(1, "wheel"), (-2, "wheel"), (3, "door")]) == ("wheel (1)", "wheel (-2)", "door")
    shown = unique_names([(1, "wheel"), (2, "wheel"), (5, "wheel (1)")])
    assert len(set(shown)) == 3 and shown[1] == "wheel (2)"


@pytest.mark.parametrize(
    ("listed", "annotated", "dropped"),
    [
        ([(0, "things", "none"), (1, "red", None), (2, "blue", None)], {1, 2}, {0}),
        ([(0, "ice", "none"), (1, "ice", "ice")], {1}, {0}),  # the parent has the name of its class
        ([(0, "ice", "none"), (1, "ice", "ice")], set(), {0}),  # a split without boxes
        ([(0, "things", "none"), (1, "red", "things")], {0, 1}, set()),  # a parent with boxes
        ([(7, "car", "vehicle"), (3, "vehicle", "object"), (4, "van", "vehicle")], {7}, {3}),
        ([(0, "cat", "none"), (1, "dog", "none")], {1}, set()),  # tools that write "none" everywhere
        ([(0, "cat", None), (1, "dog", None)], {1}, set()),
        ([(1, "person", "person"), (2, "car", "vehicle")], {2}, set()),  # as in COCO
        ([(1, "red", None), (2, "blue", None), (7, "blue", None)], {1, 2}, {7}),
        ([(2, "blue", None), (7, "blue", None)], set(), set()),
        ([(1, "a", "b"), (2, "b", "a")], set(), set()),  # otherwise no class would be left
    ],
)
def test_empty_parents_and_unused_repeated_names_are_not_classes(
    listed: list[tuple[int, str, str | None]], annotated: set[int], dropped: set[int]
) -> None:
    categories, above = [entry[:2] for entry in listed], [entry[2] for entry in listed]
    assert {i for i, _ in excluded_categories(categories, above, annotated)} == dropped
    assert excluded_categories(categories, above, annotated, known=categories) == {}
    kept = {i for i, _ in excluded_categories(categories, above, annotated, empty_parents="keep")}
    assert kept == dropped - {0, 3}


def test_the_classes_of_a_run_decide_which_categories_are_left_out() -> None:
    """A resumed run keeps its classes, and an unused repetition of a name does not hide the category with boxes."""
    parent = [(0, "things"), (1, "red")], ["none", None], {1}
    assert excluded_categories(*parent, known=[(1, "red")], empty_parents="keep").keys() == {(0, "things")}
    assert excluded_categories(*parent, known=parent[0]) == {}
    permuted = [(7, "red"), (3, "blue"), (2, "blue")]
    left_out = excluded_categories(permuted, [None] * 3, {7, 3}, known=[(1, "red"), (2, "blue")])
    assert left_out.keys() == {(2, "blue")}


def config_of(folder: Path, train: dict[str, Any], val: dict[str, Any], **changes: Any) -> Config:
    fields = {"data.bad_images": "skip", **changes}
    for split, content in (("train", train), ("val", val)):
        (folder / split).mkdir(exist_ok=True)
        path, images = write_coco(folder / split, content)
        fields |= {f"data.{split}_annotations": str(path), f"data.{split}_images": str(images)}
    return override(CONFIG, fields)


def test_both_splits_decide_the_classes_and_a_run_keeps_its_classes(tmp_path: Path) -> None:
    """A parent category with boxes in the evaluation data is a class; a resumed run keeps its classes and their
    order."""
    box, listed = [5.0, 5.0, 20.0, 20.0], [(0, "things"), (1, "red"), (2, "blue"), (7, "blue")]

    def content(*boxes_of: int) -> dict[str, Any]:
        made = coco(listed, [(0, i, box) for i in boxes_of], 1)
        made["categories"][0]["supercategory"] = "none"
        return made

    def classes(train: dict[str, Any], val: dict[str, Any], known: list[Category] | None = None, **changes: Any) -> Any:
        source, _, config = open_sources(config_of(tmp_path, train, val, **changes), known or [])
        assert config.model.num_classes == len(source.categories)
        return source.categories

    assert classes(content(1, 2), content(1, 2)) == listed[1:3]
    assert classes(content(1, 2), content(1, 2), **{"data.empty_parents": "keep"}) == listed[:3]
    assert classes(content(1, 2), content(0, 1, 2)) == listed[:3]
    assert classes(content(1, 2), content(1, 2, 7)) == listed[1:]
    assert classes(content(0, 1, 2), content(1, 2)) == listed[:3]
    assert classes(content(1, 2), content(1, 2), known=listed) == listed
    order = [listed[k] for k in (2, 0, 1)]
    train = open_sources(config_of(tmp_path, content(1, 2), content(1, 2)), order)[0]
    assert train.categories == order and train.records[0].labels.tolist() == [2, 0]
    with pytest.raises(ConfigError, match=r"RUN: .*1 .*\(red\).* 2 \(red, blue\)"):
        open_sources(config_of(tmp_path, content(1, 2), content(1)), [(1, "red")], "RUN")


def test_a_run_is_resumed_by_other_ids_unless_a_name_repeats(tmp_path: Path) -> None:
    for name in ("unique", "repeated"):
        open_run(tmp_path / name, CONFIG, ("a", "b") if name == "unique" else ("a", "a"), (1, 2))
        (tmp_path / name / "checkpoints" / "1").mkdir(parents=True)
    open_run(tmp_path / "unique", CONFIG, ("a", "b"), (2**50, -1))
    open_run(tmp_path / "repeated", CONFIG, ("a", "a"), (1, 2))
    for ids in ((2, 1), (1, 3)):
        with pytest.raises(ConfigError, match=r"2 classes \(a \(1\), a \(2\)\), the data has 2 \(a "):
            open_run(tmp_path / "repeated", CONFIG, ("a", "a"), ids)


def script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")


def test_training_is_the_same_with_any_ids_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, detections and scores are the same; detections of classes with one name are distinguished by id."""
    source = rectangles(tmp_path, [(64, 64)] * 4)
    plain, ids = json.loads(Path(source.name).read_text()), {1: LARGEST_ID - 1, 2: -1}
    messy = {
        **plain,
        "annotations": [{**a, "category_id": ids[a["category_id"]]} for a in plain["annotations"]],
        "categories": [
            {"id": 0, "name": "wheel", "supercategory": "none"},
            *entries([(ids[1], "wheel"), (7, "wheel"), (ids[2], "wheel")]),
        ],
    }
    found = []
    for name, content in {"plain": plain, "messy": messy}.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        data = [f"--data.{s}-{kind}" for s in ("train", "val") for kind in ("annotations", "images")]
        places = [word for pair in zip(data, [path, tmp_path / "images"] * 2, strict=True) for word in pair]
        script(
            monkeypatch, "train", "--config", ROOT / "configs/demo.py", "--workdir", tmp_path / name, *places,
            "--data.source", "coco", "--data.short-side", 64, "--data.long-side", 64,
            "--data.buckets", 1, "--data.batch-size", 1, "--devices", 1,
            "--model.backbone", "resnet18", "--model.base-width", 8, "--model.stage-blocks", 1, 1, 1, 1,
            "--model.min-level", 4, "--model.max-level", 5, "--model.fpn-channels", 8, "--model.head-channels", 8,
            "--model.head-convs", 1, "--model.norm", "frozen", "--anchors.size-factor", 1,
            "--training.steps", 2, "--training.eval-every", 0, "--detection.score-threshold", 0.0,
            "--training.no-tensorboard",
        )  # fmt: skip
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        detections = json.loads((tmp_path / name / "detections" / "step_00000002.json").read_text())
        found.append((summary["parameters_sha256"], summary["evaluation"], detections))
    (sha, scores, detections), (messy_sha, messy_scores, messy_detections) = found
    assert sha == messy_sha
    assert len(detections) > 0
    assert messy_detections == [{**d, "category_id": ids[d["category_id"]]} for d in detections]
    of_class = scores.pop("per_class"), messy_scores.pop("per_class")
    assert scores == messy_scores
    assert of_class[1] == {"wheel (-1)": of_class[0]["green"], f"wheel ({ids[1]})": of_class[0]["red"]}

    Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    script(monkeypatch, "predict", "--workdir", tmp_path / "messy", tmp_path / "grey.png", "--out", tmp_path / "out")
    (entry,) = json.loads((tmp_path / "out" / "detections.json").read_text())["images"]
    assert set(entry["labels"]) <= {"wheel (-1)", f"wheel ({ids[1]})"} and len(entry["labels"]) > 0
    assert entry["labels"] == [f"wheel ({category_id})" for category_id in entry["category_ids"]]
