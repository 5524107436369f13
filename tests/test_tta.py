"""Test-time augmentation against plain loops: separate detectors, boxes mapped back by hand, a naive suppression."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from small_sets import rectangles
from test_detector import CONFIG

from retina_jax import detector as tta
from retina_jax.config import Config, DetectionConfig
from retina_jax.config_io import override
from retina_jax.data.decoding import to_rgb
from retina_jax.data.transforms import buckets
from retina_jax.detector import Detector, ImageDetections, padded_batch
from retina_jax.evaluate import evaluate
from retina_jax.training.opening import open_run
from retina_jax.training.parallel import Driver

FLIPPED_AND_SMALLER = {"detection__tta_flip": True, "detection__tta_short_sides": (32,)}


@functools.cache
def detector(**changes: object) -> Detector:
    """Returns the untrained network of test_detector.py; its detections are arbitrary, but the same for the same
    image."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    driver = Driver(override(CONFIG, {"devices": 1, **named}), 2)
    return Detector(driver, driver.init_state().variables, ("red", "green"), (1, 2))


def pictures(*sizes_hw: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes_hw]


def naive_merge(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, config: DetectionConfig) -> list[int]:
    """Suppresses greedily class by class, one box after the other."""
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        x1, y1, x2, y2 = boxes[i].astype(np.float64)
        for j in kept:
            u1, v1, u2, v2 = boxes[j].astype(np.float64)
            common = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
            union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - common
            if (config.class_agnostic_nms or labels[j] == labels[i]) and union > 0 and common / union > config.nms_iou:
                break
        else:
            kept.append(i)
    return kept[: config.max_detections]


def assert_same(got: ImageDetections, expected: ImageDetections) -> None:
    assert len(expected.scores) > 5 and set(expected.labels) == {0, 1}
    np.testing.assert_allclose(got.scores, expected.scores, atol=1e-6)
    np.testing.assert_array_equal(got.labels, expected.labels)
    np.testing.assert_allclose(got.boxes_xyxy, expected.boxes_xyxy, atol=1e-3)
    assert got.class_names == expected.class_names


def flipped_back(found: ImageDetections, width: int) -> ImageDetections:
    x1, y1, x2, y2 = found.boxes_xyxy.T
    return dataclasses.replace(found, boxes_xyxy=np.stack([width - x2, y1, width - x1, y2], axis=1))


def test_all_versions_are_merged_as_by_a_plain_loop() -> None:
    """Images with a short side of 32 are enlarged by 2 or not at all, which float32 does exactly: mirroring and resize
    commute to the last bit."""
    single = [detector(), detector(data__short_side=32, data__long_side=48)]
    for image in pictures((32, 44), (32, 48)):
        parts = []
        for one in single:
            (plain,), (mirror,) = one.detect([image]), one.detect([image[:, ::-1]])
            parts += [plain, flipped_back(mirror, image.shape[1])]
        boxes, scores, labels = (
            np.concatenate([getattr(p, name) for p in parts]) for name in ("boxes_xyxy", "scores", "labels")
        )
        kept = naive_merge(boxes, scores, labels, CONFIG.detection)
        names = tuple(("red", "green")[label] for label in labels[kept])
        (found,) = detector(**FLIPPED_AND_SMALLER).detect([image])
        assert_same(found, ImageDetections(boxes[kept], scores[kept], labels[kept], names))
        of_version = np.repeat(np.arange(4), [len(part.scores) for part in parts])
        assert len({*of_version[kept].tolist()}) > 1, "the result has detections of several versions"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 30), most=st.integers(1, 8), agnostic=st.booleans())
def test_merging_equals_the_naive_suppression(seed: int, count: int, most: int, agnostic: bool) -> None:
    """This includes equal scores, of which the first has priority, and boxes without area."""
    rng = np.random.default_rng(seed)
    corner, size = rng.integers(0, 12, (count, 2)), rng.integers(0, 9, (count, 2))
    boxes = np.concatenate([corner, corner + size], axis=1).astype(np.float32)
    scores, labels = rng.integers(1, 6, count).astype(np.float32) / 8, rng.integers(0, 2, count)
    config = DetectionConfig(max_detections=most, class_agnostic_nms=agnostic)
    assert tta.merge(boxes, scores, labels, config, 30).tolist() == naive_merge(boxes, scores, labels, config)


def test_detections_of_a_mirrored_image_are_the_mirrored_detections() -> None:
    (image,) = pictures((64, 90))
    plain, augmented = detector(), detector(**FLIPPED_AND_SMALLER)
    for detecting, equal in ((augmented, True), (plain, False)):
        one, other = detecting.detect([image]), detecting.detect([image[:, ::-1]])
        back = flipped_back(other[0], 90)
        same = len(back.scores) == len(one[0].scores)
        assert (same and np.allclose(np.sort(back.scores), np.sort(one[0].scores), atol=1e-6)) == equal
        if equal:
            assert_same(back, one[0])


def test_a_single_version_is_returned_without_merging() -> None:
    images = pictures((40, 60))
    (plain,), (same,) = detector().detect(images), detector(detection__tta_short_sides=(64, 64)).detect(images)
    for name in ("boxes_xyxy", "scores", "labels"):
        np.testing.assert_array_equal(getattr(same, name), getattr(plain, name))


def test_each_size_is_used_once_and_keeps_the_aspect_ratio() -> None:
    config = override(Config(), {"detection.tta_short_sides": (800, 600, 400, 800), "data.jitter_short_sides": (500,)})
    found = tta.sizes(config)
    assert [(data.short_side, data.long_side) for data in found] == [(600, 1000), (800, 1333), (400, 667)]
    assert found[0] == config.data and found[1].jitter_short_sides == ()
    assert tta.versions(config) == 3 and tta.versions(override(config, {"detection.tta_flip": True})) == 6
    assert tta.versions(Config()) == 1


def test_an_image_is_mirrored_inside_its_padded_image() -> None:
    images = pictures((30, 41), (17, 20))
    batch = padded_batch(images, dataclasses.replace(CONFIG.data, short_side=32, long_side=48), 3)
    mirrored = tta.mirrored(batch)
    for before, after, (height, width) in zip(batch.images, mirrored.images, batch.image_sizes, strict=True):
        np.testing.assert_array_equal(after[:height, :width], before[:height, :width][:, ::-1])
        assert after[:height, :width].any() and not after[height:].any() and not after[:, width:].any()
    np.testing.assert_array_equal(tta.mirrored(mirrored).images, batch.images)


def test_evaluation_on_two_devices_equals_detect_and_compiles_one_program_per_shape(tmp_path: Path) -> None:
    source = rectangles(tmp_path, [(48, 32), (40, 32), (44, 32), (48, 32), (40, 32)])
    config = override(detector(**FLIPPED_AND_SMALLER).config, {"devices": 2})
    driver = Driver(config, 2)
    detecting = Detector(driver, driver.init_state().variables, source.class_names, source.category_ids)
    run = open_run(tmp_path / "run", config, source.class_names, source.category_ids)
    programs = tta._nms._cache_size()
    evaluate(run, detecting, source, 0)
    wide = {shape for data in tta.sizes(config) for shape in buckets(data, (data.short_side,)) if shape[1] > shape[0]}
    assert driver.detect._cache_size() == len(wide) == 2 and tta._nms._cache_size() <= programs + 1
    results = json.loads((run.folder / "detections/step_00000000.json").read_text())
    for index in (0, 4):
        mine = [r for r in results if r["image_id"] == source.records[index].image_id]
        (found,) = detector(**FLIPPED_AND_SMALLER).detect([to_rgb(source.read(index))])
        assert len(mine) > 5
        np.testing.assert_allclose([r["score"] for r in mine], found.scores, atol=5e-6)
        assert [r["category_id"] - 1 for r in mine] == found.labels.tolist()
        np.testing.assert_allclose([r["bbox"][:2] for r in mine], found.boxes_xyxy[:, :2], atol=1e-3)
