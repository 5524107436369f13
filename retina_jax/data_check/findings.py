"""Kinds of findings of a data check, how severe they are, and the findings themselves."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
SHOWN = 5  # findings of a kind that its line on the terminal names


class Kind(NamedTuple):
    """A kind of finding."""

    severity: Severity  # error: training refuses the data or learns nothing; warning: it works; note: it is handled
    title: str  # what is counted, in the plural
    meaning: str  # what training does with it, and what to do


FIRST = "Training stops at the first of them."
SKIPPED = "Training stops at them, or leaves them out with data.bad_images skip."
# By name, in the order in which they are reported.
# fmt: off
KINDS: dict[str, Kind] = {name: Kind(*kind) for name, *kind in (
    ("refused_categories", "error", "categories that training refuses", FIRST),
    ("refused_images", "error", "image entries that training refuses", FIRST),
    ("refused_boxes", "error", "annotations that training refuses", FIRST),
    ("refused_config", "error", "settings that do not fit the data", "Training stops before its first step."),
    ("missing", "error", "images that are missing", SKIPPED),
    ("unreadable", "error", "images that cannot be read", SKIPPED),
    ("wrong_size", "error", "images whose size differs from their annotations",
     f"The boxes would be in the wrong places. {SKIPPED}"),
    ("box_format", "error", "splits whose boxes look like another format",
     "Training stops. Set data.box_format or convert the boxes."),
    ("nothing_to_learn", "error", "splits without any usable box", "There is nothing to train on."),
    ("nothing_to_score", "warning", "evaluation splits without any usable box", "AP cannot be computed."),
    ("hopeless", "error", "hopeless anchor coverage",
     "Boxes without an anchor are background in training: they cannot be learned. See the suggestion."),
    ("poor", "warning", "classes with poor anchor coverage",
     "Boxes whose best anchor is below the IoU of a positive are learned badly or not at all. See the suggestion."),
    ("likely_format", "warning", "splits whose boxes may be in another format",
     "They are read in the format of data.box_format (default: x, y, width, height in pixels). Check the drawn images."),
    ("all_crowds", "warning", "splits with classes that have only crowd boxes",
     "These classes are neither learned nor scored. Set data.crowds objects to use them."),
    ("moved", "warning", "splits with images in other folders than their names say", "Check that they are the right ones."),
    ("text_numbers", "warning", "splits with numbers written as text", "They are read as numbers."),
    ("without_box", "warning", "annotations without a box", "Points, keypoints, or nothing. They are dropped."),
    ("pixels", "warning", "doubts about how image files are decoded",
     "Boxes may be on pixels that are turned another way, or 16-bit images may be too dark or cut off. Check the boxes and "
     "set data.orientation or data.bits."),
    ("incomplete", "warning", "JPEGs with missing data",
     "Part of the image is grey or displaced. Training uses it as it is."),
    ("one_colour", "warning", "images of (almost) one colour",
     "On a grid of up to 64 x 64 pixels of the image, and of each box, 99.9 % are within 2 of 255 levels of the median. "
     "Nothing can be learned from them."),
    ("leakage", "warning", "images in both splits",
     "The same bytes are in training and evaluation: the scores would be too good."),
    ("same_image", "warning", "images that are in a split twice",
     "The same bytes: trained on twice, and often labelled differently."),
    ("zero_size", "warning", "boxes without area", "A side is 0 or less. They are dropped."),
    ("outside", "warning", "boxes outside their image", "They are dropped."),
    ("clipped", "warning", "boxes that extend beyond their image", "They are clipped at its edge."),
    ("same_box", "warning", "duplicate boxes", "The same image, class and box. The first one takes all anchors."),
    ("other_class", "warning", "boxes with two classes",
     "The same image and box, another class. The first one takes all anchors."),
    ("same_id", "warning", "ids of several annotations",
     "Training ignores the ids; evaluation gives new ids to all boxes."),
    ("overflow", "warning", "images with more boxes than data.max_boxes",
     "The boxes beyond it become background. Set data.max_boxes auto, or cut images into tiles (data.tile)."),
    ("undetectable", "warning", "images with more boxes than detection.max_detections",
     "Detection finds at most so many of them. Raise detection.max_detections, or cut images into tiles (data.tile). COCO's "
     "AP counts 100 detections of a class in an image; evaluation adds the AP of all."),
    ("same_name", "warning", "names of several categories",
     "Each is a separate class, shown with its id: wheel (1), wheel (2)."),
    ("similar_name", "warning", "names of classes that differ only in case or spaces",
     "Each is a separate class. If they are the same class, give it one name and one category id."),
    ("empty_class", "warning", "classes without boxes",
     "Without boxes in train they cannot be learned; without boxes in val their AP is undefined."),
    ("unscored_class", "warning", "classes of train that are not among the categories of val", "They are not scored."),
    ("no_class", "note", "categories that are not classes", "None of them has an annotation."),
    ("no_boxes", "note", "images without usable boxes",
     "data.images_without_boxes decides whether training drops or keeps them."),
    ("decoding", "note", "conventions of the image files", "Found in the files, or set by an option."),
    ("crowd", "note", "crowd boxes", "Never trained on; evaluation ignores detections on them."),
    ("outbid", "note", "boxes whose anchors are all assigned to other boxes",
     "They have anchors of sufficient IoU, but each of these overlaps another box more."),
    ("orphaned", "note", "annotations of refused entries", "Their image or category is refused."),
)}
# fmt: on


class Finding(NamedTuple):
    """One observation about a dataset."""

    kind: str  # one of KINDS
    split: str
    name: str  # what it is about: `annotation 2288`, an image's file name, a class
    text: str = ""  # details; may be empty


class Group(NamedTuple):
    """Findings of one kind."""

    kind: str
    severity: Severity
    title: str
    meaning: str
    findings: list[Finding]

    def line(self) -> str:
        """Returns all of them as one line, which names the first SHOWN."""
        named = [f"{f.name} ({f.text})" if f.text else f.name for f in self.findings[:SHOWN]]
        named += [f"{len(self.findings) - SHOWN} more"] if len(self.findings) > SHOWN else []
        return f"{self.severity}: {self.title}: {len(self.findings)}: {'; '.join(named)}"


def grouped(findings: Sequence[Finding], tolerated: Sequence[str] = ()) -> list[Group]:
    """Groups findings by kind, errors first, in the order of KINDS; errors of `tolerated` kinds become warnings."""
    groups = []
    for name, (severity, title, meaning) in KINDS.items():
        if of_kind := [finding for finding in findings if finding.kind == name]:
            severity = "warning" if name in tolerated and severity == "error" else severity
            groups.append(Group(name, severity, title, meaning, of_kind))
    return sorted(groups, key=lambda group: ("error", "warning", "note").index(group.severity))
