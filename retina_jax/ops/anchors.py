"""Anchor boxes (Section 4, Anchors): the grid that the heads' outputs are laid over.

Everything is a function of shapes and configuration, so it is numpy, computed once and exact, and the result enters a
compiled program as a constant. Anchors that stick out of the image are kept; those over the padding are background.

Row n of the grid belongs to row n of the logits [A K], where each level's map (H, W, a * K) is reshaped to
(H * W * a, K) and the levels follow each other from the finest: level, row, column, anchor in the cell.
"""

import functools
import math

import numpy as np
from jaxtyping import Float32, Float64

from retina_jax.config import AnchorConfig, ConfigError, ModelConfig


def levels(model: ModelConfig) -> range:
    """Pyramid levels, finest first. Paper: 3 to 7."""
    return range(model.min_level, model.max_level + 1)


def level_sizes(canvas_hw: tuple[int, int], model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """(height, width) of each level's map, in cells: ceil(canvas / 2^level), as padded strided convolutions give it."""
    height, width = canvas_hw
    if height < 1 or width < 1:
        raise ConfigError(f"canvas_hw is {canvas_hw}: both sides must be at least 1 pixel")
    return tuple((-(-height // 2**level), -(-width // 2**level)) for level in levels(model))


def anchors_per_cell(config: AnchorConfig) -> int:
    """Anchors at each place of a map. Paper: 9."""
    return len(config.scales) * len(config.ratios)


def level_counts(canvas_hw: tuple[int, int], anchors: AnchorConfig, model: ModelConfig) -> tuple[int, ...]:
    """Anchors of each level, finest first; they add up to A."""
    return tuple(height * width * anchors_per_cell(anchors) for height, width in level_sizes(canvas_hw, model))


@functools.lru_cache(maxsize=64)
def anchor_grid(canvas_hw: tuple[int, int], anchors: AnchorConfig, model: ModelConfig) -> Float32[np.ndarray, "A 4"]:
    """Anchors of a canvas (height, width), xyxy in its pixels, in the order of the logits. Read-only, cached.

    Styles, of which a checkpoint needs the one it was trained with (s is the side of a level's base square,
    size_factor * 2^level; ratios are height over width):

    - paper: for each scale, for each ratio: width s * scale / sqrt(ratio), height s * scale * sqrt(ratio), so that the
      area is exactly (s * scale)^2; centred on the cell, at (column + .5, row + .5) * 2^level.
    - detectron: as its generate_anchors: the sides of a stride-sized box of each ratio are rounded to whole pixels
      (half to even) and then multiplied; for each scale, for each ratio from 1 upwards, then the ratios below 1: the
      default ratios come as (1, 2, .5). Centred on the cell. Detectron writes boxes with inclusive ends, x2 = x1 +
      width - 1, and adds 1 wherever it takes a width; here x2 = x1 + width, the same box in this package's half-open
      pixels: [-12, -12, 19, 19] there is [-12, -12, 20, 20] here. With it every formula of Detectron (IoU, encoding,
      decoding) becomes the one in `retina_jax.ops.boxes`, so nothing else has to know.
    - detectron2: the cell of the paper, centred on the cell's upper left corner, at (column, row) * 2^level.
    - torchvision: sides s * scale truncated to whole pixels (32, 40, 50), corners of each cell anchor rounded (half to
      even); for each ratio, for each scale; centred on the cell's upper left corner, and the step between cells is the
      canvas over the map, whole pixels only: at 800 px, 61 on P6 and 114 on P7.
    """
    if not anchors.scales or not anchors.ratios or min(*anchors.scales, *anchors.ratios, anchors.size_factor) <= 0:
        raise ConfigError(
            "anchors.size_factor, anchors.scales, anchors.ratios must be positive, with one scale and ratio at least: "
            f"got {anchors.size_factor}, {anchors.scales}, {anchors.ratios}"
        )
    grids = []
    for level, (rows, columns) in zip(levels(model), level_sizes(canvas_hw, model), strict=True):
        stride = 2**level
        if anchors.style == "torchvision":
            cell, offset = _torchvision_cell(stride, anchors), 0.0
            step_y, step_x = canvas_hw[0] // rows, canvas_hw[1] // columns
        elif anchors.style == "detectron2":
            # In float32 before the sum, as detectron2 has it: the last bit depends on it.
            cell, offset = _paper_cell(stride, anchors).astype(np.float32), 0.0
            step_y, step_x = stride, stride
        else:
            cell = _paper_cell(stride, anchors) if anchors.style == "paper" else _detectron_cell(stride, anchors)
            offset, step_y, step_x = 0.5 * stride, stride, stride
        y, x = np.meshgrid(np.arange(rows) * step_y + offset, np.arange(columns) * step_x + offset, indexing="ij")
        centres = np.stack([x, y, x, y], axis=-1)
        grids.append((centres[:, :, None, :] + cell[None, None, :, :]).reshape(-1, 4))
    grid = np.concatenate(grids).astype(np.float32)
    grid.setflags(write=False)  # it is cached: a caller that wrote to it would change everybody's anchors
    return grid


def _paper_cell(stride: int, anchors: AnchorConfig) -> Float64[np.ndarray, "a 4"]:
    side = anchors.size_factor * stride
    return _around_origin(
        [
            (side * scale / math.sqrt(ratio), side * scale * math.sqrt(ratio))
            for scale in anchors.scales
            for ratio in anchors.ratios
        ]
    )


def _detectron_cell(stride: int, anchors: AnchorConfig) -> Float64[np.ndarray, "a 4"]:
    ratios = [r for r in anchors.ratios if r >= 1] + [r for r in anchors.ratios if r < 1]
    sizes = []
    for scale in anchors.scales:
        for ratio in ratios:
            width = np.round(math.sqrt(stride * stride / ratio))
            height = np.round(width * ratio)
            sizes.append((width * anchors.size_factor * scale, height * anchors.size_factor * scale))
    return _around_origin(sizes)


def _torchvision_cell(stride: int, anchors: AnchorConfig) -> Float64[np.ndarray, "a 4"]:
    sides = np.array([int(anchors.size_factor * stride * scale) for scale in anchors.scales], np.float32)
    # In float32 as torchvision does it: the rounding below must see the same halves.
    height_ratios = np.sqrt(np.array(anchors.ratios, np.float32))
    width_ratios = np.float32(1) / height_ratios
    sizes = [
        (float(w * side), float(h * side)) for w, h in zip(width_ratios, height_ratios, strict=True) for side in sides
    ]
    return np.round(_around_origin(sizes))


def _around_origin(sizes: list[tuple[float, float]]) -> Float64[np.ndarray, "a 4"]:
    return np.array([(-width / 2, -height / 2, width / 2, height / 2) for width, height in sizes], np.float64)
