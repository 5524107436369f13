"""The page of a data check, with a wall of labelled images and those whose boxes the anchors cover worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from retina_jax.config import DataConfig
from retina_jax.data.decoding import DECODING, read_image, to_rgb
from retina_jax.data.source import BadImage, Decoding
from retina_jax.data.transforms import resize_large
from retina_jax.data_check.check import Check
from retina_jax.data_check.coverage import ASPECTS, SIDES, Coverage, Share
from retina_jax.data_check.examples import examples
from retina_jax.data_check.nearest import Views
from retina_jax.data_check.split import Split
from retina_jax.errors import shortened
from retina_jax.evaluation.drawing import class_colour, draw_boxes
from retina_jax.reports import jpeg, render
from retina_jax.reports.charts import Stack, bar_chart

# Boxes with an anchor of sufficient IoU, with one by the low-quality rule only, and without (Okabe and Ito).
COVERED, RESCUED, UNCOVERED = "#009E73", "#E69F00", "#D55E00"
ON_IMAGES = {COVERED: (0, 255, 0), RESCUED: (255, 190, 0), UNCOVERED: (255, 0, 0)}  # visible on a photograph
TAGGED = 12  # boxes of an image that are labelled; more labels would hide it
# Images on the wall; their longer side, pixels; boxes that are all labelled, else one per class; size of labels and lines.
ON_WALL, WALL_SIDE, WALL_TAGGED, WALL_SCALE = 16, 600, 5, 1.8
LABEL_SIZE = (120, 30)  # width and height of most labels on the wall, pixels
MARKS = {"error": "✕", "warning": "!", "note": "i"}  # of the severities, for readers who do not see colours
SHARES = {"by_iou": "sufficient IoU", "by_low_quality": "low-quality only", "uncovered": "no anchor"}


def check_page(
    check: Check,
    wall: Sequence[tuple[np.ndarray, str, str, str]],
    pictures: Sequence[tuple[np.ndarray, str]],
    title: str,
) -> str:
    """Returns the page; `wall` as from `labelled_images`, `pictures` as from `worst_pictures`."""
    shares = check.shares
    pairs = check.suggestion.pairs() if check.suggestion else []
    page = render(
        "check.html",
        title=title,
        sections=["images", "findings", "suggestion", "classes", "anchors", "worst"],
        check=check,
        marks=MARKS,
        classes_header=[
            "class",
            *(f"{split}: {of}" for split in check.counts for of in ("boxes", "images", "dropped")),
        ],
        tiles=_tiles(check),
        wall=[(jpeg(pixels, quality=75), *texts) for pixels, *texts in wall],
        crowded=int(np.bincount(check.splits[0].owners, minlength=1).max()) > WALL_TAGGED,
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


def _tiles(check: Check) -> list[tuple[str, str, str]]:
    """Returns name, value and details of the figures at the top of the page."""
    train, val = check.splits[0], check.splits[1:]
    total, counts = check.shares.total, check.counts[train.name]
    unused, dropped = len(train.images) - len(train.records), int((~train.rules["usable"]).sum())
    by_iou = f"IoU ≥ {check.config.matching.positive_iou:g}: {total.part('by_iou'):.1%}" if total.boxes else ""
    rare = min(counts, key=lambda count: count.boxes, default=None)
    return [
        ("training images", f"{len(train.images):,}", f"{unused:,} not used" if unused else "all used"),
        (
            "training boxes",
            f"{int(train.rules['usable'].sum()):,}",
            f"{dropped:,} dropped" if dropped else "none dropped",
        ),
        ("classes", str(len(counts)), f"rarest: {rare.name}, {rare.boxes:,}" if rare else ""),
        *(("validation images", f"{len(s.images):,}", f"{int(s.rules['usable'].sum()):,} boxes") for s in val),
        ("boxes with an anchor", f"{1 - total.part('uncovered'):.1%}" if total.boxes else "–", by_iou),
    ]


def labelled_images(split: Split, decoding: Decoding) -> list[tuple[np.ndarray, str, str, str]]:
    """Returns the first ON_WALL images of `examples` that can be read, with their boxes drawn: pixels, name, what the image
    is shown for, and a description. Boxes that training drops are dashed. If there are more than WALL_TAGGED boxes, only
    one of each class is labelled, a large one."""
    names, pictures = split.class_names, []
    for row, shown_for in examples(split, ON_WALL):
        _, name, width, height = split.images[row]
        try:
            encoded = read_image(Path(split.paths[row]), width, height)
            with DECODING.share(width * height):
                original = Image.fromarray(to_rgb(encoded, decoding, expected_size=(width, height)))
        except (OSError, BadImage):
            continue  # it is among the findings
        original.thumbnail((WALL_SIDE, WALL_SIDE), Image.Resampling.BILINEAR)
        of_image = split.owners == row
        kept, dropped = (np.flatnonzero(of_image & rule) for rule in (split.rules["usable"], ~split.rules["usable"]))
        boxes = split.boxes_xyxy * (original.width / width)
        labels, sides = split.labels[kept], boxes[kept, 2:] - boxes[kept, :2]
        order = np.argsort(-sides.prod(axis=1), kind="stable")  # large boxes below
        kept, labels = kept[order], labels[order].tolist()
        tagged = _apart(boxes[kept, :2], labels) if len(kept) > WALL_TAGGED else set(range(len(kept)))
        texts = [shortened(names[k]) if i in tagged else "" for i, k in enumerate(labels)]
        colours = [class_colour(k) for k in labels]
        drawn = draw_boxes(np.asarray(original), boxes[kept], colours, texts, boxes[dropped], WALL_SIDE, WALL_SCALE)
        counted = ", ".join(f"{names[k]} ({n})" for k, n in sorted(Counter(labels).items())) or "no usable box"
        pictures.append((drawn, name, shown_for, f"{name}: {counted}"))
        if len(pictures) == ON_WALL:
            break
    return pictures


def _apart(corners_xy: Float[np.ndarray, "n 2"], labels: Sequence[int]) -> set[int]:
    """Returns one box per class: the first whose label does not cover that of another class, else the first."""
    chosen: dict[int, int] = {}
    for k in dict.fromkeys(labels):
        others = corners_xy[list(chosen.values())]
        of_class = [i for i, label in enumerate(labels) if label == k]
        free = (i for i in of_class if (np.abs(corners_xy[i] - others) > LABEL_SIZE).any(axis=1).all())
        chosen[k] = next(free, of_class[0])
    return set(chosen.values())


def _histogram(shares: Sequence[Share], ends: Sequence[str], label: str) -> str:
    """Draws the bins from the first to the last with boxes; with many bins every second end is labelled."""
    filled = [i for i, share in enumerate(shares) if share.boxes] or [0]
    first, last = filled[0], filled[-1] + 1
    names = ["∞" if end == "inf" else end for end in ends[first : last + 1]]
    if len(names) > 9:
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
