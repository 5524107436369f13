"""The anchors near boxes, found without looking at all: anchors of one shape on one level differ only in position."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int64

from retina_jax.config import AnchorConfig, Config, ModelConfig
from retina_jax.data.tiles import Tile
from retina_jax.ops.anchors import anchor_grid, anchors_per_cell, level_sizes


class Views(NamedTuple):
    """V views, each an image, or a tile of one, at one of its sizes, with N boxes in all. If training draws the short side
    at random, there is one view per short side. Nothing is flipped."""

    padded_hw: list[tuple[int, int]]  # padded shape (height, width) of each view
    sizes_hw: list[tuple[int, int]]  # size of each image within it
    records: Int64[np.ndarray, " V"]  # record of each view
    ends: Int64[np.ndarray, " V+1"]  # view v has the boxes ends[v] to ends[v + 1]
    boxes_xyxy: Float32[np.ndarray, "N 4"]  # pixels of the padded image, exactly what training matches with the anchors
    labels: Int64[np.ndarray, " N"]
    boxes: Int64[np.ndarray, " N"]  # index of each box among those of all records, one record after the other
    tiles: Sequence[Tile] = ()  # the part of the image that each view shows


def best_iou(views: Views, config: Config) -> Float32[np.ndarray, " N"]:
    """Returns the largest IoU of each box with any anchor of `anchor_grid`, without looking at all anchors. Anchors of one
    shape on one level differ only in position, and two boxes of given sizes overlap the more, the closer their centres
    are along x and along y. So only the anchor with the nearest centre counts, one per level and shape."""
    best, shapes = np.zeros(len(views.labels), np.float32), anchors_per_cell(config.anchors)
    padded_of = np.repeat(np.array(views.padded_hw, np.int64).reshape(-1, 2), np.diff(views.ends), axis=0)
    for height, width in sorted(set(views.padded_hw)):
        chosen = np.flatnonzero((padded_of == (height, width)).all(1))
        boxes = views.boxes_xyxy[chosen]
        sides = boxes[:, None, 2:] - boxes[:, None, :2]
        # The x of an anchor depends on its column alone and its y on its row: the grid's first row and column are enough.
        grids = (anchor_grid(hw, config.anchors, config.model) for hw in ((1, width), (height, 1)))
        row, column = (grid.reshape(-1, shapes, 4) for grid in grids)
        across = down = 0
        for rows, columns in level_sizes((height, width), config.model):
            x1, x2 = _nearest(row[across : across + columns, :, 0::2], boxes[:, 0::2])
            y1, y2 = _nearest(column[down : down + rows, :, 1::2], boxes[:, 1::2])
            across, down = across + columns, down + rows
            overlap_x = np.minimum(x2, boxes[:, 2, None]) - np.maximum(x1, boxes[:, 0, None])
            overlap_y = np.minimum(y2, boxes[:, 3, None]) - np.maximum(y1, boxes[:, 1, None])
            shared = np.maximum(overlap_x, 0) * np.maximum(overlap_y, 0)
            ious = shared / (sides[..., 0] * sides[..., 1] + (x2 - x1) * (y2 - y1) - shared)
            best[chosen] = np.maximum(best[chosen], ious.max(1, initial=0))
    return best


def _nearest(
    ends: Float32[np.ndarray, "cells a 2"], boxes: Float32[np.ndarray, "n 2"]
) -> tuple[Float32[np.ndarray, "n a"], Float32[np.ndarray, "n a"]]:
    """Returns, along one axis, both ends of the anchor of each shape whose centre is nearest to each box's."""
    centres = ends.sum(axis=2, dtype=np.float64) / 2
    step = centres[1, 0] - centres[0, 0] if len(centres) > 1 else 1.0
    middle = boxes.sum(axis=1, dtype=np.float64)[:, None] / 2
    cell = np.clip(np.rint((middle - centres[0]) / step), 0, len(ends) - 1).astype(np.int64)
    found = ends[cell, np.arange(ends.shape[1])]
    return found[..., 0], found[..., 1]


class _Lattices(NamedTuple):
    """The S shapes of anchors of all levels, each a lattice of equal boxes; x and y in the last axis."""

    sides: Float[np.ndarray, "S 2"]
    first: Float[np.ndarray, "S 2"]  # centre of the first anchor
    steps: Float[np.ndarray, "S 2"]  # between centres
    numbers: Int64[np.ndarray, "S 2"]  # of columns and rows
    starts: Int64[np.ndarray, " S"]  # index of the first anchor in the grid


@lru_cache(maxsize=16)
def _lattices(padded_hw: tuple[int, int], anchors: AnchorConfig, model: ModelConfig) -> _Lattices:
    grid, shapes, start, parts = anchor_grid(padded_hw, anchors, model), anchors_per_cell(anchors), 0, []
    for rows, columns in level_sizes(padded_hw, model):
        level = grid[start : start + rows * columns * shapes].reshape(rows, columns, shapes, 4).astype(np.float64)
        centres = (level[..., :2] + level[..., 2:]) / 2
        steps = centres[min(1, rows - 1), min(1, columns - 1), 0] - centres[0, 0, 0]
        steps = np.where(steps > 0, steps, 1.0)  # one row or column
        each = np.tile(steps, (shapes, 1)), np.tile((columns, rows), (shapes, 1)), start + np.arange(shapes)
        parts.append((level[0, 0, :, 2:] - level[0, 0, :, :2], centres[0, 0], *each))
        start += rows * columns * shapes
    return _Lattices(*map(np.concatenate, zip(*parts, strict=True)))


def anchors_near(
    boxes_xyxy: Float32[np.ndarray, "n 4"],
    least_iou: Float[np.ndarray, " n"],
    padded_hw: tuple[int, int],
    config: Config,
) -> Float32[np.ndarray, "m 4"]:
    """Returns, in the order of `anchor_grid`, all anchors with an IoU of `least_iou` or more with a box, and some others; a
    box with a least IoU of 0 has none. An IoU of t needs an overlap of t times the longer side, along x and along y."""
    lattices, shapes = _lattices(padded_hw, config.anchors, config.model), anchors_per_cell(config.anchors)
    boxes, least = boxes_xyxy.astype(np.float64)[:, None], least_iou[:, None, None]
    sides, middle = boxes[..., 2:] - boxes[..., :2], (boxes[..., :2] + boxes[..., 2:]) / 2
    reach = (sides + lattices.sides) / 2 - least * np.maximum(sides, lattices.sides)
    low, high = ((middle + sign * reach - lattices.first) / lattices.steps for sign in (-1, 1))
    low = np.maximum(np.ceil(low - 1e-3), 0).astype(np.int64)
    number = np.maximum(np.minimum(np.floor(high + 1e-3), lattices.numbers - 1).astype(np.int64) - low + 1, 0)
    number *= ((reach >= 0) & (least > 0)).all(axis=-1, keepdims=True)
    box, shape = np.nonzero(number.prod(axis=-1))
    (x, y), (columns, rows) = low[box, shape].T, number[box, shape].T
    sizes = rows * columns
    of = np.repeat(np.arange(len(box)), sizes)
    place = np.arange(len(of)) - np.repeat(sizes.cumsum() - sizes, sizes)
    of_box, of_shape = box[of], shape[of]
    cell_xy = np.stack([x[of] + place % columns[of], y[of] + place // columns[of]], axis=1)
    # The few of them that overlap enough: matching the others would take four times as long.
    both, sides = lattices.sides[of_shape], sides[of_box, 0]
    apart = np.abs(lattices.first[of_shape] + lattices.steps[of_shape] * cell_xy - middle[of_box, 0])
    shared = np.minimum(np.minimum(sides, both), (sides + both) / 2 - apart).clip(0).prod(axis=1)
    near = shared >= (1 - 1e-3) * least_iou[of_box] * (sides.prod(axis=1) + both.prod(axis=1) - shared)
    cell = cell_xy[near, 1] * lattices.numbers[of_shape[near], 0] + cell_xy[near, 0]
    found = np.unique(lattices.starts[of_shape[near]] + shapes * cell)
    return anchor_grid(padded_hw, config.anchors, config.model)[found]
