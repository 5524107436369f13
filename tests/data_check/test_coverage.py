"""Anchor coverage equals that of NumPy over all anchors, and the suggestion does what it claims."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_sets import rectangles

from retina_jax.config import AnchorConfig, Config
from retina_jax.config_io import override
from retina_jax.data.pipeline import train_batches
from retina_jax.data.source import Record
from retina_jax.data_check.coverage import (
    Coverage,
    Shares,
    Views,
    count_shares,
    cover,
    coverage_findings,
    view_boxes,
)
from retina_jax.data_check.nearest import best_iou
from retina_jax.data_check.suggestion import GOOD, as_options, suggest
from retina_jax.ops.anchors import anchor_grid

SMALL = override(Config(), {"data.short_side": 96, "data.long_side": 128})
STYLES = ("paper", "detectron", "detectron2", "torchvision")


def ious(anchors: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Returns IoUs [A, G] in float64, computed independently."""
    a, b = anchors.astype(np.float64)[:, None], boxes.astype(np.float64)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = sides.clip(0).prod(-1)
    return shared / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared)


def records_of(*boxes_of_images: list, size: tuple[int, int] = (128, 96), seed: int = 0) -> list[Record]:
    """Returns images of one size (width, height) with boxes of random classes, 0 to 2."""
    rng = np.random.default_rng(seed)
    return [
        Record(
            i, f"{i}.jpg", *size, np.array(boxes, np.float32).reshape(-1, 4), rng.integers(0, 3, len(boxes), np.int32)
        )
        for i, boxes in enumerate(boxes_of_images)
    ]


def random_boxes(rng: np.random.Generator, n: int, sides: tuple[float, float] = (3, 90)) -> list[list[float]]:
    """Returns boxes inside 128 by 96."""
    size = np.exp(rng.uniform(*np.log(sides), (n, 2))).clip(1, [120, 90])
    corner = rng.uniform(0, 1, (n, 2)) * ([128, 96] - size)
    return np.concatenate([corner, corner + size], axis=1).tolist()


def by_hand(views: Views, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best IoU and the number of positive anchors of each box, by Section 4 and Detectron's low-quality
    rule."""
    best, won = [], []
    for v, padded_hw in enumerate(views.padded_hw):
        boxes = views.boxes_xyxy[views.ends[v] : views.ends[v + 1]]
        if not len(boxes):
            continue
        iou = ious(anchor_grid(padded_hw, config.anchors, config.model), boxes)
        largest, owner = iou.max(1), iou.argmax(1)
        rescued = (iou >= iou.max(0) - 1e-12).any(1)  # the largest that a box has
        floor = {"none": 2.0, "band": config.matching.negative_iou, "all": 1e-9}[config.matching.low_quality]
        positive = (largest >= config.matching.positive_iou) | (rescued & (largest >= floor))
        best += iou.max(0).tolist()
        won += np.bincount(owner[positive], minlength=len(boxes)).tolist()
    return np.array(best), np.array(won)


@pytest.mark.parametrize("low_quality", ["none", "band", "all"])
def test_coverage_equals_the_count_over_all_anchors(low_quality: str) -> None:
    rng = np.random.default_rng(1)
    # With integer pixels, the anchors that tie for the best of a box are the same in any precision.
    integer = {"anchors.scales": (1.0, 1.5), "anchors.ratios": (1.0,)}
    config = override(SMALL, {"matching.low_quality": low_quality, **integer})
    images = (np.round(random_boxes(rng, n)).reshape(-1, 4).tolist() for n in (5, 0, 12, 1, 9))
    views = view_boxes(records_of(*images), config.data)
    coverage = cover(views, config)
    best, won = by_hand(views, config)
    np.testing.assert_allclose(coverage.best_iou, best, atol=1e-5)
    np.testing.assert_array_equal(coverage.anchors, won)
    shares = count_shares(views, coverage, ["a", "b", "c"])
    assert shares.total.by_iou == (best >= 0.5).sum() and shares.total.uncovered == ((best < 0.5) & (won == 0)).sum()
    assert shares.total.by_low_quality == ((best < 0.5) & (won > 0)).sum()
    assert shares.positives_per_image == won.sum() / 5
    for of in (shares.classes, shares.sizes, shares.aspects):
        assert sum(share.boxes for share in of) == 27 and sum(share.anchors for share in of) == won.sum()
    low = {"none": 0, "band": ((best >= 0.4) & (best < 0.5)).sum(), "all": (best < 0.5).sum()}[low_quality]
    assert shares.total.by_low_quality <= low and (low_quality == "none" or shares.total.by_low_quality > 0)


def test_the_best_anchor_of_a_small_box_in_a_large_one_counts_for_the_large_one() -> None:
    """It is a low-quality match because of the small box, and takes the large one, which it overlaps most."""
    anchor = anchor_grid((96, 128), SMALL.anchors, SMALL.model).astype(float)
    sides = anchor[:, 2:] - anchor[:, :2]
    square = anchor[
        np.isclose(sides, 32, atol=1e-3).all(1) & (anchor[:, :2] > 20).all(1) & (anchor[:, 2:] < 76).all(1)
    ][0]
    large = square + np.array([0, 0, 32 / 0.46 - 32, 0])  # IoU 0.46 with the anchor
    small = np.concatenate([square[:2] + 15, square[:2] + 17])
    views = view_boxes(records_of([large.tolist(), small.tolist()], [large.tolist()]), SMALL.data)
    coverage = cover(views, SMALL)
    best, won = by_hand(views, SMALL)
    np.testing.assert_allclose(coverage.best_iou, best, atol=1e-5)
    np.testing.assert_array_equal(coverage.anchors, won)
    assert best[1] < SMALL.matching.negative_iou and won[0] > won[2]


@pytest.mark.parametrize("style", STYLES)
def test_the_nearest_anchor_is_the_best_one(style: str) -> None:
    rng = np.random.default_rng(2)
    config = override(
        SMALL, {"anchors.style": style, "anchors.ratios": (0.4, 1.0, 2.7), "data.jitter_short_sides": (96, 70)}
    )
    records = records_of(random_boxes(rng, 60), random_boxes(rng, 50))
    records += records_of(random_boxes(rng, 30), size=(96, 200))
    views = view_boxes(records, config.data)
    assert len(set(views.padded_hw)) > 1
    np.testing.assert_allclose(best_iou(views, config), by_hand(views, config)[0], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    padded_hw=st.tuples(st.integers(1, 20), st.integers(1, 20)).map(lambda hw: (32 * hw[0], 32 * hw[1])),
    factor=st.floats(0.5, 8),
    ratio=st.floats(0.1, 10),
    style=st.sampled_from(STYLES),
    seed=st.integers(0, 10**6),
)
def test_the_nearest_anchor_is_the_best_one_in_any_padded_shape(
    padded_hw: tuple[int, int], factor: float, ratio: float, style: str, seed: int
) -> None:
    config = Config(anchors=AnchorConfig(style=style, size_factor=factor, ratios=(1.0, ratio), scales=(1.0, 1.3)))
    grid = anchor_grid(padded_hw, config.anchors, config.model)
    if style in ("detectron", "torchvision") and (grid[:, 2:] - grid[:, :2]).min() <= 0:
        return  # these styles round, extreme ratios to nothing
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.uniform(0, 1, (2, 15, 2)), axis=0) * padded_hw[::-1]
    boxes = np.concatenate([ends[0], np.maximum(ends[1], ends[0] + 0.5)], axis=1).astype(np.float32)
    none = np.zeros(len(boxes), np.int64)
    views = Views(
        [padded_hw], [padded_hw], np.zeros(1, np.int64), np.array([0, len(boxes)]), boxes, none, np.arange(len(boxes))
    )
    np.testing.assert_allclose(best_iou(views, config), ious(grid, boxes).max(0), atol=1e-4)


def test_a_box_that_is_an_anchor_and_one_of_a_quarter_of_it() -> None:
    anchor = anchor_grid((96, 128), SMALL.anchors, SMALL.model)
    square = next(a for a in anchor if a[2] - a[0] == 32 and a[3] - a[1] == 32 and a[0] >= 0 and a[1] >= 0)
    half = (square + square[[2, 3, 0, 1]]) / 2 + np.array([-8, -8, 8, 8])  # 16 x 16 in its centre: IoU 1/4
    for low_quality, anchors in (("band", 0), ("all", 1)):
        config = override(SMALL, {"matching.low_quality": low_quality})
        views = view_boxes(records_of([square.tolist()], [half.tolist()]), config.data)
        coverage = cover(views, config)
        np.testing.assert_allclose(coverage.best_iou, [1, 0.25], atol=1e-6)
        assert coverage.kinds["by_iou"].tolist() == [True, False] and coverage.kinds["uncovered"].tolist() == [
            False,
            anchors == 0,
        ]
        assert coverage.kinds["by_low_quality"].tolist() == [False, anchors == 1]


def test_the_second_of_two_equal_boxes_is_outbid() -> None:
    views = view_boxes(records_of([[20, 20, 68, 68], [20, 20, 68, 68]]), SMALL.data)
    coverage = cover(views, SMALL)
    assert (
        coverage.kinds["outbid"].tolist() == [False, True]
        and coverage.kinds["by_iou"].all()
        and coverage.anchors[1] == 0
    )


def test_views_are_the_batches_of_training(tmp_path: Path) -> None:
    source = rectangles(tmp_path, [(64, 48), (40, 90), (100, 50), (200, 60)])
    data = override(
        Config(), {"data.short_side": 64, "data.long_side": 120, "data.batch_size": 1, "data.flip": False}
    ).data
    views = view_boxes(source.records, data)
    met = set()
    batches = train_batches(source, data, seed=0)
    while len(met) < 4:
        batch = next(batches)
        v = int(batch.indices[0])
        met.add(v)
        assert batch.images.shape[1:3] == views.padded_hw[v] and tuple(batch.image_sizes[0]) == views.sizes_hw[v]
        np.testing.assert_array_equal(batch.boxes_xyxy[0, :1], views.boxes_xyxy[views.ends[v] : views.ends[v + 1]])


def test_every_short_side_of_the_training_is_a_view() -> None:
    data = override(SMALL, {"data.jitter_short_sides": (48, 96), "data.max_boxes": 2}).data
    views = view_boxes(records_of([[0, 0, 20, 40], [0, 0, 9, 9], [5, 5, 8, 8]], []), data)
    assert views.sizes_hw == [(48, 64), (96, 128)] * 2 and views.records.tolist() == [0, 0, 1, 1]
    assert views.boxes_xyxy.tolist() == [[0, 0, 10, 20], [0, 0, 4.5, 4.5], [0, 0, 20, 40], [0, 0, 9, 9]]
    assert views.boxes.tolist() == [0, 1, 0, 1]
    shares = count_shares(views, Coverage(np.zeros(4, np.float32), np.zeros(4, np.int64), 0.5), ["a", "b", "c"])
    sizes, aspects = ({s.name: s.boxes for s in of if s.boxes} for of in (shares.sizes, shares.aspects))
    assert sizes == {"4 to 5.657": 1, "8 to 11.31": 1, "11.31 to 16": 1, "22.63 to 32": 1}
    assert aspects == {"1 to 1.414": 2, "2 to 2.828": 2}


def small_set(seed: int = 3) -> list[Record]:
    """Writes boxes of 8 to 16 pixels, for which the paper's anchors are too large."""
    rng = np.random.default_rng(seed)
    return records_of(*(random_boxes(rng, 8, (8, 16)) for _ in range(12)))


def shares_of(records: list[Record], config: Config) -> Shares:
    views = view_boxes(records, config.data)
    return count_shares(views, cover(views, config), ["a", "b", "c"])


def test_the_suggestion_has_the_coverage_that_it_claims() -> None:
    records = small_set()
    before = shares_of(records, SMALL)
    assert before.total.by_iou == 0 and coverage_findings(before)[0].kind == "hopeless"
    suggestion = suggest(records, SMALL, ["a", "b", "c"], before)
    assert suggestion is not None and suggestion.before is before
    changed = override(SMALL, suggestion.changes)
    best, won = by_hand(view_boxes(records, changed.data), changed)
    assert suggestion.after.total.by_iou == (best >= 0.5).sum() and suggestion.after.total.anchors == won.sum()
    assert suggestion.after.total.part("by_iou") >= GOOD - 0.01
    assert suggestion.options == as_options(suggestion.changes)


def test_nothing_is_suggested_if_the_coverage_is_good() -> None:
    rng = np.random.default_rng(4)
    records = records_of(*(random_boxes(rng, 4, (38, 60)) for _ in range(6)))
    before = shares_of(records, SMALL)
    assert before.total.part("by_iou") >= GOOD and suggest(records, SMALL, ["a", "b", "c"], before) is None


def test_suggested_options_are_valid_on_the_command_line() -> None:
    changes = {"anchors.size_factor": 2.5, "anchors.ratios": (0.5, 1.0, 2 ** (1 / 3)), "data.long_side": 1_333_000}
    expected = "--anchors.size-factor 2.5 --anchors.ratios 0.5 1 1.2599210498948732 --data.long-side 1333000"
    assert as_options(changes) == expected


def test_a_class_without_coverage_is_an_error_and_a_rare_one_a_warning() -> None:
    labels = np.repeat([0, 1, 2], [80, 10, 9])
    iou = np.where(labels == 0, 0.9, 0.2).astype(np.float32)
    coverage = Coverage(iou, (labels == 0).astype(np.int64), 0.5)
    boxes = np.tile(np.array([[0, 0, 9, 9]], np.float32), (99, 1))
    views = Views([(96, 128)], [(96, 128)], np.array([0]), np.array([0, 99]), boxes, labels, np.arange(99))
    found = coverage_findings(count_shares(views, coverage, ["good", "ten", "nine", "none"]))
    assert [(f.kind, f.name) for f in found] == [("hopeless", "ten"), ("poor", "nine")]


def test_platelets_of_bccd_are_covered_by_the_suggestion(shared_data: Path) -> None:
    from retina_jax.data.datasets import read_coco

    path = shared_data / "bccd/annotations/instances_train.json"
    source = read_coco(path, shared_data / "bccd/images")
    assert [c["name"] for c in json.loads(path.read_text())["categories"]] == list(source.class_names)
    config = override(Config(), {"data.short_side": 300})
    views = view_boxes(source.records, config.data)
    best = best_iou(views, config)
    platelets = views.labels == source.class_names.index("Platelets")
    assert 0.6 < (best[platelets] >= 0.5).mean() < 0.75
    shares = count_shares(views, cover(views, config), source.class_names)
    assert shares.classes[2].by_iou == (best[platelets] >= 0.5).sum()
    suggestion = suggest(source.records, config, source.class_names, shares)
    assert suggestion is not None and suggestion.after.classes[2].part("by_iou") > 0.95
