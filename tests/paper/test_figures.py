"""The figures agree with the paper, and are computed with the losses that train."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import processes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.figure import Figure

from retina_jax.config import (
    AnchorConfig,
    Config,
    ConfigError,
    DataConfig,
    LossConfig,
    ModelConfig,
    ScenesConfig,
    TrainingConfig,
)
from retina_jax.config_io import load_config, override, to_dict
from retina_jax.console import hardware
from retina_jax.data.datasets import open_source
from retina_jax.data.pipeline import eval_batches
from retina_jax.detector import Detector
from retina_jax.losses.focal import classification_loss
from retina_jax.ops.matching import BACKGROUND, IGNORED
from retina_jax.paper.figures import (
    GAMMAS,
    SELECTED,
    cumulative_loss,
    figure1,
    figure2,
    figure4,
    figure5,
    figure6,
    figure7,
    fl,
    loss_slopes,
    loss_values,
    save,
    share_of_hardest,
    shares_table,
    x_of_p,
)
from retina_jax.paper.measured import (
    Sample,
    StarRun,
    Timed,
    effective_ap,
    finished_run,
    latency,
    random_images,
    run_latency,
    sample_windows,
    speeds,
    star_runs,
    window_x_t,
)
from retina_jax.paper.results import PointResult, Result, SweepResult, read_sweeps
from retina_jax.training.parallel import Driver

ROOT = Path(__file__).parents[2]
X = np.linspace(-5, 5, 201)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# Figures 1, 5, 6: curves.


def test_p_t_of_point_9_has_a_hundredth_and_of_point_968_a_thousandth_of_the_loss() -> None:
    p_t = np.array([0.9, 1 - 10**-1.5])
    ratio = loss_values(SELECTED["CE"], x_of_p(p_t)) / loss_values(fl(2.0), x_of_p(p_t))
    np.testing.assert_allclose(ratio, [100, 1000], rtol=1e-4)
    assert p_t[1] == pytest.approx(0.968, abs=5e-4)


def test_misclassified_examples_lose_at_most_a_factor_of_4() -> None:
    p_t = np.linspace(0.001, 0.5, 100)
    ratio = loss_values(SELECTED["CE"], x_of_p(p_t)) / loss_values(fl(2.0), x_of_p(p_t))
    assert ratio.max() == pytest.approx(4, rel=1e-5) and ratio.argmax() == 99


def test_curves_are_the_papers_equations() -> None:
    p_t = sigmoid(X)
    expected = {
        "CE": -np.log(p_t),
        "FL γ = 2": -((1 - p_t) ** 2) * np.log(p_t),
        "FL* γ = 2, β = 1": -np.log(sigmoid(2 * X + 1)) / 2,
        "FL* γ = 4, β = 0": -np.log(sigmoid(4 * X)) / 4,
    }
    assert expected.keys() == SELECTED.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(loss_values(SELECTED[name], X), values, rtol=2e-5, atol=1e-9, err_msg=name)


def test_derivatives_are_equations_9_to_11() -> None:
    p_t = sigmoid(X)
    expected = {
        "CE": p_t - 1,
        "FL γ = 2": (1 - p_t) ** 2 * (2 * p_t * np.log(p_t) + p_t - 1),
        "FL* γ = 2, β = 1": sigmoid(2 * X + 1) - 1,
        "FL* γ = 4, β = 0": sigmoid(4 * X) - 1,
    }
    for name, slopes in expected.items():
        np.testing.assert_allclose(loss_slopes(SELECTED[name], X), slopes, rtol=2e-5, atol=1e-7, err_msg=name)


def test_derivatives_of_the_focal_losses_are_small_as_soon_as_x_t_is_positive() -> None:
    at_one = {name: abs(float(loss_slopes(loss, np.array([1.0]))[0])) for name, loss in SELECTED.items()}
    assert at_one.pop("CE") > 0.25 and max(at_one.values()) < 0.06


def lines(figure: Figure, panel: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    return [line.get_data() for line in figure.axes[panel].lines]


def test_figure_1_is_lower_the_larger_gamma_and_meets_cross_entropy_at_0() -> None:
    curves = [y for _, y in lines(figure1())]
    assert len(curves) == 5
    for above, below in itertools.pairwise(curves):
        assert (below <= above).all() and below[400] < above[400]
    p_t = lines(figure1())[0][0]
    np.testing.assert_allclose(curves[0], -np.log(p_t), rtol=1e-4)


def test_figures_5_and_6_draw_four_losses_over_x_t_from_minus_5_to_5() -> None:
    for figure in (figure5(), figure6()):
        drawn = lines(figure)
        assert len(drawn) == 4 and drawn[0][0][[0, -1]].tolist() == [-5, 5]
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == list(SELECTED)
    np.testing.assert_allclose(lines(figure6())[0][1], sigmoid(lines(figure6())[0][0]) - 1, rtol=1e-4, atol=1e-6)


# Figure 7.


Outcome = float | str | None


def star_sweep(
    aps: dict[tuple[float, float], Outcome | list[Outcome]], name: str = "fig7", base: str = "mini.py"
) -> SweepResult:
    """Writes a sweep with AP in percent by (gamma, beta); "diverged", or None if it was not run. A list has one entry
    per seed."""
    points = []
    for (gamma, beta), outcomes in aps.items():
        for seed, ap in enumerate(outcomes if isinstance(outcomes, list) else [outcomes]):
            loss = {"loss.kind": "focal_star", "loss.gamma": gamma, "loss.star_beta": beta}
            config = (
                override(load_config(ROOT / base) if base.startswith("configs") else Config(), loss) if ap else None
            )
            status = "finished" if isinstance(ap, float) else "diverged" if ap else "not run"
            result = Result(Path("run"), status, scores={"AP": ap} if isinstance(ap, float) else {}, config=config)
            overrides = {"loss.gamma": gamma, "loss.star_beta": beta}
            points.append(PointResult(f"gamma_{gamma}_beta_{beta}", overrides, seed, result))
    return SweepResult(name, "x.py", base, tuple(points))


def test_effective_settings_are_blue_and_those_at_the_threshold_are_not() -> None:
    figure = figure7([StarRun(2.0, 1.0, 34.0), StarRun(1.0, 0.0, 33.5), StarRun(4.0, 0.0, None)], 33.5, not_run=2)
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert len(drawn) == 3 and len({line.get_color() for line in drawn}) == 2
    (blue,) = [line for line in drawn if line.get_color() == "#0072B2"]
    np.testing.assert_allclose(blue.get_ydata(), -np.log(sigmoid(2 * blue.get_xdata() + 1)) / 2, rtol=1e-4)
    assert "3 settings" in figure.axes[0].get_title() and "2 without a result" in figure.axes[0].get_title()


def test_settings_that_were_not_run_are_counted_and_diverged_ones_drawn() -> None:
    sweep = star_sweep({(2.0, 1.0): 34.0, (4.0, 0.0): "diverged", (1.0, 0.0): None})
    assert star_runs([sweep]) == ([StarRun(2.0, 1.0, 34.0), StarRun(4.0, 0.0, None)], 1)


def test_a_setting_of_which_a_seed_diverged_is_not_effective() -> None:
    runs, left_out = star_runs([star_sweep({(2.0, 1.0): [34.0, 35.0, None], (4.0, 0.0): [36.0, "diverged", 36.0]})])
    assert runs == [StarRun(2.0, 1.0, 34.5), StarRun(4.0, 0.0, None)] and left_out == 0
    assert effective_ap([star_sweep({(2.0, 1.0): [30.0, 31.0], (4.0, 0.0): [36.0, "diverged"]})]) == 30.0


def test_a_sweep_without_a_finished_run_is_refused() -> None:
    for outcome in (None, "diverged", [30.0, "diverged"]):
        with pytest.raises(ConfigError, match="fig7"):
            star_runs([star_sweep({(2.0, 1.0): outcome, (4.0, 0.0): "diverged"})])
    with pytest.raises(ConfigError, match="no sweep fig7"):
        star_runs([star_sweep({(2.0, 1.0): 30.0}, name="mine")])


def test_effective_is_the_papers_threshold_for_its_config_else_half_a_point_below_the_focal_loss_or_the_best() -> None:
    runs = {(2.0, 1.0): 20.0, (4.0, 0.0): 22.0}
    assert effective_ap([star_sweep(runs, base="configs/paper_ablations.py")]) == 33.5
    mini = star_sweep(runs)
    assert effective_ap([mini]) == 21.5
    focal = PointResult("focal", {}, 0, Result(Path("run"), "finished", scores={"AP": 21.0}))
    assert effective_ap([mini, SweepResult("table3", "x.py", "mini.py", (focal,))]) == 20.5


# Figure 2.


def test_the_papers_speeds_form_two_curves_among_the_other_systems() -> None:
    figure = figure2()
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["other systems", "RetinaNet-50", "RetinaNet-101"]
    x, y = lines(figure)[2]
    assert list(x) == [81, 90, 122, 154, 198] and list(y) == [31.9, 34.4, 36.0, 37.1, 37.8]
    others = dict(
        zip([text.get_text() for text in figure.axes[0].texts][:7], zip(*lines(figure)[0], strict=True), strict=True)
    )
    assert others["YOLOv2"] == (25, 21.6) and others["R-FCN (time extrapolated)"] == (85, 29.9)
    assert others["FPN FRCN"] == (172, 36.2)
    assert [text.get_text() for text in figure.axes[0].texts][7:12] == ["400", "500", "600", "700", "800"]


def test_own_speeds_have_a_separate_panel_that_names_hardware_and_split() -> None:
    figure = figure2([Timed("50", "resnet18", "128", 3.0, 40.0)], "a CPU, 2 cores", "val of scenes")
    assert len(figure.axes) == 2
    assert "a CPU, 2 cores" in figure.axes[1].get_xlabel() and "val of scenes" in figure.axes[1].get_ylabel()
    assert "M40" in figure.axes[0].get_xlabel() and "test-dev" in figure.axes[0].get_ylabel()


# Figure 4.

# Few lengths, since each is a program to compile.
LOGITS = st.sampled_from((1, 7, 60)).flatmap(
    lambda length: hnp.arrays(np.float32, length, elements=st.floats(-15, 15, width=32))
)


@given(LOGITS, st.sampled_from(GAMMAS))
@settings(deadline=None, max_examples=40)
def test_the_cumulative_loss_rises_ever_steeper_and_ends_at_1(x_t: np.ndarray, gamma: float) -> None:
    cumulative = cumulative_loss(x_t, gamma)
    steps = np.diff(np.concatenate([[0.0], cumulative]))
    assert cumulative[-1] == 1.0 and (steps >= 0).all()
    assert (np.diff(steps) >= -1e-12).all(), "sorted from the lowest loss to the highest"


@given(LOGITS)
@settings(deadline=None, max_examples=40)
def test_gamma_0_distributes_the_cross_entropy(x_t: np.ndarray) -> None:
    losses = np.sort(np.logaddexp(0, -x_t.astype(np.float64)))
    np.testing.assert_allclose(cumulative_loss(x_t, 0.0), np.cumsum(losses) / losses.sum(), rtol=1e-5)


@given(LOGITS, st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=40)
def test_the_loss_concentrates_on_the_hardest_as_gamma_grows(x_t: np.ndarray, fraction: float) -> None:
    shares = [share_of_hardest(cumulative_loss(x_t, gamma), fraction) for gamma in GAMMAS]
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(shares))
    assert shares[0] >= fraction - 1e-6


def test_shares_of_equal_samples_are_their_number_and_of_one_hard_one_nearly_all() -> None:
    assert share_of_hardest(cumulative_loss(np.zeros(10, np.float32), 2.0), 0.2) == pytest.approx(0.2)
    x_t = np.concatenate([np.full(99, 8.0), [-8.0]]).astype(np.float32)
    assert share_of_hardest(cumulative_loss(x_t, 2.0), 0.01) > 0.999999
    assert share_of_hardest(cumulative_loss(x_t, 0.0), 1.0) == 1.0


def test_easy_negatives_keep_their_loss_where_p_t_rounds_to_1() -> None:
    cumulative = cumulative_loss(np.array([20.0, 20.0], np.float32), 2.0)
    np.testing.assert_allclose(cumulative, [0.5, 1.0])


def test_samples_without_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples is 0"):
        cumulative_loss(np.full(3, 90.0, np.float32), 2.0)
    with pytest.raises(ValueError, match="0 samples is 0"):
        cumulative_loss(np.zeros(0, np.float32), 0.0)


def test_a_positive_window_has_the_logit_of_its_class_and_a_negative_one_the_largest() -> None:
    logits = jnp.array([[[1.0, -2.0], [0.5, 3.0], [4.0, 5.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    labels = jnp.array([[1, BACKGROUND, IGNORED], [0, 0, BACKGROUND]])
    x_t, positive, negative = window_x_t(logits, labels, jnp.array([True, False]))
    assert x_t[positive].tolist() == [-2.0] and x_t[negative].tolist() == [-3.0]


def test_a_sample_keeps_everything_up_to_its_maximum_size() -> None:
    sample = Sample(100)
    for start in range(0, 90, 30):
        sample.add(np.arange(start, start + 30, dtype=np.float32))
    assert sorted(sample.values()) == list(range(90))
    for start in range(90, 1000, 70):
        sample.add(np.arange(start, start + 70, dtype=np.float32))
    assert len(set(sample.values().tolist())) == 100


def test_a_sample_is_uniform_over_the_stream_and_the_same_for_a_seed() -> None:
    def drawn(seed: int) -> np.ndarray:
        sample = Sample(2000, seed)
        for block in np.arange(20_000, dtype=np.float32).reshape(20, 1000):
            sample.add(block)
        return sample.values()

    np.testing.assert_array_equal(drawn(3), drawn(3))
    counts, _ = np.histogram(drawn(3), bins=10, range=(0, 20_000))
    # Of 2000 in 10 equal parts each has 200 in the mean, with a standard deviation of 12.7.
    assert counts.min() > 145 and counts.max() < 255


def test_figure_4_has_one_curve_per_gamma_that_ends_at_1() -> None:
    samples = {
        "positives": np.linspace(-3, 3, 50, dtype=np.float32),
        "negatives": np.linspace(0, 9, 99, dtype=np.float32),
    }
    figure = figure4(samples, "mini/base, step 1200, AP 42.2 on val of $cenes$")
    assert figure.get_suptitle() == r"mini/base, step 1200, AP 42.2 on val of \$cenes\$"
    for panel in (0, 1):
        drawn = lines(figure, panel)
        assert len(drawn) == 4 and all(y[0] == 0 and y[-1] == 1 and (np.diff(y) >= 0).all() for _, y in drawn)
    table = shares_table(samples)
    assert "of 50 positives" in table and table.count("gamma 2") == 2


# Figures that need a network.


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """Returns an untrained detector with random weights."""
    scenes = ScenesConfig(str(tmp_path_factory.mktemp("scenes")), train_images=2, val_images=6, size=64, max_side=30.0)
    config = Config(
        data=DataConfig(source="scenes", scenes=scenes, batch_size=2, short_side=64, long_side=64, max_boxes=8),
        model=ModelConfig(
            backbone="resnet18", base_width=8, stage_blocks=(1, 1, 1, 1), norm="group", frozen_stages=0, max_level=5,
            fpn_channels=8, head_channels=8, head_convs=1, num_classes=6,
        ),
        anchors=AnchorConfig(size_factor=2.0),
        training=TrainingConfig(steps=1),
        devices=1,
    )  # fmt: skip
    driver = Driver(config, 6)
    return Detector(driver, driver.init_state().variables, tuple("abcdef"), tuple(range(6)))


def test_windows_are_the_anchors_that_training_matches(detector: Detector) -> None:
    source = open_source(detector.config.data, "val")
    positives, negatives = sample_windows(detector, eval_batches(source, detector.config.data, batch_size=4))
    boxes = sum(len(record.labels) for record in source.records)
    anchors = 9 * (8 * 8 + 4 * 4 + 2 * 2)
    seen = len(positives.values()), len(negatives.values())
    assert boxes <= seen[0], "the band rule gives small boxes an anchor too, most boxes several"
    assert sum(seen) <= 6 * anchors, "the batch filled up with copies counts once"
    assert seen[1] > 0.9 * 6 * anchors
    # An untrained head predicts about pi = .01 everywhere.
    assert sigmoid(positives.values()).mean() == pytest.approx(0.01, abs=0.01)
    assert sigmoid(negatives.values()).mean() == pytest.approx(0.99, abs=0.01)


def test_random_images_are_a_seeded_choice_that_reads_its_own_files(detector: Detector) -> None:
    source = open_source(detector.config.data, "val")
    chosen = {seed: random_images(source, 3, seed) for seed in range(8)}
    ids = {seed: tuple(record.image_id for record in some.records) for seed, some in chosen.items()}
    assert ids[0] == tuple(record.image_id for record in random_images(source, 3, 0).records)
    assert len(set(ids.values())) > 1 and all(len(set(found)) == 3 for found in ids.values())
    assert set().union(*ids.values()) == {record.image_id for record in source.records}, "none is left out for good"
    place_of = {record.image_id: place for place, record in enumerate(source.records)}
    for some in chosen.values():
        for place, record in enumerate(some.records):
            assert some.read(place) == source.read(place_of[record.image_id])
    assert len(random_images(source, 99, 0)) == len(source)


def test_latency_is_a_time_of_one_image(detector: Detector) -> None:
    images = [np.zeros((64, 64, 3), np.uint8), np.full((40, 64, 3), 200, np.uint8)]
    assert 0 < latency(detector, images, repeats=2) < 10_000
    assert "cores" in hardware()


def test_figure_4_names_its_run_and_refuses_one_that_is_not_finished(script: Any, tmp_path: Path) -> None:
    report = load(Path(__file__).with_name("test_report.py"))
    for name, ap in (("done", 42.25), ("going", None), ("bad", None)):
        report.write_run(tmp_path / name, ap, steps=100 if ap else 30, class_names=["x"], category_ids=[1])
        for step in (50, 100):
            (tmp_path / name / "checkpoints" / str(step)).mkdir(parents=True)
    (tmp_path / "bad" / "diverged.json").write_text('{"step": 7, "message": "nan"}')
    assert finished_run(tmp_path / "done") == f"{tmp_path.name}/done, step 100, AP 42.2 on val of scenes"
    for name, says in (("going", "running or interrupted at step 30 of 100"), ("bad", "diverged at step 7")):
        with pytest.raises(ConfigError, match=f"{name}: its run is {says}"):
            script(4, workdir=tmp_path / name)


def test_a_latency_is_stored_with_its_hardware_and_measured_again_on_another(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on_eight = override(detector.config, {"devices": 8})
    saved = {"config": to_dict(trained_on_eight), "class_names": [], "category_ids": []}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    measured = []

    def loaded(folder: Path, config: Config, step: str) -> Detector:
        assert config == override(trained_on_eight, {"devices": 1}) and step == "newest"
        return detector

    monkeypatch.setattr("retina_jax.paper.measured.load_detector", loaded)
    monkeypatch.setattr("retina_jax.paper.measured.latency", lambda *_: measured.append(1) or 1.5 * len(measured))
    assert run_latency(tmp_path) == run_latency(tmp_path) == 1.5
    kept = json.loads((tmp_path / "latency.json").read_text())
    assert kept["hardware"] == hardware() and kept["images"] == 5
    (tmp_path / "latency.json").write_text(json.dumps({**kept, "hardware": "another"}))
    assert run_latency(tmp_path) == 3.0
    (tmp_path / "checkpoints" / "200").mkdir(parents=True)
    assert run_latency(tmp_path) == 4.5, "trained further, it is another detector"


def test_speeds_are_of_the_finished_runs_with_their_backbone_and_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = load(Path(__file__).with_name("test_report.py"))
    config = Config(data=DataConfig(source="scenes", short_side=96), training=TrainingConfig(steps=100))
    report.write_run(tmp_path / "a", 40.0, config=config)
    report.write_run(tmp_path / "b", 42.0, config=config)
    report.write_manifest(
        tmp_path,
        "table1e",
        [("depth_101_scale_400", 0, "a"), ("depth_101_scale_400", 1, "b"), ("depth_50_scale_400", 0, "c")],
    )
    for name in "ab":
        saved = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**saved, "class_names": ["x"], "category_ids": [1]}))
    monkeypatch.setattr("retina_jax.paper.measured.run_latency", lambda folder: {"a": 2.0, "b": 4.0}[folder.name])
    found, where, split = speeds(read_sweeps(tmp_path))
    assert found == [Timed("101", "resnet50", "96", 3.0, 41.0)]
    assert where == hardware() and split == "val of scenes"


# The script.


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> Any:
    """Calls draw() of scripts/figures.py with these options, without the cost of a process."""
    module = load(ROOT / "scripts" / "figures.py")
    return lambda figure, **options: module.draw(module.Arguments(figure, Path("x.png"), **options))


@pytest.mark.parametrize(
    ("number", "suffix"), [(1, ".png"), (1, ".pdf"), (1, ".svg"), (2, ".svg"), (5, ".svg"), (6, ".svg")]
)
def test_figures_are_written_in_every_format(script: Any, number: int, suffix: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / f"figure{suffix}"
    save(script(number), out)
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert out.read_bytes().startswith(begins)


def test_a_figure_of_results_requires_their_folder(script: Any, tmp_path: Path) -> None:
    for number, kind in ((4, "a run"), (7, "sweeps")):
        with pytest.raises(ConfigError, match=kind):
            script(number)
    with pytest.raises(ConfigError, match="no run there"):
        script(4, workdir=tmp_path)
    with pytest.raises(ConfigError, match="no sweep there"):
        script(7, workdir=tmp_path)


def test_an_unknown_suffix_or_an_unwritable_path_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .*x\.gif"):
        save(figure1(), tmp_path / "x.gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*x\.png"):
        save(figure1(), tmp_path / "file" / "x.png")


def test_an_invalid_option_ends_in_one_line() -> None:
    done = processes.run("figures", "--figure", 4, "--out", "x.png", "--negatives", 0)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--negatives" in done.stderr, done.stderr


def test_the_star_curve_is_the_loss_of_training() -> None:
    star = classification_loss(LossConfig(kind="focal_star", gamma=2.0, star_beta=1.0, alpha=1.0))
    logits = jnp.asarray(X, jnp.float32)
    drawn = star(logits[:, None], jnp.zeros(logits.shape, jnp.int32))[:, 0]
    np.testing.assert_array_equal(np.asarray(drawn), loss_values(SELECTED["FL* γ = 2, β = 1"], X))
