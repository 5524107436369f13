"""docs/tour.ipynb: its cells run from top to bottom in a separate process, with the expected output and figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import processes

ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]


def test_the_tour_is_stored_with_the_outputs_of_one_run() -> None:
    """Whoever edits a cell runs all of them again: `jupyter nbconvert --to notebook --execute --inplace docs/tour.ipynb`."""
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, 8))
    outputs = [{output["output_type"] for output in cell["outputs"]} for cell in code]
    text, both, figure = {"stream"}, {"stream", "display_data"}, {"display_data"}
    assert outputs == [text, both, both, figure, both, figure, text]
    assert all(output.get("name", "stdout") == "stdout" for cell in code for output in cell["outputs"]), "no warnings"
    assert (ROOT / "docs" / "tour.ipynb").stat().st_size < 1_500_000


def test_the_tour_runs_from_top_to_bottom(tmp_path: Path) -> None:
    code = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code")
    drawn = 'print("figures drawn:", len(plt.get_fignums()))'
    bytecode = "import sys; sys.dont_write_bytecode = False"  # that of a temporary module would be left
    (tmp_path / "tour.py").write_text(f"{bytecode}\n{code}\n{drawn}")
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
