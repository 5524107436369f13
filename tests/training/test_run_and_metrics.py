"""A run's folder and its metrics."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import override
from retina_jax.runs.files import DiskError, read_json
from retina_jax.runs.folder import Clock, Run, read_run, record_fact, training_lock
from retina_jax.runs.record import finish_run, read_metrics
from retina_jax.training.checkpoints import Checkpoints
from retina_jax.training.compilation import COMPILED, LOWERED, TRACED
from retina_jax.training.metrics import Metrics, NonFiniteLoss
from retina_jax.training.opening import open_run

NAMES, IDS = ("cat", "dog"), (3, 7)


def open_and_save(folder: Path, config: Config, **options: int) -> Run:
    """Opens a new run that has a checkpoint: from then on it keeps its config."""
    run = open_run(folder, config, NAMES, IDS, **options)
    (folder / "checkpoints" / "1").mkdir(parents=True)
    return run


def test_config_json_contains_the_resolved_config(tmp_path: Path) -> None:
    config = override(Config(), {"loss.gamma": 5.0})
    open_run(tmp_path / "run", config, NAMES, IDS)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["loss"]["gamma"] == 5.0
    assert saved["class_names"] == ["cat", "dog"] and saved["category_ids"] == [3, 7]
    assert {"jax", "flax", "optax", "orbax-checkpoint", "python"} <= set(saved["versions"])
    assert saved["commit"] is None or len(saved["commit"].removesuffix("+changes")) == 40
    again = read_run(tmp_path / "run")
    assert (again.config, again.class_names, again.category_ids) == (config, NAMES, IDS)


def test_another_config_in_the_same_folder_is_refused_by_field(tmp_path: Path) -> None:
    open_and_save(tmp_path, Config())
    open_run(tmp_path, override(Config(), {"training.steps": 100, "devices": 4}), NAMES, IDS)
    with pytest.raises(ConfigError, match=r"loss.gamma: 2.0 -> 5.0"):
        open_run(tmp_path, override(Config(), {"loss.gamma": 5.0}), NAMES, IDS)
    with pytest.raises(ConfigError, match=r"2 classes \(cat, dog\), the data has 3"):
        open_run(tmp_path, Config(), (*NAMES, "emu"), (3, 7, 8))
    assert read_run(tmp_path).config.training.steps == 100


def test_a_resumed_run_neither_starts_nor_stops_averaging(tmp_path: Path) -> None:
    means = override(Config(), {"optimizer.ema_decay": 0.9})
    for number, (before, after) in enumerate([(Config(), means), (means, Config())]):
        folder = tmp_path / str(number)
        open_and_save(folder, before)
        saved = (folder / "config.json").read_text()
        with pytest.raises(ConfigError, match=r"optimizer.ema_decay .*EMA"):
            open_run(folder, after, NAMES, IDS, allow_changes=["optimizer.ema_decay"])
        assert (folder / "config.json").read_text() == saved


def test_a_fact_of_the_first_start_stays_when_the_run_is_opened_again(tmp_path: Path) -> None:
    record_fact(open_and_save(tmp_path, Config()), "backbone_sha256", "abc")
    run = open_run(tmp_path, override(Config(), {"training.steps": 100}), NAMES, IDS)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["facts"] == {"backbone_sha256": "abc"} and saved["config"]["training"]["steps"] == 100
    assert read_run(tmp_path).config == run.config


def test_two_processes_never_train_in_one_folder(tmp_path: Path) -> None:
    with training_lock(tmp_path), pytest.raises(ConfigError, match="another process"), training_lock(tmp_path):
        pass
    with training_lock(tmp_path):
        pass


def test_the_lock_of_a_run_follows_no_link(tmp_path: Path) -> None:
    with training_lock(tmp_path / "run"):
        (lock,) = [path for path in (tmp_path / "run").iterdir() if "lock" in path.name]
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=re.escape(str(lock))), training_lock(tmp_path / "run"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_that_is_interrupted_keeps_its_folder_until_the_process_ends(tmp_path: Path) -> None:
    script, run, log = tmp_path / "interrupted.py", tmp_path / "run", tmp_path / "log"
    script.write_text(
        "import sys, pathlib, contextlib, time\nfrom retina_jax.runs.folder import training_lock\n"
        "with contextlib.suppress(KeyboardInterrupt), training_lock(pathlib.Path(sys.argv[1])): raise KeyboardInterrupt\n"
        "print('left', flush=True); time.sleep(120)"
    )
    with log.open("w") as file, processes.start(script, run, stdout=file) as process:
        while "left" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        with pytest.raises(ConfigError, match="another process"), training_lock(run):
            pass
        process.kill()
    with training_lock(run):
        pass


def test_a_folder_that_cannot_be_written_or_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file.*cannot be written"):
        open_run(tmp_path / "file", Config(), NAMES, IDS)
    with pytest.raises(ConfigError, match="no run there"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json: is not valid JSON"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/nowhere.json: cannot be read: No such file"):
        read_json(tmp_path / "nowhere.json")


def test_a_change_that_is_asked_for_is_taken_and_noted(tmp_path: Path) -> None:
    open_and_save(tmp_path, Config())
    first = json.loads((tmp_path / "config.json").read_text())
    changed = override(Config(), {"loss.gamma": 5.0, "data.flip": False})
    with pytest.raises(ConfigError, match=r"loss.gamma: 2.0 -> 5.0 .*--allow-changes loss.gamma"):
        open_run(tmp_path, changed, NAMES, IDS, allow_changes=["data.flip"])
    with pytest.raises(ConfigError, match=r"--allow-changes loss.gama: no such field; did you mean loss.gamma"):
        open_run(tmp_path, changed, NAMES, IDS, allow_changes=["loss.gama"])
    open_run(tmp_path, changed, NAMES, IDS, allow_changes=["loss.gamma", "data.flip"])
    open_run(tmp_path, changed, NAMES, IDS)  # the run has this value now
    saved = json.loads((tmp_path / "config.json").read_text())
    assert [change["field"] for change in saved["changes"]] == ["data.flip: True -> False", "loss.gamma: 2.0 -> 5.0"]
    assert saved["first_start"] == {name: first[name] for name in ("command", "commit", "versions")}


@pytest.mark.parametrize(
    "change",
    [
        {"model.base_width": 32},
        {"model.frozen_stages": 4},
        {"anchors.ratios": (1.0,)},
        {"optimizer.name": "adamw"},
        {"optimizer.clip_norm": 1.0, "loss.gamma": 5.0},
    ],
)
def test_a_change_that_no_checkpoint_fits_is_never_taken(tmp_path: Path, change: dict[str, Any]) -> None:
    """Neither proposed nor accepted: the run would be left with a config that its checkpoints do not have."""
    small = override(Config(), {"model.backbone": "resnet18", "model.base_width": 16, "model.fpn_channels": 16})
    open_and_save(tmp_path, small)
    saved = (tmp_path / "config.json").read_text()
    for allowed in ([], list(change)):
        with pytest.raises(ConfigError, match=rf"{re.escape(next(iter(change)))}: .* use another --workdir$") as caught:
            open_run(tmp_path, override(small, change), NAMES, IDS, allow_changes=allowed)
        assert "--allow-changes" not in str(caught.value) and "loss.gamma" not in str(caught.value)
    assert (tmp_path / "config.json").read_text() == saved


def test_a_change_is_accepted_on_other_devices_than_those_of_the_run(tmp_path: Path) -> None:
    open_and_save(tmp_path, override(Config(), {"devices": 64}))
    changed = override(Config(), {"loss.gamma": 5.0})
    with pytest.raises(ConfigError, match=r"--allow-changes loss\.gamma"):
        open_run(tmp_path, changed, NAMES, IDS)
    open_run(tmp_path, changed, NAMES, IDS, allow_changes=["loss.gamma"])


def test_fields_of_another_source_may_change(tmp_path: Path) -> None:
    open_and_save(tmp_path, Config())
    open_run(tmp_path, override(Config(), {"data.scenes.train_images": 7}), NAMES, IDS)


@pytest.mark.parametrize(("normaliser", "refused"), [("global", False), ("per_device", True), ("ema", True)])
def test_the_number_of_micro_batches_may_change_if_the_loss_does_not_depend_on_it(
    tmp_path: Path, normaliser: str, refused: bool
) -> None:
    config = override(Config(), {"loss.normaliser": normaliser})
    open_and_save(tmp_path, config, num_microbatches=8)
    open_run(tmp_path, override(config, {"training.accumulate": 4, "devices": 2}), NAMES, IDS, num_microbatches=8)
    with (
        pytest.raises(ConfigError, match=r"into 8 .*loss.normaliser.* into 4") if refused else contextlib.nullcontext()
    ):
        open_run(tmp_path, config, NAMES, IDS, num_microbatches=4)


def test_accumulation_changes_what_batch_norm_sees(tmp_path: Path) -> None:
    config = override(Config(), {"model.norm": "batch"})
    open_and_save(tmp_path, config)
    with pytest.raises(ConfigError, match=r"training.accumulate: 1 -> 2"):
        open_run(tmp_path, override(config, {"training.accumulate": 2}), NAMES, IDS)


def test_batch_norm_with_micro_batches_keeps_its_devices(tmp_path: Path) -> None:
    """The images that share statistics are those of one micro-batch of every device."""
    config = override(Config(), {"model.norm": "batch", "training.accumulate": 2})
    open_and_save(tmp_path, config, num_microbatches=8)
    with pytest.raises(ConfigError, match=r"into 8 micro-batches .*model.norm batch.* into 4"):
        open_run(tmp_path, config, NAMES, IDS, num_microbatches=4)


def test_a_run_with_more_steps_than_before_is_not_complete(tmp_path: Path) -> None:
    run = open_run(tmp_path, Config(), NAMES, IDS)
    with Clock(tmp_path, resumed=False) as clock:
        finish_run(run, 90_000, clock.seconds, "sum")
    open_run(tmp_path, Config(), NAMES, IDS)
    assert (tmp_path / "summary.json").exists() and (tmp_path / "seconds.json").exists()
    open_run(tmp_path, override(Config(), {"training.steps": 100_000}), NAMES, IDS)
    assert not (tmp_path / "summary.json").exists()


def step_metrics(
    loss: float, gradient: float = 1.0, parameters: float = 1.0, skipped: int = 0, positives: float = 3.0
) -> dict:
    return {
        "loss": jnp.float32(loss),
        "classification_loss": jnp.float32(loss),
        "box_loss": jnp.float32(0.5),
        "positives_per_image": jnp.float32(positives),
        "learning_rate": jnp.float32(0.01),
        "gradient_norm": jnp.float32(gradient),
        "parameter_norm": jnp.float32(parameters),
        "skipped": jnp.int32(skipped),
    }


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_line_has_the_mean_of_its_window(tmp_path: Path) -> None:
    run = open_run(tmp_path, Config(), NAMES, IDS)
    with Metrics(run, 0) as metrics:
        for step, loss in enumerate((1.0, 2.0, 6.0), start=1):
            metrics.add(step, step_metrics(loss), [step], 0.01)
        metrics.flush()
    (line,) = lines(tmp_path)
    assert line["step"] == 3 and line["loss"] == pytest.approx(3.0) and line["event"] == "train"
    assert line["images_per_second"] > 0 and line["data_wait_percent"] > 0 and line["peak_memory_mib"] > 0
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_the_time_left_leaves_out_what_compiles_after_the_first_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step takes 1 s. The step compiles in the first and the third window, and detection in the evaluation after the
    first one, which takes 7 s more."""
    run, clock = open_run(tmp_path, override(Config(), {"training.steps": 60}), NAMES, IDS), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def compile_for(traced: float, lowered: float, compiled: float) -> None:
        for event, seconds in ((TRACED, traced), (LOWERED, lowered), (COMPILED, compiled)):
            jax.monitoring.record_event_duration_secs(event, seconds)
            clock[0] += seconds

    with Metrics(run, 0) as metrics:
        for step in range(1, 41):
            if step in (1, 25):
                compile_for(20.0, 10.0, 300.0)
            clock[0] += 1.0
            metrics.add(step, step_metrics(1.0), [step], 0.0)
            if step % 10 == 0:
                metrics.flush()
            if step == 10:
                compile_for(5.0, 5.0, 100.0)
                clock[0] += 7.0
                metrics.restart_window()
    # 7 s of the evaluation are in the estimate: 17 s for 10 steps, 27 s for 20, 37 s for 30.
    assert re.findall(r"ETA (\S+)", capsys.readouterr().out) == ["0:01:08", "0:00:40", "0:00:25"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(1.0, []), (16.0, ["a step takes about 16.0 s: 4:25:52 for the 997 steps left"])]
)
def test_slow_steps_are_announced_before_the_first_line_of_metrics(
    seconds: float, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the compilation of another padded shape in the third step."""
    changes = {"training.steps": 1000, "training.log_every": 20}
    run, clock = open_run(tmp_path, override(Config(), changes), NAMES, IDS), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Metrics(run, 0) as metrics:
        for step in range(1, 10):
            compiling = 300.0 if step in (1, 3) else 0.0
            jax.monitoring.record_event_duration_secs(COMPILED, compiling)
            clock[0] += compiling + seconds
            metrics.add(step, step_metrics(1.0), [step], 0.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(";")[0] for line in lines if "a step takes" in line] == said


def test_skipped_steps_are_reported_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps may be skipped and are in no mean; the third ends the run, even with finite steps before it in the
    window."""
    run = open_run(tmp_path, override(Config(), {"training.skip_non_finite": 2}), NAMES, IDS)
    with Metrics(run, 0) as metrics:
        metrics.add(1, step_metrics(2.0), [1], 0.0)
        metrics.add(2, step_metrics(np.nan, skipped=1), [7, 8], 0.0)
        metrics.add(3, step_metrics(4.0, skipped=1), [3], 0.0)
        metrics.flush()
        metrics.add(4, step_metrics(1.0, np.inf, skipped=2), [9], 0.0)
        metrics.flush()
        assert "gradient_norm is inf at step 4, images 9: step skipped (2 of at most 2)" in capsys.readouterr().out
        metrics.add(5, step_metrics(np.nan, skipped=3), [10], 0.0)
        with pytest.raises(
            NonFiniteLoss, match=r"step 5 .*images 10, after 2 skipped steps \(training.skip_non_finite\)"
        ):
            metrics.flush()
    events = [(line["step"], line["event"], line["skipped"]) for line in lines(tmp_path)]
    assert events == [(2, "left_out", 1), (3, "train", 1), (4, "left_out", 2)]
    assert lines(tmp_path)[0]["images"] == [7, 8] and lines(tmp_path)[1]["loss"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("start", "steps", "positive", "warned"),
    [
        (0, 200, None, 1),  # no positive anchor: one warning, after step 50
        (0, 200, 51, 1),  # too late, although in the same window
        (0, 200, 50, 0),
        (30, 200, None, 1),  # a resumed run counts from 0
        (0, 20, None, 1),  # a shorter run
        (190, 200, None, 0),  # the rest of a longer one
    ],
)
def test_a_run_without_a_positive_anchor_in_its_first_steps_gives_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], start: int, steps: int, positive: int | None, warned: int
) -> None:
    run = open_run(tmp_path, override(Config(), {"training.steps": steps}), NAMES, IDS)
    with Metrics(run, start) as metrics:
        for step in range(start + 1, steps + 1):
            metrics.add(step, step_metrics(1.0, positives=float(step == positive)), [step], 0.0)
            if step % 20 == 0:
                metrics.flush()
    assert capsys.readouterr().out.count("no anchor was positive") == warned


def test_resuming_drops_the_lines_that_will_be_written_again(tmp_path: Path) -> None:
    run = open_run(tmp_path, Config(), NAMES, IDS)
    with Metrics(run, 0) as metrics:
        for step in range(1, 6):
            metrics.write(step, {"event": "train", "loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    with Metrics(run, 3) as metrics:
        metrics.write(4, {"event": "train", "loss": 40.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


@pytest.mark.parametrize("damage", ['{"step": Infinity}', "[" * 200_000, '{"step": 1e400}', "\x00" * 50])
def test_a_malformed_line_is_dropped_by_a_resumed_run_and_named_by_a_reader(tmp_path: Path, damage: str) -> None:
    run = open_run(tmp_path, Config(), NAMES, IDS)
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{damage}\n{{"step": 2}}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 2"):
        read_metrics(tmp_path)
    with Metrics(run, 2):
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_start_that_trains_nothing_adds_no_time_and_no_curves(tmp_path: Path) -> None:
    run = open_run(tmp_path, override(Config(), {"training.steps": 2}), NAMES, IDS)
    (tmp_path / "seconds.json").write_text("7.5")
    (tmp_path / "metrics.jsonl").write_text('{"event": "evaluation", "step": 2, "AP": 0.5}\n')
    with Metrics(run, 2) as metrics, Clock(tmp_path, resumed=True, counts=not metrics.is_complete()) as clock:
        assert metrics.is_complete()
    assert clock.seconds == 7.5 and (tmp_path / "seconds.json").read_text() == "7.5"
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("content", ["Infinity", "NaN", "[" * 200_000, "{}", ""])
def test_a_damaged_time_of_a_run_costs_that_time_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "seconds.json").write_text(content)
    assert 0 <= Clock(tmp_path, resumed=True).seconds < 60


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_moved_ends_training_in_one_line(tmp_path: Path, replaced: bool) -> None:
    folder, moved = tmp_path / "run", tmp_path / "moved"
    with Metrics(open_run(folder, Config(), NAMES, IDS), 0) as metrics:
        metrics.write(1, {"event": "train"})
        folder.rename(moved)
        if replaced:
            open_run(folder, Config(), NAMES, IDS)
        with pytest.raises(DiskError, match=f"{folder}: was moved or replaced"):
            metrics.write(2, {"event": "train"})
    assert len(lines(moved)) == 1 and not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("replaced", [False, True])
def test_an_evaluation_and_a_save_make_no_new_folder_for_a_run_that_was_moved(tmp_path: Path, replaced: bool) -> None:
    folder, moved = tmp_path / "run", tmp_path / "moved"
    run = open_run(folder, Config(), NAMES, IDS)
    folder.rename(moved)
    if replaced:
        folder.mkdir()
    with pytest.raises(DiskError, match=f"{folder}: was moved or replaced"):
        run.path("detections", 1)
    if not replaced:
        with (
            pytest.raises(DiskError, match="step 1 could not be saved"),
            Checkpoints(folder / "checkpoints") as checkpoints,
        ):
            checkpoints.save(1, {"x": jnp.zeros(1)})
    assert folder.exists() == replaced and not any(tmp_path.glob("run/*"))


@pytest.mark.parametrize("values", [(np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, 1.0, np.inf)])
def test_a_non_finite_loss_names_step_window_and_images(tmp_path: Path, values: tuple) -> None:
    run = open_run(tmp_path, Config(), NAMES, IDS)
    with Metrics(run, 10) as metrics:
        metrics.add(11, step_metrics(1.0), [100, 101], 0.0)
        metrics.add(12, step_metrics(*values), [102, 103], 0.0)
        metrics.add(13, step_metrics(float("nan")), [104, 105], 0.0)
        with pytest.raises(NonFiniteLoss, match=r"step 12 .*window 11 to 13.*images 102, 103;") as error:
            metrics.flush()
        assert "\n" not in str(error.value) and "checkpoint" not in str(error.value)
        (tmp_path / "checkpoints" / "10").mkdir(parents=True)
        with pytest.raises(NonFiniteLoss, match=f"newest checkpoint in {tmp_path}/checkpoints is from before"):
            metrics.flush()
    assert lines(tmp_path) == [] if (tmp_path / "metrics.jsonl").exists() else True
