"""Sweeps without training: identity, folders, manifests, states, locks, costs, and invalid input."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import runpy
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from retina_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    LossConfig,
    ModelConfig,
    ScenesConfig,
    TrainingConfig,
)
from retina_jax.config_io import flatten, load_config, options, override
from retina_jax.model.summary import forward_flops
from retina_jax.runs.files import exclusive_lock
from retina_jax.sweeps.launchers import _core_slots, _log, _settings
from retina_jax.sweeps.points import (
    Point,
    Task,
    _typed,
    base_file,
    chosen,
    digest,
    distinct,
    expand,
    folder_name,
    load_sweep,
    open_sweep,
    read_manifest,
    tasks_of,
)
from retina_jax.sweeps.status import (
    State,
    listing,
    lock_file,
    mean_padded_area,
    run_point,
    state_of,
    training_pflop,
)
from retina_jax.training.metrics import NonFiniteLoss

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "configs" / "paper_ablations.py"
OWN = '''
"""Two learning rates by two batch sizes."""

BASE = "configs/demo.py"


def get_sweep(base):
    return {
        f"rate_{rate}_batch_{batch}": {"optimizer.learning_rate": rate, "data.batch_size": batch}
        for rate in (0.001, 0.01) for batch in (8, 16)
    }
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def write(own: Path, seeds: tuple[int, ...] = (), base: Config | None = None, base_path: Path = PAPER) -> list[Point]:
    return open_sweep(
        own.parent / "runs", own, load_sweep(own), base_path, base or load_config(base_path), seeds, write=True
    )


# Identity.


HINTS = {
    f"{group}.{name}" if group else name: hint
    for group, kind in {"": Config, "data.scenes": ScenesConfig, **get_type_hints(Config)}.items()
    if dataclasses.is_dataclass(kind)
    for name, hint in get_type_hints(kind).items()
}


def changed(name: str, value: Any) -> Any:
    """Returns another valid value of the field."""
    if get_origin(HINTS[name]) is Literal:
        return next(v for v in get_args(HINTS[name]) if v != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, tuple):
        return (*value, 3.0) if name.startswith(("anchors", "optimizer.boundary_epochs")) else (*value, 3)
    if name == "data.scale_jitter":
        return 0.5, 2.0
    return 7 if value is None else value + "x"


@pytest.mark.parametrize("name", flatten(Config()))
def test_a_field_changes_the_run_only_if_it_changes_the_outcome(name: str) -> None:
    other = override(Config(), {name: changed(name, flatten(Config())[name])})
    assert (digest(other) == digest(Config())) == (options(Config)[name].outcome is False)


def test_the_same_data_at_another_path_is_the_same_run() -> None:
    one = Config(data=DataConfig(train_annotations="a/train.json", val_annotations="a/val.json", train_images="x"))
    two = Config(data=DataConfig(train_annotations="b/c/train.json", val_annotations="val.json", train_images="y"))
    assert digest(one) == digest(two)
    other = Config(data=DataConfig(train_annotations="a/others.json", val_annotations="a/val.json"))
    assert digest(one) != digest(other)


@pytest.mark.parametrize(
    ("value", "default", "typed"), [(5, 2.0, 5.0), ((1, 2), (0.5,), (1.0, 2.0)), (7, 8, 7), ((1,), (), (1,))]
)
def test_an_integer_equals_the_float_of_its_value(value: Any, default: Any, typed: Any) -> None:
    assert repr(_typed(value, default)) == repr(typed)


def test_folder_names_do_not_change() -> None:
    """Existing runs have these names: if they changed, every sweep would start again."""
    base = Config()

    def named(**changes: Any) -> str:
        return folder_name(override(base, {k.replace("__", "."): v for k, v in changes.items()}), base)

    assert named() == "base-4f66c01d"
    assert named(data__buckets=4).endswith("-f66fd119")
    assert named(loss__normaliser="global", data__buckets=4).endswith("-44136fa3")  # the defaults of earlier versions
    assert named(loss__kind="balanced_cross_entropy", loss__alpha=0.75) == (
        "alpha_0.75-kind_balanced_cross_entropy-"
        + digest(Config(loss=LossConfig(kind="balanced_cross_entropy", alpha=0.75)))
    )
    assert named(loss__gamma=5.0, data__buckets=4).endswith("-19d0e749")
    assert named(loss__gamma=5.0, loss__normaliser="global", data__buckets=4).endswith("-ba977d8c")
    assert named(loss__gamma=5.0, seed=1).startswith("gamma_5-seed1-")
    assert named(seed=2).startswith("base-seed2-")
    assert named(model__backbone="resnet101", model__backbone_weights="a/r.pth").startswith("backbone_resnet101-")
    assert named(model__backbone_weights="torchvision:a b/../c:d").startswith("backbone_weights_c_d-")


def test_a_long_name_is_truncated_and_keeps_its_seed() -> None:
    other = override(Config(), {k: changed(k, v) for k, v in flatten(Config()).items() if k.startswith("detection")})
    name = folder_name(dataclasses.replace(other, seed=12), Config())
    assert "-seed12-" in name and len(name) <= 96 + 9
    assert name != folder_name(override(other, {"training.steps": 1, "seed": 12}), Config())


# Sweep files.


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_sweep(base:\n", "line 1: SyntaxError"),
        ("x = 1\n", "there is no function get_sweep"),
        ("import nothing_of_that_name\ndef get_sweep(base): return {}", "line 1: ModuleNotFoundError"),
        ("def get_sweep(base):\n    return {'a': {'loss.gamma': 1 / 0}}", "line 2: ZeroDivisionError"),
        ("def get_sweep(base): return {}", "at least one name"),
        ("def get_sweep(base): return [1]", "must return a dict"),
        ("def get_sweep(base): return {'a': {'loss.gama': 1.0}}", "'a': loss.gama: no such field; did you mean loss.gamma"),
        ("def get_sweep(base): return {'a': {'loss.gamma': -0.5}}", "point 'a': loss.gamma: "),
        ("def get_sweep(base): return {'a': {'loss.gamma': -1.0}}", "point 'a': loss.gamma: "),
        ("def get_sweep(base): return {'a': {'loss': None}}", "point 'a': loss: no such field"),
        ("def get_sweep(base): return {'a': ['loss.gamma']}", "point 'a': must be a dict"),
        ("def get_sweep(base): return {'a': {'seed': 1}}", "--seeds"),
        ("def get_sweep(base): return {1: {}}", "point 1: a point's name"),
        ("def get_sweep(base): return {'a\\nb': {}}", "a point's name"),
    ],
)  # fmt: skip
def test_the_error_for_an_invalid_sweep_file_names_it_in_one_line(own: Path, text: str, says: str) -> None:
    own.write_text(text)
    with pytest.raises(ConfigError) as refused:
        write(own)
    message = str(refused.value)
    assert str(own) in message and says in message and "\n" not in message, message
    assert not list(own.parent.glob("runs/sweeps/*.json"))


def test_a_missing_sweep_file_names_the_others_in_its_folder(own: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.py: .*mine\.py"):
        load_sweep(own.with_name("none.py"))


def test_a_list_in_overrides_is_a_tuple(own: Path) -> None:
    own.write_text("def get_sweep(base): return {'a': {'anchors.scales': [1.0, 1.5]}}")
    (point,) = write(own)
    assert point.config.anchors.scales == (1.0, 1.5)


def test_the_base_is_that_of_the_files_unless_they_disagree(own: Path) -> None:
    bare, other = ModuleType("bare"), ModuleType("other")
    other.BASE = "elsewhere.py"
    assert base_file({own: load_sweep(own)}, PAPER).resolve() == ROOT / "configs" / "demo.py"
    assert base_file({own: bare}, PAPER) == PAPER
    with pytest.raises(ConfigError, match="--base"):
        base_file({own: load_sweep(own), PAPER: other}, PAPER)


# Manifests.


def test_a_manifest_contains_the_complete_sweep(own: Path) -> None:
    base = override(load_config(PAPER), {"training.steps": 12})
    sweep = write(own, (0, 3), base)
    manifest = read_manifest(own.parent / "runs" / "sweeps" / "mine.json")
    assert list(manifest) == ["sweep", "file", "base", "overrides", "points"]
    assert manifest["sweep"] == "mine" and manifest["file"] == str(own)
    assert manifest["base"] == "configs/paper_ablations.py" and manifest["overrides"] == {"training.steps": 12}
    names = ["rate_0.001_batch_8", "rate_0.001_batch_16", "rate_0.01_batch_8", "rate_0.01_batch_16"]
    assert [(p["name"], p["seed"]) for p in manifest["points"]] == [(n, seed) for seed in (0, 3) for n in names]
    assert manifest["points"][0]["overrides"] == {"optimizer.learning_rate": 0.001, "data.batch_size": 8}
    assert manifest["points"][4]["folder"].startswith("batch_size_8-learning_rate_0.001-seed3-")
    assert [p.config.training.steps for p in sweep] == [12] * 8
    assert [p.config.seed for p in sweep] == [0] * 4 + [3] * 4


def test_the_same_call_changes_nothing(own: Path) -> None:
    first = write(own, (0, 1))
    file = own.parent / "runs" / "sweeps" / "mine.json"
    before = file.stat().st_mtime_ns
    assert write(own, (0, 1)) == write(own, (1,)) == write(own) == first
    assert file.stat().st_mtime_ns == before


def test_later_seeds_are_added_and_indices_stay(own: Path) -> None:
    first = tasks_of({"mine": write(own)})
    second = tasks_of({"mine": write(own, (5, 0))})
    assert second[:4] == first and [row.point.seed for row in second] == [0] * 4 + [5] * 4
    assert [row.index for row in tasks_of({"mine": write(own, (7,))})] == list(range(12))


def test_without_write_the_same_points_are_returned_and_nothing_is_written(own: Path) -> None:
    def planned(workdir: Path | None, seeds: tuple[int, ...] = (), base_path: Path = PAPER) -> list[Point]:
        return open_sweep(workdir, own, load_sweep(own), base_path, load_config(base_path), seeds, write=False)

    runs = own.parent / "runs"
    assert planned(None) == planned(runs) and not runs.exists()
    assert write(own, (0, 1)) == planned(runs) == planned(None, (0, 1))
    with pytest.raises(ConfigError, match="differs, base"):
        planned(runs, base_path=ROOT / "configs" / "demo.py")


def test_two_simultaneous_writers_lose_nothing(own: Path) -> None:
    threads = [threading.Thread(target=write, args=(own, (seed,))) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    points = read_manifest(own.parent / "runs" / "sweeps" / "mine.json")["points"]
    assert len(points) == 24 and {p["seed"] for p in points} == set(range(6))
    write(own)  # the manifest is one that this sweep would have written


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("0.01)", "0.02)", "points rate_0.01_batch_8, rate_0.01_batch_16 are gone and points rate_0.02_batch_8"),
        ("(0.001, 0.01)", "(0.001, 0.01, 0.1)", "points rate_0.1_batch_8, rate_0.1_batch_16 are new"),
        ("(0.001, 0.01)", "(0.01, 0.001)", "in another order"),
        ('"data.batch_size": batch', '"data.batch_size": 2 * batch', "point 'rate_0.001_batch_8': overrides:"),
    ],
)
def test_the_error_for_a_changed_sweep_names_the_change(own: Path, old: str, new: str, says: str) -> None:
    write(own)
    own.write_text(OWN.replace(old, new))
    with pytest.raises(ConfigError, match="exists already and differs") as refused:
        write(own)
    assert says in str(refused.value) and "mine.json" in str(refused.value) and "\n" not in str(refused.value)


def test_another_base_is_refused_by_name(own: Path) -> None:
    write(own)
    with pytest.raises(ConfigError, match=r"differs, base: configs/paper_ablations\.py -> configs/demo\.py"):
        write(own, base_path=ROOT / "configs" / "demo.py")
    with pytest.raises(ConfigError, match=r"differs, training\.steps: as the base -> 12; use another --workdir"):
        write(own, base=override(load_config(PAPER), {"training.steps": 12}))


def test_what_changes_no_outcome_may_change(own: Path) -> None:
    first = write(own)
    again = write(own, base=override(load_config(PAPER), {"devices": 2, "training.log_every": 1}))
    assert [p.folder for p in again] == [p.folder for p in first]
    assert again[0].config.devices == 2


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"points": 3}', '{"sweep": 1, "file": 1, "base": 1, "overrides": 1, "points": [{}]}']
)
def test_the_error_for_a_damaged_manifest_names_it(own: Path, text: str) -> None:
    write(own)
    (own.parent / "runs" / "sweeps" / "mine.json").write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.json: .*delete it"):
        write(own)


# Rows.


def sweep_of(name: str, seeds: tuple[int, ...] = (0,), **folders: str) -> dict[str, list[Point]]:
    return {name: [Point(n, {}, seed, f"{f}{seed}", Config(seed=seed)) for seed in seeds for n, f in folders.items()]}


def test_one_sweep_is_indexed_by_its_points() -> None:
    found = tasks_of(sweep_of("t", a="x", b="x", c="y"))
    assert [(row.index, row.labels, row.point.folder) for row in found] == [
        (0, ("a",), "x0"), (1, ("b",), "x0"), (2, ("c",), "y0"),
    ]  # fmt: skip
    assert [row.index for row in distinct(found)] == [0, 2]


def test_several_sweeps_are_indexed_by_their_distinct_runs() -> None:
    found = tasks_of({**sweep_of("t", a="x", b="y"), **sweep_of("u", c="y", d="z")})
    assert [(row.point.folder, row.labels) for row in found] == [
        ("x0", ("t/a",)), ("y0", ("t/b", "u/c")), ("z0", ("u/d",)),
    ]  # fmt: skip
    more = tasks_of({**sweep_of("t", (0, 1), a="x", b="y"), **sweep_of("u", (0, 1), c="y", d="z")})
    assert more[:3] == found and [row.point.folder for row in more[3:]] == ["x1", "y1", "z1"]


def test_more_seeds_of_one_sweep_do_not_change_the_indices_of_another() -> None:
    found = tasks_of({**sweep_of("t", (0,), a="x"), **sweep_of("u", (0, 1), c="y", d="z")})
    more = tasks_of({**sweep_of("t", (0, 2), a="x"), **sweep_of("u", (0, 1), c="y", d="z")})
    assert more[: len(found)] == found and more[-1].point.folder == "x2"


def test_points_are_chosen_by_name_and_seed() -> None:
    found = tasks_of({**sweep_of("t", (0, 1), a="x", b="y"), **sweep_of("u", (0, 1), a="y", d="z")})

    def indices(only: tuple[str, ...], seeds: tuple[int, ...] | None) -> list[int]:
        return [row.index for row in chosen(found, only, seeds)]

    assert indices((), None) == list(range(6)) and indices((), (1,)) == [3, 4, 5]
    assert indices(("a",), (0,)) == [0, 1] and indices(("u/a", "d"), None) == [1, 2, 4, 5]
    with pytest.raises(ConfigError, match="--only e: no such point; there are "):
        chosen(found, ("e",), None)


def test_a_launcher_whose_log_cannot_be_written_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # closing it tries to write again
        monkeypatch.setattr(sys, "stdout", full)
        _log(Task(0, POINT, ("p",)), "started")


# States.


POINT = Point("p", {}, 0, "p-1", Config(training=TrainingConfig(steps=5)))
SUMMARY = {"steps": 5, "seconds": 9.0, "evaluation": {"AP": 0.25}, "images": 0, "parameters_sha256": ""}


def put(workdir: Path, name: str, value: Any) -> None:
    (workdir / "p-1").mkdir(exist_ok=True)
    (workdir / "p-1" / name).write_text(value if isinstance(value, str) else json.dumps(value))


def test_the_states_of_a_point(tmp_path: Path) -> None:
    assert state_of(tmp_path, POINT) == State("waiting")
    put(tmp_path, "config.json", {})
    assert state_of(tmp_path, POINT) == State("interrupted")
    with exclusive_lock(lock_file(tmp_path, "p-1"), timeout=0.0) as locked:
        assert locked and state_of(tmp_path, POINT) == State("running")
    assert state_of(tmp_path, POINT) == State("interrupted")
    put(tmp_path, "summary.json", {**SUMMARY, "steps": 4})
    assert state_of(tmp_path, POINT) == State("interrupted")
    put(tmp_path, "diverged.json", {"step": 3, "message": "loss is nan"})
    assert str(state_of(tmp_path, POINT)) == "diverged at step 3"
    put(tmp_path, "summary.json", SUMMARY)
    assert state_of(tmp_path, POINT) == State("done", ap=0.25, seconds=9.0)
    assert str(state_of(tmp_path, POINT)) == "done, AP 25.0"
    put(tmp_path, "summary.json", {**SUMMARY, "evaluation": None})
    unscored = dataclasses.replace(POINT, config=override(POINT.config, {"training.eval_every": -1}))
    assert str(state_of(tmp_path, unscored)) == "done"
    (tmp_path / "p-1" / "diverged.json").unlink()
    assert state_of(tmp_path, POINT) == State("interrupted")  # it resumes, and is scored


def test_reading_the_state_never_marks_a_point_as_running(tmp_path: Path) -> None:
    with exclusive_lock(lock_file(tmp_path, "p-1")):
        pass
    states: list[str] = []
    looking = [
        threading.Thread(target=lambda: states.extend(state_of(tmp_path, POINT).kind for _ in range(300)))
        for _ in range(3)
    ]
    for thread in looking:
        thread.start()
    for thread in looking:
        thread.join()
    assert states == ["waiting"] * 900


@pytest.mark.parametrize(("name", "text"), [("summary.json", "{"), ("summary.json", "[]"), ("diverged.json", "{}")])
def test_the_error_for_a_damaged_summary_names_it(tmp_path: Path, name: str, text: str) -> None:
    put(tmp_path, name, text)
    with pytest.raises(ConfigError, match=f"p-1/{name}: "):
        state_of(tmp_path, POINT)


def trainer(calls: list[Path], error: Exception | None = None) -> Any:
    def train(config: Config, folder: Path) -> None:
        calls.append(folder)
        put(folder.parent, "config.json", {})
        if error is not None:
            raise error
        put(folder.parent, "summary.json", {**SUMMARY, "steps": config.training.steps})

    return train


def test_a_point_is_trained_once(tmp_path: Path) -> None:
    calls: list[Path] = []
    assert [run_point(tmp_path, POINT, trainer(calls)).kind for _ in range(3)] == ["done"] * 3
    assert calls == [tmp_path / "p-1"]


def test_a_point_that_another_worker_trains_is_skipped(tmp_path: Path) -> None:
    calls: list[Path] = []
    with exclusive_lock(lock_file(tmp_path, "p-1")):
        assert run_point(tmp_path, POINT, trainer(calls)) == State("running")
    assert not calls


def test_a_worker_waits_while_the_state_is_read(tmp_path: Path) -> None:
    """`state_of` holds the lock for an instant; a worker that starts meanwhile waits for it."""
    calls: list[Path] = []
    released = threading.Event()
    with exclusive_lock(lock_file(tmp_path, "p-1")):
        worker = threading.Thread(target=lambda: (run_point(tmp_path, POINT, trainer(calls)), released.set()))
        worker.start()
        assert not released.wait(0.2)
    worker.join()
    assert len(calls) == 1


def test_divergence_is_a_result_and_is_not_retried(tmp_path: Path) -> None:
    calls: list[Path] = []
    diverges = trainer(
        calls, NonFiniteLoss("classification_loss is nan at step 3 (seen in the window 1 to 4), images 7")
    )
    state = run_point(tmp_path, POINT, diverges)
    assert state == State("diverged", step=3) == run_point(tmp_path, POINT, diverges) and len(calls) == 1
    written = json.loads((tmp_path / "p-1" / "diverged.json").read_text())
    assert written["step"] == 3 and written["message"].startswith("classification_loss is nan at step 3")
    (tmp_path / "p-1" / "diverged.json").unlink()
    assert run_point(tmp_path, POINT, trainer(calls)).kind == "done" and len(calls) == 2


def test_other_errors_are_raised_and_retried(tmp_path: Path) -> None:
    calls: list[Path] = []
    with pytest.raises(ConfigError, match="its own"):
        run_point(tmp_path, POINT, trainer(calls, ConfigError("its own")))
    assert state_of(tmp_path, POINT) == State("interrupted")
    assert run_point(tmp_path, POINT, trainer(calls)).kind == "done"


def test_training_that_ends_without_a_summary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"summary\.json"):
        run_point(tmp_path, POINT, lambda config, folder: None)


# What --list shows.


def test_the_mean_padded_area_is_of_the_padded_shapes() -> None:
    assert mean_padded_area(Config()) == 608 * (800 + 928 + 1024) / 3  # and these turned
    assert mean_padded_area(Config(data=DataConfig(short_side=128, long_side=128))) == 128**2


def test_the_cost_is_proportional_to_the_area() -> None:
    model = ModelConfig(backbone="resnet18", base_width=4, fpn_channels=8, head_channels=8, head_convs=1)
    config = Config(model=model)
    one, many = (forward_flops(config, 3, shape) for shape in ((128, 128), (384, 256)))
    assert many == 6 * one


def test_training_costs_three_passes_per_image() -> None:
    model = ModelConfig(backbone="resnet18", base_width=4, fpn_channels=8, head_channels=8, head_convs=1)
    base = Config(model=model, data=DataConfig(short_side=64, long_side=64))
    cost = training_pflop(base)
    assert training_pflop(override(base, {"training.steps": 45_000})) == pytest.approx(cost / 2)
    assert training_pflop(override(base, {"data.batch_size": 32})) == pytest.approx(2 * cost)
    assert (
        training_pflop(override(base, {"model.num_classes": 80}))
        == cost
        > training_pflop(override(base, {"model.num_classes": 3}))
    )


def test_the_list_shows_state_cost_and_sum(tmp_path: Path) -> None:
    model = ModelConfig(backbone="resnet18", base_width=4, fpn_channels=8, head_channels=8, head_convs=1)
    base = Config(model=model, data=DataConfig(short_side=64, long_side=64), training=TrainingConfig(steps=5))
    twice = override(base, {"training.steps": 10})
    points = [
        Point("p", {"loss.gamma": 5.0}, 0, "p-1", base),
        Point("q", {}, 0, "q-2", twice),
        Point("r", {}, 0, "q-2", twice),
    ]
    found = [Task(i, point, (point.name,)) for i, point in enumerate(points)]
    text = listing(tmp_path, found)
    assert "hours" not in text and "2 distinct runs: 2 waiting" in text and "loss.gamma=5" in text
    put(tmp_path, "summary.json", {**SUMMARY, "seconds": 3600.0})
    lines = listing(tmp_path, found).splitlines()
    assert "done, AP 25.0" in lines[1] and " 1.00 " in lines[1] and " ~2.00 " in lines[2] and len(lines) == 5
    assert lines[4].startswith("2 distinct runs: 1 done, 1 waiting") and lines[4].endswith(
        "2.00 hours at the rate of the done points"
    )


# Command line.


def test_early_options_and_the_command_of_a_single_point() -> None:
    script = ROOT / "scripts" / "sweep.py"
    early_options = runpy.run_path(str(script))["early_options"]
    argv = [
        "--sweep",
        "a.py",
        "b.py",
        "--jobs=2",
        "--slurm",
        "x=1",
        "y=2",
        "--loss.star_beta",
        "-1",
        "--seeds",
        "0",
        "1",
    ]
    files, base, command = early_options([*argv, "--only", "p", "q"])
    assert (files, base) == (["a.py", "b.py"], None)
    assert command[1:] == [str(script), "--sweep", "a.py", "b.py", "--loss.star_beta", "-1", "--seeds", "0", "1"]
    files, base, command = early_options(["--base=x.py", "--launcher", "slurm", "--sweep=a.py"])
    assert (files, base, command[1:]) == (["a.py"], "x.py", [str(script), "--sweep", "a.py", "--base", "x.py"])
    with pytest.raises(ConfigError, match="--sweep"):
        early_options(["--sweep", "a.py", "--sweep", "b.py"])


def test_slurm_settings_that_look_like_integers_are_integers() -> None:
    assert _settings(["timeout_min=2880", "slurm_partition=gpu", "slurm_time=1:00"]) == {
        "timeout_min": 2880, "slurm_partition": "gpu", "slurm_time": "1:00",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="--slurm gpu: give KEY=VALUE"):
        _settings(["gpu"])


def test_jobs_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retina_jax.sweeps.launchers.ACCELERATORS", ())
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 2, 3, 5, 7}, raising=False)
    assert _core_slots(2) == [{0, 2}, {3, 5, 7}]
    assert _core_slots(1) == [] and _core_slots(6) == []
    monkeypatch.setattr("retina_jax.sweeps.launchers.ACCELERATORS", ("null",))
    assert _core_slots(2) == []


def test_expand_keeps_the_order_of_the_file(own: Path) -> None:
    module: ModuleType = load_sweep(own)
    names = [point.name for point in expand(own, module, load_config(PAPER), (1, 0))]
    assert names[:4] == list(module.get_sweep(None)) == names[4:]
