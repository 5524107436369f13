"""Mining equals the complete suppression: sort all, suppress all, choose."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from retina_jax.config import AnchorConfig, ModelConfig
from retina_jax.losses.mining import mine
from retina_jax.ops.anchors import anchor_grid

KINDS = ("ohem", "ohem_1_3", "ohem_1_3_strict")
GRID = anchor_grid((64, 96), AnchorConfig(size_factor=2.0), ModelConfig(max_level=5))


@functools.cache
def compiled(kind: str, batch: int, iou_threshold: float) -> jax.stages.Wrapped:
    return jax.jit(functools.partial(mine, kind=kind, batch=batch, iou_threshold=iou_threshold))


def mined_by(
    loss: np.ndarray, positive: np.ndarray, part: np.ndarray, anchors: np.ndarray, **options: object
) -> list[int]:
    mined = compiled(**options)(
        jnp.asarray(loss, jnp.float32), jnp.asarray(positive), jnp.asarray(part), jnp.asarray(anchors, jnp.float32)
    )
    return np.flatnonzero(mined).tolist()


def chosen_by_complete_suppression(
    loss: np.ndarray,
    positive: np.ndarray,
    part: np.ndarray,
    anchors: np.ndarray,
    *,
    kind: str,
    batch: int,
    iou_threshold: float,
) -> list[int]:
    x1, y1, x2, y2 = anchors.astype(np.float32).T
    inner = np.clip(np.minimum.outer(x2, x2) - np.maximum.outer(x1, x1), 0, None) * np.clip(
        np.minimum.outer(y2, y2) - np.maximum.outer(y1, y1), 0, None
    )
    area = (x2 - x1) * (y2 - y1)
    overlap = inner / np.maximum(np.add.outer(area, area) - inner, 1e-20) > np.float32(iou_threshold)
    alive, survivors = part & (loss > 0), []
    for a in np.argsort(-loss, kind="stable"):
        if alive[a]:
            survivors.append(int(a))
            alive = alive & ~overlap[a]
    if kind == "ohem":
        return sorted(survivors[:batch])
    positives = [a for a in survivors if positive[a]][: batch // 4]
    wanted = batch - len(positives) if kind == "ohem_1_3" else 3 * max(len(positives), 1)
    negatives = [a for a in survivors if not positive[a]]
    return sorted(positives + negatives[:wanted])


def random_boxes(rng: np.random.Generator, count: int, span: int) -> np.ndarray:
    """Draws integer coordinates: IoUs of exactly a threshold occur, and are exact."""
    corner = rng.integers(0, span, (count, 2))
    return np.concatenate([corner, corner + rng.integers(1, 9, (count, 2))], axis=1).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    threshold=st.sampled_from([0.3, 0.5, 0.7]),
    batch=st.sampled_from([4, 11, 100]),
    levels=st.sampled_from([3, 1000]),
    positives=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    part=st.sampled_from([0.0, 0.3, 1.0]),
    easy=st.booleans(),
)
def test_mining_equals_complete_suppression_then_the_choice(
    kind: str, seed: int, threshold: float, batch: int, levels: int, positives: float, part: float, easy: bool
) -> None:
    """Uses random boxes, losses with many equal values and zeros (levels 3) or few, and batches larger than the number
    of anchors (100)."""
    rng = np.random.default_rng(seed)
    anchors = random_boxes(rng, 60, int(rng.integers(2, 40)))
    loss = (rng.integers(0, levels, 60) / 8).astype(np.float32)
    positive, taking_part = rng.random(60) < positives, rng.random(60) < part
    if easy:  # every positive behind the negatives: each is reached by a climb alone
        loss = np.where(positive, loss / 1024, loss)
    case, options = (loss, positive, taking_part, anchors), {"batch": batch, "iou_threshold": threshold}
    assert mined_by(*case, kind=kind, **options) == chosen_by_complete_suppression(*case, kind=kind, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [0.5, 0.7])
@pytest.mark.parametrize("batch", [16, 128])
def test_mining_on_an_anchor_grid_equals_complete_suppression_then_the_choice(
    kind: str, threshold: float, batch: int
) -> None:
    """Losses rise and fall over the image, as a network's do, with positives hard, mixed and easy; or they are all
    equal."""
    rng = np.random.default_rng(batch)
    centre = (GRID[:, :2] + GRID[:, 2:]) / 2
    options = {"kind": kind, "batch": batch, "iou_threshold": threshold}
    for scale in (10.0, 1.0, 0.01, 0.0):
        peaks, widths = rng.uniform(0, 96, (5, 2)), rng.uniform(4, 30, 5)
        distance = np.linalg.norm(centre[:, None] - peaks[None], axis=-1)
        smooth = np.exp(-((distance / widths[None]) ** 2)).sum(axis=1) + 0.01 * rng.random(len(GRID))
        positive = np.linalg.norm(centre - rng.uniform(20, 70, (1, 2)), axis=1) < 10
        loss = (np.where(positive, scale * smooth, smooth) if scale else np.ones(len(GRID))).astype(np.float32)
        case = (loss, positive, rng.random(len(GRID)) < 0.9, GRID)
        expected = chosen_by_complete_suppression(*case, **options)
        assert mined_by(*case, **options) == expected
        assert len(expected) > 3  # there was something to choose


SIX = np.array([[20 * i, 0, 20 * i + 10, 10] for i in range(6)], np.float32)  # apart from each other
ALL = np.ones(6, bool)


def test_ohem_takes_the_hardest_of_any_label() -> None:
    loss, positive = np.array([1, 6, 2, 5, 3, 4.0]), np.arange(6) == 0
    assert mined_by(loss, positive, ALL, SIX, kind="ohem", batch=3, iou_threshold=0.5) == [1, 3, 5]


def test_strict_1_3_takes_three_negatives_per_positive_even_if_it_is_easy() -> None:
    loss, positive = np.array([1, 6, 2, 5, 3, 4.0]), np.arange(6) == 0
    strict = {"kind": "ohem_1_3_strict", "batch": 8, "iou_threshold": 0.5}
    assert mined_by(loss, positive, ALL, SIX, **strict) == [0, 1, 3, 5]
    assert mined_by(loss, ~ALL, ALL, SIX, **strict) == [1, 3, 5]
    assert mined_by(loss, ALL, ALL, SIX, **strict) == [1, 3]


def test_ohem_1_3_fills_its_minibatch_with_negatives() -> None:
    apart = np.array([[20 * i, 0, 20 * i + 10, 10] for i in range(40)], np.float32)
    loss, part = np.arange(40, 0, -1.0), np.ones(40, bool)
    for batch in (8, 16, 32):  # 2, 4 and then all 5 of the positives, which are the easiest
        mined = mined_by(loss, np.arange(40) >= 35, part, apart, kind="ohem_1_3", batch=batch, iou_threshold=0.5)
        positives = [35, 36, 37, 38, 39][: batch // 4]
        assert mined == [*range(batch - len(positives)), *positives]
    assert mined_by(loss, ~part, part, apart, kind="ohem_1_3", batch=8, iou_threshold=0.5) == list(range(8))


def test_an_overlap_of_exactly_the_threshold_does_not_suppress() -> None:
    boxes = np.array([[0, 0, 10, 1], [0, 0, 5, 1], [0, 0, 5.1, 1]], np.float32)
    loss, part = np.array([3, 1, 2.0]), np.ones(3, bool)
    for kind in KINDS:
        assert mined_by(loss, ~part, part, boxes, kind=kind, batch=4, iou_threshold=0.5) == [0, 1]


def test_a_suppressed_anchor_does_not_suppress() -> None:
    boxes = np.array([[0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10]], np.float32)
    loss, positive = np.array([3, 2, 1.0]), np.array([False, False, True])
    for kind in KINDS:  # for 1:3 a climb from the easiest over both
        assert mined_by(loss, positive, ~(loss < 0), boxes, kind=kind, batch=4, iou_threshold=0.5) == [0, 2]


def test_of_equal_anchors_only_the_first_is_mined() -> None:
    same = np.tile(SIX[:1], (6, 1))
    for kind in KINDS:
        assert mined_by(np.ones(6), np.arange(6) > 2, ALL, same, kind=kind, batch=4, iou_threshold=0.5) == [0]


def test_an_anchor_without_area_is_mined_once() -> None:
    boxes = np.array([[5, 5, 5, 5], [0, 0, 4, 4], [9, 9, 9, 20]], np.float32)
    loss, positive, part = np.array([3, 2, 1.0]), np.array([False, True, True]), np.ones(3, bool)
    for kind in KINDS:
        assert mined_by(loss, positive, part, boxes, kind=kind, batch=8, iou_threshold=0.5) == [0, 1, 2]


def test_ignored_anchors_and_those_without_loss_are_not_mined_and_suppress_nothing() -> None:
    boxes, loss = np.repeat(SIX[:3], 2, axis=0), np.array([9, 1, 0, 0, 2, 1.0])
    part = np.arange(6) != 0
    for kind in KINDS:
        mined = mined_by(loss, np.array([True, True, True, False, False, False]), part, boxes, kind=kind, batch=8,
                         iou_threshold=0.5)  # fmt: skip
        assert mined == [1, 4]


def test_losses_that_are_not_finite_are_always_mined() -> None:
    loss = np.array([np.nan, 1, np.inf, 2, np.nan, 3])
    for kind in KINDS:
        mined = mined_by(loss, np.arange(6) < 2, np.arange(6) != 4, SIX, kind=kind, batch=4, iou_threshold=0.5)
        assert mined == [0, 1, 2, 3, 5]
        everything = mined_by(np.full(6, np.nan), ~ALL, ALL, SIX, kind=kind, batch=4, iou_threshold=0.5)
        assert everything == list(range(6))


@pytest.mark.parametrize("kind", KINDS)
def test_images_in_a_batch_are_mined_independently(kind: str) -> None:
    """Under vmap, and over 8 devices by jit and by shard_map; the images end after different numbers of steps."""
    rng = np.random.default_rng(5)
    loss = jnp.asarray(rng.exponential(size=(8, len(GRID))), jnp.float32)
    positive = jnp.asarray(rng.random((8, len(GRID))) < np.array([0, 0.001, 0.01, 0.1, 0.5, 1, 0.02, 0])[:, None])
    loss = jnp.where(positive, loss * 1e-3, loss)
    part = jnp.asarray(rng.random((8, len(GRID))) < 0.9).at[7].set(False)
    options = {"kind": kind, "batch": 32, "iou_threshold": 0.5}

    def of_images(loss: jax.Array, positive: jax.Array, part: jax.Array) -> jax.Array:
        return jax.vmap(lambda *image: mine(*image, GRID, **options))(loss, positive, part)

    alone = [compiled(**options)(loss[i], positive[i], part[i], jnp.asarray(GRID)) for i in range(8)]
    expected = np.stack(alone)
    assert expected[:7].any(axis=1).all() and not expected[7].any()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    by_device = jax.shard_map(of_images, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    for program in (jax.jit(of_images), jax.jit(of_images, in_shardings=split), jax.jit(by_device)):
        np.testing.assert_array_equal(program(loss, positive, part), expected)


def test_ohem_over_a_mesh_needs_no_collective() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def of_images(loss: jax.Array) -> jax.Array:
        part = jnp.ones(len(GRID), bool)
        one = functools.partial(mine, kind="ohem", batch=8, iou_threshold=0.5)
        return jax.vmap(lambda loss: one(loss, ~part, part, GRID))(loss)

    split = NamedSharding(mesh, PartitionSpec("data"))
    text = jax.jit(of_images, in_shardings=split).lower(jnp.ones((8, len(GRID)))).compile().as_text()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert f"{collective}(" not in text
