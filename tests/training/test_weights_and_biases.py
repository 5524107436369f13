"""Weights & Biases, with a fake of its package: what is sent; its absence or failure gives one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import override
from retina_jax.runs.folder import Run
from retina_jax.training.metrics import Metrics
from retina_jax.training.opening import open_run


class FakeWandb(ModuleType):
    """The functions of wandb 0.31 that are used, with their arguments; the same calls were made offline with the real
    package."""

    class Error(Exception):
        pass

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.started: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.ended: list[int] = []
        self.fails = fails

    def Settings(self, *, console: str, silent: bool) -> tuple[str, bool]:
        return console, silent

    def Image(self, path: str, *, caption: str) -> tuple[str, str]:
        self._fail("image")
        return Path(path).name, caption

    def init(self, **given: Any) -> SimpleNamespace:
        self._fail("init")
        self.started.append(given)
        return SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, values: dict, *, step: int) -> None:
        self._fail("log")
        self.logged.append((step, values))

    def _finish(self, *, exit_code: int) -> None:
        self._fail("finish")
        self.ended.append(exit_code)

    def _fail(self, where: str) -> None:
        if where == self.fails:
            raise self.Error(f"{where}: api_key not configured\n(no-tty)")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def opened(folder: Path, project: str = "cells") -> Run:
    config = override(Config(), {"training.wandb": project, "training.tensorboard": False})
    return open_run(folder, config, ("cat",), (1,))


def test_curves_pictures_and_config_are_sent(tmp_path: Path, wandb: FakeWandb) -> None:
    run = opened(tmp_path)
    run.path("pictures", 20, "_7.png").write_bytes(b"")
    with Metrics(run, 0) as metrics:
        metrics.write(20, {"event": "train", "loss": 0.5, "skipped": 0, "note": "x"})
        metrics.evaluated(20, {"AP": 0.25, "APs": None})
    (started,) = wandb.started
    assert started["project"] == "cells" and started["name"] == tmp_path.name and started["dir"] == str(tmp_path)
    assert started["config"]["loss"]["gamma"] == 2.0 and started["settings"] == ("off", True)
    assert wandb.logged == [
        (20, {"train/loss": 0.5, "train/skipped": 0}),
        (20, {"evaluation/AP": 0.25}),
        (20, {"predictions": [("step_00000020_7.png", "7")]}),
    ]
    assert wandb.ended == [0]


def test_a_resumed_run_continues_the_same_curves(tmp_path: Path, wandb: FakeWandb) -> None:
    for _ in range(2):
        with Metrics(opened(tmp_path), 0):
            (tmp_path / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
    first, second = wandb.started
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert json.loads((tmp_path / "config.json").read_text())["facts"]["wandb_id"] == first["id"]


def test_a_run_that_fails_is_marked_as_failed(tmp_path: Path, wandb: FakeWandb) -> None:
    with pytest.raises(ZeroDivisionError), Metrics(opened(tmp_path), 0):
        _ = 1 / 0
    assert wandb.ended == [1]


def test_without_a_project_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    with Metrics(opened(tmp_path, project=""), 0) as metrics:
        metrics.write(1, {"event": "train", "loss": 0.5})


def test_a_missing_package_or_a_refusal_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"^training\.wandb: cells: pip install 'retina-jax\[wandb\]'"):
        Metrics(opened(tmp_path), 0)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails="init"))
    with pytest.raises(ConfigError, match=r"^training\.wandb: .*: init: api_key not configured \(no-tty\)"):
        Metrics(opened(tmp_path), 0)


@pytest.mark.parametrize("fails", ["log", "image", "finish"])
def test_a_failure_during_the_run_gives_one_warning_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails))
    run = opened(tmp_path)
    run.path("pictures", 3, "_7.png").write_bytes(b"")
    with Metrics(run, 0) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"event": "train", "loss": 0.5})
        metrics.evaluated(3, {"AP": 0.25})
    assert capsys.readouterr().out.count(f"warning: training.wandb: {fails}: api_key not configured") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
