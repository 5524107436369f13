"""Boxes that training drops, cuts or takes twice, each by its annotation's id."""

from __future__ import annotations

import numpy as np

from retina_jax.data_check.findings import Finding
from retina_jax.data_check.split import Split


def box_findings(split: Split, max_boxes: int) -> list[Finding]:
    """Crowds, boxes without area, outside or partly outside their image, the same box again, and images with more usable
    boxes than `max_boxes`, or with none."""
    return [*_dropped(split), *_again(split), *_counted(split, max_boxes)]


def _dropped(split: Split) -> list[Finding]:
    found = []
    for rule in ("zero_size", "outside", "clipped", "crowd"):
        for m in np.flatnonzero(split.rules[rule]).tolist():
            x1, y1, x2, y2 = split.boxes_xyxy[m].tolist()
            width, height = split.images[split.owners[m]][2:]
            text = f"{x2 - x1:g} x {y2 - y1:g} at {x1:g}, {y1:g} in {split.file_of(m)}, {width} x {height}"
            found.append(Finding(rule, split.name, split.box_name(m), text))
    return found


def _again(split: Split) -> list[Finding]:
    """Usable boxes that equal one before them in the same image, to the last bit."""
    rows = np.flatnonzero(split.rules["usable"])
    keys = np.column_stack([split.owners[rows], split.boxes_xyxy[rows]])
    order = np.lexsort(keys.T)  # stable: equal boxes stay in the order of the file
    same = np.r_[False, (keys[order][1:] == keys[order][:-1]).all(1)][: len(rows)]
    found = []
    first = 0
    for place in range(len(rows)):
        if not same[place]:
            first = place
            continue
        m, before = int(rows[order[place]]), rows[order[first:place]]
        twin = next((int(b) for b in before if split.labels[b] == split.labels[m]), None)
        if twin is not None:
            text = f"as {split.box_name(twin)}, {split.class_names[split.labels[m]]}, in {split.file_of(m)}"
            found.append(Finding("same_box", split.name, split.box_name(m), text))
        else:
            names = [split.class_names[split.labels[b]] for b in (m, int(before[0]))]
            text = f"{names[0]}, and {names[1]} in {split.box_name(int(before[0]))}, in {split.file_of(m)}"
            found.append(Finding("other_class", split.name, split.box_name(m), text))
    return found


def _counted(split: Split, max_boxes: int) -> list[Finding]:
    counts = np.bincount(split.owners[split.rules["usable"]], minlength=len(split.images)).tolist()
    all_counts = np.bincount(split.owners, minlength=len(split.images)).tolist()
    found = []
    for (_, file_name, _, _), count, listed in zip(split.images, counts, all_counts, strict=True):
        if count > max_boxes:
            found.append(
                Finding("overflow", split.name, file_name, f"{count} boxes, of which {max_boxes} are trained on")
            )
        if count == 0:
            text = f"{listed} in the file, none usable" if listed else ""
            found.append(Finding("no_boxes", split.name, file_name, text))
    return found
