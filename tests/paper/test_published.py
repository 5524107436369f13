"""The paper's numbers agree with each other, with its text, and with the sweeps that make them again."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from retina_jax.config import Config
from retina_jax.paper.published import EFFECTIVE_AP, FASTER_RCNN_FPN, TABLES, Row, Table

SWEEPS = Path(__file__).parents[2] / "configs" / "sweeps"
ROWS = {
    "table1a": 7,
    "table1b": 7,
    "table1c": 7,
    "table1d": 10,
    "table1e": 10,
    "table2": 9,
    "table3": 4,
    "section5_1": 4,
}


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
def test_a_table_has_the_papers_rows_each_complete(table: Table) -> None:
    assert len(table.rows) == ROWS[table.name]
    names = [row.name for row in table.rows if row.name]
    assert len(names) == len(set(names)) and table.reference in names
    for row in table.rows:
        assert len(row.settings) == len(table.columns)
        assert tuple(row.scores) == table.metrics or row.note
        if "AP50" in row.scores:
            assert row.scores["AP75"] <= row.scores["AP50"] and row.scores["AP"] <= row.scores["AP50"]
        if "APs" in row.scores:
            assert row.scores["APs"] < row.scores["APm"] < row.scores["APl"]


def test_tables_1e_and_2_are_on_test_dev_the_others_on_minival() -> None:
    assert {name for name, table in TABLES.items() if table.split == "test-dev"} == {"table1e", "table2"}
    assert {table.split for table in TABLES.values()} == {"test-dev", "minival"}


def test_rows_that_are_one_run_have_one_result() -> None:
    assert row("table1a", "alpha_0.75").scores == row("table1b", "gamma_0.0").scores
    assert row("table1a", "alpha_0.75").scores == row("table3", "cross_entropy").scores
    assert row("table1b", "gamma_2.0").scores == row("table1c", "scales_3_ratios_3").scores
    assert row("table1b", "gamma_2.0").scores == row("table3", "focal").scores
    assert ap("table1a", "alpha_0.50") == ap("section5_1", "prior_0.01") == 30.2


def test_differences_are_those_of_the_text() -> None:
    assert ap("table1a", "alpha_0.75") - ap("table1a", "alpha_0.50") == pytest.approx(0.9)  # "a gain of 0.9 points AP"
    assert ap("table1b", "gamma_2.0") - ap("table1b", "gamma_0.0") == pytest.approx(2.9)  # "a 2.9 AP improvement"
    assert ap("table1d", "focal") - max(r.scores["AP"] for r in TABLES["table1d"].rows[:-1]) == pytest.approx(3.2)
    others = {row.settings[0]: row.scores["AP"] for row in TABLES["table2"].rows if row.name is None}
    assert ap("table2", "resnet101") - others["DSSD513"] == pytest.approx(5.9)  # "5.9 point AP gap"
    assert ap("table2", "resnet101") - others["Faster R-CNN w TDM"] == pytest.approx(2.3)  # "2.3 point gap"
    assert ap("table2", "resnext101") - ap("table2", "resnet101") == pytest.approx(1.7)  # "another 1.7 AP"
    assert ap("table2", "resnet101") - ap("table1e", "depth_101_scale_800") == pytest.approx(1.3)  # "a 1.3 AP gain"
    assert ap("table1b", "gamma_2.0") - ap("section5_1", "focal_alpha_0.50") == pytest.approx(0.4)  # ".4 AP lower"


def test_speed_is_that_of_the_text_and_grows_with_scale_and_depth() -> None:
    assert row("table1e", "depth_101_scale_600").milliseconds == 122  # "122 ms per image compared to 172 ms"
    assert FASTER_RCNN_FPN == (172, 36.2)
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
