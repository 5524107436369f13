"""The complete check: findings in the splits of a dataset, and how well the anchors cover its boxes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import flatten, override, with_classes
from retina_jax.console import log
from retina_jax.data.classes import Category, category_ids, open_both
from retina_jax.data.source import Decoding
from retina_jax.data.survey import Survey, survey_files
from retina_jax.data_check.coverage import Coverage, Shares, count_shares, cover, coverage_findings, view_boxes
from retina_jax.data_check.findings import Finding, Group, grouped
from retina_jax.data_check.nearest import Views
from retina_jax.data_check.split import Split, check_images, duplicates, read_split, split_findings
from retina_jax.data_check.suggestion import Suggestion, suggest

BAD_IMAGES = ("missing", "unreadable", "wrong_size")  # kinds that data.bad_images skip tolerates
CONCERNED = ("data", "anchors", "matching")  # sections of the config that the check depends on


class ClassCount(NamedTuple):
    """Numbers of boxes and images of a class."""

    name: str
    boxes: int  # boxes that can be trained on
    images: int  # images with at least one of them
    dropped: int  # crowd boxes, boxes without area and boxes outside their image


@dataclass(frozen=True, eq=False)
class Check:
    """Results of a data check."""

    config: Config
    decoding: Decoding  # how images of the training split are decoded
    splits: list[Split]  # train, and val if it was given
    counts: dict[str, list[ClassCount]]  # by split, then by label
    groups: list[Group]  # findings by kind, errors first
    views: Views  # boxes of the training split at the sizes of training
    coverage: Coverage
    shares: Shares
    suggestion: Suggestion | None
    searched: bool  # whether a suggestion was searched for

    @property
    def ready(self) -> bool:
        """Whether training would start and could learn something, because there is no error."""
        return all(group.severity != "error" for group in self.groups)

    def verdict(self) -> str:
        """Returns one line: whether the data is ready, and the numbers of errors and warnings, if there are any."""
        counts = Counter(group.severity for group in self.groups for _ in group.findings)
        counted = [f"{counts[s]} {s}{'s' * (counts[s] > 1)}" for s in ("error", "warning") if counts[s]]
        return ": ".join(filter(None, (f"{'Ready' if self.ready else 'Not ready'} to train", ", ".join(counted))))


def check_data(config: Config, pairs: dict[str, tuple[Path, Path]], *, search: bool = True) -> Check:
    """Checks the splits `train` and, if given, `val`: each a COCO JSON and a folder; `search` for a suggestion or not.
    Raises DataError as `read_split`."""

    def opened(name: str, known: Sequence[Category] = ()) -> Split:
        without_boxes = config.data.images_without_boxes if name == "train" else "keep"
        return read_split(name, *pairs[name], without_boxes, known, config.data)

    both = "val" in pairs
    splits = list(open_both(partial(opened, "train"), partial(opened, "val"))) if both else [opened("train")]
    surveys = {split.name: survey_split(split) for split in splits}
    shown = [survey.votes.shown for survey in surveys.values()]
    if config.data.orientation == "auto" and set(shown) == {"open", "stored"}:
        config = override(config, {"data.undecided_orientation": "stored"})
        # Image entries without a size follow the other split if their own does not show the convention.
        again = [bool(split.unsized) and one == "open" for split, one in zip(splits, shown, strict=True)]
        splits = [opened(s.name, s.categories) if late else s for s, late in zip(splits, again, strict=True)]
    found: list[Finding] = []
    digests, decodings = {}, {}
    for split in splits:
        log(f"{split.name}: {len(split.images)} images, {len(split.labels)} boxes, {len(split.class_names)} classes")
        decodings[split.name], config, of_files = decide_decoding(split, surveys[split.name], config)
        bad_images, digests[split.name] = check_images(split, decodings[split.name], config.data.workers)
        found += [*of_files, *split_findings(split, config), *bad_images]
    found += duplicates(digests, splits)
    train = splits[0]
    counts = {split.name: count_classes(split) for split in splits}
    for name, rows in counts.items():
        if any(c.boxes for c in rows):
            found += [Finding("empty_class", name, c.name, f"in {name}") for c in rows if not c.boxes]
        elif name == "val":
            found.append(Finding("nothing_to_score", name, splits[-1].annotations.name, "AP cannot be computed"))
    found += [Finding("no_class", s.name, f"{c[1]} ({c[0]})", why) for s in splits for c, why in s.left_out.items()]
    try:
        ids = category_ids(train.categories, splits[-1], "data.val_annotations")
        lacking = [name for name, same in zip(train.class_names, ids, strict=True) if same is None]
        found += [Finding("unscored_class", "val", name) for name in lacking]
        with_classes(config, len(train.categories))
    except ConfigError as error:
        field, _, text = str(error).partition(": ")
        found.append(Finding("refused_config", splits[-1].name, field, text))
    views = view_boxes(train.records, config.data)
    coverage = cover(views, config)
    shares = count_shares(views, coverage, train.class_names)
    if len(views.labels):
        # Boxes that duplicates outbid are reported already.
        twins = {finding.name for finding in found if finding.kind in ("same_box", "other_class")}
        boxes = train.trained_boxes()[np.unique(views.boxes[coverage.kinds["outbid"]])].tolist()
        outbid = {train.box_name(m): train.file_of(m) for m in boxes}
        found += coverage_findings(shares)
        found += [Finding("outbid", "train", name, file) for name, file in outbid.items() if name not in twins]
    else:
        found.append(Finding("nothing_to_learn", "train", str(train.annotations)))
    groups = grouped(found, BAD_IMAGES if config.data.bad_images == "skip" else ())
    suggestion = suggest(train.records, config, train.class_names, shares) if search else None
    return Check(config, decodings[train.name], splits, counts, groups, views, coverage, shares, suggestion, search)


def survey_split(split: Split) -> Survey:
    """Reads the headers of the image files of a split."""
    sizes = [None if row in split.unsized else image[2:] for row, image in enumerate(split.images)]
    return survey_files([image[1] for image in split.images], list(map(Path, split.paths)), sizes)


def decide_decoding(split: Split, survey: Survey, config: Config) -> tuple[Decoding, Config, list[Finding]]:
    """Returns how the split's images are decoded, the config with the range of 16-bit images, and findings on both."""
    decoding, lines = survey.decide(config.data)
    if decoding.bits:
        config = override(config, {"data.bits": decoding.bits})
    name = split.annotations.name
    found = [Finding("pixels" if in_doubt else "decoding", split.name, name, line) for line, in_doubt in lines]
    return decoding, config, found


def count_classes(split: Split) -> list[ClassCount]:
    """Counts the boxes and images of each class, by label."""
    usable, names = split.rules["usable"], split.class_names
    images_labels = np.unique(np.stack([split.owners[usable], split.labels[usable]]), axis=1)
    columns = split.labels[usable], images_labels[1], split.labels[~usable]
    counts = (np.bincount(labels, minlength=len(names)).tolist() for labels in columns)
    return [ClassCount(*row) for row in zip(names, *counts, strict=True)]


def facts_of(check: Check) -> dict[str, Any]:
    """Returns all that the page shows, in JSON's own types."""
    suggestion = check.suggestion
    return {
        "makes_sense": check.ready,
        "splits": {
            split.name: {
                "annotations": str(split.annotations),
                "images_folder": str(split.folder),
                "images": len(split.images),
                "boxes": len(split.labels),
                "usable_boxes": int(split.rules["usable"].sum()),
                "classes": [count._asdict() for count in check.counts[split.name]],
            }
            for split in check.splits
        },
        "findings": [
            {"kind": kind, "severity": severity, "title": title, "count": len(findings)}
            | {"found": [{"split": f.split, "name": f.name, "text": f.text} for f in findings]}
            for kind, severity, title, _, findings in check.groups
        ],
        "coverage": check.shares.as_dict(),
        "suggestion": suggestion
        and {
            "options": suggestion.options,
            "changes": suggestion.changes,
            "pixels_factor": suggestion.pixels,
            "anchors_per_cell": list(suggestion.anchors),
            "coverage": suggestion.after.as_dict(),
        },
        "settings": {name: value for name, value in flatten(check.config).items() if name.split(".")[0] in CONCERNED},
    }
