"""Tables in docs/: conventions.md equals the presets; reproducing.md equals the sweeps and its own formula."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from retina_jax.config_io import load_config
from retina_jax.model.summary import forward_flops
from retina_jax.presets import FIELDS, PRESETS
from retina_jax.sweeps.points import expand, load_sweep
from retina_jax.sweeps.status import training_pflop

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BASE = load_config(ROOT / "configs" / "paper_ablations.py")


def table(path: Path, heading: str) -> Iterator[list[str]]:
    """Yields the cells of each row of the first table under a heading."""
    text = path.read_text().partition(f"\n## {heading}\n")[2]
    rows = re.search(r"^\|.*?\n(?!\|)", text, re.MULTILINE | re.DOTALL)[0].splitlines()
    return ([cell.strip() for cell in row.strip("|").split("|")] for row in [rows[0], *rows[2:]])


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"{value[0]} … {value[-1]} by {value[1] - value[0]}" if value else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def test_the_table_of_conventions_equals_the_presets() -> None:
    (_, *names), *rows = table(DOCS / "conventions.md", "Field by field")
    assert names == list(PRESETS)
    assert [row[0] for row in rows] == [f"`{field}`" for field in FIELDS]
    for field, (_, *cells) in zip(FIELDS, rows, strict=True):
        assert cells == [shown(PRESETS[name][field]) for name in names], field


def costs() -> dict[str, list[float]]:
    """Returns, for the name of each table, runs, PFLOP and the three columns of hours."""
    _, *rows = table(DOCS / "reproducing.md", "What it costs")
    return {row[0].partition(",")[0]: [float(cell) for cell in row[1:]] for row in rows}


def test_hours_follow_from_operations_and_rates() -> None:
    rates = {}
    for column, number, exponent in re.findall(
        r"^\| ([\w ]+) \| ([\d.]+) · 10([⁰¹²³⁴-⁹]+)", (DOCS / "reproducing.md").read_text(), re.MULTILINE
    ):
        rates[column] = float(number) * 10 ** int(exponent.translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")))
    assert set(rates) == {"8 V100", "one A100", "this CPU"}
    for _, pflop, v100, a100, years in costs().values():
        hours = pflop * 1e15 / 3600
        assert v100 == pytest.approx(hours / (8 * rates["8 V100"]), abs=0.51)
        assert a100 == pytest.approx(hours / rates["one A100"], abs=0.51)
        assert years == pytest.approx(hours / rates["this CPU"] / 8760, abs=0.051)


def test_the_rate_of_the_cpu_is_that_of_the_measured_step() -> None:
    """The step is that of one image at 256 x 256 in docs/results/performance.md: three forward passes of 29.9 GFLOP
    each."""
    measured = re.search(
        r"^\| training step, 256² \| (\d+) ms", (DOCS / "results/performance.md").read_text(), re.MULTILINE
    )
    named = re.search(
        r"(\d*\.\d+) s for a step of one image at 256 × 256.*is (\d*\.\d+) TFLOP", (DOCS / "reproducing.md").read_text()
    )
    assert float(named[1]) == pytest.approx(int(measured[1]) / 1000, abs=5e-4)
    assert float(named[2]) == pytest.approx(3 * forward_flops(BASE, 80, (256, 256)) / 1e12, abs=5e-5)
    assert f"| {float(named[2]) / float(named[1]) * 1000:.0f} · 10⁹ per core |" in (DOCS / "reproducing.md").read_text()


@pytest.mark.parametrize("name", ["1a", "1b", "3", "Figure 7"])
def test_operations_equal_those_of_list(name: str) -> None:
    _compare(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1c", "1d", "1e", "2", "Section 5.1"])
def test_operations_of_other_networks_equal_those_of_list(name: str) -> None:
    _compare(name)


def _compare(name: str) -> None:
    file = {"Figure 7": "fig7", "Section 5.1": "section5_1"}.get(name, f"table{name}")
    path = ROOT / "configs" / "sweeps" / f"{file}.py"
    points = expand(path, load_sweep(path), BASE, (0,))
    runs, pflop, *_ = costs()[name]
    assert runs == len(points)
    assert pflop == pytest.approx(sum(training_pflop(point.config) for point in points), abs=0.51)
