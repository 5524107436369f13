"""The last bit of their IoUs decides which anchors tie for the best of a box, and no compiler may change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from retina_jax.config import AnchorConfig, LossConfig, MatchingConfig, ModelConfig
from retina_jax.losses.total import image_losses
from retina_jax.ops.anchors import anchor_grid
from retina_jax.ops.boxes import iou_matrix
from retina_jax.ops.matching import BACKGROUND, IGNORED, match

IMAGES, DEVICES, CLASSES = 200, 8, 2
ANCHORS = anchor_grid((64, 128), AnchorConfig(style="detectron2"), ModelConfig(max_level=5))
RULE = MatchingConfig(low_quality="all")
matching = partial(match, config=RULE)


def reference_ious(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Returns IoUs [A, G] of the anchors by detectron2's operations in float32, each rounded separately."""
    anchors, boxes = ANCHORS[:, None], boxes_xyxy[None]
    sides = np.minimum(anchors[..., 2:], boxes[..., 2:]) - np.maximum(anchors[..., :2], boxes[..., :2])
    intersection = np.maximum(sides, 0).prod(axis=2)
    of_anchors, of_boxes = ((b[..., 2:] - b[..., :2]).prod(axis=2) for b in (anchors, boxes))
    return np.where(intersection > 0, intersection / (of_anchors + of_boxes - intersection), np.float32(0))


def reference(boxes_xyxy: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, bool]:
    """Returns labels [A] of the anchors, and whether anchors tie for the best of every box."""
    ious = reference_ious(boxes_xyxy)
    best = ious.max(axis=1)
    tied = (ious == ious.max(axis=0)) & (ious > 0)
    positive = (best >= np.float32(RULE.positive_iou)) | tied.any(axis=1)
    unmatched = np.where(best < np.float32(RULE.negative_iou), BACKGROUND, IGNORED)
    return np.where(positive, labels[ious.argmax(axis=1)], unmatched), bool((tied.sum(axis=0) > 1).all())


def images_with_ties(count: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns boxes [G, 4], labels [G] and expected labels [A] of IMAGES images, G = `count`."""
    rng = np.random.default_rng(count)
    found = 0
    while found < IMAGES:
        corner, sides = rng.uniform(0, 60, (count, 2)), rng.uniform(4, 30, (count, 2))
        boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
        labels = rng.integers(0, CLASSES, count).astype(np.int32)
        expected, ties = reference(boxes, labels)
        if ties:
            found += 1
            yield boxes, labels, expected


def in_loss_program(boxes: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the labels [B, A] in the loss program, by the signs of its gradient: the logit of the class must rise,
    those of the others fall, and those of an ignored anchor do neither."""

    def total(logits: jax.Array) -> jax.Array:
        deltas = jnp.zeros((len(labels), len(ANCHORS), 4))
        sums = image_losses([logits], [deltas], ANCHORS, boxes, labels, matching=RULE, loss=LossConfig())
        return (sums.classification + sums.box).sum()

    gradient = jax.grad(total)(jnp.zeros((len(labels), len(ANCHORS), CLASSES)))
    positive, ignored = (gradient < 0).any(axis=2), (gradient == 0).all(axis=2)
    return jnp.where(positive, gradient.argmin(axis=2), jnp.where(ignored, IGNORED, BACKGROUND))


def alone(boxes: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the labels by a program for one image."""
    program = jax.jit(matching)
    return jnp.stack([program(ANCHORS, *image).labels for image in zip(boxes, labels, strict=True)])


def batched(boxes: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the labels by a program for all images."""
    return jax.vmap(matching, in_axes=(None, 0, 0))(jnp.asarray(ANCHORS), boxes, labels).labels


def by_pmap(function: Callable, boxes: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the labels by a program for a share of the images on each device."""
    shares = (x.reshape(DEVICES, -1, *x.shape[1:]) for x in (boxes, labels))
    return jax.pmap(function)(*shares).reshape(IMAGES, -1)


def by_mesh(function: Callable, boxes: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the labels as the default driver does."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False))(
        boxes, labels
    )


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_labels_equal_the_reference_in_every_program(count: int) -> None:
    boxes, labels, expected = map(np.stack, zip(*images_with_ties(count), strict=True))
    assert {BACKGROUND, IGNORED, 0, 1} == set(np.unique(expected))
    programs = {
        "alone": alone,
        "vmap": jax.jit(batched),
        "loss": jax.jit(in_loss_program),
        "pmap": partial(by_pmap, batched),
        "loss under pmap": partial(by_pmap, in_loss_program),
        "loss over a mesh": partial(by_mesh, in_loss_program),
    }
    wrong = {name: int((np.asarray(program(boxes, labels)) != expected).sum()) for name, program in programs.items()}
    assert wrong == dict.fromkeys(programs, 0)


@pytest.mark.parametrize("count", [1, 2, 8, 50])
def test_ious_equal_the_reference_to_the_last_bit(count: int) -> None:
    rng = np.random.default_rng(count)
    corner, sides = rng.uniform(0, 60, (count, 2)), rng.uniform(4, 30, (count, 2))
    boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(iou_matrix)(ANCHORS, boxes), reference_ious(boxes))
