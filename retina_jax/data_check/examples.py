"""The images of a split that a person should see first: every class, and the unusual images."""

from collections.abc import Iterator

import numpy as np

from retina_jax.data_check.split import Split

# Boxes that training drops or changes, by rule of `classify_boxes`, and what the image is shown for.
UNUSUAL = {
    "clipped": "a box extends beyond the image",
    "outside": "a box is outside the image",
    "zero_size": "a box has no area",
    "crowd": "a crowd box",
}


def examples(split: Split, most: int) -> Iterator[tuple[int, str]]:
    """Yields the rows in `split.images` of all images, each once, with what it is shown for; of these, the first `most` show
    as many classes as possible and the unusual images. The order depends on the annotations alone.

    Classes come first: each image is the one with the most classes that those before it and the unusual images lack. Then
    come the unusual images, then others at equal distances in the file."""
    if not split.images:
        return
    unusual = _unusual(split)
    usable, classes = split.rules["usable"], len(split.class_names)
    owners, labels = divmod(np.unique(split.owners[usable] * classes + split.labels[usable]), max(classes, 1))
    unseen = np.ones(classes, bool)
    unseen[labels[np.isin(owners, list(unusual))]] = False
    shown: dict[int, str] = {}
    while unseen[labels].any() and len(shown) + len(unusual) < most:
        new = np.bincount(owners[unseen[labels]], minlength=len(split.images))
        row = int(new.argmax())
        of_row = labels[(owners == row) & unseen[labels]]
        names = [split.class_names[label] for label in of_row[:3].tolist()]
        shown[row] = ", ".join(names) + (f" and {len(of_row) - 3} more" if len(of_row) > 3 else "")
        unseen[of_row] = False
    shown |= unusual
    spread = np.linspace(0, len(split.images) - 1, min(most, len(split.images))).round().astype(int).tolist()
    others = [row for row in dict.fromkeys([*spread, *range(len(split.images))]) if row not in shown]
    yield from [*shown.items(), *((row, "") for row in others)]


def _unusual(split: Split) -> dict[int, str]:
    """Returns the images with the most boxes, the smallest and the largest box, and the first one of each rule."""
    found: dict[int, list[str]] = {}
    usable = np.flatnonzero(split.rules["usable"])
    if len(usable):
        counts = np.bincount(split.owners[usable], minlength=len(split.images))
        sides = split.boxes_xyxy[usable, 2:] - split.boxes_xyxy[usable, :2]
        areas = sides.prod(axis=1)
        found.setdefault(int(counts.argmax()), []).append(f"the most boxes: {counts.max()}")
        for size, n in (("smallest", areas.argmin()), ("largest", areas.argmax())):
            text = f"the {size} box: {sides[n, 0]:.0f} x {sides[n, 1]:.0f}"
            found.setdefault(int(split.owners[usable[n]]), []).append(text)
    for rule, text in UNUSUAL.items():
        if (boxes := np.flatnonzero(split.rules[rule])).size:
            found.setdefault(int(split.owners[boxes[0]]), []).append(text)
    return {row: "; ".join(texts) for row, texts in found.items()}
