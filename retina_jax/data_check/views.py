"""The boxes as the network sees them: each image resized to each short side of the training and padded; and, for the search
for better anchors, a fast computation of the best IoU of each box."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from retina_jax.config import Config, DataConfig
from retina_jax.data.source import Record
from retina_jax.data.transforms import assign_bucket, buckets, resized_size, to_canvas_pixels, train_short_sides
from retina_jax.ops.anchors import anchor_grid, anchors_per_cell, level_sizes

SIDES = np.array([0.0, *(2.0 ** (np.arange(4, 21) / 2)), np.inf])
"""Ends of the bins of box sizes, the square root of the area in pixels: half octaves from 4 to 1024."""
ASPECTS = np.array([0.0, *(2.0 ** (np.arange(-6, 7) / 2)), np.inf])
"""Ends of the bins of aspect ratios, height over width: half octaves from 1:8 to 8:1."""


class Views(NamedTuple):
    """V views, each an image at one of its sizes, with N boxes in all. If training draws the short side at random, every
    image has one view per short side. Nothing is flipped."""

    padded_hw: list[tuple[int, int]]
    """Padded shape (height, width) of each view."""
    sizes_hw: list[tuple[int, int]]
    """Size of each image within it."""
    records: Int64[np.ndarray, " V"]
    """Record of each view."""
    ends: Int64[np.ndarray, " V+1"]
    """View v has the boxes ends[v] to ends[v + 1]."""
    boxes_xyxy: Float32[np.ndarray, "N 4"]
    """Pixels of the padded image, exactly what training matches with the anchors."""
    labels: Int64[np.ndarray, " N"]
    boxes: Int64[np.ndarray, " N"]
    """Index of each box among those of all records, one record after the other."""

    def bins(self) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"]]:
        """The bin of SIDES and the bin of ASPECTS of each box; a value on the border of two bins is in the upper one."""
        width, height = (self.boxes_xyxy[:, 2:] - self.boxes_xyxy[:, :2]).astype(np.float64).T
        ends_values = (SIDES, np.sqrt(width * height)), (ASPECTS, height / width)
        return tuple(np.searchsorted(ends, values, side="right") - 1 for ends, values in ends_values)


def view_boxes(records: list[Record], data: DataConfig) -> Views:
    """The views of all records as training would make them; of each image the first `data.max_boxes` boxes."""
    short_sides = train_short_sides(data)
    shapes, rule = buckets(data, short_sides), (data.long_side, data.size_rounding)
    starts = np.cumsum([0, *(len(record.labels) for record in records)])
    padded, sizes, rows, boxes, labels, places = [], [], [], [], [], []
    for row, record in enumerate(records):
        n = min(len(record.labels), data.max_boxes)
        largest = resized_size(record.height, record.width, max(short_sides), *rule)
        for short_side in short_sides:
            height, width = resized_size(record.height, record.width, short_side, *rule)
            scale_xy = np.array([width / record.width, height / record.height])
            padded.append(shapes[assign_bucket(largest, shapes)])
            sizes.append((height, width))
            rows.append(row)
            boxes.append(to_canvas_pixels(record.boxes_xyxy[:n], scale_xy, data.box_ends).astype(np.float32))
            labels.append(record.labels[:n])
            places.append(np.arange(starts[row], starts[row] + n))
    return Views(
        padded_hw=padded,
        sizes_hw=sizes,
        records=np.array(rows, np.int64),
        ends=np.cumsum([0, *map(len, boxes)]),
        boxes_xyxy=np.concatenate([np.zeros((0, 4), np.float32), *boxes]),
        labels=np.concatenate([np.zeros(0, np.int64), *labels]).astype(np.int64),
        boxes=np.concatenate([np.zeros(0, np.int64), *places]),
    )


def best_iou(views: Views, config: Config) -> Float32[np.ndarray, " N"]:
    """The largest IoU of each box with any anchor of `anchor_grid`, without looking at all anchors.

    Anchors of one shape on one level differ only in position, and two boxes of given sizes overlap the more, the closer
    their centres are along x and along y. So only the anchor with the nearest centre counts, one per level and shape.
    """
    best = np.zeros(len(views.labels), np.float32)
    padded_of = np.repeat(np.array(views.padded_hw, np.int64).reshape(-1, 2), np.diff(views.ends), axis=0)
    for padded_hw in sorted(set(views.padded_hw)):
        chosen = (padded_of == padded_hw).all(1)
        best[chosen] = best_iou_on(padded_hw, views.boxes_xyxy[chosen], config)
    return best


def best_iou_on(
    padded_hw: tuple[int, int], boxes_xyxy: Float32[np.ndarray, "n 4"], config: Config
) -> Float32[np.ndarray, " n"]:
    """The same for boxes in one padded shape."""
    height, width = padded_hw
    shapes = anchors_per_cell(config.anchors)
    # The x of an anchor depends on its column alone and its y on its row: the grid's first row and first column are enough.
    row, column = (
        anchor_grid(hw, config.anchors, config.model).reshape(-1, shapes, 4) for hw in ((1, width), (height, 1))
    )
    best = np.zeros(len(boxes_xyxy), np.float32)
    across = down = 0
    for rows, columns in level_sizes(padded_hw, config.model):
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
