"""Every number of the paper's tables (Lin et al. 2017) and of its text, under the names of `configs/sweeps/`.

Scores are in percent, as printed (tables.txt). Tables 1a to 1d and 3 are on minival (val2017). Tables 1e and 2 are on
test-dev, whose labels are not public.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

AP = ("AP", "AP50", "AP75")  # Scores of the ablations


@dataclass(frozen=True)
class Row:
    """Row of a table."""

    name: str | None  # point of the sweep that trains it; None: another system
    settings: tuple[str, ...]  # as printed, one for each of the table's `columns`
    scores: dict[str, float] = field(default_factory=dict)  # percent; only those that the paper gives
    minival: dict[str, float] = field(default_factory=dict)  # for a table on test-dev: the paper's on minival
    milliseconds: float | None = None  # time per image on an Nvidia M40 (Table 1e)
    group: str = ""  # heading above the row
    note: str = ""  # what the paper says about the row besides its numbers
    derived: bool = False  # the scores follow from the text and are not printed in the paper


@dataclass(frozen=True)
class Table:
    """Table of the paper."""

    name: str  # name of its sweep
    title: str
    split: str  # minival or test-dev
    reference: str  # point that the other rows are compared with
    reference_label: str  # name of the reference in a heading
    note: str  # remark about its rows, or empty
    columns: tuple[str, ...]  # headings of the rows' settings
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]


EFFECTIVE_AP = 33.5  # AP in percent above which Figure 7 calls a setting of FL* effective; it must also have converged

# Figure 2's other systems: milliseconds per image and AP on test-dev. The paper extrapolated the time of R-FCN; FPN FRCN is
# Faster R-CNN with ResNet-101-FPN, measured on an M40 (Section 5.2).
OTHER_SYSTEMS = {
    "YOLOv2": (25.0, 21.6),
    "SSD321": (61.0, 28.0),
    "DSSD321": (85.0, 28.0),
    "R-FCN": (85.0, 29.9),
    "SSD513": (125.0, 31.2),
    "DSSD513": (156.0, 33.2),
    "FPN FRCN": (172.0, 36.2),
}
# Two models of Table 1e are also in ablations, on minival: the default of Table 1b and the focal loss of Table 1d.
_ON_MINIVAL = {
    "depth_50_scale_600": {"AP": 34.0, "AP50": 52.5, "AP75": 36.5},
    "depth_101_scale_600": {"AP": 36.0, "AP50": 54.9, "AP75": 38.7},
}


def _table(text: str) -> Table:
    """Reads a table in the format that tables.txt explains."""
    heading, reference, *lines = text.strip().splitlines()
    name, split, title = heading.removeprefix("# ").split(" | ")
    compared, label = reference.removeprefix("reference: ").split(" | ")
    note = lines.pop(0).removeprefix("note: ") if lines[0].startswith("note: ") else ""
    _, *columns, last = (part.strip() for part in lines[0].split("|"))
    metrics, rows, group = last.split(), [], ""
    for line in lines[1:]:
        if line.startswith("["):
            group = line.strip("[]")
            continue
        point, *settings, results = (part.strip() for part in line.split("|"))
        derived, numbers, remark = re.fullmatch(r"(≈?) ?((?:\d+\.?\d* ?)*)(.*)", results).groups()
        scores = dict(zip(metrics, map(float, numbers.split()), strict=bool(numbers)))
        time, minival = scores.pop("milliseconds", None), _ON_MINIVAL.get(point, {})
        named = None if point == "-" else point
        rows.append(Row(named, tuple(settings), scores, minival, time, group, remark, bool(derived)))
    shown = tuple(name for name in metrics if name != "milliseconds")
    return Table(name, title, split, compared, label, note, tuple(columns), shown, tuple(rows))


_TEXTS = Path(__file__).with_name("tables.txt").read_text(encoding="utf-8").split("\n\n")[1:]
TABLES = {table.name: table for table in map(_table, _TEXTS)}  # In the paper's order
