"""docs/tour.ipynb: its cells run from top to bottom in a separate process, with the expected output and figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import processes

ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]


def test_the_tour_is_stored_without_outputs() -> None:
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(code) == 7
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_tour_runs_from_top_to_bottom(tmp_path: Path) -> None:
    code = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code")
    drawn = 'print("figures drawn:", len(plt.get_fignums()))'
    (tmp_path / "tour.py").write_text(f"{code}\n{drawn}")
    environment = {"TOUR_STEPS": "8", "TMPDIR": str(tmp_path), "MPLBACKEND": "Agg"}
    # In docs/, where Jupyter starts it; plt.show() of a backend without a screen leaves the figures open.
    done = processes.run(tmp_path / "tour.py", environment=environment, folder=ROOT / "docs")
    assert done.returncode == 0, done.stderr
    assert "figures drawn: 5" in done.stdout
    total, *parts = map(int, re.search(r"(\d+) anchors: (\d+) pos\w+, (\d+) ign\w+, (\d+) back", done.stdout).groups())
    assert total == sum(parts) and parts[0] > 0
    losses = [float(value) for value in re.findall(r"classification_loss ([\d.]+)", done.stdout)]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert "Average Precision" in done.stdout and "AP of red disc" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"tour.py", "retina_jax_tour"}
