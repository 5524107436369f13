"""Anchor grids equal the paper's numbers and cells computed by hand."""

import numpy as np
import pytest

from retina_jax.config import AnchorConfig, ModelConfig
from retina_jax.ops.anchors import anchor_grid, anchors_per_cell, level_counts, level_sizes, levels

MODEL = ModelConfig()
PAPER, DETECTRON, TORCHVISION = (AnchorConfig(style=style) for style in ("paper", "detectron", "torchvision"))


def sides(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]


def first_cells(padded_hw: tuple[int, int], config: AnchorConfig) -> list[np.ndarray]:
    """Returns the anchors of the first cell of each level."""
    grid, per_cell = anchor_grid(padded_hw, config, MODEL), anchors_per_cell(config)
    starts = np.cumsum([0, *level_counts(padded_hw, config, MODEL)[:-1]])
    return [grid[start : start + per_cell] for start in starts]


def test_each_cell_has_nine_anchors() -> None:
    assert list(levels(MODEL)) == [3, 4, 5, 6, 7]
    assert anchors_per_cell(PAPER) == 9


def test_counts_of_a_padded_shape_of_600_by_1000() -> None:
    assert level_sizes((600, 1000), MODEL) == ((75, 125), (38, 63), (19, 32), (10, 16), (5, 8))
    counts = level_counts((600, 1000), PAPER, MODEL)
    assert counts == (84375, 21546, 5472, 1440, 360)  # the paper's "~100k"
    assert anchor_grid((600, 1000), PAPER, MODEL).shape == (sum(counts), 4)


@pytest.mark.parametrize("style", ["paper", "detectron", "torchvision"])
def test_the_grid_has_the_counted_number_of_rows_in_every_style(style: str) -> None:
    config, model = AnchorConfig(style=style, scales=(1.0, 1.5), ratios=(0.5, 1.0, 2.0, 3.0)), ModelConfig(max_level=5)
    counts = level_counts((97, 130), config, model)
    assert counts == (13 * 17 * 8, 7 * 9 * 8, 4 * 5 * 8)
    assert anchor_grid((97, 130), config, model).shape == (sum(counts), 4)


def test_paper_sides_cover_32_to_813_pixels() -> None:
    areas = [np.prod(sides(cell), axis=0) for cell in first_cells((640, 1024), PAPER)]
    for level_areas, base in zip(areas, (32, 64, 128, 256, 512), strict=True):
        expected = np.repeat([(base * 2 ** (octave / 3)) ** 2 for octave in range(3)], 3)
        np.testing.assert_allclose(level_areas, expected, rtol=1e-5)
    assert np.sqrt(min(a.min() for a in areas)) == pytest.approx(32, abs=1e-3)
    assert np.sqrt(max(a.max() for a in areas)) == pytest.approx(813, abs=0.5)


def test_paper_order_is_scale_then_ratio_of_height_over_width() -> None:
    for cell in first_cells((640, 1024), PAPER):
        width, height = sides(cell)
        np.testing.assert_allclose(height / width, [0.5, 1, 2] * 3, rtol=1e-5)
        assert (np.diff(np.sqrt(width * height).reshape(3, 3)[:, 1]) > 0).all()


@pytest.mark.parametrize("config", [PAPER, DETECTRON])
def test_anchors_are_centred_on_their_cells_row_by_row(config: AnchorConfig) -> None:
    padded_hw = (64, 96)
    grid = anchor_grid(padded_hw, config, MODEL)
    start = 0
    for level, (rows, columns) in zip(levels(MODEL), level_sizes(padded_hw, MODEL), strict=True):
        boxes = grid[start : start + rows * columns * 9].reshape(rows, columns, 9, 4)
        start += rows * columns * 9
        centre = (np.arange(max(rows, columns)) + 0.5) * 2**level
        x, y = (boxes[..., 0] + boxes[..., 2]) / 2, (boxes[..., 1] + boxes[..., 3]) / 2
        np.testing.assert_allclose(x, np.broadcast_to(centre[None, :columns, None], x.shape), atol=1e-3)
        np.testing.assert_allclose(y, np.broadcast_to(centre[:rows, None, None], y.shape), atol=1e-3)


def test_detectron_cell_rounds_at_stride_size_and_starts_with_the_square() -> None:
    cell = first_cells((128, 128), DETECTRON)[0]
    # At stride 8: ratio 1 is 8 x 8; ratio 2 is round(5.66) = 6 x 12; ratio 0.5 is round(11.3) = 11 x round(5.5) = 6.
    # Times 4, about (4, 4). Detectron prints the same boxes with inclusive ends: x2 and y2 smaller by 1.
    expected = [[-12, -12, 20, 20], [-8, -20, 16, 28], [-18, -8, 26, 16]]
    np.testing.assert_array_equal(cell[:3], expected)
    width, height = sides(cell)
    np.testing.assert_allclose(width[3:6], np.array([32, 24, 44]) * 2 ** (1 / 3), rtol=1e-6)
    np.testing.assert_allclose(height[6:], np.array([32, 48, 24]) * 2 ** (2 / 3), rtol=1e-6)


def test_torchvision_cell_truncates_sides_and_rounds_halves_to_even() -> None:
    cells = first_cells((800, 800), TORCHVISION)
    # Sizes (32, 40, 50), ratio outermost: 32 at ratio 0.5 is 45.25 x 22.63, halves 22.63 and 11.31.
    half_width = [23, 28, 35, 16, 20, 25, 11, 14, 18]
    half_height = [11, 14, 18, 16, 20, 25, 23, 28, 35]
    expected = np.array([(-w, -h, w, h) for w, h in zip(half_width, half_height, strict=True)], np.float32)
    np.testing.assert_array_equal(cells[0], expected)
    np.testing.assert_array_equal(cells[4][4], [-322, -322, 322, 322])  # side 645 on P7: 322.5 to the even 322


def test_torchvision_steps_by_integer_pixels_of_padded_size_over_map_size() -> None:
    padded_hw = (800, 800)
    grid, counts = anchor_grid(padded_hw, TORCHVISION, MODEL), level_counts(padded_hw, TORCHVISION, MODEL)
    steps = []
    for start in np.cumsum([0, *counts[:-1]]):
        steps.append(float(grid[start + 9, 0] - grid[start, 0]))
    assert steps == [8, 16, 32, 61, 114]


def test_anchors_beyond_the_image_are_kept() -> None:
    grid = anchor_grid((64, 64), PAPER, MODEL)
    assert grid.min() < 0
    assert grid.max() > 64


def test_size_factor_scales_every_style() -> None:
    for style in ("paper", "detectron", "torchvision"):
        cell = first_cells((64, 64), AnchorConfig(style=style, size_factor=2.0, scales=(1.0,), ratios=(1.0,)))
        assert [float(box[0, 2] - box[0, 0]) for box in cell] == [16, 32, 64, 128, 256]


def test_grid_is_cached_and_read_only() -> None:
    grid = anchor_grid((64, 64), PAPER, MODEL)
    assert grid is anchor_grid((64, 64), PAPER, MODEL)
    assert grid.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        grid[0, 0] = 0
