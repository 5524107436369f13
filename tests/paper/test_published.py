"""The paper's numbers agree with each other, with its text, and with the sweeps that reproduce them."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from retina_jax.config import Config
from retina_jax.paper.settings import EFFECTIVE_AP, OTHER_SYSTEMS, TABLES, Row, Table

SWEEPS = Path(__file__).parents[2] / "configs" / "sweeps"
PRINTED = {
    "table1a": """
        .10 0.0 0.0 0.0
        .25 10.8 16.0 11.7
        .50 30.2 46.7 32.8
        .75 31.1 49.4 33.0
        .90 30.8 49.7 32.3
        .99 28.7 47.4 29.9
        .999 25.1 41.7 26.1
    """,
    "table1b": """
        0 .75 31.1 49.4 33.0
        0.1 .75 31.4 49.9 33.1
        0.2 .75 31.9 50.7 33.4
        0.5 .50 32.9 51.7 35.2
        1.0 .25 33.7 52.0 36.2
        2.0 .25 34.0 52.5 36.5
        5.0 .25 32.2 49.6 34.8
    """,
    "table1c": """
        1 1 30.3 49.0 31.8
        2 1 31.9 50.0 34.0
        3 1 31.8 49.4 33.7
        1 3 32.4 52.3 33.9
        2 3 34.2 53.1 36.5
        3 3 34.0 52.5 36.5
        4 3 33.8 52.1 36.2
    """,
    "table1d": """
        OHEM 128 .7 31.1 47.2 33.2
        OHEM 256 .7 31.8 48.8 33.9
        OHEM 512 .7 30.6 47.0 32.6
        OHEM 128 .5 32.8 50.3 35.1
        OHEM 256 .5 31.0 47.4 33.0
        OHEM 512 .5 27.6 42.0 29.2
        OHEM 1:3 128 .5 31.1 47.2 33.2
        OHEM 1:3 256 .5 28.3 42.4 30.3
        OHEM 1:3 512 .5 24.0 35.5 25.8
        FL n/a n/a 36.0 54.9 38.7
    """,
    "table1e": """
        50 400 30.5 47.8 32.7 11.2 33.8 46.1 64
        50 500 32.5 50.9 34.8 13.9 35.8 46.7 72
        50 600 34.3 53.2 36.9 16.2 37.4 47.4 98
        50 700 35.1 54.2 37.7 18.0 39.3 46.4 121
        50 800 35.7 55.0 38.5 18.9 38.9 46.3 153
        101 400 31.9 49.5 34.1 11.6 35.8 48.5 81
        101 500 34.4 53.1 36.8 14.7 38.5 49.1 90
        101 600 36.0 55.2 38.7 17.4 39.6 49.7 122
        101 700 37.1 56.6 39.8 19.1 40.6 49.4 154
        101 800 37.8 57.5 40.8 20.2 41.1 49.2 198
    """,
    "table2": """
        Faster R-CNN+++ ResNet-101-C4 34.9 55.7 37.4 15.6 38.7 50.9
        Faster R-CNN w FPN ResNet-101-FPN 36.2 59.1 39.0 18.2 39.0 48.2
        Faster R-CNN by G-RMI Inception-ResNet-v2 34.7 55.5 36.7 13.5 38.1 52.0
        Faster R-CNN w TDM Inception-ResNet-v2-TDM 36.8 57.7 39.2 16.2 39.8 52.1
        YOLOv2 DarkNet-19 21.6 44.0 19.2 5.0 22.4 35.5
        SSD513 ResNet-101-SSD 31.2 50.4 33.3 10.2 34.5 49.8
        DSSD513 ResNet-101-DSSD 33.2 53.3 35.2 13.0 35.4 51.1
        RetinaNet ResNet-101-FPN 39.1 59.1 42.3 21.8 42.7 50.2
        RetinaNet ResNeXt-101-FPN 40.8 61.1 44.1 24.1 44.2 51.2
    """,
    "table3": """
        CE — — 31.1 49.4 33.0
        FL 2.0 — 34.0 52.5 36.5
        FL* 2.0 1.0 33.8 52.7 36.3
        FL* 4.0 0.0 33.9 51.8 36.4
    """,
}
"""The tables as the paper prints them: settings and scores, in Table 1e also the time."""


def row(table: str, name: str) -> Row:
    (found,) = [row for row in TABLES[table].rows if row.name == name]
    return found


def ap(table: str, name: str) -> float:
    return row(table, name).scores["AP"]


def load_sweep(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_a_table_has_all_rows_of_the_paper_with_all_cells(table: Table) -> None:
    names = [row.name for row in table.rows if row.name]
    assert len(names) == len(set(names)) and table.reference in names
    for row in table.rows:
        assert len(row.settings) == len(table.columns)
        assert tuple(row.scores) == table.metrics or row.note
        if "AP50" in row.scores:
            assert row.scores["AP75"] <= row.scores["AP50"] and row.scores["AP"] <= row.scores["AP50"]
        if "APs" in row.scores:
            assert row.scores["APs"] < row.scores["APm"] < row.scores["APl"]


@pytest.mark.parametrize("name", PRINTED)
def test_every_cell_is_as_printed(name: str) -> None:
    rows = [
        " ".join([*row.settings, *(f"{row.scores[m]:.1f}" for m in TABLES[name].metrics)])
        + (f" {row.milliseconds:.0f}" if name == "table1e" else "")
        for row in TABLES[name].rows
    ]
    assert rows == [line.strip() for line in PRINTED[name].strip().splitlines()]


def test_only_a_score_that_the_paper_does_not_print_is_marked_derived() -> None:
    derived = [(table.name, row.name) for table in TABLES.values() for row in table.rows if row.derived]
    assert derived == [("section5_1", "focal_alpha_0.50")], "33.6 is 34.0 less .4"


def test_tables_1e_and_2_are_on_test_dev_the_others_on_minival() -> None:
    assert {name for name, table in TABLES.items() if table.split == "test-dev"} == {"table1e", "table2"}
    assert {table.split for table in TABLES.values()} == {"test-dev", "minival"}


def test_rows_of_the_same_run_have_the_same_result() -> None:
    assert row("table1a", "alpha_0.75").scores == row("table1b", "gamma_0.0").scores
    assert row("table1a", "alpha_0.75").scores == row("table3", "cross_entropy").scores
    assert row("table1b", "gamma_2.0").scores == row("table1c", "scales_3_ratios_3").scores
    assert row("table1b", "gamma_2.0").scores == row("table3", "focal").scores
    assert ap("table1a", "alpha_0.50") == ap("section5_1", "prior_0.01") == 30.2


def test_differences_agree_with_the_text() -> None:
    assert ap("table1a", "alpha_0.75") - ap("table1a", "alpha_0.50") == pytest.approx(0.9)  # "a gain of 0.9 points AP"
    assert ap("table1b", "gamma_2.0") - ap("table1b", "gamma_0.0") == pytest.approx(2.9)  # "a 2.9 AP improvement"
    assert ap("table1d", "focal") - max(r.scores["AP"] for r in TABLES["table1d"].rows[:-1]) == pytest.approx(3.2)
    others = {row.settings[0]: row.scores["AP"] for row in TABLES["table2"].rows if row.name is None}
    assert ap("table2", "resnet101") - others["DSSD513"] == pytest.approx(5.9)  # "5.9 point AP gap"
    assert ap("table2", "resnet101") - others["Faster R-CNN w TDM"] == pytest.approx(2.3)  # "2.3 point gap"
    assert ap("table2", "resnext101") - ap("table2", "resnet101") == pytest.approx(1.7)  # "another 1.7 AP"
    assert ap("table2", "resnet101") - ap("table1e", "depth_101_scale_800") == pytest.approx(1.3)  # "a 1.3 AP gain"
    assert ap("table1b", "gamma_2.0") - ap("section5_1", "focal_alpha_0.50") == pytest.approx(0.4)  # ".4 AP lower"


def test_the_time_agrees_with_the_text_and_grows_with_scale_and_depth() -> None:
    assert row("table1e", "depth_101_scale_600").milliseconds == 122  # "122 ms per image compared to 172 ms"
    table_2 = {row.settings[0]: row.scores["AP"] for row in TABLES["table2"].rows}
    assert OTHER_SYSTEMS["FPN FRCN"] == (172, table_2["Faster R-CNN w FPN"])
    for name in ("YOLOv2", "SSD513", "DSSD513"):
        assert OTHER_SYSTEMS[name][1] == table_2[name]
    for depth in (50, 101):
        times = [row("table1e", f"depth_{depth}_scale_{scale}").milliseconds for scale in (400, 500, 600, 700, 800)]
        assert times == sorted(times)


def test_table_3s_variants_are_effective_in_figure_7s_sense() -> None:
    assert ap("table3", "focal_star_2.0_1.0") > EFFECTIVE_AP < ap("table3", "focal_star_4.0_0.0")
    assert ap("table3", "cross_entropy") < EFFECTIVE_AP


@pytest.mark.parametrize("name", [name for name in TABLES if name.startswith("table")])
def test_a_sweep_trains_the_tables_rows(name: str) -> None:
    points = load_sweep(SWEEPS / f"{name}.py").get_sweep(Config())
    assert list(points) == [row.name for row in TABLES[name].rows if row.name]
