"""Anchor coverage: which boxes get anchors by training's own matching, and counts by class, size and aspect ratio."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int64

from retina_jax.config import Config, DataConfig
from retina_jax.console import track
from retina_jax.data.source import Record
from retina_jax.data.tiles import boxes_in, tiles_of
from retina_jax.data.transforms import assign_bucket, buckets, resized_size, to_padded_pixels, train_short_sides
from retina_jax.data_check.findings import Finding
from retina_jax.data_check.nearest import Views, anchors_near, best_iou
from retina_jax.ops.boxes import iou_matrix
from retina_jax.ops.matching import match

# Ends of the bins, half octaves, of the square root of the area in pixels, and of height over width.
SIDES = np.array([0.0, *(2.0 ** (np.arange(4, 21) / 2)), np.inf])
ASPECTS = np.array([0.0, *(2.0 ** (np.arange(-6, 7) / 2)), np.inf])
# Boxes and anchors are padded to these numbers times a power of four, so that few programs are compiled.
FEWEST = 8, 1024
NOWHERE = (-2.0, -2.0, -1.0, -1.0)  # an anchor that overlaps no box
ROUNDING = 1e-4  # more than the relative error of an IoU in float32
THREADS = 2  # images matched at the same time
POOR = 0.9  # a class with a smaller share of boxes with an anchor of sufficient IoU gets a warning
HOPELESS = 0.5  # if a smaller share of all boxes has any anchor, the data is not ready to train
CLASS_HOPELESS = 0.1  # the same for a class of CLASS_BOXES boxes: it would never be detected
CLASS_BOXES = 10


def view_boxes(records: list[Record], data: DataConfig) -> Views:
    """Returns the views of all records as training would make them, without data.scale_jitter; of each image or tile the
    first `data.max_boxes` boxes."""
    short_sides = train_short_sides(data)
    shapes, rule = buckets(data, short_sides), (data.long_side, data.size_rounding, data.resize_rule)
    cut = partial(tiles_of, side=data.tile, overlap=data.tile_overlap)
    starts = np.cumsum([0, *(len(record.labels) for record in records)])
    views = []
    for tile in (tile for row, record in enumerate(records) for tile in cut(row, record.height, record.width)):
        row = tile.image
        inside, kept = boxes_in(tile, records[row].boxes_xyxy)
        if data.tile and not len(kept) and data.images_without_boxes == "drop":
            continue
        n = len(kept) if data.max_boxes == "auto" else min(len(kept), data.max_boxes)
        largest = resized_size(tile.height, tile.width, max(short_sides), *rule)
        for short_side in short_sides:
            height, width = resized_size(tile.height, tile.width, short_side, *rule)
            scale_xy = np.array([width / tile.width, height / tile.height])
            boxes = to_padded_pixels(inside[:n], scale_xy, data.box_ends).astype(np.float32)
            of_view = boxes, records[row].labels[kept[:n]], starts[row] + kept[:n]
            views.append((shapes[assign_bucket(largest, shapes)], (height, width), row, *of_view, tile))
    padded, sizes, rows, boxes, labels, places, tiles = list(zip(*views, strict=True)) or [()] * 7
    return Views(
        padded_hw=list(padded),
        sizes_hw=list(sizes),
        records=np.array(rows, np.int64),
        ends=np.cumsum([0, *map(len, boxes)]),
        boxes_xyxy=np.concatenate([np.zeros((0, 4), np.float32), *boxes]),
        labels=np.concatenate([np.zeros(0, np.int64), *labels]).astype(np.int64),
        boxes=np.concatenate([np.zeros(0, np.int64), *places]),
        tiles=list(tiles),
    )


class Coverage(NamedTuple):
    """Coverage of N boxes by the anchors."""

    best_iou: Float32[np.ndarray, " N"]  # largest IoU of any anchor with the box
    anchors: Int64[np.ndarray, " N"]  # positive anchors assigned to the box
    positive_iou: float

    @property
    def kinds(self) -> dict[str, Bool[np.ndarray, " N"]]:
        """Returns which boxes are `by_iou` (an anchor has matching.positive_iou or more), `by_low_quality` (anchors only by
        matching.low_quality) or `uncovered` (no anchor): each box is one of these. `outbid`: those `by_iou` without an
        anchor, because theirs all overlap other boxes more."""
        near, won = self.best_iou >= self.positive_iou, self.anchors > 0
        return {"by_iou": near, "by_low_quality": ~near & won, "uncovered": ~near & ~won, "outbid": near & ~won}


def cover(views: Views, config: Config, what: str = "anchors") -> Coverage:
    """Matches the anchors of every view with its boxes; `what` names the progress line. Only anchors that can be positive
    are matched, which changes nothing for the boxes: of 100,000 in an image, a few hundred."""
    counts, closest = np.diff(views.ends), best_iou(views, config)
    best, anchors = closest.copy(), np.zeros(len(views.labels), np.int64)
    program, matching = _program(config), config.matching
    # Positive are anchors of positive_iou or more, and with low-quality matches the best ones of every box.
    lowest = matching.positive_iou if matching.low_quality == "none" else 0.0
    least = (1 - ROUNDING) * np.clip(closest, lowest, matching.positive_iou)

    def cover_view(v: int) -> None:
        of_view, n = slice(views.ends[v], views.ends[v + 1]), int(counts[v])
        near = anchors_near(views.boxes_xyxy[of_view], least[of_view], views.padded_hw[v], config)
        grid = np.full((_padded(len(near), FEWEST[1]), 4), NOWHERE, np.float32)
        boxes = np.zeros((_padded(n, FEWEST[0]), 4), np.float32)
        labels = np.full(len(boxes), -1, np.int32)
        grid[: len(near)] = near
        boxes[:n], labels[:n] = views.boxes_xyxy[of_view], views.labels[of_view]
        iou, won = program(grid, boxes, labels)
        best[of_view] = np.where(closest[of_view] < least[of_view], closest[of_view], np.asarray(iou)[:n])
        anchors[of_view] = np.asarray(won)[:n]

    filled = np.flatnonzero(counts).tolist()
    with ThreadPoolExecutor(THREADS) as pool:
        list(track(f"{what}: images", pool.map(cover_view, filled), len(filled)))
    return Coverage(best, anchors, config.matching.positive_iou)


def _padded(number: int, fewest: int) -> int:
    while fewest < number:
        fewest *= 4
    return fewest


def _program(config: Config) -> Callable[..., tuple[Array, Array]]:
    """Maps anchors, and boxes and labels of an image, to the best IoU and the number of positive anchors of each box."""

    @jax.jit
    def cover_boxes(
        grid: Float[Array, "A 4"], boxes_xyxy: Float[Array, "G 4"], labels: Int[Array, " G"]
    ) -> tuple[Array, Array]:
        matches = match(grid, boxes_xyxy, labels, config.matching)
        won = jnp.zeros(labels.shape, jnp.int32).at[matches.box_index].add((matches.labels >= 0).astype(jnp.int32))
        return iou_matrix(boxes_xyxy, grid).max(axis=1), won

    return cover_boxes


class Share(NamedTuple):
    """Coverage of a group of boxes: numbers of boxes by `Coverage.kinds`."""

    name: str
    boxes: int
    by_iou: int
    by_low_quality: int
    uncovered: int
    outbid: int
    anchors: int  # positive anchors of all of them

    def part(self, kind: str) -> float:
        """Returns the share of boxes of this kind; 1 if there are no boxes."""
        return getattr(self, kind) / self.boxes if self.boxes else 1.0

    def as_dict(self) -> dict[str, str | int | float | None]:
        """Returns counts and shares for JSON; without boxes the shares are null."""
        kinds = ("by_iou", "by_low_quality", "uncovered")
        return self._asdict() | {f"{kind}_share": round(self.part(kind), 6) if self.boxes else None for kind in kinds}


class Shares(NamedTuple):
    """Shares of covered boxes, in total and by class, size and aspect."""

    total: Share
    classes: list[Share]  # by label; classes without boxes included
    sizes: list[Share]  # by bin of SIDES
    aspects: list[Share]  # by bin of ASPECTS
    positives_per_image: float  # mean number of positive anchors; times the batch size, the loss's normaliser

    def as_dict(self) -> dict[str, Any]:
        """Returns all of them for JSON."""
        return {
            "all": self.total.as_dict(),
            "positives_per_image": round(self.positives_per_image, 3),
            **{key: [share.as_dict() for share in getattr(self, key)] for key in ("classes", "sizes", "aspects")},
        }


def count_shares(views: Views, coverage: Coverage, class_names: Sequence[str]) -> Shares:
    """Counts the `coverage` of the boxes of `views`."""

    def by_group(groups: Int64[np.ndarray, " N"], names: Sequence[str]) -> list[Share]:
        columns = np.ones(len(groups)), *coverage.kinds.values(), coverage.anchors
        counts = (np.bincount(groups, of.astype(np.float64), len(names)).astype(np.int64).tolist() for of in columns)
        return [Share(*row) for row in zip(names, *counts, strict=True)]

    def by_bin(ends: Float[np.ndarray, " n"], values: Float[np.ndarray, " N"]) -> list[Share]:
        """Counts by bin; a value on the border of two bins is in the upper one, and the last bin is open."""
        names = [f"{low:.4g} to {high:.4g}" for low, high in pairwise(ends[:-1].tolist())] + [f"{ends[-2]:.4g} or more"]
        return by_group(np.searchsorted(ends, values, side="right") - 1, names)

    width, height = (views.boxes_xyxy[:, 2:] - views.boxes_xyxy[:, :2]).astype(np.float64).T
    return Shares(
        total=by_group(np.zeros(len(views.labels), np.int64), ["all"])[0],
        classes=by_group(views.labels, class_names),
        sizes=by_bin(SIDES, np.sqrt(width * height)),
        aspects=by_bin(ASPECTS, height / width),
        positives_per_image=int(coverage.anchors.sum()) / max(1, len(views.padded_hw)),
    )


def coverage_findings(shares: Shares) -> list[Finding]:
    """Returns hopeless coverage, and the classes with poor coverage, the worst first."""
    found = []
    for share in (shares.total, *sorted(shares.classes, key=lambda share: share.part("by_iou"))):
        by_iou, by_low_quality, uncovered = map(share.part, ("by_iou", "by_low_quality", "uncovered"))
        total = share is shares.total
        least = HOPELESS if total else CLASS_HOPELESS if share.boxes >= CLASS_BOXES else 0.0
        kind = "hopeless" if 1 - uncovered < least else "poor" if not total and by_iou < POOR else None
        if kind is not None:
            text = f"{by_iou:.1%} by IoU, {by_low_quality:.1%} by the low-quality rule only, {uncovered:.1%} none"
            name = "all boxes" if total else share.name
            found.append(Finding(kind, "train", name, f"{text}, of {share.boxes} boxes"))
    return found
