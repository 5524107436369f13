"""The pictures with the worst coverage, drawn as the network would see them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from retina_jax.config import DataConfig
from retina_jax.data.coco import read_image
from retina_jax.data.conventions import Decoding
from retina_jax.data.decoding import DECODING, to_rgb
from retina_jax.data.source import BadImage
from retina_jax.data.transforms import resize_large
from retina_jax.data_check.coverage import Coverage
from retina_jax.data_check.split import Split
from retina_jax.data_check.views import Views
from retina_jax.evaluation.drawing import READABLE_SIDE, tag

COVERED, RESCUED, UNCOVERED = "#009E73", "#E69F00", "#D55E00"
"""Boxes with an anchor of sufficient IoU, with one by the low-quality rule only, and without (Okabe and Ito)."""
IN_PICTURES = {COVERED: (0, 255, 0), RESCUED: (255, 190, 0), UNCOVERED: (255, 0, 0)}
"""The same in colours that are seen on a photograph."""

TAGGED = 12
"""Boxes of a picture that are tagged; of more, the tags would hide it."""


class Worst(NamedTuple):
    """A picture, and what is to be said of it."""

    pixels: UInt8[np.ndarray, "H W 3"]
    caption: str


def worst_pictures(
    split: Split, data: DataConfig, decoding: Decoding, views: Views, coverage: Coverage, most: int
) -> list[Worst]:
    """At most `most` images, each once: those with the most boxes without an anchor first, then those with the most that
    have one by the low-quality rule only. Images without such boxes are left out, and so are those that cannot be read.
    """
    without, rescued = (_per_view(of, views) for of in (coverage.uncovered | coverage.outbid, coverage.by_low_quality))
    pictures: dict[int, Worst] = {}
    for v in np.lexsort([-rescued, -without]).tolist():
        if len(pictures) == most or not without[v] + rescued[v]:
            break
        if (record := int(views.records[v])) in pictures:
            continue
        image_row = split.record_images[record]
        row = split.images[image_row]
        try:
            encoded = read_image(Path(split.paths[image_row]), *row[2:])
            with DECODING.share(row[2] * row[3]):
                image = resize_large(to_rgb(encoded, decoding, expected_size=row[2:]), views.sizes_hw[v], data.resize)
        except (OSError, BadImage):
            continue  # it is among the findings
        height, width = views.sizes_hw[v]
        counts = (
            f"{views.ends[v + 1] - views.ends[v]} boxes, {without[v]} without an anchor, {rescued[v]} by the rule only"
        )
        pixels = draw_coverage(image, split.class_names, views, coverage, v)
        pictures[record] = Worst(pixels, f"{row[1]}, at {width} x {height}: {counts}")
    return list(pictures.values())


def draw_coverage(
    image: UInt8[np.ndarray, "h w 3"], class_names: tuple[str, ...], views: Views, coverage: Coverage, v: int
) -> UInt8[np.ndarray, "H W 3"]:
    """The image of view `v`, enlarged by a whole factor where it is small. Boxes with anchors are green, those by the
    low-quality rule only yellow, those without red; the latter two carry their class and their best IoU, where there are at
    most TAGGED."""
    zoom = max(1, round(READABLE_SIDE * 1.5 / max(image.shape[:2])))
    picture = Image.fromarray(image).resize((image.shape[1] * zoom, image.shape[0] * zoom), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(picture)
    line = max(2, round(max(picture.size) / 400))
    font = ImageFont.load_default(max(11, round(max(picture.size) / 55)))
    mine = range(int(views.ends[v]), int(views.ends[v + 1]))
    colours = {n: colour_of(coverage, n) for n in mine}
    worst_last = sorted(mine, key=lambda n: list(IN_PICTURES).index(colours[n]))
    for n in worst_last:
        place = np.clip(views.boxes_xyxy[n] * zoom, 0, [picture.width - 1, picture.height - 1] * 2).tolist()
        canvas.rectangle(place, outline=IN_PICTURES[colours[n]], width=line)
    tagged = [n for n in worst_last if colours[n] != COVERED]
    for n in tagged if len(tagged) <= TAGGED else ():
        text = f"{class_names[views.labels[n]]} {coverage.best_iou[n]:.2f}"
        corner = tuple((views.boxes_xyxy[n, :2] * zoom).tolist())
        tag(canvas, corner, text, IN_PICTURES[colours[n]], font, picture.size)
    return np.asarray(picture)


def colour_of(coverage: Coverage, n: int) -> str:
    """COVERED, RESCUED or UNCOVERED, the last for a box that others outbid too."""
    if coverage.anchors[n] == 0:
        return UNCOVERED
    return COVERED if coverage.by_iou[n] else RESCUED


def _per_view(of: np.ndarray, views: Views) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(of)])
    return sums[views.ends[1:]] - sums[views.ends[:-1]]
