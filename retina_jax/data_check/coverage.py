"""Anchor coverage: which boxes training would give anchors to, by training's own anchors and its own matching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int64

from retina_jax.config import Config
from retina_jax.console import track
from retina_jax.data_check.findings import Finding
from retina_jax.data_check.views import ASPECTS, SIDES, Views
from retina_jax.ops.anchors import anchor_grid
from retina_jax.ops.boxes import iou_matrix
from retina_jax.ops.matching import match

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
        for v, iou, won in track(f"{what}: images", pool.map(look, filled), len(filled)):
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


# Coverage in numbers: of all boxes, by class, by size and by aspect; and whether one can train with it.

POOR = 0.9
"""A class of which a smaller share has an anchor of sufficient IoU is warned of."""
HOPELESS = 0.5
"""Training makes no sense where a smaller share of all boxes has any anchor at all."""
CLASS_HOPELESS = 0.1
"""The same for a class of MANY boxes: it would never be found."""
MANY = 10


class Share(NamedTuple):
    """What the anchors are to some of the boxes: each is one of the three."""

    name: str
    boxes: int
    by_iou: int
    """Boxes with an anchor of matching.positive_iou or more."""
    by_low_quality: int
    """Boxes that have anchors only because matching.low_quality rescues their best ones."""
    uncovered: int
    """Boxes without an anchor."""
    outbid: int
    """Of `by_iou`, those whose anchors all go to other boxes."""
    anchors: int
    """Positive anchors of all of them."""

    def part(self, kind: str) -> float:
        """The share of one of the counts in all boxes; 1 of no boxes."""
        return getattr(self, kind) / self.boxes if self.boxes else 1.0

    def as_dict(self) -> dict[str, str | int | float | None]:
        """Counts and shares, for JSON; shares of no boxes are null."""
        kinds = ("by_iou", "by_low_quality", "uncovered")
        parts = {f"{kind}_share": round(self.part(kind), 6) if self.boxes else None for kind in kinds}
        return {**self._asdict(), **parts}


class Shares(NamedTuple):
    """Coverage of a split."""

    total: Share
    classes: list[Share]
    """Of every class, by label; those without boxes too."""
    sizes: list[Share]
    """By bin of SIDES."""
    aspects: list[Share]
    """By bin of ASPECTS."""
    positives_per_image: float
    """Positive anchors that an image of the training has on average; over the batch, what the loss is divided by."""


def count_shares(views: Views, coverage: Coverage, class_names: Sequence[str]) -> Shares:
    """Counts the `coverage` of the boxes of `views`."""
    return Shares(
        total=_split(np.zeros(len(views.labels), np.int64), ["all"], coverage)[0],
        classes=_split(views.labels, class_names, coverage),
        sizes=_split(views.bin_of_size(), bin_names(SIDES), coverage),
        aspects=_split(views.bin_of_aspect(), bin_names(ASPECTS), coverage),
        positives_per_image=int(coverage.anchors.sum()) / max(1, len(views.canvases)),
    )


def bin_names(ends: Float[np.ndarray, " n"]) -> list[str]:
    """What the bins between `ends` are called; the last has none."""
    pairs = pairwise(ends.tolist())
    return [f"{low:.4g} to {high:.4g}" if np.isfinite(high) else f"{low:.4g} or more" for low, high in pairs]


def coverage_findings(shares: Shares) -> list[Finding]:
    """What is hopeless, and the classes with poor coverage, the worst first."""
    found = []
    for share in (shares.total, *sorted(shares.classes, key=lambda share: share.part("by_iou"))):
        text = (
            f"{share.part('by_iou'):.1%} by IoU, {share.part('by_low_quality'):.1%} by the low-quality rule only, "
            f"{share.part('uncovered'):.1%} none, of {share.boxes} boxes"
        )
        name = "all boxes" if share is shares.total else share.name
        least = HOPELESS if share is shares.total else CLASS_HOPELESS if share.boxes >= MANY else 0.0
        if 1 - share.part("uncovered") < least:
            found.append(Finding("hopeless", "train", name, text))
        elif share is not shares.total and share.part("by_iou") < POOR:
            found.append(Finding("poor", "train", name, text))
    return found


def _split(groups: Int64[np.ndarray, " N"], names: Sequence[str], coverage: Coverage) -> list[Share]:
    def count(of: np.ndarray) -> list[int]:
        return np.bincount(groups, weights=of.astype(np.float64), minlength=len(names)).astype(np.int64).tolist()

    columns = [np.ones(len(groups)), coverage.by_iou, coverage.by_low_quality, coverage.uncovered, coverage.outbid]
    return [Share(*row) for row in zip(names, *map(count, [*columns, coverage.anchors]), strict=True)]
