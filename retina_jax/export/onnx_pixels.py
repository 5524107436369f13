"""Nodes that prepare images as evaluation does: resize, normalisation, padding.

The resizes are those of `data.transforms`: the same operations in the same order, so that on a CPU every uint8 pixel is
equal with bilinear, and all but about one number of 1000 with antialias (tested). ONNX's own Resize rounds in other
places. Sizes are computed in float64, as in Python.

Pillow is x first, then y. Pillow 13 itself takes y first in some images, mostly reduced ones of more than twice the height
than width; there pixels differ by one grey level.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from retina_jax.config import DataConfig
from retina_jax.data.pipeline import LARGE
from retina_jax.data.transforms import buckets
from retina_jax.export.onnx_nodes import Graph
from retina_jax.model.retinanet import STATISTICS

BITS = 22  # Pillow's weights are integers of this many bits after the point


class Prepared(NamedTuple):
    """Names of values."""

    images: str  # float32 [B, 3, H, W]: normalised RGB, 0 in the padding
    size_hw: str  # int64 [2]: of the given images
    resized_hw: str  # int64 [2]
    padded_hw: str  # int64 [2]


def prepare(graph: Graph, images: str, data: DataConfig, normalisation: str) -> Prepared:
    """Adds everything between uint8 RGB images [B, h, w, 3] and the network."""
    size = graph("Slice", graph("Shape", images), [1], [3])
    resized = _resized_size(graph, size, data)
    padded = _padded_size(graph, resized, data)
    pixels = _resize(graph, images, size, resized, data)
    order, *statistics = STATISTICS[normalisation]  # of the network's channels, here changed to the order RGB
    mean, std = (np.array(numbers, np.float32)[np.argsort(order)] for numbers in statistics)
    pixels = graph("Sub", pixels, mean)
    if (std != 1).any():
        pixels = graph("Div", pixels, std)
    pads = graph("Concat", [0, 0, 0, 0, 0], graph("Sub", padded, resized), [0], axis=0)
    pixels = graph("Transpose", graph("Pad", pixels, pads), perm=[0, 3, 1, 2])
    return Prepared(pixels, size, resized, padded)


def _resized_size(graph: Graph, size: str, data: DataConfig) -> str:
    """Adds `transforms.resized_size`."""
    if data.resize_rule == "stretch":
        return graph.constant([data.short_side, data.short_side])
    short, long = (
        graph("Div", np.float64(side), graph.cast(graph(reduce, size, keepdims=0), np.float64))
        for side, reduce in ((data.short_side, "ReduceMin"), (data.long_side, "ReduceMax"))
    )
    exact = graph("Mul", graph.cast(size, np.float64), graph("Min", short, long))
    if data.size_rounding == "nearest":
        exact = graph("Add", exact, np.float64(0.5))
    return graph("Max", graph.cast(exact, np.int64), 1)


def _padded_size(graph: Graph, resized: str, data: DataConfig) -> str:
    """Adds the choice of the padded shape: the smallest that fits, the first of equal ones."""
    if data.buckets == 0:
        steps = graph("Div", graph("Add", resized, data.pad_multiple - 1), data.pad_multiple)
        return graph("Mul", steps, data.pad_multiple)
    *others, largest = sorted(buckets(data, (data.short_side,)), key=lambda shape: shape[0] * shape[1])
    padded = graph.constant(largest)
    for shape in reversed(others):
        too_large = graph("ReduceMax", graph("Sub", resized, shape), keepdims=0)
        padded = graph("Where", graph("LessOrEqual", too_large, 0), shape, padded)
    return padded


def _resize(graph: Graph, images: str, size: str, resized: str, data: DataConfig) -> str:
    """Adds `transforms.resize`, or `resize_large`; returns float32 [B, h', w', 3]."""
    if data.resize == "pillow":
        pixels = graph.cast(images, np.int32)
        for axis in (2, 1):
            pixels = _weighted_sum(graph, pixels, axis, size, resized, np.float64)
        return graph.cast(pixels, np.float32)
    pixels = graph.cast(images, np.float32)
    if rounds := data.pixels == "uint8":
        # Evaluation adds the half that rounds before the weights if the image is small, otherwise after them.
        small = graph("LessOrEqual", graph("ReduceProd", size, keepdims=0), LARGE)
        before = graph("Where", small, 0.5, 0.0)
        pixels = graph("Add", pixels, before)
    if data.resize == "bilinear":
        pixels = _bilinear(graph, pixels, size, resized)
    else:
        reduced = graph("Greater", graph("ReduceMax", graph("Sub", size, resized), keepdims=0), 0)
        wide, plain = Graph(graph), Graph(graph)
        summed = pixels
        for axis in (1, 2):
            summed = _weighted_sum(wide, summed, axis, size, resized, np.float32)
        pixels = graph.either(reduced, summed, wide, _bilinear(plain, pixels, size, resized), plain)
    return graph("Floor", graph("Add", pixels, graph("Sub", 0.5, before))) if rounds else pixels


def _bilinear(graph: Graph, pixels: str, size: str, resized: str) -> str:
    """Adds TensorFlow's bilinear resize with half-pixel centres: along x, then along y."""
    for axis in (2, 1):
        old, new = graph.item(size, axis - 1), graph.item(resized, axis - 1)
        scale = graph("Div", graph.cast(old, np.float32), graph.cast(new, np.float32))
        place = graph("Sub", graph("Mul", _centres(graph, new, np.float32), scale), 0.5)
        low, last = graph("Floor", place), graph("Sub", old, 1)
        ends = (graph.clip(graph.cast(end, np.int64), 0, last) for end in (low, graph("Ceil", place)))
        first, second = (graph("Gather", pixels, end, axis=axis) for end in ends)
        share = graph("Unsqueeze", graph("Sub", place, low), [1] if axis == 2 else [1, 2])
        pixels = graph("Add", first, graph("Mul", graph("Sub", second, first), share))
    return pixels


def _centres(graph: Graph, count: str, dtype: type) -> str:
    return graph("Add", graph.cast(graph("Range", 0, count, 1), dtype), dtype(0.5))


def _weighted_sum(graph: Graph, pixels: str, axis: int, size: str, resized: str, dtype: type) -> str:
    """Adds a resize along an axis with the triangle kernel: each new pixel is the weighted sum of its old ones, in order.

    float32: TensorFlow's ScaleAndTranslate. float64: Pillow's, with rounded weights and a rounded sum, all int32.
    """
    index, weights = _triangle(graph, graph.item(size, axis - 1), graph.item(resized, axis - 1), dtype)
    if dtype is np.float64:
        weights = graph.cast(graph("Add", graph("Mul", weights, dtype(2**BITS)), dtype(0.5)), np.int32)
    weights = graph("Unsqueeze", weights, [2] if axis == 2 else [2, 3])

    def term(inside: Graph, number: str | int) -> str:
        old = inside("Gather", pixels, inside.item(index, number), axis=axis)
        return inside("Mul", old, inside.item(weights, number))

    total, body = term(graph, 0), Graph(graph)
    if dtype is np.float64:
        total = graph("Add", total, np.int32(2 ** (BITS - 1)))
    names = [f"{total}_{name}" for name in ("number", "continue", "sum")]
    new = body("Add", names[2], term(body, body("Add", names[0], 1)))
    inside = body.loop_body(names, new)
    times = graph("Sub", graph("Gather", graph("Shape", index), 0), 1)
    total = graph("Loop", times, np.array(True), total, body=inside)
    return graph("Div", total, np.int32(2**BITS)) if dtype is np.float64 else total


def _triangle(graph: Graph, size: str, resized: str, dtype: type) -> tuple[str, str]:
    """Returns the old pixels of each new one, int64 [taps, new], and their weights, whose sum is 1, `dtype` [taps, new]."""
    ratio = graph("Div", graph.cast(resized, dtype), graph.cast(size, dtype))
    old, last = graph("Div", dtype(1), ratio), graph("Sub", size, 1)
    reach = graph("Max", old, dtype(1))
    centre = graph("Mul", _centres(graph, resized, dtype), old)
    low = graph("Ceil", graph("Sub", graph("Sub", centre, reach), dtype(0.5)))
    high = graph("Floor", graph("Sub", graph("Add", centre, reach), dtype(0.5)))
    first, end = (graph.clip(graph.cast(side, np.int64), 0, last) for side in (low, high))
    most = graph("ReduceMax", graph("Sub", end, first), keepdims=0)
    index = graph("Add", graph("Unsqueeze", graph("Range", 0, graph("Add", most, 1), 1), [1]), first)
    distance = graph("Sub", graph("Add", graph.cast(index, dtype), dtype(0.5)), centre)
    distance = graph("Abs", graph("Mul", distance, graph("Div", dtype(1), reach)))
    weights = graph("Sub", dtype(1), graph("Min", distance, dtype(1)))
    weights = graph("Where", graph("LessOrEqual", index, end), weights, dtype(0))
    share = graph("Div", dtype(1), graph("ReduceSum", weights, [0], keepdims=0))
    return graph("Min", index, last), graph("Mul", weights, share)
