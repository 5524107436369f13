"""The report on sweeps written by the tests: finished, diverged, running and missing runs, several seeds, damaged
files."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_jax.config import Config, ConfigError, DataConfig, ModelConfig, TrainingConfig
from retina_jax.config_io import load_config, override, to_dict
from retina_jax.evaluation.coco_scores import SUMMARY
from retina_jax.paper.comparison import Section, build_report, signed
from retina_jax.paper.results import read_sweeps
from retina_jax.paper.settings import TABLES
from retina_jax.reports.charts import line_chart, log_ticks, ticks
from retina_jax.reports.sweep_page import charts_of, plain, smoothed, to_html, to_markdown

ROOT = Path(__file__).parents[2]
SCENES = Config(data=DataConfig(source="scenes"), model=ModelConfig(num_classes=6), training=TrainingConfig(steps=100))
PAPER = "configs/paper_ablations.py"
COCO = load_config(ROOT / PAPER)
HOSTILE = '<script>alert("x")</script>|`*&'


def write_run(
    folder: Path, ap: float | None = None, *, steps: int = 100, config: Config = SCENES, **further: Any
) -> None:
    """Writes a run's folder; the run is finished if `ap` (percent) is given. `further` is added to config.json."""
    folder.mkdir(parents=True)
    saved = {"config": to_dict(config), "command": ["x.py"], "commit": "abc123", "versions": {"devices": "1 x cpu"}}
    saved |= {"class_names": ["x"], "category_ids": [1]} | further
    (folder / "config.json").write_text(json.dumps(saved))
    lines = [
        {"step": s, "event": "train", "classification_loss": 2.0 / s}
        for s in range(10, steps + 1, max(10, steps // 100))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = dict.fromkeys(SUMMARY, 0.05) | {"step": steps, "images": 5, "per_class": {}}
    (folder / "evaluation").mkdir()
    for step in (steps // 2, steps):
        file = folder / "evaluation" / f"step_{step:08d}.json"
        file.write_text(json.dumps(evaluation | {"AP": step / 1000 if step < 1000 else 0.5, "step": step}))
    if ap is not None:
        evaluation |= dict.fromkeys(SUMMARY, ap / 100)
        summary = {
            "steps": steps,
            "images": 8,
            "seconds": 12.3,
            "evaluation": evaluation,
            "parameters_sha256": "f" * 64,
        }
        (folder / "summary.json").write_text(json.dumps(summary))


def write_diverged(folder: Path, step: int = 40) -> None:
    """Writes a run whose loss became non-finite."""
    write_run(folder)
    (folder / "diverged.json").write_text(json.dumps({"step": step, "message": "loss is nan"}))


def write_manifest(folder: Path, name: str, points: list[tuple], base: str = "configs/mini.py") -> None:
    """Writes a manifest; `points` are (name, seed, run's folder[, overrides])."""
    keys = ("name", "seed", "folder", "overrides")
    listed = [dict(zip(keys, (*point, {})[:4], strict=True)) for point in points]
    (folder / "sweeps").mkdir(parents=True, exist_ok=True)
    manifest = {"sweep": name, "file": f"configs/sweeps/{name}.py", "base": base, "overrides": {}, "points": listed}
    (folder / "sweeps" / f"{name}.json").write_text(json.dumps(manifest))


@pytest.fixture
def sweeps(tmp_path: Path) -> Path:
    """Writes Table 1b with runs in every state, Table 3 with two of its runs, and a user's sweep."""
    for seed, ap in enumerate((30.0, 31.0, 32.0)):
        write_run(tmp_path / f"fl{seed}", ap)
    write_run(tmp_path / "ce", 28.0)
    write_run(tmp_path / "half0", 32.5)
    write_diverged(tmp_path / "half1")
    write_diverged(tmp_path / "bad")
    write_run(tmp_path / "going", steps=30)
    write_run(tmp_path / "own", 31.0)
    write_manifest(
        tmp_path,
        "table1b",
        [
            ("gamma_0.0", 0, "ce"),
            ("gamma_1.0", 0, "bad"),
            ("gamma_5.0", 0, "going"),
            ("gamma_0.5", 0, "never"),
            *[("gamma_2.0", seed, f"fl{seed}") for seed in range(3)],
            ("gamma_0.2", 0, "half0"),
            ("gamma_0.2", 1, "half1"),
            ("gamma_0.2", 2, "half2"),
            ("gamma_9.0", 0, "ce"),
        ],
    )
    write_manifest(tmp_path, "table3", [("cross_entropy", 0, "ce"), ("focal", 0, "fl0")])
    write_manifest(tmp_path, "mine", [(HOSTILE, 0, "own", {"loss.kind": HOSTILE}), ("other", 0, "ce")])
    return tmp_path


def by_name(folder: Path) -> dict[str, Section]:
    return {section.name: section for section in build_report(read_sweeps(folder))}


def table(section: Section) -> dict[str, dict[str, str]]:
    """Returns first cell -> heading -> text."""
    return {row[0].text: dict(zip(section.header, (c.text for c in row), strict=False)) for row in section.rows}


def test_the_report_has_every_row_of_the_paper_in_its_order_with_its_value(sweeps: Path) -> None:
    section = by_name(sweeps)["table1b"]
    printed = [[cell.text for cell in row] for row in section.rows]
    assert [tuple(row[:2]) for row in printed[:7]] == [row.settings for row in TABLES["table1b"].rows]
    assert [row[2] for row in printed[:7]] == [f"{row.scores['AP']:.1f}" for row in TABLES["table1b"].rows]
    assert printed[7][0] == "gamma_9.0" and printed[7][2] == "", "a point that the paper does not have comes last"


def test_headings_name_the_split_of_the_paper_and_of_our_runs(sweeps: Path) -> None:
    header = by_name(sweeps)["table1b"].header
    for metric in ("AP", "AP50", "AP75"):
        assert f"{metric}, paper (minival)" in header and f"{metric}, ours (val of scenes)" in header


def test_seeds_are_one_row_with_mean_sample_deviation_and_number(sweeps: Path) -> None:
    row = table(by_name(sweeps)["table1b"])["2.0"]
    assert row["AP, ours (val of scenes)"] == "31.0 ± 1.0"
    assert row["seeds"] == "3"
    assert row["Δ AP, ours − paper"] == "−3.0"
    assert row["AP50, ours (val of scenes)"] == "31.0 ± 1.0", "no difference in brackets where runs do not compare"


def test_rows_without_a_result_show_the_state_of_their_runs(sweeps: Path) -> None:
    rows = table(by_name(sweeps)["table1b"])
    ours = "AP, ours (val of scenes)"
    assert rows["1.0"][ours] == "diverged at step 40"
    assert rows["5.0"][ours] == "running or interrupted at step 30 of 100"
    assert rows["0.5"][ours] == "not run", "its folder is absent"
    assert rows["0.1"][ours] == "not run", "the sweep has no such point"
    assert rows["5.0"]["seeds"] == rows["1.0"]["seeds"] == "0 of 1" and rows["0.5"]["seeds"] == ""


def test_a_row_with_a_diverged_seed_is_marked_and_is_not_the_best(sweeps: Path) -> None:
    section = by_name(sweeps)["table1b"]
    row = table(section)["0.2"]
    assert row["AP, ours (val of scenes)"] == "32.5; 1 of 2 seeds diverged", "above all others"
    assert row["seeds"] == "1 of 2: seed 1 diverged at step 40", "seed 2, which did not run, is not mentioned"
    (cells,) = [cells for cells in section.rows if cells[0].text == "0.2"]
    assert not any(cell.bold for cell in cells)
    assert "best gamma_2.0 31.0 ± 1.0" in section.summary and "2 diverged" in section.summary


def test_seeds_that_all_diverged_are_counted_and_running_ones_named(tmp_path: Path) -> None:
    for seed in range(3):
        write_diverged(tmp_path / f"bad{seed}", 10 * seed + 10)
    write_run(tmp_path / "done", 30.0)
    write_run(tmp_path / "going", steps=30)
    write_manifest(
        tmp_path,
        "table3",
        [
            *[("focal", seed, f"bad{seed}") for seed in range(3)],
            *[("cross_entropy", seed, run) for seed, run in enumerate(("done", "going", "absent"))],
        ],
    )
    rows = table(by_name(tmp_path)["table3"])
    ours = "AP, ours (val of scenes)"
    assert rows["FL"][ours] == "3 of 3 seeds diverged" and rows["FL"]["seeds"].startswith("0 of 3: seed 0 diverged at")
    assert rows["CE"][ours] == "30.0"
    assert rows["CE"]["seeds"] == "1 of 2: seed 1 running or interrupted at step 30 of 100"


def test_a_difference_between_rows_is_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    for seed, (ce, fl) in enumerate(((20.0, 25.0), (30.0, 32.0), (None, 45.0))):
        write_run(tmp_path / f"ce{seed}", ce)
        write_run(tmp_path / f"fl{seed}", fl)
    write_run(tmp_path / "star3", 50.0)
    write_manifest(
        tmp_path,
        "table3",
        [(name, seed, f"{run}{seed}") for name, run in (("cross_entropy", "ce"), ("focal", "fl")) for seed in range(3)]
        + [("focal_star_2.0_1.0", 3, "star3")],
    )
    section = by_name(tmp_path)["table3"]
    rows = [dict(zip(section.header, (cell.text for cell in row), strict=True)) for row in section.rows]
    delta, ours = "Δ AP to FL (γ = 2), paper / ours", "AP, ours (val of scenes)"
    assert [row[delta] for row in rows[:3]] == ["−2.9 / −3.5 (2 seeds)", "0.0 / 0.0", "−0.2 / –"]
    assert rows[0][ours] == "25.0 ± 7.1" and rows[1][ours] == "34.0 ± 10.1", "means are over all seeds"


def test_tables_that_share_a_run_share_its_seeds(tmp_path: Path) -> None:
    for seed, ap in enumerate((28.0, 29.0, 33.0)):
        write_run(tmp_path / f"ce{seed}", ap)
    write_manifest(tmp_path, "table1a", [("alpha_0.75", 0, "ce0"), ("alpha_0.10", 1, "other")])
    write_manifest(tmp_path, "table1b", [("gamma_0.0", 1, "ce1"), ("gamma_0.0", 0, "ce0")])
    write_manifest(tmp_path, "table3", [("cross_entropy", 1, "ce1"), ("cross_entropy", 2, "ce2", {"loss.alpha": 0.75})])
    found = by_name(tmp_path)
    for name, first in (("table1a", ".75"), ("table1b", "0"), ("table3", "CE")):
        row = table(found[name])[first]
        assert row["AP, ours (val of scenes)"] == "30.0 ± 2.6" and row["seeds"] == "3", name
    points = {sweep.name: sweep for sweep in read_sweeps(tmp_path)}["table1a"].points
    assert [(p.name, p.seed, p.overrides) for p in points if p.name == "alpha_0.75"] == [
        ("alpha_0.75", seed, {}) for seed in range(3)
    ], "by its own name and words"
    assert len(points) == 4, "the other point gains nothing"


def test_a_seed_that_two_sweeps_trained_in_two_folders_counts_once(tmp_path: Path) -> None:
    for name, ap in (("shared", 30.0), ("one", 32.0), ("two", 40.0)):
        write_run(tmp_path / name, ap)
    write_manifest(tmp_path, "table1b", [("gamma_2.0", 0, "shared"), ("gamma_2.0", 1, "one")])
    write_manifest(tmp_path, "table3", [("focal", 0, "shared"), ("focal", 1, "two")])
    row = table(by_name(tmp_path)["table1b"])["2.0"]
    assert row["AP, ours (val of scenes)"] == "31.0 ± 1.4" and row["seeds"] == "2"


def test_differences_to_the_focal_loss_are_shown_if_values_are_not_comparable(sweeps: Path) -> None:
    section = by_name(sweeps)["table1b"]
    heading = "Δ AP to FL (γ = 2), paper / ours"
    assert table(section)["0"][heading] == "−2.9 / −2.0 (1 seed)", "the first seed has 28.0 and 30.0"
    assert table(section)["2.0"][heading] == "0.0 / 0.0"
    assert table(section)["1.0"][heading] == "−0.3 / –"
    assert sum("not comparable" in note for note in section.notes) == 1


def focal_run(folder: Path, changes: dict[str, Any]) -> str:
    """Returns the report's note on a run of Table 1b's gamma 2 with `changes` of the paper's config; empty if it is
    comparable."""
    config = override(COCO, changes)
    write_run(folder / "run", 34.2, steps=config.training.steps, config=config)
    write_manifest(folder, "table1b", [("gamma_2.0", 0, "run")], base=PAPER)
    return "".join(note for note in by_name(folder)["table1b"].notes if "not comparable" in note)


def test_runs_of_the_papers_config_are_comparable(tmp_path: Path) -> None:
    assert focal_run(tmp_path, {}) == ""
    section = by_name(tmp_path)["table1b"]
    assert "Δ AP, ours − paper" in section.header and not any("to FL" in name for name in section.header)
    row = table(section)["2.0"]
    assert row["AP, ours (instances_val2017)"] == "34.2" and row["Δ AP, ours − paper"] == "+0.2"
    assert row["AP50, ours (instances_val2017)"] == "34.2 (−18.3)"


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 3},
        {"model.num_classes": None},
        {"data.val_annotations": "/elsewhere/instances_val2017.json", "data.val_images": "/elsewhere"},
        {"training.eval_every": 7, "data.workers": 3, "devices": 4},
    ],
)
def test_a_field_without_effect_on_the_outcome_keeps_the_run_comparable(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert focal_run(tmp_path, changes) == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training.steps": 60_000}, "60000 steps"),
        ({"training.steps": 180_000}, "180000 steps"),
        ({"model.num_classes": 20}, "20 classes"),
        ({"model.backbone_weights": ""}, "backbone from random weights"),
        ({"model.backbone_weights": "data/r50.safetensors"}, "backbone from data/r50.safetensors"),
        ({"data.source": "scenes", "data.train_annotations": ""}, "ablations.py): the data are generated scenes. Abs"),
        ({"data.val_annotations": "minival2014.json"}, "data.val_annotations minival2014.json"),
        ({"detection.nms_iou": 0.6}, "detection.nms_iou 0.6"),
        ({"optimizer.learning_rate": 0.02, "data.batch_size": 32}, "data.batch_size 32; optimizer.learning_rate 0.02"),
        ({"loss.gamma": 1.0}, "loss.gamma 1"),
        (
            dict.fromkeys(("model.head_convs", "model.fpn_channels", "data.max_boxes", "data.buckets", "seed"), 2),
            "buckets",
        ),
        (
            dict.fromkeys(("model.head_convs", "model.fpn_channels", "model.head_channels", "data.buckets"), 2)
            | {"data.flip": False, "training.steps": 9},
            "9 steps; 5 other fields",
        ),
    ],
)
def test_a_field_that_changes_the_outcome_makes_the_run_not_comparable(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    assert says in focal_run(tmp_path, changes)


def test_the_setting_of_the_row_is_comparable_and_that_of_another_row_is_not(tmp_path: Path) -> None:
    write_run(
        tmp_path / "a", 31.0, steps=90_000, config=override(COCO, {"data.short_side": 800, "data.long_side": 1333})
    )
    write_manifest(tmp_path, "table1e", [("depth_50_scale_800", 0, "a")], base=PAPER)
    assert not any("not comparable" in note for note in by_name(tmp_path)["table1e"].notes)
    write_manifest(tmp_path, "table1e", [("depth_50_scale_700", 0, "a")], base=PAPER)
    (note,) = [note for note in by_name(tmp_path)["table1e"].notes if "not comparable" in note]
    assert "data.short_side 800" in note


def test_before_a_run_has_started_the_base_decides_whether_it_is_comparable(tmp_path: Path) -> None:
    def notes(base: str, overrides: dict[str, Any]) -> list[str]:
        write_manifest(tmp_path, "table1b", [("gamma_2.0", 0, "absent")], base=base)
        file = tmp_path / "sweeps" / "table1b.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "overrides": overrides}))
        return by_name(tmp_path)["table1b"].notes

    assert len(notes(PAPER, {"data.val_images": "x"})) == 1
    first, second = notes(PAPER, {"optimizer.boundaries": [10, 20], "optimizer.learning_rate": 0.1})
    assert "paper_ablations.py with optimizer.boundaries (10, 20), optimizer.learning_rate 0.1" in first
    assert "optimizer.learning_rate 0.1" in second
    assert "the base is configs/mini.py" in notes("configs/mini.py", {})[1]
    with pytest.raises(ConfigError, match=r"sweep table1b: loss\.gama"):
        notes(PAPER, {"loss.gama": 1})


def test_runs_of_other_commits_or_pretrained_weights_are_listed_under_the_table(tmp_path: Path) -> None:
    def footnotes(*saved: dict[str, Any]) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for place, further in enumerate(saved):
            write_run(folder / f"run{place}", 30.0, **further)
        write_diverged(folder / "bad")
        write_manifest(
            folder,
            "table1c",
            [(f"scales_{i + 1}_ratios_3", 0, f"run{i}") for i in range(len(saved))] + [("x", 0, "bad")],
        )
        return by_name(folder)["table1c"].footnotes

    one, other = {"commit": "a" * 40}, {"commit": "b" * 40}
    assert footnotes(one, one) == [], "the diverged run, of another commit, has no figure in the table"
    assert footnotes(one, one, other) == ["Commits of the finished runs: aaaaaaa (2 runs), bbbbbbb (1 run)."]
    (note,) = footnotes({"commit": "a" * 40 + "+changes"})
    assert "aaaaaaa+changes (1 run); +changes" in note
    old, new = (one | {"facts": {"backbone_sha256": digit * 64}} for digit in "12")
    assert footnotes(old, old, one) == [], "an older run does not have the checksum"
    (note,) = footnotes(old, new)
    assert "different weights of resnet50" in note and "111111111111 (1 run), 222222222222 (1 run)" in note


def test_the_cross_entropy_of_section_5_1_is_named_once(tmp_path: Path) -> None:
    write_manifest(tmp_path, "table1a", [("alpha_0.50", 0, "absent")])
    section = by_name(tmp_path)["table1a"]
    (note,) = section.footnotes
    assert "prior_0.01" in note
    assert note in to_markdown([section], "x", {}) and note in Tags(to_html([section], "x")).text


def test_a_value_that_the_paper_does_not_print_is_marked_and_never_the_best(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 30.0)
    write_manifest(tmp_path, "section5_1", [("prior_0.01", 0, "run")])
    section = by_name(tmp_path)["section5_1"]
    paper = section.header.index("AP, paper (minival)")
    assert section.rows[2][paper].text.startswith("≈ 33.6 (") and "34.0" in section.rows[2][paper].text
    assert not any(row[paper].bold for row in section.rows) and "paper" not in section.summary


def test_the_report_explains_itself_once(sweeps: Path) -> None:
    sections = list(by_name(sweeps).values())
    charts = {(s.name, kind): "x.svg" for s in sections for kind in charts_of(s)}
    for text in (to_markdown(sections, "x", charts), Tags(to_html(sections, "x")).text):
        for words in (
            "standard deviation",
            "heights are not comparable",
            "seeds that both rows have",
            "“Δ AP, ours − paper”",
        ):
            assert text.count(words) == 1


def test_a_run_resumed_for_more_steps_is_not_finished(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 30.0, steps=50)
    write_manifest(tmp_path, "table3", [("focal", 0, "run")])
    assert (
        table(by_name(tmp_path)["table3"])["FL"]["AP, ours (val of scenes)"]
        == "running or interrupted at step 50 of 100"
    )


def test_the_best_of_each_side_is_bold(sweeps: Path) -> None:
    section = by_name(sweeps)["table1b"]
    bold = {(row[0].text, section.header[i]) for row in section.rows for i, cell in enumerate(row) if cell.bold}
    assert {name for name, heading in bold if heading.startswith("AP, ")} == {"2.0"}, "32.5 has a diverged seed"
    assert len(bold) == 6


def test_all_equal_best_values_are_bold(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 30.0)
    write_manifest(tmp_path, "table1c", [("scales_1_ratios_1", 0, "run"), ("scales_2_ratios_1", 0, "run")])
    section = by_name(tmp_path)["table1c"]
    best_ap75 = [row for row in section.rows if row[section.header.index("AP75, paper (minival)")].bold]
    assert len(best_ap75) == 2, "36.5 twice, as in the paper"
    assert sum(row[section.header.index("AP, ours (val of scenes)")].bold for row in section.rows) == 2


def test_table_1e_has_sizes_times_and_a_warning_of_its_split(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 30.0)
    (tmp_path / "run" / "latency.json").write_text('{"milliseconds": 12.34, "hardware": "H200", "step": 100}')
    write_manifest(tmp_path, "table1e", [("depth_50_scale_600", 0, "run")])
    section = by_name(tmp_path)["table1e"]
    assert {"APs, paper (test-dev)", "APl, ours (val of scenes)", "ms per image, ours (H200)"} <= set(section.header)
    assert any("test-dev" in note for note in section.notes)
    row = dict(zip(section.header, (cell.text for cell in section.rows[2]), strict=True))
    assert row["ms per image, paper (M40)"] == "98" and row["ms per image, ours (H200)"] == "12.3"
    assert len(section.rows) == len(TABLES["table1e"].rows)


def test_only_values_of_the_same_split_are_subtracted(tmp_path: Path) -> None:
    for name in ("400", "600", "101", "best"):
        write_run(tmp_path / name, 30.0)
    points = [("depth_50_scale_400", "400"), ("depth_50_scale_600", "600"), ("depth_101_scale_600", "101")]
    write_manifest(tmp_path, "table1e", [(name, 0, folder) for name, folder in points])
    write_manifest(tmp_path, "table2", [("resnet101", 0, "best")])
    sections = by_name(tmp_path)
    header = sections["table1e"].header
    rows = {row[0].text + " " + row[1].text: [c.text for c in row] for row in sections["table1e"].rows}
    row_of = {name: dict(zip(header, row, strict=True)) for name, row in rows.items()}
    assert not any("ours (test-dev)" in name or name == "Δ AP, ours − paper (test-dev)" for name in header)
    delta = "Δ AP, ours − paper"
    assert {name: row[delta] for name, row in row_of.items() if row[delta]} == {"50 600": "−4.0", "101 600": "−6.0"}
    assert row_of["50 600"]["AP, paper (test-dev)"] == "34.3" and row_of["50 600"]["AP, paper (minival)"] == "34.0"
    assert row_of["50 400"]["AP, paper (test-dev)"] == "30.5" and row_of["50 400"]["AP, paper (minival)"] == ""
    assert delta not in sections["table2"].header


def test_runs_of_the_papers_config_have_no_difference_across_splits(tmp_path: Path) -> None:
    for folder, scale in (("a", (800, 1333)), ("b", (600, 1000))):
        config = override(COCO, {"data.short_side": scale[0], "data.long_side": scale[1]})
        write_run(tmp_path / folder, 35.0, steps=config.training.steps, config=config)
    points = [("depth_50_scale_800", 0, "a"), ("depth_50_scale_600", 0, "b")]
    write_manifest(tmp_path, "table1e", points, base=PAPER)
    section = by_name(tmp_path)["table1e"]
    ours = [section.header.index(f"{m}, ours (instances_val2017)") for m in ("AP50", "APs")]
    texts = {row[1].text: [row[i].text for i in ours] for row in section.rows if row[0].text == "50"}
    assert texts["800"] == ["35.0", "35.0"]
    assert texts["600"] == ["35.0 (−17.5)", "35.0"], "52.5 is Table 1b's on minival; sizes are on test-dev alone"


@pytest.mark.parametrize(
    "scores",
    [{"AP": 0.352, "AP_50": 0.55, "AP_small": 0.2, "AR_max_1": 0.3}, {"AP": 0.352, "AP50": 0.55, "APs": 0.2}],
)
def test_the_servers_scores_are_compared_on_test_dev(tmp_path: Path, scores: dict[str, float]) -> None:
    write_run(tmp_path / "run", 30.0)
    write_run(tmp_path / "other", 29.0)
    (tmp_path / "run" / "evaluation" / "test_dev.json").write_text(json.dumps(scores))
    write_manifest(tmp_path, "table1e", [("depth_50_scale_800", 0, "run"), ("depth_50_scale_700", 0, "other")])
    section = by_name(tmp_path)["table1e"]
    rows = {row[1].text: dict(zip(section.header, row, strict=True)) for row in section.rows if row[0].text == "50"}
    row = {name: cell.text for name, cell in rows["800"].items()}
    assert row["AP, ours (test-dev)"] == "35.2" and row["Δ AP, ours − paper (test-dev)"] == "−0.5"
    assert row["AP50, ours (test-dev)"] == "55.0" and row["APs, ours (test-dev)"] == "20.0"
    assert row["AP75, ours (test-dev)"] == "" and row["AP, ours (val of scenes)"] == "30.0"
    assert rows["700"]["AP, ours (test-dev)"].text == "" and rows["800"]["AP, ours (test-dev)"].bold


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (f'{{"AP": {"9" * 5000}}}', "not valid JSON"),
        ('{"AP": 0.3, "AP50": 0.5, "AP_50": 0.4}', "AP50 and AP_50 differ"),
        ("[0.3]", "must hold an object"),
        ('{"AP_50": 0.5}', "AP is missing"),
        ('{"AP": 35.2}', "AP: invalid value 35.2; must be a fraction from 0 to 1"),
        ('{"AP": 0.3, "AP_small": true}', "AP_small: invalid value True"),
    ],
)
def test_a_server_file_that_is_malformed_is_named_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    write_run(tmp_path / "run", 30.0)
    (tmp_path / "run" / "evaluation" / "test_dev.json").write_text(text)
    write_manifest(tmp_path, "table2", [("resnet101", 0, "run")])
    with pytest.raises(ConfigError, match=says) as raised:
        read_sweeps(tmp_path)
    assert "test_dev.json" in str(raised.value) and "\n" not in str(raised.value)


def test_table_2_lists_other_systems_under_their_headings(tmp_path: Path) -> None:
    write_manifest(tmp_path, "table2", [("resnet101", 0, "absent")])
    section = by_name(tmp_path)["table2"]
    assert [row[0].text for row in section.rows if len(row) == 1] == ["Two-stage methods", "One-stage methods"]
    rows = table(section)
    assert rows["YOLOv2"]["AP, paper (test-dev)"] == "21.6" and rows["YOLOv2"]["AP, ours (val)"] == ""
    ours = section.header.index("AP, ours (val)")
    assert [row[ours].text for row in section.rows[-2:]] == ["not run", "not run"]


def test_a_users_sweep_has_no_column_of_the_paper(sweeps: Path) -> None:
    section = by_name(sweeps)["mine"]
    assert not any("paper" in name for name in section.header)
    assert table(section)["other"]["AP, ours (val of scenes)"] == "28.0"
    assert by_name(sweeps).keys() == {"table1b", "table3", "mine"}
    assert list(by_name(sweeps)) == ["table1b", "table3", "mine"], "the paper's first, in its order"


def test_a_run_that_two_sweeps_share_is_one_result(sweeps: Path) -> None:
    found = {sweep.name: sweep for sweep in read_sweeps(sweeps)}
    assert found["table1b"].seeds("gamma_0.0")[0].result is found["table3"].seeds("cross_entropy")[0].result
    assert table(by_name(sweeps)["table3"])["CE"]["AP, ours (val of scenes)"] == "28.0"


def test_undefined_and_missing_scores_are_described(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 30.0)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    unscored = json.dumps({**summary, "evaluation": None})
    summary["evaluation"]["AP"] = None
    (tmp_path / "run/summary.json").write_text(json.dumps(summary))
    write_run(tmp_path / "blind", 30.0, config=override(SCENES, {"training.eval_every": -1}))
    write_run(tmp_path / "killed", 30.0)
    for name in ("blind", "killed"):
        (tmp_path / name / "summary.json").write_text(unscored)
    write_manifest(
        tmp_path, "table3", [("focal", 0, "run"), ("cross_entropy", 0, "blind"), ("focal_star_2.0_1.0", 0, "killed")]
    )
    rows = table(by_name(tmp_path)["table3"])
    assert rows["FL"]["AP, ours (val of scenes)"] == "AP undefined"
    assert rows["CE"]["AP, ours (val of scenes)"] == "not evaluated", "as its config wants it"
    cells = by_name(tmp_path)["table3"].rows[2]
    assert "running or interrupted at step 100 of 100" in [cell.text for cell in cells], (
        "its evaluation is still to come"
    )


class Tags(HTMLParser):
    """Collects all tags and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_complete_and_escapes_all_text(sweeps: Path) -> None:
    page = to_html(list(by_name(sweeps).values()), f"of {HOSTILE}")
    tags = Tags(page)
    assert tags.open == [], "every tag is closed"
    assert "script" not in {tag for tag, _ in tags.tags}
    assert tags.text.count(HOSTILE) >= 5, "title, heading, point, overrides, legend"
    names = {attribute for _, attributes in tags.tags for attribute in attributes}
    assert not names & {"src", "onclick", "onload"} and "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert '<meta name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_markdown_rows_have_as_many_fields_as_their_heading(sweeps: Path) -> None:
    sections = list(by_name(sweeps).values())
    charts = {(s.name, kind): "x.svg" for s in sections for kind in charts_of(s)}
    lines = to_markdown(sections, "Title", charts).splitlines()
    for section in sections:
        start = next(i for i, line in enumerate(lines) if line.startswith("| " + plain(section.header[0]) + " | "))
        rows = lines[start : start + 2 + len(section.rows)]
        assert {row.replace("\\|", "").count("|") for row in rows} == {len(section.header) + 1}
    assert "<script>" not in "\n".join(lines)


def test_charts_are_xml_with_one_line_per_run_and_one_legend_entry_per_point(sweeps: Path) -> None:
    charts = charts_of(by_name(sweeps)["table1b"])
    assert set(charts) == {"ap", "loss"}
    root = ElementTree.fromstring(charts["ap"])
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("gamma_2.0") == 1, "three seeds, one name"
    lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    # gamma_2.0 three times, gamma_0.0, gamma_1.0, gamma_5.0, gamma_0.2 twice (one seed did not run), gamma_9.0
    assert len(lines) == 9
    box = [float(n) for n in root.attrib["viewBox"].split()]
    for line in lines:
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= box[2] and 0 <= y <= box[3]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
@settings(deadline=None, max_examples=100)
def test_ticks_are_a_few_numbers_inside_their_range(low: float, length: float) -> None:
    found = ticks(low, low + length)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-6 * length <= tick <= low + length * (1 + 1e-6) for tick in found)


def test_log_ticks_are_round_numbers() -> None:
    assert log_ticks(-1.0, 1.0) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10])
    assert log_ticks(-3.0, 1.0) == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert log_ticks(-0.5, 0.1) == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.2]), (
        "a short range has round numbers all the same"
    )


def test_an_empty_chart_is_refused_and_a_constant_one_is_drawn() -> None:
    with pytest.raises(ValueError):
        line_chart([("a", [(0.0, 0.0)])], "x", "y", log_y=True)
    ElementTree.fromstring(line_chart([("a", [(5.0, 0.0), (5.0, 0.0)])], "x", "y"))


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=900))
@settings(deadline=None, max_examples=30)
def test_smoothing_stays_in_range_and_keeps_the_last_step(values: list[float]) -> None:
    points = smoothed([(float(i), value) for i, value in enumerate(values)])
    assert len(points) <= 201 and points[-1] == (len(values) - 1, values[-1])
    assert all(min(values) - 1e-9 <= y <= max(values) + 1e-9 for _, y in points)


def test_smoothing_does_not_change_a_straight_line() -> None:
    line = [(float(i), 2.0 * i + 1) for i in range(100)]
    np.testing.assert_allclose(smoothed(line), line, rtol=1e-12)


def test_differences_are_signed_and_zero_has_no_sign() -> None:
    assert [signed(d) for d in (1.26, -0.31, 0.04, -0.04)] == ["+1.3", "−0.3", "0.0", "0.0"]


def broken(folder: Path, file: str, text: str) -> str:
    (folder / file).write_text(text)
    with pytest.raises(ConfigError) as error:
        build_report(read_sweeps(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("sweeps/table1b.json", "{", ""),
        ("sweeps/table1b.json", "[]", ""),
        ("sweeps/table1b.json", '{"sweep": "table1b", "file": "x", "base": "y", "overrides": {}}', "points"),
        (
            "sweeps/table1b.json",
            '{"sweep": "other", "file": "x", "base": "y", "overrides": {}, "points": []}',
            "sweep is 'other'",
        ),
        (
            "sweeps/table1b.json",
            '{"sweep": "table1b", "file": "x", "base": "y", "overrides": {}, '
            '"points": [{"name": 5, "overrides": {}, "seed": 0, "folder": "ce"}]}',
            "name",
        ),
        ("ce/metrics.jsonl", "[]\n{}\n", "line 1"),
        ("ce/summary.json", '{"steps": 100, "seconds": "long", "evaluation": null}', "seconds"),
        (
            "ce/summary.json",
            '{"steps": 100, "seconds": 1, "parameters_sha256": "", "evaluation": {"AP": "high"}}',
            "evaluation.AP",
        ),
        ("ce/summary.json", '{"steps": 100, "seconds": 1, "evaluation": {"AP": 0.1, "AP50": "x"}}', "evaluation.AP50"),
        ("ce/config.json", '{"config": {"loss": {"gama": 1}}, "class_names": [], "category_ids": []}', "gama"),
        ("ce/metrics.jsonl", "{\n{}\n", "line 1"),
        ("bad/diverged.json", '{"step": "ten"}', "step"),
        ("ce/latency.json", '{"milliseconds": 1.0}', "hardware"),
    ],
)
def test_a_damaged_file_ends_in_one_line_that_names_it(sweeps: Path, file: str, text: str, says: str) -> None:
    message = broken(sweeps, file, text)
    assert file in message and says in message


@pytest.mark.parametrize("folder", ["../elsewhere", "/etc", "", ".."])
def test_a_manifest_cannot_name_a_folder_elsewhere(tmp_path: Path, folder: str) -> None:
    write_manifest(tmp_path, "table3", [("focal", 0, folder)])
    with pytest.raises(ConfigError, match=r"points\[0\].folder"):
        read_sweeps(tmp_path)


def test_an_unfinished_last_line_is_not_an_error(sweeps: Path) -> None:
    with (sweeps / "going/metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "eve')
    assert table(by_name(sweeps)["table1b"])["5.0"]["AP, ours (val of scenes)"].startswith(
        "running or interrupted at step 30"
    )


def test_a_single_run_or_an_empty_folder_is_refused_in_one_line(sweeps: Path) -> None:
    with pytest.raises(ConfigError, match=r"ce: .* single run"):
        read_sweeps(sweeps / "ce")
    with pytest.raises(ConfigError, match="no sweep there"):
        read_sweeps(sweeps / "sweeps")


def test_the_script_writes_both_files_and_prints_their_names(sweeps: Path) -> None:
    done = processes.run("report", "--workdir", sweeps)
    assert done.returncode == 0, done.stderr
    assert (
        "table1b: 4 of 8 rows have an AP; best gamma_2.0 31.0 ± 1.0 (paper: gamma_2.0 34.0 on minival)" in done.stdout
    )
    assert f"{sweeps / 'report'}.md" in done.stdout
    markdown, page = (sweeps / "report.md").read_text(), (sweeps / "report.html").read_text()
    assert "Table 1b" in markdown and "Table 1b" in page
    assert "](report_table1b_ap.svg)" in markdown and (sweeps / "report_table1b_ap.svg").is_file()


def test_the_script_ends_in_one_line_if_there_is_nothing_to_report(tmp_path: Path) -> None:
    done = processes.run("report", "--workdir", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no sweep there" in done.stderr
