"""Anchor coverage: which boxes training would give anchors to, by training's own anchors and its own matching."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int64

from retina_jax.anchors import anchor_grid
from retina_jax.boxes import iou_matrix
from retina_jax.config import Config
from retina_jax.data_check.progress import Progress
from retina_jax.data_check.views import Views
from retina_jax.matching import match

FEWEST = 8
"""Rows that boxes are padded to at least; from there on powers of two, so that few programs are compiled."""
THREADS = 2
"""Images matched at once."""


class Coverage(NamedTuple):
    """What the anchors are to N boxes. Each box is one of `by_iou`, `by_low_quality` and `uncovered`."""

    best_iou: Float32[np.ndarray, " N"]
    """Largest IoU that any anchor has with the box."""
    anchors: Int64[np.ndarray, " N"]
    """Positive anchors that are trained to be the box."""
    positive_iou: float

    @property
    def by_iou(self) -> Bool[np.ndarray, " N"]:
        """Boxes with an anchor of matching.positive_iou or more."""
        return self.best_iou >= self.positive_iou

    @property
    def by_low_quality(self) -> Bool[np.ndarray, " N"]:
        """Boxes that have anchors only because matching.low_quality rescues their best ones."""
        return ~self.by_iou & (self.anchors > 0)

    @property
    def uncovered(self) -> Bool[np.ndarray, " N"]:
        """Boxes that no anchor is trained to be, and whose best one is below matching.positive_iou."""
        return ~self.by_iou & (self.anchors == 0)

    @property
    def outbid(self) -> Bool[np.ndarray, " N"]:
        """Boxes `by_iou` that no anchor is trained to be all the same: their anchors overlap other boxes more."""
        return self.by_iou & (self.anchors == 0)


def cover(views: Views, config: Config, what: str = "anchors") -> Coverage:
    """Matches the anchors of every view with its boxes; `what` is what the progress is called."""
    counts = np.diff(views.ends)
    best, anchors = np.zeros(len(views.labels), np.float32), np.zeros(len(views.labels), np.int64)

    def look(v: int) -> tuple[int, np.ndarray, np.ndarray]:
        start, n = views.ends[v], int(counts[v])
        rows = max(FEWEST, 1 << (n - 1).bit_length())
        boxes, labels = np.zeros((rows, 4), np.float32), np.full(rows, -1, np.int32)
        boxes[:n], labels[:n] = views.boxes_xyxy[start : start + n], views.labels[start : start + n]
        iou, won = _program(views.canvases[v], config)(boxes, labels)
        return v, np.asarray(iou)[:n], np.asarray(won)[:n]

    filled = np.flatnonzero(counts).tolist()
    with ThreadPoolExecutor(THREADS) as pool:
        for v, iou, won in Progress(f"{what}: images", pool.map(look, filled), len(filled)):
            mine = slice(views.ends[v], views.ends[v + 1])
            best[mine], anchors[mine] = iou, won
    return Coverage(best, anchors, config.matching.positive_iou)


@lru_cache(maxsize=16)
def _program(canvas_hw: tuple[int, int], config: Config) -> Callable[..., tuple[Array, Array]]:
    """Boxes and labels of an image to the best IoU of each box and the number of anchors that it wins."""
    grid = anchor_grid(canvas_hw, config.anchors, config.model)

    @jax.jit
    def look(boxes_xyxy: Float[Array, "G 4"], labels: Int[Array, " G"]) -> tuple[Float[Array, " G"], Int[Array, " G"]]:
        matches = match(grid, boxes_xyxy, labels, config.matching)
        won = jnp.zeros(labels.shape, jnp.int32).at[matches.box_index].add((matches.labels >= 0).astype(jnp.int32))
        return iou_matrix(boxes_xyxy, grid).max(axis=1), won

    return look
