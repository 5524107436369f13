"""Suggests anchors and an image size that fit the boxes better: searched on some of the boxes, counted on all."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from retina_jax.config import Config
from retina_jax.config_io import flatten, override
from retina_jax.console import track
from retina_jax.data.source import Record
from retina_jax.data_check.coverage import Share, Shares, count_shares, cover, view_boxes
from retina_jax.data_check.nearest import Views, best_iou
from retina_jax.ops.anchors import anchors_per_cell

GOOD = 0.98  # this share of the boxes, and mean share of the classes, with an anchor of sufficient IoU is enough
CLOSE = 0.01  # if no setting is GOOD, the cheapest this near to the best is suggested; a smaller gain is no reason to
SEARCHED = 4000  # approximate number of boxes used in the search
ENLARGED = (1.0, 1.25, 1.5, 2.0)  # short sides tried, as multiples of the config's
FACTORS = (1.0, 0.25, 0.375, 0.5, 0.625, 0.75, 1.5, 2.0)  # anchors.size_factor tried, as multiples of the config's
OCTAVE = (1.0, 1.1892, 1.4142, 1.6818)  # four scales per octave, tried besides the config's
QUANTILES = ((0.1, 0.5, 0.9), (0.03, 0.25, 0.5, 0.75, 0.97))  # of the aspect ratios: anchors.ratios tried


class Suggestion(NamedTuple):
    """Config changes that improve the coverage, with the coverage before and after."""

    changes: dict[str, Any]  # config fields by dotted name
    options: str  # the same as command-line options
    before: Shares
    after: Shares  # coverage of all boxes, by training's own matching
    pixels: float  # pixels of an image, relative to before
    anchors: tuple[int, int]  # anchors per cell, before and after

    def pairs(self) -> list[tuple[Share, Share]]:
        """Returns shares before and after, of all boxes and of each class with boxes."""
        classes = zip(self.before.classes, self.after.classes, strict=True)
        return [(self.before.total, self.after.total), *(pair for pair in classes if pair[0].boxes)]

    def line(self) -> str:
        """Returns the options and their gain, for all boxes and for the class that was worst."""
        everything, *classes = self.pairs()
        worst = min(classes, key=lambda pair: pair[0].part("by_iou"))
        gains = (f"{a.name} {a.part('by_iou'):.1%} -> {b.part('by_iou'):.1%}" for a, b in (everything, worst))
        return f"suggestion: {self.options} (boxes by IoU: {', '.join(gains)})"


def suggest(records: Sequence[Record], config: Config, class_names: Sequence[str], before: Shares) -> Suggestion | None:
    """Returns the cheapest of some hundred settings that is GOOD, or if none is, CLOSE to the best; None if `config` is
    good enough or no setting gains more than CLOSE. Larger images are tried only if no anchors are GOOD before."""
    filled = [record for record in records if len(record.labels)]
    some = filled[:: max(1, sum(len(record.labels) for record in filled) // SEARCHED)]
    boxes = view_boxes(some, config.data)
    now = _score(best_iou(boxes, config), boxes, config)
    if not len(boxes.labels) or now >= GOOD:
        return None
    tried, best, fields, per_cell = [], 0.0, flatten(config), anchors_per_cell(config.anchors)
    for data in _sizes(some, config):
        views = view_boxes(some, override(config, data).data)
        pixels = (data["data.short_side"] / config.data.short_side) ** 2
        settings = list(_anchors(boxes, config))
        for anchors in track(f"suggestion: settings at {data['data.short_side']} px", settings, len(settings)):
            other = override(config, data | anchors)
            changes = {name: value for name, value in flatten(other).items() if value != fields[name]}
            # A rule of thumb: time is proportional to the pixels; more anchors cost only channels of the last convolution
            # and rows of the losses; of two equally costly settings the one with fewer changes is better.
            more = max(0.0, anchors_per_cell(other.anchors) / per_cell - 1)
            cost, score = pixels + 0.1 * more + 0.001 * len(changes), _score(best_iou(views, other), views, other)
            tried.append((cost, score, changes, pixels))
            best = max(best, score)
        if best >= GOOD:
            break
    enough = [entry for entry in tried if entry[1] >= min(GOOD, best - CLOSE)]
    _, score, changes, pixels = min(enough, key=lambda entry: (entry[0], -entry[1]))
    if score < now + CLOSE:
        return None
    other = override(config, changes)
    views = view_boxes(list(records), other.data)
    after = count_shares(views, cover(views, other, "suggested anchors"), class_names)
    if after.total.by_iou <= before.total.by_iou:
        return None
    return Suggestion(changes, as_options(changes), before, after, pixels, (per_cell, anchors_per_cell(other.anchors)))


def as_options(changes: dict[str, Any]) -> str:
    """Writes dotted fields as command-line options: --anchors.size-factor 2 --anchors.ratios 0.5 1 2."""

    def words(value: tuple | int | float) -> str:
        if isinstance(value, tuple):
            return " ".join(map(words, value))
        short = f"{value:g}"
        return short if isinstance(value, float) and float(short) == value else repr(value)

    return " ".join(f"--{name.replace('_', '-')} {words(value)}" for name, value in changes.items())


def _sizes(records: Sequence[Record], config: Config) -> Iterator[dict[str, Any]]:
    """Yields short sides, each with the smallest long side that allows it."""
    data = config.data
    longest = max(max(r.width, r.height) / min(r.width, r.height) for r in records)
    for factor in ENLARGED:
        short = round(data.short_side * factor)
        jitter = tuple(round(side * factor) for side in data.jitter_short_sides)
        needed = int(np.ceil(longest * max(short, *jitter, 0)))
        long = max(data.long_side, min(round(data.long_side * factor), needed))
        yield {"data.short_side": short, "data.long_side": long, "data.jitter_short_sides": jitter}


def _anchors(views: Views, config: Config) -> Iterator[dict[str, Any]]:
    width, height = (views.boxes_xyxy[:, 2:] - views.boxes_xyxy[:, :2]).astype(np.float64).T
    ratios = [config.anchors.ratios]
    for quantiles in QUANTILES:
        ratios.append(tuple(dict.fromkeys(float(f"{r:.2g}") for r in np.quantile(height / width, quantiles))))
    for factor, ratio, scales in itertools.product(FACTORS, ratios, (config.anchors.scales, OCTAVE)):
        size_factor = float(f"{config.anchors.size_factor * factor:.4g}")
        yield {"anchors.size_factor": size_factor, "anchors.ratios": ratio, "anchors.scales": scales}


def _score(iou: Float32[np.ndarray, " N"], views: Views, config: Config) -> float:
    """Returns the share of boxes of sufficient IoU, or if it is smaller the mean of the classes' shares."""
    good = (iou >= config.matching.positive_iou).astype(np.float64)
    counts = np.bincount(views.labels)
    of_classes = np.bincount(views.labels, weights=good)[counts > 0] / counts[counts > 0]
    return float(min(good.mean(), of_classes.mean())) if len(good) else 1.0
