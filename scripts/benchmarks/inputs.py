"""Inputs of the benchmarks: images with ground truth, logits, candidate boxes. NumPy only, for every variant."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

COCO_BOXES = 7
"""Mean number of ground-truth boxes per image of COCO."""


class Scene(NamedTuple):
    """Images with ground truth."""

    images: UInt8[np.ndarray, "B H W 3"]
    boxes_xyxy: Float32[np.ndarray, "B G 4"]
    """Pixels."""
    labels: Int32[np.ndarray, "B G"]


class Candidates(NamedTuple):
    """Boxes before suppression."""

    boxes_xyxy: Float32[np.ndarray, "N 4"]
    scores: Float32[np.ndarray, " N"]
    labels: Int32[np.ndarray, " N"]


def scene(batch: int, size_hw: tuple[int, int], boxes: int, classes: int, seed: int) -> Scene:
    """Returns images of smooth noise. The sides of the boxes are log-uniform from 1/32 to 1 of the image's, roughly as
    COCO's."""
    rng = np.random.default_rng(seed)
    height, width = size_hw
    coarse = rng.integers(0, 256, (batch, -(-height // 8), -(-width // 8), 3), np.uint8)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    return Scene(
        np.ascontiguousarray(images), boxes_in(rng, (batch, boxes), size_hw), _labels(rng, (batch, boxes), classes)
    )


def boxes_in(
    rng: np.random.Generator, shape: tuple[int, ...], size_hw: tuple[int, int]
) -> Float32[np.ndarray, "... 4"]:
    """Returns boxes inside the image, with log-uniform sides."""
    sides_hw = np.exp(rng.uniform(np.log(1 / 32), 0, (*shape, 2))) * np.array(size_hw)
    corners = rng.uniform(0, 1, (*shape, 2)) * (np.array(size_hw) - sides_hw)
    return np.concatenate([corners[..., ::-1], (corners + sides_hw)[..., ::-1]], axis=-1).astype(np.float32)


def _labels(rng: np.random.Generator, shape: tuple[int, ...], classes: int) -> Int32[np.ndarray, ...]:
    return rng.integers(0, classes, shape).astype(np.int32)


def class_outputs(
    rows: int, classes: int, seed: int
) -> tuple[Float32[np.ndarray, "rows classes"], Int32[np.ndarray, " rows"]]:
    """Returns logits around the prior 0.01, and labels: 1 row in 200 positive, 1 in 100 ignored (-2), the others
    background (-1)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-4.6, 1.5, (rows, classes)).astype(np.float32)
    draw = rng.uniform(size=rows)
    labels = np.where(draw < 0.005, rng.integers(0, classes, rows), np.where(draw < 0.015, -2, -1))
    return logits, labels.astype(np.int32)


def candidates(number: int, classes: int, seed: int) -> Candidates:
    """Returns clusters as a detector outputs them: about ten boxes near each object, most of them of its class. Nearer
    ones score higher."""
    rng = np.random.default_rng(seed)
    objects = max(1, number // 10)
    boxes, labels = boxes_in(rng, (objects,), (800, 1333)), _labels(rng, (objects,), classes)
    of = rng.integers(0, objects, number)
    size = np.tile(boxes[of, 2:] - boxes[of, :2], 2)
    shift = rng.normal(0, 0.15, (number, 4))
    distance = np.abs(shift).mean(axis=1)
    labels = np.where(rng.uniform(size=number) < 0.8, labels[of], rng.integers(0, classes, number))
    scores = rng.uniform(0.05, 1, objects)[of] * np.exp(-4 * distance) * rng.uniform(0.9, 1, number)
    return Candidates((boxes[of] + shift * size).astype(np.float32), scores.astype(np.float32), labels.astype(np.int32))
