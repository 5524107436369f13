"""Coverage in numbers: of all boxes, by class, by size and by aspect; and whether one can train with it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from retina_jax.data_check.coverage import Coverage
from retina_jax.data_check.findings import Finding
from retina_jax.data_check.views import ASPECTS, SIDES, Views

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
