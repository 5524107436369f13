"""The twelve shapes of generated scenes, as polygons that fill a given box exactly."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image, ImageDraw

SUPERSAMPLING = 4
"""Shapes are drawn this much larger and averaged down."""


def _around(radii: list[float], start: float = 0.0) -> Float[np.ndarray, "n 2"]:
    """Points at equal angles around the centre, the first straight up where `start` is 0 (turns)."""
    angles = 2 * np.pi * (np.arange(len(radii)) / len(radii) + start)
    return np.stack([np.sin(angles), -np.cos(angles)], axis=1) * np.array(radii)[:, None]


def _heart() -> Float[np.ndarray, "n 2"]:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    down = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([16 * np.sin(t) ** 3, down], axis=1)


def _crescent() -> Float[np.ndarray, "n 2"]:
    outer, inner = np.linspace(0.12, 0.88, 40), np.linspace(0.78, 0.22, 32)

    def arc(turns: np.ndarray, radius: float, centre: float) -> np.ndarray:
        return np.stack([centre + radius * np.cos(2 * np.pi * turns), radius * np.sin(2 * np.pi * turns)], axis=1)

    return np.concatenate([arc(outer, 1.0, 0.0), arc(inner, 0.70, 0.62)])


SHAPES: dict[str, tuple[Float[np.ndarray, "n 2"], ...]] = {
    "disc": (_around([1.0] * 48),),
    "square": (_around([1.0] * 4, 1 / 8),),
    "triangle": (_around([1.0] * 3),),
    "cross": (
        np.array([[1, 0], [2, 0], [2, 1], [3, 1], [3, 2], [2, 2], [2, 3], [1, 3], [1, 2], [0, 2], [0, 1], [1, 1]])
        - 1.5,
    ),
    "ring": (_around([1.0] * 48), _around([0.52] * 48)),
    "star": (_around([1.0, 0.42] * 5),),
    "diamond": (_around([1.0, 0.75] * 2),),
    "heart": (_heart(),),
    "hexagon": (_around([1.0] * 6),),
    "crescent": (_crescent(),),
    "arrow": (np.array([[0, -2], [2, 0.2], [0.8, 0.2], [0.8, 2], [-0.8, 2], [-0.8, 0.2], [-2, 0.2]]),),
    "bolt": (np.array([[0.5, -2], [-1.3, 0.4], [-0.2, 0.4], [-0.6, 2], [1.3, -0.6], [0.2, -0.6], [1.2, -2]]),),
}
"""A polygon, and a second one for the hole of the ring; any unit, y down."""


def draw_shape(
    shape: str, box_xywh: tuple[float, float, float, float], rotation: float, outline: float
) -> tuple[tuple[int, int], Float32[np.ndarray, "h w"], Float32[np.ndarray, "h w"]]:
    """Draws a shape turned by `rotation` (radians) and then stretched to fill the box, which so is tight by construction.

    Returns the pixel (x, y) of the patch's upper left corner, the share of each pixel that the shape covers, and the share
    that lies deeper inside it than `outline` pixels.
    """
    x, y, width, height = box_xywh
    left, top = int(np.floor(x)), int(np.floor(y))
    patch_w, patch_h = int(np.ceil(x + width)) - left, int(np.ceil(y + height)) - top
    turn = np.array([[np.cos(rotation), np.sin(rotation)], [-np.sin(rotation), np.cos(rotation)]])
    polygons = [polygon @ turn for polygon in SHAPES[shape]]
    low, high = polygons[0].min(0), polygons[0].max(0)
    canvas = Image.new("L", (patch_w * SUPERSAMPLING, patch_h * SUPERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    for polygon, ink in zip(polygons, (255, 0), strict=False):
        pixels = (polygon - low) / (high - low) * [width, height] + [x - left, y - top]
        # PIL's coordinates are pixel centres, ours are corners.
        pen.polygon((pixels * SUPERSAMPLING - 0.5).ravel().tolist(), fill=ink)
    whole = np.asarray(canvas)
    return (left, top), _averaged(whole), _averaged(_eroded(whole, round(outline * SUPERSAMPLING)))


def _eroded(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask where everything within `radius`, looked for in eight directions, is in it."""
    height, width = mask.shape
    padded = np.pad(mask, radius)
    diagonal = round(radius / 2**0.5)
    steps = [(0, radius), (0, -radius), (radius, 0), (-radius, 0)]
    steps += [(a * diagonal, b * diagonal) for a in (-1, 1) for b in (-1, 1)]
    inner = mask.copy()
    for down, right in steps:
        np.minimum(inner, padded[radius + down :, radius + right :][:height, :width], out=inner)
    return inner


def _averaged(mask: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).reduce(SUPERSAMPLING), np.float32) / 255
