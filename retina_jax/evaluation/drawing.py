"""Images with boxes drawn on them."""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from retina_jax.errors import shortened

READABLE_SIDE = 480  # small images are enlarged to about this length of their longer side, pixels
LABELLED = 50  # boxes up to which they are labelled, with thick lines: more labels would hide the image
GAP = 6  # pixels between the images of a contact sheet


def class_colour(label: int) -> tuple[int, int, int]:
    """Returns the RGB colour of class `label` (>= 0): hues a golden angle apart, so neighbours differ."""
    hue = (0.02 + label * (math.sqrt(5) - 1) / 2) % 1
    saturation, value = ((0.95, 1.0), (0.6, 1.0), (0.95, 0.72))[label // 8 % 3]
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))


def draw(
    image: UInt8[np.ndarray, "h w 3"],
    boxes_xyxy: Float[np.ndarray, "D 4"],
    labels: Int[np.ndarray, " D"],
    scores: Float[np.ndarray, " D"] | None = None,
    *,
    class_names: Sequence[str],
    ground_truth_xyxy: Float[np.ndarray, "G 4"] | None = None,
    notes: Sequence[str] = (),
    scale: float = 1.0,
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the RGB image with its boxes (in its pixels), one colour per class, labelled "name .87"; see `draw_boxes`.

    A negative label is padding and is left out; a class without a name is labelled with its number. With `scores`, boxes
    with the highest are on top. `ground_truth_xyxy` is dashed. `notes` are added to the label of each box, `scale` is as in
    `draw_boxes`.
    """
    order = np.arange(len(labels)) if scores is None else np.argsort(scores, kind="stable")
    order = order[labels[order] >= 0]
    texts = []
    for i in order.tolist():
        words = [shortened(class_names[labels[i]]) if labels[i] < len(class_names) else f"class {labels[i]}"]
        words += [] if scores is None else [format_score(float(scores[i]))]
        texts.append(" ".join([*words, *([notes[i]] if notes and notes[i] else [])]))
    colours = [class_colour(label) for label in labels[order].tolist()]
    return draw_boxes(image, boxes_xyxy[order], colours, texts, ground_truth_xyxy, scale=scale)


def draw_boxes(
    image: UInt8[np.ndarray, "h w 3"],
    boxes_xyxy: Float[np.ndarray, "D 4"],
    colours: Sequence[tuple[int, int, int]],
    texts: Sequence[str],
    dashed_xyxy: Float[np.ndarray, "G 4"] | None = None,
    side: int = READABLE_SIDE,
    scale: float = 1.0,
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the RGB image with boxes, clipped to it, and a label above each that has a text; the last box is on top. Of
    more than LABELLED texts none is drawn, and lines are thin.

    The image is enlarged by the integer factor that brings its longer side closest to `side` pixels (1 if it is longer than
    2/3 of `side`). `dashed_xyxy` are drawn as dashed white lines below the other boxes. `scale` is that of lines and labels:
    pictures that are shown smaller need larger ones.
    """
    height, width = image.shape[:2]
    zoom = max(1, round(side / max(height, width)))
    picture = Image.fromarray(image).resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
    pen, longer = ImageDraw.Draw(picture), max(picture.size)
    line, font = max(2, round(scale * longer / 300)), ImageFont.load_default(max(11, round(scale * longer / 42)))
    if sum(map(bool, texts)) > LABELLED:
        line, texts = max(1, line // 2), [""] * len(texts)
    pad = round(3 * scale)  # left and right of the text
    limit = np.array([picture.width - 1, picture.height - 1] * 2)

    def place(box: np.ndarray) -> tuple[float, ...]:
        x1, y1, x2, y2 = np.clip(box.astype(np.float64) * zoom, 0, limit).tolist()
        return x1, y1, max(x1, x2), max(y1, y2)  # PIL refuses a box of negative size

    for box in () if dashed_xyxy is None else dashed_xyxy:
        _dashed_rectangle(pen, place(box), dash=4 * line, width=max(1, line // 2))
    for box, colour in zip(boxes_xyxy, colours, strict=True):
        pen.rectangle(place(box), outline=colour, width=line)
    # Labels after all boxes, so that no line crosses them: text on a plate above the box's upper left corner, moved inside.
    for box, colour, text in zip(boxes_xyxy, colours, texts, strict=True):
        if text:
            left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
            plate_width, plate_height = right - left + 2 * pad, bottom - top + 2 * pad - 2
            x, y = place(box)[:2]
            x = max(0, min(x, picture.width - plate_width))
            y = max(0, min(y - plate_height, picture.height - plate_height))
            pen.rectangle((x, y, x + plate_width - 1, y + plate_height - 1), fill=colour)
            luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
            pen.text((x + pad - left, y + pad - 1 - top), text, fill="black" if luminance > 128 else "white", font=font)
    return np.asarray(picture)


def format_score(score: float) -> str:
    """Returns a score in two digits: .87, and 1.0 from 0.995 on."""
    return "1.0" if score >= 0.995 else f"{score:.2f}".removeprefix("0")


def _dashed_rectangle(pen: ImageDraw.ImageDraw, box_xyxy: tuple[float, ...], *, dash: int, width: int) -> None:
    """Draws white dashes on a black line, visible on any background."""
    x1, y1, x2, y2 = box_xyxy
    pen.rectangle(box_xyxy, outline="black", width=width)
    for ax, ay, bx, by in ((x1, y1, x2, y1), (x2, y1, x2, y2), (x1, y2, x2, y2), (x1, y1, x1, y2)):
        length = max(bx - ax, by - ay)
        for start in np.arange(0, length, 2 * dash):
            a, b = start / length, min(start + dash, length) / length
            ends = (ax + a * (bx - ax), ay + a * (by - ay), ax + b * (bx - ax), ay + b * (by - ay))
            pen.line(ends, fill="white", width=width)


def contact_sheet(images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> UInt8[np.ndarray, "H W 3"]:
    """Returns RGB images of any sizes in a grid, about as many rows as columns, with a dark grey gap of GAP pixels around
    each. Columns are as wide as the widest image, a row is as high as its highest. Raises ValueError without an image."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    tops = np.cumsum([GAP, *(max(map(len, row)) + GAP for row in rows)])
    width = max(image.shape[1] for image in images) + GAP
    sheet = np.full((tops[-1], columns * width + GAP, 3), 40, np.uint8)
    for top, row in zip(tops, rows, strict=False):
        for i, image in enumerate(row):
            left = i * width + GAP
            sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet
