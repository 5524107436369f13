"""Formats figures as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.work import BENCHMARKS

COLUMNS = {
    "variant": "",
    "cpu_ms": "CPU ms",
    "ratio": "ratio",
    "wall_ms": "wall ms",
    "wall_ratio": "wall ratio",
    "peak_mib": "peak MiB",
    "images_per_second": "images/s",
    "tflops": "TFLOP/s",
    "share_of_matmul": "of a matmul's",
    "cached_cpu_ms": "cached, CPU ms",
    "programs": "programs",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a line of headings, then one line per variant. Columns without values are left out."""
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    cells = [[COLUMNS[c] for c in columns]] + [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([f"{rows[0]['name']}: {BENCHMARKS[rows[0]['name']]} ({rows[0]['hardware']})", *lines])


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"
