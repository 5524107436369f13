"""Every number of the paper's tables (Lin et al. 2017), and those its text gives, by the names of `configs/sweeps/`.

Scores are in percent, as printed. Tables 1a to 1d and 3 are on minival (val2017), Tables 1e and 2 on test-dev, whose
labels are not public.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

AP = ("AP", "AP50", "AP75")
"""Columns of the ablations."""
AP_AND_SIZES = (*AP, "APs", "APm", "APl")
"""Columns of Tables 1e and 2."""


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str | None
    """Point of the sweep that trains it; None: a system of others."""
    settings: tuple[str, ...]
    """As printed, one for each of the table's `columns`."""
    scores: dict[str, float] = field(default_factory=dict)
    """Percent, by the table's `metrics`; what the paper does not give is absent."""
    minival: dict[str, float] = field(default_factory=dict)
    """Scores of the same model on minival, of a table on test-dev; empty: the paper gives none."""
    milliseconds: float | None = None
    """Time an image on an Nvidia M40 (Table 1e)."""
    group: str = ""
    """Heading that the line stands under."""
    note: str = ""
    """What the paper says of it beside its numbers."""
    derived: bool = False
    """Its scores follow from what the text says and stand nowhere in the paper."""


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    name: str
    """Name of its sweep."""
    title: str
    columns: tuple[str, ...]
    """Headings of the rows' settings."""
    split: str
    """minival or test-dev."""
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    reference: str
    """Point that the other rows are compared with."""
    reference_label: str
    """What it is called in a heading."""
    note: str = ""
    """What a reader has to know of its rows."""


def _rows(
    text: str, metrics: tuple[str, ...], settings: int, minival: Mapping[str, dict[str, float]] | None = None
) -> tuple[Row, ...]:
    """Lines of "point | setting | ... | scores [milliseconds]"."""
    rows, minival = [], minival or {}
    for line in text.strip().splitlines():
        name, *others = (part.strip() for part in line.split("|"))
        numbers = [float(n) for n in others[settings].split()]
        scores = dict(zip(metrics, numbers, strict=False))
        time = numbers[len(metrics)] if len(numbers) > len(metrics) else None
        rows.append(Row(name, tuple(others[:settings]), scores, minival.get(name, {}), time))
    return tuple(rows)


TABLE_1A = Table(
    name="table1a",
    title="Table 1a: α of the balanced cross entropy (γ = 0)",
    columns=("α",),
    split="minival",
    metrics=AP,
    rows=_rows(
        """
        alpha_0.10  | .10  | 0.0 0.0 0.0
        alpha_0.25  | .25  | 10.8 16.0 11.7
        alpha_0.50  | .50  | 30.2 46.7 32.8
        alpha_0.75  | .75  | 31.1 49.4 33.0
        alpha_0.90  | .90  | 30.8 49.7 32.3
        alpha_0.99  | .99  | 28.7 47.4 29.9
        alpha_0.999 | .999 | 25.1 41.7 26.1
        """,
        AP,
        1,
    ),
    reference="alpha_0.50",
    reference_label="α = .50",
    note=(
        "The row α = .50 is the cross entropy of Section 5.1, 30.2 AP there too: positives and negatives weigh the same. "
        "It is one run with prior_0.01 of the sweep section5_1."
    ),
)

TABLE_1B = Table(
    name="table1b",
    title="Table 1b: γ of the focal loss, each with its best α",
    columns=("γ", "α"),
    split="minival",
    metrics=AP,
    rows=_rows(
        """
        gamma_0.0 | 0   | .75 | 31.1 49.4 33.0
        gamma_0.1 | 0.1 | .75 | 31.4 49.9 33.1
        gamma_0.2 | 0.2 | .75 | 31.9 50.7 33.4
        gamma_0.5 | 0.5 | .50 | 32.9 51.7 35.2
        gamma_1.0 | 1.0 | .25 | 33.7 52.0 36.2
        gamma_2.0 | 2.0 | .25 | 34.0 52.5 36.5
        gamma_5.0 | 5.0 | .25 | 32.2 49.6 34.8
        """,
        AP,
        2,
    ),
    reference="gamma_2.0",
    reference_label="FL (γ = 2)",
)

TABLE_1C = Table(
    name="table1c",
    title="Table 1c: anchor scales and aspect ratios at each place",
    columns=("#sc", "#ar"),
    split="minival",
    metrics=AP,
    rows=_rows(
        """
        scales_1_ratios_1 | 1 | 1 | 30.3 49.0 31.8
        scales_2_ratios_1 | 2 | 1 | 31.9 50.0 34.0
        scales_3_ratios_1 | 3 | 1 | 31.8 49.4 33.7
        scales_1_ratios_3 | 1 | 3 | 32.4 52.3 33.9
        scales_2_ratios_3 | 2 | 3 | 34.2 53.1 36.5
        scales_3_ratios_3 | 3 | 3 | 34.0 52.5 36.5
        scales_4_ratios_3 | 4 | 3 | 33.8 52.1 36.2
        """,
        AP,
        2,
    ),
    reference="scales_3_ratios_3",
    reference_label="FL (3 scales, 3 ratios)",
)

TABLE_1D = Table(
    name="table1d",
    title="Table 1d: focal loss against online hard example mining (ResNet-101)",
    columns=("method", "batch size", "nms thr"),
    split="minival",
    metrics=AP,
    rows=_rows(
        """
        ohem_128_nms_0.7     | OHEM     | 128 | .7  | 31.1 47.2 33.2
        ohem_256_nms_0.7     | OHEM     | 256 | .7  | 31.8 48.8 33.9
        ohem_512_nms_0.7     | OHEM     | 512 | .7  | 30.6 47.0 32.6
        ohem_128_nms_0.5     | OHEM     | 128 | .5  | 32.8 50.3 35.1
        ohem_256_nms_0.5     | OHEM     | 256 | .5  | 31.0 47.4 33.0
        ohem_512_nms_0.5     | OHEM     | 512 | .5  | 27.6 42.0 29.2
        ohem_1_3_128_nms_0.5 | OHEM 1:3 | 128 | .5  | 31.1 47.2 33.2
        ohem_1_3_256_nms_0.5 | OHEM 1:3 | 256 | .5  | 28.3 42.4 30.3
        ohem_1_3_512_nms_0.5 | OHEM 1:3 | 512 | .5  | 24.0 35.5 25.8
        focal                | FL       | n/a | n/a | 36.0 54.9 38.7
        """,
        AP,
        3,
    ),
    reference="focal",
    reference_label="FL",
)

_ON_MINIVAL = {
    "depth_50_scale_600": TABLE_1B.rows[5].scores,
    "depth_101_scale_600": TABLE_1D.rows[-1].scores,
}
"""The models of Table 1e that the ablations give on minival: the default of Table 1b, and the focal loss of Table 1d."""

TABLE_1E = Table(
    name="table1e",
    title="Table 1e: accuracy and speed by depth and image scale",
    columns=("depth", "scale"),
    split="test-dev",
    metrics=AP_AND_SIZES,
    rows=_rows(
        """
        depth_50_scale_400  | 50  | 400 | 30.5 47.8 32.7 11.2 33.8 46.1 64
        depth_50_scale_500  | 50  | 500 | 32.5 50.9 34.8 13.9 35.8 46.7 72
        depth_50_scale_600  | 50  | 600 | 34.3 53.2 36.9 16.2 37.4 47.4 98
        depth_50_scale_700  | 50  | 700 | 35.1 54.2 37.7 18.0 39.3 46.4 121
        depth_50_scale_800  | 50  | 800 | 35.7 55.0 38.5 18.9 38.9 46.3 153
        depth_101_scale_400 | 101 | 400 | 31.9 49.5 34.1 11.6 35.8 48.5 81
        depth_101_scale_500 | 101 | 500 | 34.4 53.1 36.8 14.7 38.5 49.1 90
        depth_101_scale_600 | 101 | 600 | 36.0 55.2 38.7 17.4 39.6 49.7 122
        depth_101_scale_700 | 101 | 700 | 37.1 56.6 39.8 19.1 40.6 49.4 154
        depth_101_scale_800 | 101 | 800 | 37.8 57.5 40.8 20.2 41.1 49.2 198
        """,
        AP_AND_SIZES,
        2,
        minival=_ON_MINIVAL,
    ),
    reference="depth_50_scale_600",
    reference_label="FL (ResNet-50, 600 px)",
)


def _scores(text: str) -> dict[str, float]:
    return dict(zip(AP_AND_SIZES, map(float, text.split()), strict=True))


_TWO, _ONE = "Two-stage methods", "One-stage methods"
_TDM = "Inception-ResNet-v2-TDM"

TABLE_2 = Table(
    name="table2",
    title="Table 2: single models against the state of the art (800 px, scale jitter, 1.5 times the schedule)",
    columns=("method", "backbone"),
    split="test-dev",
    metrics=AP_AND_SIZES,
    rows=(
        Row(None, ("Faster R-CNN+++", "ResNet-101-C4"), _scores("34.9 55.7 37.4 15.6 38.7 50.9"), group=_TWO),
        Row(None, ("Faster R-CNN w FPN", "ResNet-101-FPN"), _scores("36.2 59.1 39.0 18.2 39.0 48.2"), group=_TWO),
        Row(
            None, ("Faster R-CNN by G-RMI", "Inception-ResNet-v2"), _scores("34.7 55.5 36.7 13.5 38.1 52.0"), group=_TWO
        ),
        Row(None, ("Faster R-CNN w TDM", _TDM), _scores("36.8 57.7 39.2 16.2 39.8 52.1"), group=_TWO),
        Row(None, ("YOLOv2", "DarkNet-19"), _scores("21.6 44.0 19.2 5.0 22.4 35.5"), group=_ONE),
        Row(None, ("SSD513", "ResNet-101-SSD"), _scores("31.2 50.4 33.3 10.2 34.5 49.8"), group=_ONE),
        Row(None, ("DSSD513", "ResNet-101-DSSD"), _scores("33.2 53.3 35.2 13.0 35.4 51.1"), group=_ONE),
        Row("resnet101", ("RetinaNet", "ResNet-101-FPN"), _scores("39.1 59.1 42.3 21.8 42.7 50.2"), group=_ONE),
        Row("resnext101", ("RetinaNet", "ResNeXt-101-FPN"), _scores("40.8 61.1 44.1 24.1 44.2 51.2"), group=_ONE),
    ),
    reference="resnet101",
    reference_label="RetinaNet, ResNet-101",
)

TABLE_3 = Table(
    name="table3",
    title="Table 3: FL and FL* against the cross entropy (balanced, α = .75)",
    columns=("loss", "γ", "β"),
    split="minival",
    metrics=AP,
    rows=_rows(
        """
        cross_entropy      | CE  | —   | —   | 31.1 49.4 33.0
        focal              | FL  | 2.0 | —   | 34.0 52.5 36.5
        focal_star_2.0_1.0 | FL* | 2.0 | 1.0 | 33.8 52.7 36.3
        focal_star_4.0_0.0 | FL* | 4.0 | 0.0 | 33.9 51.8 36.4
        """,
        AP,
        3,
    ),
    reference="focal",
    reference_label="FL (γ = 2)",
)

SECTION_5_1 = Table(
    name="section5_1",
    title="Section 5.1: what the text says of other losses and starts",
    columns=("loss", "start"),
    split="minival",
    metrics=("AP",),
    rows=(
        Row("no_prior", ("CE, α = .5", "no prior"), note="diverges"),
        Row("prior_0.01", ("CE, α = .5", "π = .01"), {"AP": 30.2}),
        Row(
            "focal_alpha_0.50",
            ("FL, γ = 2, α = .5", "π = .01"),
            {"AP": 33.6},
            note="“.4 AP lower” than 34.0, of α = .25",
            derived=True,
        ),
        Row("hinge", ("hinge on p_t", "π = .01"), note="unstable, no meaningful result"),
    ),
    reference="prior_0.01",
    reference_label="CE with prior",
)

TABLES = {
    table.name: table for table in (TABLE_1A, TABLE_1B, TABLE_1C, TABLE_1D, TABLE_1E, TABLE_2, TABLE_3, SECTION_5_1)
}
"""All of them by name, in the paper's order."""

EFFECTIVE_AP = 33.5
"""AP in percent over which Figure 7 calls a setting of FL* effective; it must have converged too."""

OTHER_SYSTEMS = {
    "YOLOv2": (25.0, 21.6),
    "SSD321": (61.0, 28.0),
    "DSSD321": (85.0, 28.0),
    "R-FCN": (85.0, 29.9),
    "SSD513": (125.0, 31.2),
    "DSSD513": (156.0, 33.2),
    "FPN FRCN": (172.0, 36.2),
}
"""Figure 2's other systems: milliseconds per image and AP on test-dev. The paper extrapolated R-FCN's time; FPN FRCN is
Faster R-CNN with ResNet-101-FPN, measured on an M40 (Section 5.2)."""
