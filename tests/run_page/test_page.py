"""A run's page: its content; missing files are named and the rest is shown."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest
from markupsafe import escape

from retina_jax.config import ConfigError
from retina_jax.data.datasets import open_source
from retina_jax.evaluation.coco_scores import SUMMARY, evaluate_coco
from retina_jax.reports.follow import follow
from retina_jax.reports.run_page import MOST_POINTS, points, run_page
from retina_jax.runs.record import SCORES, read_record

NEEDED = "The detections and their ground truth are needed"


def text(page: str) -> str:
    """Returns what a reader sees of the page, on one line."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.S)))


def edit(path: Path, change: object) -> None:
    """Rewrites a JSON file."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_the_page_has_the_content_of_the_runs_files(tiny_run: Path) -> None:
    page, line = run_page(tiny_run)
    shown = text(page)
    scores = json.loads((tiny_run / "evaluation/step_00000040.json").read_text())
    assert line.startswith("Finished after 40 steps in ") and line.split(" AP")[0] in shown
    best = max((json.loads((tiny_run / f"evaluation/step_{n:08d}.json").read_text())["AP"], n) for n in (20, 40))
    of_newest = f"{scores['AP']:.3f} step 40, 8 images AP50 {scores['AP50']:.3f} step 40, 8 images"
    assert f" AP {of_newest} best step {best[1]} AP {best[0]:.3f}, highest of 2 images/s " in shown
    assert (
        f"AP {scores['AP']:.3f}, AP50 {scores['AP50']:.3f}, AP75 {scores['AP75']:.3f} on 8 images at step 40." in line
    )
    for step in (20, 40):
        evaluation = json.loads((tiny_run / f"evaluation/step_{step:08d}.json").read_text())
        row = " ".join(f"{evaluation[n]:.3f}" if evaluation[n] is not None else "n/a" for n in SUMMARY)
        assert f"{step} 8 {row}" in re.sub(" +", " ", shown)
    for name, value in scores["per_class"].items():
        assert re.search(rf" {name} +\d+ +\d+ +{value:.3f} ", shown), name
    assert "training.steps 40 paper: 90000" in shown and "data.source scenes paper: coco" in shown
    assert "loss.gamma 2 paper" not in shown, "equal to the paper's value"
    assert "paper: None" not in shown, "None is not a value of the paper"
    saved = json.loads((tiny_run / "config.json").read_text())
    assert saved["commit"] is None or saved["commit"] in shown
    assert saved["versions"]["jax"] in shown and saved["versions"]["devices"] in shown
    for label in ("loss", "learning rate", "gradient norm", "positives per image", "precision at IoU 0.50"):
        assert f'aria-label="{label} by ' in page
    assert f"AP50 is {scores['AP50']:.3f}." in shown
    threshold = operating_point_of(tiny_run)
    assert f"score {threshold:.2f}: highest F1" in shown and page.count('<circle class="mark"') == 2
    assert page.count("data:image/jpeg;base64,") % 2 == 0 and page.count('class="pair"') >= 2
    assert not re.search(r'(src|href)="(?!data:|#)', page), "nothing that would be fetched"


def operating_point_of(folder: Path) -> float:
    """Returns the score that an evaluation records as `f1_threshold`."""
    source = open_source(read_record(folder).config.data, "val")
    found = json.loads((folder / "detections/step_00000040.json").read_text())
    return evaluate_coco(source.ground_truth, found, [record.image_id for record in source.records]).f1_threshold


def test_the_table_of_confusions_sums_to_the_detections(tiny_run: Path) -> None:
    threshold = operating_point_of(tiny_run)
    found = json.loads((tiny_run / "detections/step_00000040.json").read_text())
    table = run_page(tiny_run)[0].split('class="scroll confusion')[1].split("</table>")[0]
    rows = [re.findall(r"<td class=[^>]*>(\d*)</td>", row) for row in table.split("<tr")[2:]]
    counts = np.array([[int(cell or 0) for cell in row] for row in rows])
    assert counts.shape == (4, 4) and counts[3, 3] == 0 and counts[:, :3].sum() > counts.trace() > 0
    for k, column in enumerate(counts.T[:3], start=1):
        assert column.sum() == sum(d["category_id"] == k and d["score"] >= threshold for d in found)


def test_a_followed_run_is_written_when_it_changes_and_until_it_is_finished(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run, pages = tmp_path / "followed", []
    late = [tiny_run / "evaluation/step_00000040.json", tiny_run / "summary.json"]

    def start() -> None:
        shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns(*(file.name for file in late)))

    def log_more() -> None:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"event": "train", "step": 45, "loss": 0.5}) + "\n")

    def evaluate() -> None:
        shutil.copy(late[0], run / "evaluation")

    def finish() -> None:
        shutil.copy(late[1], run)

    steps = iter([lambda: None, start, lambda: None, log_more, evaluate, finish])
    monkeypatch.setattr(time, "sleep", lambda seconds: next(steps)())
    follow(run, pages.append)
    assert [page.count("location.reload()") for page in pages] == [1, 1, 1, 1, 0] and next(steps, None) is None
    assert "step 40 of 40" in text(pages[0]) and "step 45 of 40" in text(pages[1])
    assert text(pages[-1]) == text(run_page(run)[0]) and "refresh" not in pages[-1]
    printed = capsys.readouterr().out.splitlines()
    of_run = [line for line in printed if not line.startswith("analysing")]
    assert len(printed) - len(of_run) == 3, "each evaluation once, and the last line's own"
    assert [line[:8] for line in of_run] == ["watching", "waiting ", "Not fini", "Not fini", "Finished"]

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    (run / "summary.json").unlink()
    follow(run, pages.append)
    assert "location.reload()" not in pages[-1] and capsys.readouterr().out.endswith("\nstopped watching\n")
    (tmp_path / "sweeps").mkdir()
    with pytest.raises(ConfigError, match="holds sweeps"):
        follow(tmp_path, pages.append)


def test_evaluations_with_other_settings_are_listed_with_them(tiny_run: Path) -> None:
    own = json.loads((tiny_run / "evaluation/step_00000040.json").read_text())
    other = {**own, "AP": 0.123, "settings": {"detection.tta_flip": True, "detection.tta_short_sides": [64, 96]}}
    (tiny_run / "evaluation/step_00000040_0123abcd.json").write_text(json.dumps(other))
    assert read_record(tiny_run).evaluations[40] == own
    page, line = run_page(tiny_run)
    shown = text(page).split("With other settings")[1]
    assert re.search(r"40 +8 +0\.123 .* detection\.tta_flip True, detection\.tta_short_sides 64 96 ", shown)
    assert "0.123" not in line

    untold = {name: value for name, value in other.items() if name != "settings"}
    (tiny_run / "evaluation/step_00000040_0123abcd.json").write_text(json.dumps(untold))
    (tiny_run / "evaluation/step_00000020.json").write_text(json.dumps({**own, "settings": {"devices": 4}}))
    (tiny_run / "evaluation/step_00000040.json").unlink()
    assert not read_record(tiny_run).evaluations
    shown = text(run_page(tiny_run)[0])
    assert (
        "has not been evaluated yet" in shown
        and "no evaluation yet" in shown
        and "not known" in shown
        and "devices 4" in shown
    )

    (tiny_run / "evaluation/step_00000040_0123abcd.json").write_text(json.dumps({**other, "settings": ["x"]}))
    with pytest.raises(ConfigError, match=r"step_00000040_0123abcd\.json: settings"):
        read_record(tiny_run)


def test_the_kinds_of_error_on_the_page_sum_up(tiny_run: Path) -> None:
    page = run_page(tiny_run)[0]
    rows = re.findall(
        r"<tr[^>]*><td>(\w[\w ]*).*?</tr>", page.split('<table class="kinds stack"')[1].split("</table>")[0]
    )
    body = page.split('<table class="kinds stack"')[1].split("<tbody>")[1].split("</tbody>")[0]
    cells = [[c or "0" for c in re.findall(r"<td>(\d*)</td>", row)][-3:] for row in body.split("</tr>")[:-1]]
    numbers = np.array(cells, int)
    assert rows[-1] == "all" and (numbers[:-1].sum(axis=0) == numbers[-1]).all()
    found = json.loads((tiny_run / "detections/step_00000040.json").read_text())
    assert numbers[-1, 0] == len(found) and (numbers[:, 1] <= numbers[:, 0]).all()


def test_names_from_the_data_are_escaped(tiny_run: Path) -> None:
    nasty = "<script>alert('x')</script>"
    annotations = next((tiny_run.parent / "scenes").rglob("val.json"))
    edit(annotations, lambda d: {**d, "categories": [{**c, "name": f"{c['id']}{nasty}"} for c in d["categories"]]})
    page = run_page(tiny_run)[0]
    assert nasty not in page
    assert str(escape(f"1{nasty}")) in page


def test_missing_images_are_named_and_the_rest_is_shown(tiny_run: Path) -> None:
    for image in (tiny_run.parent / "scenes").rglob("*.jpg"):
        image.unlink()
    page = run_page(tiny_run)[0]
    assert "images could not be read" in page and "data:image" not in page
    assert "not found It cannot be read" in text(page)
    assert 'class="kinds stack"' in page and "precision at IoU 0.75" in page


def test_a_missing_folder_of_images_leaves_the_ground_truth(tiny_run: Path) -> None:
    """The same scenes are COCO files, whose image folder is then deleted."""
    annotations = next((tiny_run.parent / "scenes").rglob("val.json"))

    def to_coco(saved: dict) -> dict:
        paths = {"val_annotations": str(annotations), "val_images": str(annotations.parent / "gone")}
        data = {**saved["config"]["data"], "source": "coco", **paths}
        return {**saved, "config": {**saved["config"], "data": data}}

    edit(tiny_run / "config.json", to_coco)
    page = run_page(tiny_run)[0]
    assert 'class="kinds stack"' in page and "images could not be read" in page
    annotations.unlink()
    page = run_page(tiny_run)[0]
    assert NEEDED in page and 'class="kinds stack"' not in page
    assert "n/a" in page or "0." in page, "AP of the classes is known from the evaluation"


@pytest.mark.parametrize(
    "content", ["{", "{}", '[{"image_id": 1}]', '[{"image_id": 1, "category_id": 99, "bbox": [], "score": 1}]']
)
def test_detections_that_cannot_be_used_are_named(tiny_run: Path, content: str) -> None:
    (tiny_run / "detections/step_00000040.json").write_text(content)
    page = run_page(tiny_run)[0]
    assert NEEDED in page and 'class="kinds stack"' not in page


def test_data_that_has_changed_is_noted(tiny_run: Path) -> None:
    annotations = next((tiny_run.parent / "scenes").rglob("val.json"))
    edit(annotations, lambda d: {**d, "annotations": d["annotations"][::2]})
    assert "the data has changed since" in run_page(tiny_run)[0]


def test_a_run_that_has_just_started_has_a_page(tiny_run: Path) -> None:
    for what in ("evaluation", "detections"):
        shutil.rmtree(tiny_run / what)
    (tiny_run / "summary.json").unlink()
    (tiny_run / "metrics.jsonl").write_text((tiny_run / "metrics.jsonl").read_text()[:700])  # in the middle of a line
    page, line = run_page(tiny_run)
    assert line == "Not finished: step 10 of 40."
    assert "The run has not been evaluated yet." in page and "<svg" in page and '<progress value="0.2500"' in page
    (tiny_run / "metrics.jsonl").unlink()
    page, line = run_page(tiny_run)
    assert line == "Not finished: step 0 of 40." and "no curve to draw" in page


def test_damaged_files_end_in_one_line_that_names_them(tiny_run: Path) -> None:
    assert tuple(SUMMARY) == SCORES
    metrics = (tiny_run / "metrics.jsonl").read_text()
    (tiny_run / "metrics.jsonl").write_text("{\n" + metrics)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 1: cannot be read"):
        read_record(tiny_run)
    (tiny_run / "metrics.jsonl").write_text(metrics)
    edit(tiny_run / "evaluation/step_00000020.json", lambda scores: {**scores, "AP75": 75})
    with pytest.raises(ConfigError, match=r"step_00000020\.json: AP75: "):
        read_record(tiny_run)


def test_scores_with_other_settings_are_not_those_of_the_run(tiny_run: Path) -> None:
    shutil.copy(tiny_run / "evaluation/step_00000040.json", tiny_run / "evaluation/step_00000040_1a2b3c4d.json")
    assert list(read_record(tiny_run).evaluations) == [20, 40]


def test_long_curves_are_means_of_neighbours() -> None:
    windows = [{"step": step, "loss": float(step % 2)} for step in range(1, 2 * MOST_POINTS + 1)]
    drawn = points(windows, "loss")
    assert drawn == [(2 * n + 1.5, 0.5) for n in range(MOST_POINTS)]
    assert points(windows[:3], "loss") == [(1.0, 1.0), (2.0, 0.0), (3.0, 1.0)] and points([], "loss") == []


def test_the_script_writes_the_page_of_a_run(tiny_run: Path, tmp_path: Path) -> None:
    (tiny_run / "report.html").symlink_to(tmp_path / "shared.html")
    done = processes.run("report", "--workdir", tiny_run)
    assert done.returncode == 0, done.stderr
    assert "Finished after 40 steps" in done.stdout and f"written: {tiny_run / 'report.html'}" in done.stdout
    assert (tmp_path / "shared.html").read_text() == (tiny_run / "report.html").read_text() == run_page(tiny_run)[0]


def test_the_page_needs_no_tensorflow(tiny_run: Path) -> None:
    program = "import runpy, sys; sys.modules['tensorflow'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = f"import sys; sys.argv = ['scripts/report.py', '--workdir', {str(tiny_run)!r}]; {program}"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=Path(__file__).parents[2])
    assert "data:image" in (tiny_run / "report.html").read_text()
