"""The sweeps of the paper's tables: the settings of every row, on every base, and the runs that tables share."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from retina_jax.config import AnchorConfig, Config, ConfigError, DataConfig, ModelConfig, OptimizerConfig
from retina_jax.config_io import load_config, override
from retina_jax.paper import settings
from retina_jax.sweeps.points import Point, expand, load_sweep

CONFIGS = Path(__file__).parents[2] / "configs"
SWEEPS = sorted(path.stem for path in (CONFIGS / "sweeps").glob("*.py"))
TABLE_1 = ("table1a", "table1b", "table1c", "table1d", "table1e")
PAPER = load_config(CONFIGS / "paper_r50_600.py")
TINY = Config(model=ModelConfig(backbone="resnet18", stage_blocks=(1, 1, 1, 1), base_width=4))
BASES = {
    "paper": PAPER,
    "demo": load_config(CONFIGS / "demo.py"),
    "own_data": load_config(CONFIGS / "own_data.py"),
    "tiny": TINY,
} | ({"mini": load_config(CONFIGS / "mini.py")} if (CONFIGS / "mini.py").exists() else {})


@cache
def points(sweep: str, base: Config = PAPER) -> dict[str, Point]:
    path = CONFIGS / "sweeps" / f"{sweep}.py"
    return {point.name: point for point in expand(path, load_sweep(path), base, (base.seed,))}


def changes(sweep: str, base: Config = PAPER) -> dict[str, dict[str, Any]]:
    return {name: point.overrides for name, point in points(sweep, base).items()}


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("base", BASES)
def test_every_sweep_is_valid_on_every_base(sweep: str, base: str) -> None:
    assert points(sweep, BASES[base])  # expand() validates each


def test_the_recipes_accept_a_base_with_epochs_and_several_short_sides() -> None:
    base = override(BASES["own_data"], {"training.epochs": 12.0, "data.jitter_short_sides": (400, 480)})
    found = points("recipes", base)
    assert found["patience"].config.training.epochs == 24 and found["scale_crop"].config.data.jitter_short_sides == ()
    assert {point.config.training.eval_every for point in found.values()} == {base.training.eval_every}


def test_tables_have_as_many_rows_as_the_papers() -> None:
    rows = {sweep: len(points(sweep)) for sweep in (*TABLE_1, "table2", "table3")}
    assert rows == {"table1a": 7, "table1b": 7, "table1c": 7, "table1d": 10, "table1e": 10, "table2": 2, "table3": 4}


@pytest.mark.parametrize("base", BASES)
def test_table_1_has_41_rows_of_37_runs(base: str) -> None:
    folders = [point.folder for sweep in TABLE_1 for point in points(sweep, BASES[base]).values()]
    assert len(folders) == 41 and len(set(folders)) == 37


@pytest.mark.parametrize("base", BASES)
def test_tables_share_the_expected_runs(base: str) -> None:
    table = {sweep: points(sweep, BASES[base]) for sweep in SWEEPS}

    def folders(*rows: str) -> set[str]:
        return {table[sweep][name].folder for sweep, name in (row.split() for row in rows)}

    assert len(folders("table1a alpha_0.75", "table1b gamma_0.0", "table3 cross_entropy")) == 1
    assert len(folders("table1a alpha_0.50", "section5_1 prior_0.01")) == 1
    assert len(folders("table1d focal", "table1e depth_101_scale_600")) == 1
    default = ("table1b gamma_2.0", "table1c scales_3_ratios_3", "table1e depth_50_scale_600", "table3 focal")
    assert len(folders(*default)) == 1
    assert len(folders("table3 focal_star_2.0_1.0", "fig7 gamma_2.0_beta_1.0")) == 1
    assert len(folders("table3 focal_star_4.0_0.0", "fig7 gamma_4.0_beta_0.0")) == 1


def test_the_default_row_is_the_papers_config_itself() -> None:
    assert points("table1b")["gamma_2.0"].config == PAPER
    assert points("table1c")["scales_3_ratios_3"].config == PAPER
    assert points("table1e")["depth_50_scale_600"].config == PAPER
    assert points("table1c")["scales_3_ratios_3"].config.anchors == AnchorConfig()


def test_table_1a_is_balanced_cross_entropy_by_alpha() -> None:
    made = changes("table1a")
    assert {name: row["loss.alpha"] for name, row in made.items()} == {
        "alpha_0.10": 0.10, "alpha_0.25": 0.25, "alpha_0.50": 0.50, "alpha_0.75": 0.75, "alpha_0.90": 0.90,
        "alpha_0.99": 0.99, "alpha_0.999": 0.999,
    }  # fmt: skip
    assert all(row["loss.kind"] == "balanced_cross_entropy" and len(row) == 2 for row in made.values())


def test_table_1b_has_the_papers_alpha_for_each_gamma() -> None:
    made = changes("table1b")
    assert made.pop("gamma_0.0") == {"loss.kind": "balanced_cross_entropy", "loss.alpha": 0.75}
    assert {name: (row["loss.kind"], row["loss.gamma"], row["loss.alpha"]) for name, row in made.items()} == {
        "gamma_0.1": ("focal", 0.1, 0.75),
        "gamma_0.2": ("focal", 0.2, 0.75),
        "gamma_0.5": ("focal", 0.5, 0.5),
        "gamma_1.0": ("focal", 1.0, 0.25),
        "gamma_2.0": ("focal", 2.0, 0.25),
        "gamma_5.0": ("focal", 5.0, 0.25),
    }


def test_table_1c_is_scales_by_ratios() -> None:
    made = changes("table1c")
    assert list(made) == [
        "scales_1_ratios_1", "scales_2_ratios_1", "scales_3_ratios_1", "scales_1_ratios_3", "scales_2_ratios_3",
        "scales_3_ratios_3", "scales_4_ratios_3",
    ]  # fmt: skip
    one, six = made["scales_1_ratios_1"], made["scales_2_ratios_3"]
    assert (one["anchors.scales"], one["anchors.ratios"]) == ((1.0,), (1.0,))
    assert (six["anchors.scales"], six["anchors.ratios"]) == ((1.0, 2**0.5), (0.5, 1.0, 2.0))
    assert made["scales_4_ratios_3"]["anchors.scales"] == pytest.approx((1, 2**0.25, 2**0.5, 2**0.75))
    for name, row in made.items():
        assert f"scales_{len(row['anchors.scales'])}_ratios_{len(row['anchors.ratios'])}" == name


def test_table_1d_mines_with_cross_entropy_on_resnet_101() -> None:
    made = points("table1d")
    rows = [
        (mining, iou, batch)
        for mining, iou in (("ohem", 0.7), ("ohem", 0.5), ("ohem_1_3", 0.5))
        for batch in (128, 256, 512)
    ]
    assert list(made) == [*(f"{mining}_{batch}_nms_{iou}" for mining, iou, batch in rows), "focal"]
    for (mining, iou, batch), point in zip(rows, made.values(), strict=False):
        assert point.config.model.backbone == "resnet101"
        loss = point.config.loss
        found = (loss.kind, loss.mining, loss.mining_batch, loss.mining_nms_iou)
        assert found == ("cross_entropy", mining, batch, iou)
    assert made["focal"].config == override(PAPER, {"model.backbone": "resnet101"})


def test_table_1e_is_depth_by_scale() -> None:
    made = points("table1e")
    sides = {400: 667, 500: 833, 600: 1000, 700: 1167, 800: 1333}
    assert list(made) == [f"depth_{depth}_scale_{scale}" for depth in (50, 101) for scale in sides]
    for name, point in made.items():
        _, depth, _, scale = name.split("_")
        data = point.config.data
        assert point.config.model.backbone == f"resnet{depth}"
        assert (data.short_side, data.long_side) == (int(scale), sides[int(scale)])


def test_table_2_has_800_pixels_with_jitter_and_1_5_times_the_schedule() -> None:
    made = points("table2")
    for point in made.values():
        config = point.config
        assert (config.data.short_side, config.data.long_side) == (800, 1333)
        assert config.data.jitter_short_sides == (640, 672, 704, 736, 768, 800)
        assert config.training.steps == 135_000 and config.optimizer.boundaries == (90_000, 120_000)
    assert made["resnet101"].config.model == ModelConfig(backbone="resnet101", num_classes=80)
    assert made["resnext101"].config.model == ModelConfig(
        backbone="resnext101_32x8d", stride_position="3x3", num_classes=80
    )


def test_focal_star_has_the_papers_settings_and_alpha() -> None:
    rows = {**changes("table3"), **changes("fig7")}
    stars = {name: row for name, row in rows.items() if row["loss.kind"] == "focal_star"}
    assert len(stars) == 2 + 16
    for name, row in stars.items():
        gamma, beta = (float(word) for word in name.split("_") if word.lstrip("-").replace(".", "").isdigit())
        assert row == {"loss.kind": "focal_star", "loss.gamma": gamma, "loss.star_beta": beta, "loss.alpha": 0.25}


@hypothesis_settings(deadline=None, max_examples=50)
@given(short=st.integers(32, 2000), more=st.integers(0, 2000))
def test_scale_600_is_the_base_itself(short: int, more: int) -> None:
    base = Config(data=DataConfig(short_side=short, long_side=short + more, jitter_short_sides=(short, short - 1)))
    assert override(base, settings.at_scale(base, 600)) == base
    larger = settings.at_scale(base, 800)
    assert abs(larger["data.short_side"] - 4 / 3 * short) <= 0.5
    assert larger["data.short_side"] <= larger["data.long_side"]


def test_the_deeper_network_of_each_backbone() -> None:
    assert settings.deeper(Config()) == {"model.backbone": "resnet101"}
    assert settings.deeper(TINY) == {"model.backbone": "resnet34", "model.stage_blocks": (1, 1, 4, 1)}
    as_50 = Config(model=ModelConfig(stage_blocks=(3, 4, 6, 3)))
    assert settings.deeper(as_50)["model.stage_blocks"] == (3, 4, 23, 3)
    assert settings.resnext(BASES["demo"])["model.stage_blocks"] == (3, 4, 6, 3)
    assert "model.stage_blocks" not in settings.resnext(PAPER)
    with pytest.raises(ConfigError, match=r"model\.backbone: .*resnet101"):
        settings.deeper(Config(model=ModelConfig(backbone="resnet101")))


@pytest.mark.parametrize(
    ("backbone", "weights", "deeper", "resnext"),
    [
        ("resnet18", "resnet18/resnet18.pth", "resnet18/resnet34.pth", "resnet18/resnext101_32x8d.pth"),
        ("resnet50", "torchvision:resnet50", "torchvision:resnet101", "torchvision:resnext101_32x8d"),
        ("resnet50", "detectron:R-50", "detectron:R-101", "detectron:X-101-32x8d"),
        ("resnet50", "imagenet", None, None),
        ("resnet50", "", None, None),
    ],
)  # fmt: skip
def test_the_weight_file_changes_with_the_backbone(
    backbone: str, weights: str, deeper: str | None, resnext: str | None
) -> None:
    base = Config(model=ModelConfig(backbone=backbone, backbone_weights=weights))
    assert settings.deeper(base).get("model.backbone_weights") == deeper
    assert settings.resnext(base).get("model.backbone_weights") == resnext


def test_weights_without_the_backbones_name_are_refused() -> None:
    base = Config(model=ModelConfig(backbone_weights="resnet50/mine.pth"))
    with pytest.raises(ConfigError, match=r"model\.backbone_weights: resnet50/mine\.pth has no resnet50 in its name"):
        settings.deeper(base)


def test_a_longer_schedule_moves_the_boundaries() -> None:
    base = Config(optimizer=OptimizerConfig(boundaries=(800, 1067)))
    assert settings.longer(base, 1.5) == {"training.steps": 135_000, "optimizer.boundaries": (1200, 1600)}
    in_epochs = override(base, {"training.epochs": 12.0, "optimizer.boundary_epochs": (8.0, 11.0)})
    changes = {"training.epochs": 18.0, "optimizer.boundary_epochs": (12.0, 16.5)}
    assert settings.longer(in_epochs, 1.5) == settings.longer(base, 1.5) | changes
    for config, eval_every in ((base, 36_000), (in_epochs, None)):
        runs = load_sweep(CONFIGS / "sweeps" / "long.py").get_sweep(config).values()
        assert [run.get("training.eval_every") for run in runs] == [eval_every, eval_every]


def test_focal_of_gamma_zero_is_written_as_cross_entropy() -> None:
    assert settings.focal(0.0, 0.3) == settings.balanced_cross_entropy(0.3)
