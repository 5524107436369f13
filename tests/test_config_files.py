"""Configs: files, overrides, JSON, validation, and the one-line errors of the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from retina_jax.cli import parse_command_line
from retina_jax.config import Config, ConfigError, LossConfig
from retina_jax.config_io import flatten, from_dict, load_config, options, override, to_dict, training_changes, validate
from retina_jax.runs.folder import config_of

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Arguments:
    workdir: Path
    settings: Annotated[Config, tyro.conf.arg(name="")]


def parse(*argv: str, listed: str = "") -> Config:
    defaults = Arguments(tyro.MISSING, Config())
    return parse_command_line(Arguments, defaults, ("--workdir", "x", *argv), "test", listed).settings


def test_the_defaults_are_those_of_the_paper() -> None:
    c = Config()
    assert (c.data.batch_size, c.data.short_side, c.data.long_side) == (16, 600, 1000)
    assert (c.model.backbone, c.model.prior, c.model.head_convs, c.model.fpn_channels) == ("resnet50", 0.01, 4, 256)
    assert (c.loss.alpha, c.loss.gamma) == (0.25, 2.0)
    assert (c.optimizer.learning_rate, c.optimizer.momentum, c.optimizer.weight_decay) == (0.01, 0.9, 1e-4)
    assert (c.optimizer.boundaries, c.training.steps) == ((60_000, 80_000), 90_000)
    assert (c.detection.score_threshold, c.detection.top_k, c.detection.nms_iou) == (0.05, 1000, 0.5)
    assert (c.matching.positive_iou, c.matching.negative_iou) == (0.5, 0.4)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_file_is_valid_and_documented(path: Path) -> None:
    config = validate(load_config(path))
    assert from_dict(to_dict(config)) == config
    commands = ("python scripts/train.py", "python scripts/sweep.py", "make demo")
    assert any(command in path.read_text() for command in commands)


def help_text(capsys: pytest.CaptureFixture[str], option: str, listed: str = "") -> str:
    with pytest.raises(SystemExit) as end:
        parse(option, listed=listed)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_lists_the_options_of_the_script_and_the_basic_fields(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_text(capsys, "--help").split()
    listed = {name for name in flatten(Config()) if f"--{name.replace('_', '-')}" in shown}
    assert listed == {name for name, known in options(Config).items() if known.basic} and 10 <= len(listed) <= 15
    assert {"--workdir", "--help-all"} <= {word.rstrip(":") for word in shown}


def test_help_lists_only_the_fields_that_a_script_uses(capsys: pytest.CaptureFixture[str]) -> None:
    listed = {"--help": "model.backbone ", "--help-all": "model.backbone seed "}
    for option, names in listed.items():
        shown = help_text(capsys, option, listed=r"model\.backbone$|seed$").split()
        assert {name for name in flatten(Config()) if f"--{name.replace('_', '-')}" in shown} == {*names.split()}
    assert parse("--loss.gamma", "5", listed="seed$").loss.gamma == 5


def test_help_all_documents_every_field_with_its_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_text(capsys, "--help-all")
    words = " ".join(shown.replace("│", " ").split())
    assert "Peak learning rate" in words and "(>= 0) (default: 0.01)" in words and "(px, >= 1) (default: 600)" in words
    for name in flatten(Config()):
        option = f"--{name.replace('_', '-')}"
        assert option in shown
        after = shown[shown.index(option + ("," if f"{option}," in shown else " ")) :].splitlines()[1]
        assert len(after.strip("│ ")) > 8, f"{option} has no help"


def test_overrides_have_the_type_of_their_field() -> None:
    config = parse(
        "--loss.gamma", "5", "--data.batch-size=32", "--data.jitter-short-sides", "640", "800", "--parallel", "pmap"
    )
    assert config.loss.gamma == 5.0 and isinstance(config.loss.gamma, float)
    assert config.data.batch_size == 32
    assert config.data.jitter_short_sides == (640, 800)
    assert config.parallel == "pmap"
    assert parse("--model.num_classes", "7").model.num_classes == 7


@pytest.mark.parametrize("argv", [("--data.no-flip",), ("--data.flip", "False"), ("--data.flip=false",)])
def test_booleans_both_ways(argv: tuple[str, ...]) -> None:
    assert parse(*argv).data.flip is False
    assert parse("--data.flip", "True").data.flip is True
    assert parse("--data.no-flip", "True").data.flip is False
    assert parse("--data.no-flip", "false").data.flip is True


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--loss.gama", "3"), "did you mean loss.gamma"),
        (("--loss.nonsense", "3"), "there are loss.kind, loss.alpha"),
        (("--lozz.gamma", "3"), "loss.gamma"),
        (("--loss.gamma", "abc"), "--loss.gamma"),
        (("--loss.kind", "foo"), "cross_entropy"),
        (("--data.batch-size", "1.5"), "--data.batch-size"),
        (("stray",), "stray"),
    ],
)
def test_the_error_for_an_unknown_option_names_existing_ones(argv: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data.batch_size", 0),
        ("data.short_side", 2000),
        ("data.pad_multiple", 48),
        ("model.prior", 1.0),
        ("model.stage_blocks", (1, 2)),
        ("anchors.scales", ()),
        ("matching.positive_iou", 0.3),
        ("loss.gamma", -1.0),
        ("loss.gamma", float("nan")),
        ("optimizer.boundaries", (80, 60)),
        ("optimizer.learning_rate", float("inf")),
        ("optimizer.ema_decay", 1.0),
        ("detection.tta_short_sides", (600, 0)),
        ("data.jitter_short_sides", (600, 2000)),
        ("data.scenes.max_side", 3.0),
        ("data.scenes.min_side", 60.0),
        ("data.scenes.max_side", 200.0),
        ("model.num_classes", 0),
        ("training.profile_steps", "5:3"),
    ],
)
def test_an_invalid_value_names_its_field(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name) as error:
        validate(override(Config(), {name: value}))
    assert "\n" not in str(error.value)


def test_the_error_for_an_unknown_override_names_existing_fields() -> None:
    with pytest.raises(ConfigError, match=r"loss\.gama: no such field; did you mean loss\.gamma"):
        override(Config(), {"loss.gama": 1.0})


@given(
    gamma=st.floats(0, 100),
    sides=st.lists(st.integers(1, 5000), max_size=4),
    classes=st.none() | st.integers(1, 1000),
)
def test_json_round_trip(gamma: float, sides: list[int], classes: int | None) -> None:
    changes = {"loss.gamma": gamma, "data.jitter_short_sides": tuple(sides), "model.num_classes": classes}
    config = override(Config(), changes)
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(("mining", "read"), [("none", "none"), ("ohem", "ohem"), ("ohem_1_3", "ohem_1_3_strict")])
def test_configs_of_earlier_versions_keep_their_mining(mining: str, read: str) -> None:
    saved = to_dict(override(Config(), {"loss.mining": mining}))
    del saved["loss"]["mining_normaliser"]
    assert from_dict(saved).loss == LossConfig(mining=read, mining_normaliser="assigned")


def test_json_with_a_wrong_field_or_type_is_refused_by_name() -> None:
    saved = to_dict(Config())
    saved["loss"]["gama"] = 1
    with pytest.raises(ConfigError, match=r"run.json: loss.gama"):
        from_dict(saved, "run.json")
    saved = to_dict(Config())
    saved["loss"]["gamma"] = "two"
    with pytest.raises(ConfigError, match=r"loss.gamma: .*'two'.*number"):
        from_dict(saved)


def test_only_fields_that_change_the_computation_are_changes() -> None:
    old = Config()
    assert training_changes(old, override(old, {"training.log_every": 7, "parallel": "pmap", "data.workers": 3})) == []
    assert training_changes(old, override(old, {"loss.gamma": 5.0, "seed": 3})) == [
        "loss.gamma: 2.0 -> 5.0",
        "seed: 0 -> 3",
    ]


def test_config_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.py")
    (tmp_path / "broken.py").write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(ConfigError, match=r"broken.py, line 2: ZeroDivisionError"):
        load_config(tmp_path / "broken.py")
    (tmp_path / "typo.py").write_text("def get_config(:\n")
    with pytest.raises(ConfigError, match=r"typo.py, line 1: SyntaxError"):
        load_config(tmp_path / "typo.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="get_config"):
        load_config(tmp_path / "empty.py")
    (tmp_path / "call.py").write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match=r"call.py, line 2: ZeroDivisionError"):
        load_config(tmp_path / "call.py")
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)
    (tmp_path / "wrong.py").write_text("def get_config(): return {}\n")
    with pytest.raises(ConfigError, match="dict"):
        load_config(tmp_path / "wrong.py")


def test_the_config_option_is_read_before_the_other_options() -> None:
    assert config_of(["--workdir", "x", "--config", str(ROOT / "configs/demo.py")], "absent.py").data.source == "scenes"
    assert config_of([f"--config={ROOT / 'configs/demo.py'}"], "absent.py").data.source == "scenes"
    with pytest.raises(ConfigError):
        config_of([], "absent.py")


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3
