"""Every number of the paper's tables (Lin et al. 2017) and of its text, under the names of `configs/sweeps/`.

Scores are in percent, as printed. Tables 1a to 1d and 3 are on minival (val2017). Tables 1e and 2 are on test-dev, whose
labels are not public.
"""

import re
from dataclasses import dataclass, field

AP = ("AP", "AP50", "AP75")  # Scores of the ablations


@dataclass(frozen=True)
class Row:
    """A row of a table."""

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
    """A table of the paper."""

    name: str  # name of its sweep
    title: str
    split: str  # minival or test-dev
    reference: str  # point that the other rows are compared with
    reference_label: str  # name of the reference in a heading
    note: str  # remark about its rows, or empty
    columns: tuple[str, ...]  # headings of the rows' settings
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]


# For each table: "# sweep | split | title", the reference, optionally a note, the headings, and its rows. A row is
# "point | settings ... | scores [milliseconds] [note]". The point "-" means another system; "≈" marks derived scores. A
# line in brackets is a heading above the rows that follow.
_PUBLISHED = """
# table1a | minival | Table 1a: α of the balanced cross entropy (γ = 0)
reference: alpha_0.50 | α = .50
note: The row α = .50 is the cross entropy of Section 5.1, where it also has 30.2 AP: positives and negatives have the same \
weight. It is the same run as prior_0.01 of the sweep section5_1.
point       | α    | AP AP50 AP75
alpha_0.10  | .10  | 0.0 0.0 0.0
alpha_0.25  | .25  | 10.8 16.0 11.7
alpha_0.50  | .50  | 30.2 46.7 32.8
alpha_0.75  | .75  | 31.1 49.4 33.0
alpha_0.90  | .90  | 30.8 49.7 32.3
alpha_0.99  | .99  | 28.7 47.4 29.9
alpha_0.999 | .999 | 25.1 41.7 26.1

# table1b | minival | Table 1b: γ of the focal loss, each with its best α
reference: gamma_2.0 | FL (γ = 2)
point     | γ   | α   | AP AP50 AP75
gamma_0.0 | 0   | .75 | 31.1 49.4 33.0
gamma_0.1 | 0.1 | .75 | 31.4 49.9 33.1
gamma_0.2 | 0.2 | .75 | 31.9 50.7 33.4
gamma_0.5 | 0.5 | .50 | 32.9 51.7 35.2
gamma_1.0 | 1.0 | .25 | 33.7 52.0 36.2
gamma_2.0 | 2.0 | .25 | 34.0 52.5 36.5
gamma_5.0 | 5.0 | .25 | 32.2 49.6 34.8

# table1c | minival | Table 1c: anchor scales and aspect ratios at each place
reference: scales_3_ratios_3 | FL (3 scales, 3 ratios)
point             | #sc | #ar | AP AP50 AP75
scales_1_ratios_1 | 1   | 1   | 30.3 49.0 31.8
scales_2_ratios_1 | 2   | 1   | 31.9 50.0 34.0
scales_3_ratios_1 | 3   | 1   | 31.8 49.4 33.7
scales_1_ratios_3 | 1   | 3   | 32.4 52.3 33.9
scales_2_ratios_3 | 2   | 3   | 34.2 53.1 36.5
scales_3_ratios_3 | 3   | 3   | 34.0 52.5 36.5
scales_4_ratios_3 | 4   | 3   | 33.8 52.1 36.2

# table1d | minival | Table 1d: focal loss against online hard example mining (ResNet-101)
reference: focal | FL
point                | method   | batch size | nms thr | AP AP50 AP75
ohem_128_nms_0.7     | OHEM     | 128        | .7      | 31.1 47.2 33.2
ohem_256_nms_0.7     | OHEM     | 256        | .7      | 31.8 48.8 33.9
ohem_512_nms_0.7     | OHEM     | 512        | .7      | 30.6 47.0 32.6
ohem_128_nms_0.5     | OHEM     | 128        | .5      | 32.8 50.3 35.1
ohem_256_nms_0.5     | OHEM     | 256        | .5      | 31.0 47.4 33.0
ohem_512_nms_0.5     | OHEM     | 512        | .5      | 27.6 42.0 29.2
ohem_1_3_128_nms_0.5 | OHEM 1:3 | 128        | .5      | 31.1 47.2 33.2
ohem_1_3_256_nms_0.5 | OHEM 1:3 | 256        | .5      | 28.3 42.4 30.3
ohem_1_3_512_nms_0.5 | OHEM 1:3 | 512        | .5      | 24.0 35.5 25.8
focal                | FL       | n/a        | n/a     | 36.0 54.9 38.7

# table1e | test-dev | Table 1e: accuracy and speed by depth and image scale
reference: depth_50_scale_600 | FL (ResNet-50, 600 px)
point               | depth | scale | AP AP50 AP75 APs APm APl milliseconds
depth_50_scale_400  | 50    | 400   | 30.5 47.8 32.7 11.2 33.8 46.1 64
depth_50_scale_500  | 50    | 500   | 32.5 50.9 34.8 13.9 35.8 46.7 72
depth_50_scale_600  | 50    | 600   | 34.3 53.2 36.9 16.2 37.4 47.4 98
depth_50_scale_700  | 50    | 700   | 35.1 54.2 37.7 18.0 39.3 46.4 121
depth_50_scale_800  | 50    | 800   | 35.7 55.0 38.5 18.9 38.9 46.3 153
depth_101_scale_400 | 101   | 400   | 31.9 49.5 34.1 11.6 35.8 48.5 81
depth_101_scale_500 | 101   | 500   | 34.4 53.1 36.8 14.7 38.5 49.1 90
depth_101_scale_600 | 101   | 600   | 36.0 55.2 38.7 17.4 39.6 49.7 122
depth_101_scale_700 | 101   | 700   | 37.1 56.6 39.8 19.1 40.6 49.4 154
depth_101_scale_800 | 101   | 800   | 37.8 57.5 40.8 20.2 41.1 49.2 198

# table2 | test-dev | Table 2: single models against the state of the art (800 px, scale jitter, 1.5 times the schedule)
reference: resnet101 | RetinaNet, ResNet-101
point      | method                | backbone                | AP AP50 AP75 APs APm APl
[Two-stage methods]
-          | Faster R-CNN+++       | ResNet-101-C4           | 34.9 55.7 37.4 15.6 38.7 50.9
-          | Faster R-CNN w FPN    | ResNet-101-FPN          | 36.2 59.1 39.0 18.2 39.0 48.2
-          | Faster R-CNN by G-RMI | Inception-ResNet-v2     | 34.7 55.5 36.7 13.5 38.1 52.0
-          | Faster R-CNN w TDM    | Inception-ResNet-v2-TDM | 36.8 57.7 39.2 16.2 39.8 52.1
[One-stage methods]
-          | YOLOv2                | DarkNet-19              | 21.6 44.0 19.2 5.0 22.4 35.5
-          | SSD513                | ResNet-101-SSD          | 31.2 50.4 33.3 10.2 34.5 49.8
-          | DSSD513               | ResNet-101-DSSD         | 33.2 53.3 35.2 13.0 35.4 51.1
resnet101  | RetinaNet             | ResNet-101-FPN          | 39.1 59.1 42.3 21.8 42.7 50.2
resnext101 | RetinaNet             | ResNeXt-101-FPN         | 40.8 61.1 44.1 24.1 44.2 51.2

# table3 | minival | Table 3: FL and FL* against the cross entropy (balanced, α = .75)
reference: focal | FL (γ = 2)
point              | loss | γ   | β   | AP AP50 AP75
cross_entropy      | CE   | —   | —   | 31.1 49.4 33.0
focal              | FL   | 2.0 | —   | 34.0 52.5 36.5
focal_star_2.0_1.0 | FL*  | 2.0 | 1.0 | 33.8 52.7 36.3
focal_star_4.0_0.0 | FL*  | 4.0 | 0.0 | 33.9 51.8 36.4

# section5_1 | minival | Section 5.1: other losses and initialisations in the text
reference: prior_0.01 | CE with prior
point            | loss              | start    | AP
no_prior         | CE, α = .5        | no prior | diverges
prior_0.01       | CE, α = .5        | π = .01  | 30.2
focal_alpha_0.50 | FL, γ = 2, α = .5 | π = .01  | ≈ 33.6 “.4 AP lower” than 34.0, of α = .25
hinge            | hinge on p_t      | π = .01  | unstable, no meaningful result
"""

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


TABLES = {table.name: table for table in map(_table, _PUBLISHED.split("\n\n"))}  # In the paper's order
