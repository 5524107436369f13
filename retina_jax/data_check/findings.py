"""What a data check can find, how bad each kind is, and the findings themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
SHOWN = 5
"""Findings of a kind that its one line on the terminal names."""


class Kind(NamedTuple):
    """A kind of finding."""

    severity: Severity
    """error: training would refuse the data, or makes no sense on it; warning: it goes on, and somebody should look;
    note: known and handled."""
    title: str
    """What is counted, in the plural."""
    meaning: str
    """What training makes of it, and what to do."""


SKIPPED = "Training stops at them, or with data.bad_images skip leaves them out."
KINDS: dict[str, Kind] = {
    "refused_categories": Kind("error", "categories that training refuses", "Training stops at the first of them."),
    "refused_images": Kind("error", "image entries that training refuses", "Training stops at the first of them."),
    "refused_boxes": Kind("error", "annotations that training refuses", "Training stops at the first of them."),
    "refused_config": Kind("error", "settings that do not fit the data", "Training stops before its first step."),
    "missing": Kind("error", "images that are missing", SKIPPED),
    "unreadable": Kind("error", "images that cannot be read", SKIPPED),
    "wrong_size": Kind(
        "error",
        "images of another size than their annotations say",
        f"The boxes would lie in the wrong places. {SKIPPED}",
    ),
    "box_format": Kind(
        "error", "splits whose boxes look like another format", "Training stops. Set data.box_format or convert them."
    ),
    "nothing_to_learn": Kind("error", "splits without any usable box", "There is nothing to train on."),
    "hopeless": Kind(
        "error",
        "hopeless anchor coverage",
        "Boxes without an anchor are background to the training: these could not be learnt. See the suggestion.",
    ),
    "poor": Kind(
        "warning",
        "classes with poor anchor coverage",
        "Boxes whose best anchor is below the IoU of a positive are learnt badly or not at all. See the suggestion.",
    ),
    "likely_format": Kind(
        "warning",
        "splits whose boxes may be in another format",
        "They are read as data.box_format has it, as x, y, width, height in pixels by default: look at the pictures.",
    ),
    "all_crowds": Kind(
        "warning",
        "splits with classes that have crowds alone",
        "These classes are neither learnt nor scored. Set data.crowds objects.",
    ),
    "moved": Kind(
        "warning", "splits with images elsewhere than their names say", "Check that they are the right ones."
    ),
    "text_numbers": Kind("warning", "splits with numbers written as text", "They are read as numbers."),
    "without_box": Kind("warning", "annotations without a box", "Points, keypoints, or nothing. They are dropped."),
    "pixels": Kind(
        "warning",
        "doubts about how image files are decoded",
        "Boxes may lie on pixels that are turned otherwise, or 16-bit images may be too dark or cut off. Check the boxes "
        "and set data.orientation or data.bits.",
    ),
    "incomplete": Kind(
        "warning",
        "JPEGs with missing data",
        "Part of the image is grey or displaced. Training takes it as it is.",
    ),
    "one_colour": Kind(
        "warning",
        "images of one colour, wholly or nearly",
        "On a grid of up to 64 x 64 pixels of the image, and of each box, 99.9 % are within 2 of 255 levels of the median. "
        "Nothing can be learnt from them.",
    ),
    "leakage": Kind(
        "warning", "images in both splits", "The same bytes in training and evaluation: the scores would be too good."
    ),
    "same_image": Kind(
        "warning",
        "images that are in a split twice",
        "The same bytes: trained on twice, and often labelled differently.",
    ),
    "zero_size": Kind("warning", "boxes without area", "A side is 0 or less. They are dropped."),
    "outside": Kind("warning", "boxes outside their image", "They are dropped."),
    "clipped": Kind("warning", "boxes that stick out of their image", "They are cut at its edge."),
    "same_box": Kind(
        "warning",
        "boxes that are there twice",
        "The same image, class and box. The first takes all anchors.",
    ),
    "other_class": Kind(
        "warning",
        "boxes of two classes at once",
        "The same image and box, another class. The first takes all anchors.",
    ),
    "same_id": Kind(
        "warning", "ids of several annotations", "Training does not mind; evaluation gives all boxes new ids."
    ),
    "overflow": Kind(
        "warning",
        "images with more boxes than data.max_boxes",
        "The last ones become background. Raise it.",
    ),
    "same_name": Kind(
        "warning",
        "names of several categories",
        "Each is a class of its own, and shown with its id: wheel (1), wheel (2).",
    ),
    "empty_class": Kind("warning", "classes without boxes", "They cannot be learnt, and their AP is undefined."),
    "no_class": Kind("note", "categories that are left out of the classes", "None of them has an annotation."),
    "no_boxes": Kind(
        "note", "images without usable boxes", "data.images_without_boxes says whether training drops or keeps them."
    ),
    "decoding": Kind("note", "conventions of the image files", "Found on the files, or set by an option."),
    "crowd": Kind("note", "crowd boxes", "Never trained on; evaluation ignores detections on them."),
    "outbid": Kind(
        "note",
        "boxes whose anchors all go to others",
        "They have anchors of sufficient IoU, each of which overlaps another box more; none is left to learn them.",
    ),
    "orphaned": Kind(
        "note", "annotations of refused entries", "Their image or category is one of those that are refused."
    ),
}
"""By name, in the order in which they are told."""


class Finding(NamedTuple):
    """One thing found."""

    kind: str
    """One of KINDS."""
    split: str
    name: str
    """What it is about: `annotation 2288`, an image's file name, a class."""
    text: str = ""
    """What is to be said of it; may be empty."""


class Group(NamedTuple):
    """All findings of a kind."""

    kind: str
    severity: Severity
    title: str
    meaning: str
    findings: list[Finding]

    def line(self) -> str:
        """All on one line; the first SHOWN are named."""
        named = [f"{f.name} ({f.text})" if f.text else f.name for f in self.findings[:SHOWN]]
        more = len(self.findings) - len(named)
        tail = f"; {more} more" if more else ""
        return f"{self.severity}: {self.title}: {len(self.findings)}: {'; '.join(named)}{tail}"


def grouped(findings: Sequence[Finding], tolerated: Sequence[str] = ()) -> list[Group]:
    """Findings by kind, errors first, in the order of KINDS; errors of the `tolerated` kinds become warnings."""
    by_kind: dict[str, list[Finding]] = {name: [] for name in KINDS}
    for finding in findings:
        by_kind[finding.kind].append(finding)
    groups = [
        Group(
            name,
            "warning" if name in tolerated and kind.severity == "error" else kind.severity,
            *kind[1:],
            by_kind[name],
        )
        for name, kind in KINDS.items()
        if by_kind[name]
    ]
    return sorted(groups, key=lambda group: ("error", "warning", "note").index(group.severity))
