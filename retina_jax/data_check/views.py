"""The boxes as the network will see them: each image resized to each short side of the training, laid on its canvas."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int64

from retina_jax.config import Config, DataConfig
from retina_jax.data.source import Record
from retina_jax.data.transforms import assign_bucket, buckets, resized_size, to_canvas_pixels, train_short_sides
from retina_jax.ops.anchors import anchor_grid, anchors_per_cell, level_sizes

SIDES = np.array([0.0, *(2.0 ** (np.arange(4, 21) / 2)), np.inf])
"""Ends of the bins of box sizes, the square root of the area in pixels: half octaves from 4 to 1024."""
ASPECTS = np.array([0.0, *(2.0 ** (np.arange(-6, 7) / 2)), np.inf])
"""Ends of the bins of aspects, height over width: half octaves from 1:8 to 8:1."""


class Views(NamedTuple):
    """V images at one of their sizes each, with N boxes in all. Where the short side is drawn at random in training, every
    image is there once for each of them. Nothing is mirrored."""

    canvases: list[tuple[int, int]]
    """Canvas shape (height, width) of each view."""
    sizes_hw: list[tuple[int, int]]
    """Size of each image on its canvas."""
    records: Int64[np.ndarray, " V"]
    """Record of each view."""
    ends: Int64[np.ndarray, " V+1"]
    """View v has the boxes ends[v] to ends[v + 1]."""
    boxes_xyxy: Float32[np.ndarray, "N 4"]
    """Canvas pixels, exactly what training matches with the anchors."""
    labels: Int64[np.ndarray, " N"]
    boxes: Int64[np.ndarray, " N"]
    """Place of each box among those of all records, one record after the other."""

    def bin_of_size(self) -> Int64[np.ndarray, " N"]:
        """Bin of SIDES that each box falls in; a size that two bins share falls in the upper."""
        width, height = self._sides()
        return np.searchsorted(SIDES, np.sqrt(width * height), side="right") - 1

    def bin_of_aspect(self) -> Int64[np.ndarray, " N"]:
        """Bin of ASPECTS that each box falls in; an aspect that two bins share falls in the upper."""
        width, height = self._sides()
        return np.searchsorted(ASPECTS, height / width, side="right") - 1

    def _sides(self) -> Float[np.ndarray, "2 N"]:
        return (self.boxes_xyxy[:, 2:] - self.boxes_xyxy[:, :2]).astype(np.float64).T


def view_boxes(records: list[Record], data: DataConfig) -> Views:
    """Lays the boxes of all records on the canvases that training would; of each image the first `data.max_boxes`."""
    short_sides = train_short_sides(data)
    shapes = buckets(data, short_sides)
    starts = np.cumsum([0, *(len(record.labels) for record in records)])
    canvases, sizes, rows, boxes, labels, places = [], [], [], [], [], []
    for row, record in enumerate(records):
        n = min(len(record.labels), data.max_boxes)
        rule = data.long_side, data.size_rounding
        canvas = shapes[assign_bucket(resized_size(record.height, record.width, max(short_sides), *rule), shapes)]
        for short_side in short_sides:
            height, width = resized_size(record.height, record.width, short_side, *rule)
            scale_xy = np.array([width / record.width, height / record.height])
            canvases.append(canvas)
            sizes.append((height, width))
            rows.append(row)
            boxes.append(to_canvas_pixels(record.boxes_xyxy[:n], scale_xy, data.box_ends).astype(np.float32))
            labels.append(record.labels[:n])
            places.append(np.arange(starts[row], starts[row] + n))
    return Views(
        canvases=canvases,
        sizes_hw=sizes,
        records=np.array(rows, np.int64),
        ends=np.cumsum([0, *map(len, boxes)]),
        boxes_xyxy=np.concatenate([np.zeros((0, 4), np.float32), *boxes]),
        labels=np.concatenate([np.zeros(0, np.int64), *labels]).astype(np.int64),
        boxes=np.concatenate([np.zeros(0, np.int64), *places]),
    )


# The best IoU that any anchor has with each of many boxes, without a look at all anchors: for the search of better ones.
#
# Anchors of one shape on one level differ only in where they stand, and two boxes of given sizes overlap the more, the closer
# their centres are along x and along y. So the best of them is the one whose centre is nearest, and A candidates a box become
# one for each level and shape.


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
