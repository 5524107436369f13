"""Anchor boxes (Section 4, Anchors).

They are computed in numpy and enter a compiled program as a constant. Anchors that reach out of the image are kept; anchors
over the padding are background. Row n of the grid belongs to row n of the logits [A K]. The order is: level (finest first),
row, column, anchor of the cell, because each level's map (H, W, a * K) is reshaped to (H * W * a, K).
"""

import functools
import math

import numpy as np
from jaxtyping import Float32, Float64

from retina_jax.config import AnchorConfig, ModelConfig


def levels(model: ModelConfig) -> range:
    """Returns the pyramid levels, finest first. Paper: 3 to 7."""
    return range(model.min_level, model.max_level + 1)


def level_sizes(padded_hw: tuple[int, int], model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Returns (height, width) of each level's map, in cells: ceil(side / 2^level), as of padded strided convolutions."""
    height, width = padded_hw
    return tuple((-(-height // 2**level), -(-width // 2**level)) for level in levels(model))


def anchors_per_cell(config: AnchorConfig) -> int:
    """Returns the number of anchors per cell of a map. Paper: 9."""
    return len(config.scales) * len(config.ratios)


def level_counts(padded_hw: tuple[int, int], anchors: AnchorConfig, model: ModelConfig) -> tuple[int, ...]:
    """Returns the number of anchors of each level, finest first; their sum is A."""
    return tuple(height * width * anchors_per_cell(anchors) for height, width in level_sizes(padded_hw, model))


@functools.lru_cache(maxsize=64)
def anchor_grid(padded_hw: tuple[int, int], anchors: AnchorConfig, model: ModelConfig) -> Float32[np.ndarray, "A 4"]:
    """Returns the anchors of a padded image, xyxy in its pixels, in the order of the logits. Read-only, cached.

    A checkpoint needs the style it was trained with. s = size_factor * 2^level is the side of a level's base square;
    ratios are height over width.

    - paper: for each scale, for each ratio: width s * scale / sqrt(ratio), height s * scale * sqrt(ratio), so the area is
      exactly (s * scale)^2. Centred on the cell, at (column + 0.5, row + 0.5) * 2^level.
    - detectron: as its generate_anchors. The sides of a stride-sized box of each ratio are rounded to integers (half to
      even) and then multiplied; for each scale, for each ratio from 1 upwards, then the ratios below 1: (1, 2, 0.5) by
      default. Centred on the cell. Detectron's boxes include their last pixel; here 1 is added to x2 and y2, so that
      widths are x2 - x1 as in `retina_jax.ops.boxes`.
    - detectron2: the anchors of the paper, centred on the cell's upper left corner, at (column, row) * 2^level.
    - torchvision: sides s * scale truncated to integers (32, 40, 50), corners of each anchor rounded (half to even); for
      each ratio, for each scale. Centred on the cell's upper left corner; the step between cells is the padded side divided
      by the map's, an integer: at 800 px, 61 on P6 and 114 on P7.
    """
    grids = []
    for level, (rows, columns) in zip(levels(model), level_sizes(padded_hw, model), strict=True):
        step_y = step_x = 2**level
        cell, offset = cell_and_offset(level, anchors)
        if anchors.style == "torchvision":
            step_y, step_x = padded_hw[0] // rows, padded_hw[1] // columns
        y, x = np.meshgrid(np.arange(rows) * step_y + offset, np.arange(columns) * step_x + offset, indexing="ij")
        centres = np.stack([x, y, x, y], axis=-1)
        grids.append((centres[:, :, None, :] + cell[None, None, :, :]).reshape(-1, 4))
    grid = np.concatenate(grids).astype(np.float32)
    grid.setflags(write=False)  # it is cached
    return grid


def cell_and_offset(
    level: int, anchors: AnchorConfig
) -> tuple[Float64[np.ndarray, "a 4"] | Float32[np.ndarray, "a 4"], float]:
    """Returns the anchors of a cell around (0, 0), and the x and y of the first cell's centre."""
    cell = STYLES[anchors.style](2**level, anchors)
    if anchors.style == "detectron2":
        return cell.astype(np.float32), 0.0  # float32 before the sum: the last bit depends on it
    return cell, 0.0 if anchors.style == "torchvision" else 0.5 * 2**level


def _paper_cell(stride: int, anchors: AnchorConfig) -> Float64[np.ndarray, "a 4"]:
    side = anchors.size_factor * stride
    pairs = [(side * scale, math.sqrt(ratio)) for scale in anchors.scales for ratio in anchors.ratios]
    return _around_origin([(side / root, side * root) for side, root in pairs])


def _detectron_cell(stride: int, anchors: AnchorConfig) -> Float64[np.ndarray, "a 4"]:
    sizes = []
    for ratio in sorted(anchors.ratios, key=lambda ratio: ratio < 1):  # stable: ratios from 1 upwards first
        width = np.round(math.sqrt(stride * stride / ratio))
        sizes.append((width * anchors.size_factor, np.round(width * ratio) * anchors.size_factor))
    return _around_origin([(width * scale, height * scale) for scale in anchors.scales for width, height in sizes])


def _torchvision_cell(stride: int, anchors: AnchorConfig) -> Float64[np.ndarray, "a 4"]:
    sides = np.array([int(anchors.size_factor * stride * scale) for scale in anchors.scales], np.float32)
    # In float32, as in torchvision, so that the rounding below sees the same halves.
    height_ratios = np.sqrt(np.array(anchors.ratios, np.float32))
    pairs = zip(np.float32(1) / height_ratios, height_ratios, strict=True)
    return np.round(_around_origin([(float(w * side), float(h * side)) for w, h in pairs for side in sides]))


def _around_origin(sizes: list[tuple[float, float]]) -> Float64[np.ndarray, "a 4"]:
    """Returns boxes of these (width, height), centred on (0, 0)."""
    return np.array([(-width / 2, -height / 2, width / 2, height / 2) for width, height in sizes], np.float64)


STYLES = {
    "paper": _paper_cell,
    "detectron": _detectron_cell,
    "detectron2": _paper_cell,
    "torchvision": _torchvision_cell,
}
