"""The page of a data check, with the images whose boxes are covered worst."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from retina_jax.config import DataConfig
from retina_jax.data.decoding import DECODING, read_image, to_rgb
from retina_jax.data.source import BadImage, Decoding
from retina_jax.data.transforms import resize_large
from retina_jax.data_check.check import Check
from retina_jax.data_check.coverage import ASPECTS, SIDES, Coverage, Share
from retina_jax.data_check.nearest import Views
from retina_jax.data_check.split import Split
from retina_jax.evaluation.drawing import draw_boxes
from retina_jax.reports import jpeg, render
from retina_jax.reports.charts import Stack, bar_chart

# Boxes with an anchor of sufficient IoU, with one by the low-quality rule only, and without (Okabe and Ito).
COVERED, RESCUED, UNCOVERED = "#009E73", "#E69F00", "#D55E00"
ON_IMAGES = {COVERED: (0, 255, 0), RESCUED: (255, 190, 0), UNCOVERED: (255, 0, 0)}  # visible on a photograph
TAGGED = 12  # boxes of an image that are labelled; more labels would hide it
SHARES = {"by_iou": "sufficient IoU", "by_low_quality": "low-quality only", "uncovered": "no anchor"}


def check_page(check: Check, pictures: Sequence[tuple[np.ndarray, str]], title: str) -> str:
    """Returns the page; `pictures` as from `worst_pictures`."""
    shares = check.shares
    pairs = check.suggestion.pairs() if check.suggestion else []
    page = render(
        "check.html",
        title=title,
        sections=["findings", "classes", "anchors", "suggestion", "pictures"],
        colours={"rescued": RESCUED, "uncovered": UNCOVERED},
        check=check,
        most_listed=200,  # findings of a kind on the page; the JSON has all
        open_up_to=10,  # lists of at most this many findings are open from the start
        class_names=list(dict.fromkeys(count.name for counts in check.counts.values() for count in counts)),
        counts={split: {count.name: count for count in counts} for split, counts in check.counts.items()},
        histograms=[
            _histogram(shares.sizes, [f"{end:.3g}" for end in SIDES], "square root of the area, pixels"),
            _histogram(shares.aspects, [f"{end:.2g}" for end in ASPECTS], "height over width"),
        ],
        worst_first=sorted(shares.classes, key=lambda s: (not s.boxes, s.part("by_iou"), s.part("uncovered"))),
        pairs=pairs[:1] + sorted(pairs[1:], key=lambda pair: pair[0].part("by_iou")),
        pictures=[(jpeg(pixels), caption) for pixels, caption in pictures],
    )
    return str(page)


def _histogram(shares: Sequence[Share], ends: Sequence[str], label: str) -> str:
    """Draws the bins from the first to the last with boxes; with many bins every second end is labelled."""
    filled = [i for i, share in enumerate(shares) if share.boxes] or [0]
    first, last = filled[0], filled[-1] + 1
    names = ["∞" if end == "inf" else end for end in ends[first : last + 1]]
    if len(names) > 12:
        names[1::2] = [""] * len(names[1::2])
    stacks = [
        Stack(text, [getattr(share, kind) for share in shares[first:last]], colour)
        for (kind, text), colour in zip(SHARES.items(), ON_IMAGES, strict=True)
    ]
    return bar_chart(names, stacks, label, "boxes")


def worst_pictures(
    split: Split, data: DataConfig, decoding: Decoding, views: Views, coverage: Coverage, most: int
) -> list[tuple[np.ndarray, str]]:
    """Returns at most `most` images with captions, each once: those with the most boxes without an anchor first, then those
    with the most by the low-quality rule only. Images without such boxes and unreadable images are left out."""
    kinds = coverage.kinds
    without, rescued = (
        np.diff(np.concatenate([[0], np.cumsum(boxes)])[views.ends])
        for boxes in (kinds["uncovered"] | kinds["outbid"], kinds["by_low_quality"])
    )
    pictures: dict[int, tuple[np.ndarray, str]] = {}
    for v in np.lexsort([-rescued, -without]).tolist():
        if len(pictures) == most or not without[v] + rescued[v]:
            break
        if (record := int(views.records[v])) in pictures:
            continue
        row = split.record_images[record]
        _, name, *size = split.images[row]
        height, width = views.sizes_hw[v]
        try:
            encoded = read_image(Path(split.paths[row]), *size)
            with DECODING.share(size[0] * size[1]):
                pixels = views.tiles[v].of(to_rgb(encoded, decoding, expected_size=tuple(size)))
                image = resize_large(pixels, (height, width), data.resize)
        except (OSError, BadImage):
            continue  # it is among the findings
        boxes = views.ends[v + 1] - views.ends[v]
        counts = f"{boxes} boxes, {without[v]} without an anchor, {rescued[v]} by the low-quality rule only"
        pixels = draw_coverage(image, split.class_names, views, coverage, v)
        pictures[record] = pixels, f"{name}, at {width} x {height}: {counts}"
    return list(pictures.values())


def draw_coverage(
    image: UInt8[np.ndarray, "h w 3"], class_names: tuple[str, ...], views: Views, coverage: Coverage, v: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Draws the boxes of view `v` on its image: green with anchors, yellow by the low-quality rule only, red without or
    outbid. Yellow and red ones are labelled with their class and best IoU if there are at most TAGGED."""
    kinds = coverage.kinds
    colours = {
        n: UNCOVERED if coverage.anchors[n] == 0 else COVERED if kinds["by_iou"][n] else RESCUED
        for n in range(int(views.ends[v]), int(views.ends[v + 1]))
    }
    worst_last = sorted(colours, key=lambda n: list(ON_IMAGES).index(colours[n]))
    tagged = {n for n in worst_last if colours[n] != COVERED}
    tagged = tagged if len(tagged) <= TAGGED else set()
    texts = [f"{class_names[views.labels[n]]} {coverage.best_iou[n]:.2f}" if n in tagged else "" for n in worst_last]
    return draw_boxes(image, views.boxes_xyxy[worst_last], [ON_IMAGES[colours[n]] for n in worst_last], texts, side=720)
