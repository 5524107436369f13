"""Nodes from logits to detections: `ops.postprocess.detect`, then the boxes in pixels of the given images.

Equal scores keep the order of `detect`: by level, anchor and class, because ONNX's TopK returns the lowest index of equal
values first.
"""

from __future__ import annotations

import numpy as np

from retina_jax.config import AnchorConfig, Config, DetectionConfig
from retina_jax.export.onnx_nodes import Graph
from retina_jax.export.onnx_pixels import Prepared
from retina_jax.ops.anchors import anchors_per_cell, cell_and_offset, levels
from retina_jax.ops.boxes import MAX_LOG_SCALE
from retina_jax.ops.postprocess import PADDING

ABSENT = np.float32(-1)
"""Score of a candidate that is not above its threshold, or that is suppressed."""


def detections(
    graph: Graph, maps: list[tuple[str, str]], prepared: Prepared, num_classes: int, config: Config
) -> dict[str, str]:
    """Adds the detection. `maps` are the last maps of both heads of each level, finest first. Returns boxes float32
    [B, D, 4], scores float32 [B, D], classes int32 [B, D] and count int32 [B]. The rows after the first `count` are empty:
    class -1, box and score 0."""
    rule, parts = config.detection, []
    for level, (logits, deltas) in zip(levels(config.model), maps, strict=True):
        coarsest = level == config.model.max_level
        threshold = rule.score_threshold if rule.threshold_coarsest or not coarsest else 0.0
        best = _best(graph, logits, num_classes, anchors_per_cell(config.anchors), rule.top_k)
        anchors = _anchors(graph, best[1], logits, prepared.padded_hw, level, config.anchors)
        boxes = _decoded(graph, _rows(graph, deltas, best[1], 4), anchors)
        scores = graph("Sigmoid", best[0])
        above = graph("Where", graph("Greater", scores, np.float32(threshold)), scores, ABSENT)
        parts.append((above, boxes, best[2]))
    scores, boxes, labels = (graph("Concat", *values, axis=1) for values in zip(*parts, strict=True))
    resized = graph.cast(graph("Gather", prepared.resized_hw, [1, 0, 1, 0]), np.float32)
    if rule.clip == "before_nms":
        boxes = graph.clip(boxes, np.float32(0), resized)
    kept = _suppressed(graph, boxes, scores, labels, num_classes, rule)
    # Room for max_detections even if there are fewer candidates.
    kept = graph("Pad", kept, [0, 0, 0, rule.max_detections], ABSENT)
    scores, boxes, labels = _first(graph, kept, boxes, labels, rule.max_detections)
    if rule.clip == "after_nms":
        boxes = graph.clip(boxes, np.float32(0), resized)
        scores = graph("Where", _has_area(graph, boxes), scores, ABSENT)
    size = graph.cast(graph("Gather", prepared.size_hw, [1, 0, 1, 0]), np.float32)
    scale = graph("Div", resized, size)
    if config.data.box_ends == "inclusive":
        shift = graph("Mul", graph("Sub", np.float32(1), scale), np.array([0, 0, 1, 1], np.float32))
        boxes = graph("Sub", boxes, shift)
    boxes = graph.clip(graph("Div", boxes, scale), np.float32(0), size)
    scores = graph("Where", _has_area(graph, boxes), scores, ABSENT)
    scores, boxes, labels = _first(graph, scores, boxes, labels, rule.max_detections)  # moves boxes without area behind
    valid = graph("Greater", scores, np.float32(0))
    return {
        "boxes": graph("Where", graph("Unsqueeze", valid, [2]), boxes, np.float32(0)),
        "scores": graph("Max", scores, np.float32(0)),
        "classes": graph.cast(graph("Where", valid, labels, PADDING), np.int32),
        "count": graph("ReduceSum", graph.cast(valid, np.int32), [1], keepdims=0),
    }


def _best(graph: Graph, logits: str, num_classes: int, per_cell: int, top_k: int) -> tuple[str, str, str]:
    """Adds `best_logits`; returns logits, anchors and classes, each [B, k]. `logits` is [B, anchors * K, H, W]."""
    flat = graph("Reshape", graph("Transpose", logits, perm=[0, 2, 3, 1]), [0, -1])
    number = graph("Min", graph("Slice", graph("Shape", flat), [1], [2]), [top_k])
    values, place = graph.several(2, "TopK", flat, number, axis=1)
    return values, graph("Div", place, num_classes), graph("Mod", place, num_classes)


def _rows(graph: Graph, maps: str, index: str, length: int) -> str:
    """Returns the rows [B, k, length] of anchors from the last map of a head [B, anchors * length, H, W]."""
    rows = graph("Reshape", graph("Transpose", maps, perm=[0, 2, 3, 1]), [0, -1, length])
    return graph("GatherND", rows, graph("Unsqueeze", index, [2]), batch_dims=1)


def _anchors(graph: Graph, index: str, maps: str, padded: str, level: int, config: AnchorConfig) -> str:
    """Adds the anchors [B, k, 4] of `ops.anchors.anchor_grid` with these numbers in their level."""
    cell, offset = cell_and_offset(level, config)
    place, size = graph("Div", index, len(cell)), graph("Slice", graph("Shape", maps), [2], [4])
    steps = graph("Div", padded, size) if config.style == "torchvision" else graph.constant([2**level, 2**level])
    columns = graph.item(size, 1)
    numbers = graph("Mod", place, columns), graph("Div", place, columns)
    x, y = (graph.cast(graph("Mul", numbers[i], graph.item(steps, 1 - i)), np.float32) for i in (0, 1))
    x, y = (graph("Unsqueeze", graph("Add", side, np.float32(offset)), [2]) for side in (x, y))
    of_cell = graph("Gather", cell.astype(np.float32), graph("Mod", index, len(cell)), axis=0)
    return graph("Add", graph("Concat", x, y, x, y, axis=2), of_cell)


def _decoded(graph: Graph, deltas: str, anchors: str) -> str:
    """Adds `ops.boxes.decode`."""
    low, high = (graph("Slice", anchors, [start], [start + 2], [2]) for start in (0, 2))
    shift, log_scale = (graph("Slice", deltas, [start], [start + 2], [2]) for start in (0, 2))
    sides, half = graph("Sub", high, low), np.float32(0.5)
    centre = graph("Add", graph("Mul", graph("Add", low, high), half), graph("Mul", shift, sides))
    growth = graph("Exp", graph("Min", log_scale, np.float32(MAX_LOG_SCALE)))
    reach = graph("Mul", graph("Mul", sides, half), growth)
    return graph("Concat", graph("Sub", centre, reach), graph("Add", centre, reach), axis=2)


def _suppressed(graph: Graph, boxes: str, scores: str, labels: str, num_classes: int, rule: DetectionConfig) -> str:
    """Adds NonMaxSuppression by class, or of all classes together with class_agnostic_nms. Returns the scores [B, N] of the
    boxes that it keeps, and ABSENT for the others."""
    of_class = graph("Unsqueeze", scores, [1])
    if not rule.class_agnostic_nms:
        its_own = graph("Equal", graph("Unsqueeze", labels, [1]), np.arange(num_classes)[:, None])
        of_class = graph("Where", its_own, of_class, ABSENT)
    # Its corners may be in any order of x and y. No class can give more than max_detections of the final boxes.
    limits = [rule.max_detections], np.array([rule.nms_iou], np.float32), np.array([0], np.float32)
    selected = graph("NonMaxSuppression", boxes, of_class, *limits)
    places = graph("Gather", selected, [0, 2], axis=1)  # image and box
    nothing = graph("Expand", ABSENT, graph("Shape", scores))
    return graph("ScatterND", nothing, places, graph("GatherND", scores, places))


def _first(graph: Graph, scores: str, boxes: str, labels: str, count: int) -> tuple[str, str, str]:
    """Returns the `count` best scores, with their boxes and labels."""
    best, place = graph.several(2, "TopK", scores, [count], axis=1)
    place = graph("Where", graph("Greater", best, np.float32(0)), place, 0)  # of a row that the padding added
    boxes = graph("GatherND", boxes, graph("Unsqueeze", place, [2]), batch_dims=1)
    return best, boxes, graph("GatherElements", labels, place, axis=1)


def _has_area(graph: Graph, boxes: str) -> str:
    low, high = (graph("Gather", boxes, sides, axis=2) for sides in ([0, 1], [2, 3]))
    larger = graph.cast(graph("Greater", high, low), np.int32)
    return graph.cast(graph("ReduceMin", larger, axes=[2], keepdims=0), np.bool_)
