"""The best IoU that any anchor has with each of many boxes, without a look at all anchors: for the search of better ones.

Anchors of one shape on one level differ only in where they stand, and two boxes of given sizes overlap the more, the closer
their centres are along x and along y. So the best of them is the one whose centre is nearest, and A candidates a box become
one for each level and shape.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from retina_jax.anchors import anchor_grid, anchors_per_cell, level_sizes
from retina_jax.config import Config
from retina_jax.data_check.views import Views


def best_iou(views: Views, config: Config) -> Float32[np.ndarray, " N"]:
    """Of each box, the largest IoU that `anchor_grid` has for it on its canvas."""
    best = np.zeros(len(views.labels), np.float32)
    canvas_of = np.repeat(np.array(views.canvases, np.int64).reshape(-1, 2), np.diff(views.ends), axis=0)
    for canvas in sorted(set(views.canvases)):
        mine = (canvas_of == canvas).all(1)
        best[mine] = best_iou_on(canvas, views.boxes_xyxy[mine], config)
    return best


def best_iou_on(
    canvas_hw: tuple[int, int], boxes_xyxy: Float32[np.ndarray, "n 4"], config: Config
) -> Float32[np.ndarray, " n"]:
    """The same for boxes of one canvas."""
    height, width = canvas_hw
    shapes = anchors_per_cell(config.anchors)
    # The x of an anchor depend on its column alone and its y on its row: the grid's first row and first column hold all.
    row, column = (
        anchor_grid(hw, config.anchors, config.model).reshape(-1, shapes, 4) for hw in ((1, width), (height, 1))
    )
    best = np.zeros(len(boxes_xyxy), np.float32)
    across = down = 0
    for rows, columns in level_sizes(canvas_hw, config.model):
        x1, x2 = _nearest(row[across : across + columns, :, 0::2], boxes_xyxy[:, 0::2])
        y1, y2 = _nearest(column[down : down + rows, :, 1::2], boxes_xyxy[:, 1::2])
        across, down = across + columns, down + rows
        overlap_x = np.minimum(x2, boxes_xyxy[:, 2, None]) - np.maximum(x1, boxes_xyxy[:, 0, None])
        overlap_y = np.minimum(y2, boxes_xyxy[:, 3, None]) - np.maximum(y1, boxes_xyxy[:, 1, None])
        shared = np.maximum(overlap_x, 0) * np.maximum(overlap_y, 0)
        areas = ((boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1]))[:, None]
        np.maximum(best, (shared / (areas + (x2 - x1) * (y2 - y1) - shared)).max(1, initial=0), out=best)
    return best


def _nearest(
    ends: Float32[np.ndarray, "cells a 2"], boxes: Float32[np.ndarray, "n 2"]
) -> tuple[Float32[np.ndarray, "n a"], Float32[np.ndarray, "n a"]]:
    """Along one axis, both ends of the anchor of each shape whose centre is nearest to each box's."""
    centres = ends.sum(axis=2, dtype=np.float64) / 2
    step = centres[1, 0] - centres[0, 0] if len(centres) > 1 else 1.0
    middle = boxes.sum(axis=1, dtype=np.float64)[:, None] / 2
    cell = np.clip(np.rint((middle - centres[0]) / step), 0, len(ends) - 1).astype(np.int64)
    found = ends[cell, np.arange(ends.shape[1])]
    return found[..., 0], found[..., 1]
