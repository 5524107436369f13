"""The profiler's window contains exactly its steps, however the run ends."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from retina_jax.config import ConfigError
from retina_jax.config_io import parse_window
from retina_jax.training.profiling import Profiler


@jax.jit
def small_step(x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ x)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    yield []
    with pytest.raises(RuntimeError, match="No profile started"):  # every test stops the profiler
        jax.profiler.stop_trace()


def run_steps(profiler: Profiler, first: int, last: int, fail_at: int | None = None) -> None:
    x = small_step(jnp.eye(64))
    with profiler:
        for step in range(first, last + 1):
            profiler.begin(step)
            if step == fail_at:
                raise ZeroDivisionError("a bad image")
            x = small_step(x)
            profiler.end(step, {"x": x})


def events(folder: Path, name: str = "perfetto_trace.json.gz") -> list[dict]:
    (trace,) = folder.glob(f"plugins/profile/*/{name}")
    with gzip.open(trace) as file:
        return json.load(file)["traceEvents"]


def traced_steps(folder: Path) -> list[int]:
    return [int(event["args"]["step_num"]) for event in events(folder) if event.get("name") == "train"]


@pytest.mark.parametrize(
    ("text", "window"), [("", None), ("10:15", (10, 15)), ("10:10", (10, 10)), ("1:1", (1, 1)), ("010:15", (10, 15))]
)
def test_a_window_is_its_first_and_last_step(text: str, window: tuple[int, int] | None) -> None:
    assert parse_window(text) == window


@pytest.mark.parametrize(
    "text", ["15:10", "0:3", "-1:3", "10", "10:", ":15", "10:15:20", "a:b", "10-15", " 10:15", "1.5:2"]
)
def test_an_invalid_window_is_named(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_window(text)
    assert str(caught.value).startswith("training.profile_steps: ") and f"{text!r}; must be FIRST:LAST" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_the_trace_contains_exactly_the_steps_of_the_window(tmp_path: Path, logged: list[str]) -> None:
    run_steps(Profiler(tmp_path, (10, 15), logged.append), 1, 20)
    folder = tmp_path / "profile"
    assert traced_steps(folder) == [10, 11, 12, 13, 14, 15]
    calls = [event for event in events(folder) if event.get("name") == "PjitFunction(small_step)"]
    assert len({event["ts"] for event in calls if event.get("dur", 0) > 0}) >= 6
    (line,) = logged
    assert line.startswith(f"profile of steps 10 to 15: {folder}/plugins/profile/") and "ui.perfetto.dev" in line
    assert Path(line.split(": ", 1)[1].split(" for ")[0]).is_file()
    assert f"tensorboard --logdir {folder}" in line


def test_the_work_of_the_last_step_is_complete(tmp_path: Path, logged: list[str]) -> None:
    """The trace has the device's events of every step of the window, because the profiler waits for them."""
    run_steps(Profiler(tmp_path, (3, 4), logged.append), 1, 6)
    (file,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    names = [
        event.name
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
    ]
    begun = [name for name in names if name.endswith("ExecuteHelperOnSingleDevice")]
    assert names.count("train") == 2 and len(begun) == 2


def test_one_step_is_a_window(tmp_path: Path, logged: list[str]) -> None:
    run_steps(Profiler(tmp_path, (1, 1), logged.append), 1, 3)
    assert traced_steps(tmp_path / "profile") == [1]
    assert logged[0].startswith("profile of step 1: ")


def test_without_a_window_nothing_is_written_or_logged(tmp_path: Path, logged: list[str]) -> None:
    run_steps(Profiler(tmp_path, None, logged.append), 1, 3)
    assert logged == [] and list(tmp_path.iterdir()) == []


def test_a_run_resumed_inside_the_window_traces_the_rest(tmp_path: Path, logged: list[str]) -> None:
    run_steps(Profiler(tmp_path, (10, 15), logged.append), 13, 20)
    assert traced_steps(tmp_path / "profile") == [13, 14, 15]
    assert logged[0].startswith("profile of steps 13 to 15: ")


def test_a_run_resumed_after_the_window_logs_that_once(tmp_path: Path, logged: list[str]) -> None:
    run_steps(Profiler(tmp_path, (10, 15), logged.append), 16, 20)
    assert len(logged) == 1 and re.match(r"warning: training.profile_steps 10:15: .*step 16", logged[0])
    assert not (tmp_path / "profile").exists()


def test_a_run_that_ends_before_the_window_logs_that(tmp_path: Path, logged: list[str]) -> None:
    run_steps(Profiler(tmp_path, (10, 15), logged.append), 1, 9)
    assert len(logged) == 1 and re.match("warning: training.profile_steps 10:15: .*the run ended", logged[0])


def test_a_run_that_ends_inside_the_window_keeps_its_steps(tmp_path: Path, logged: list[str]) -> None:
    run_steps(Profiler(tmp_path, (10, 15), logged.append), 8, 12)
    assert traced_steps(tmp_path / "profile") == [10, 11, 12]
    assert logged[0].startswith("profile of steps 10 to 12, where the run ended: ")


def test_an_exception_inside_the_window_closes_the_trace(tmp_path: Path, logged: list[str]) -> None:
    with pytest.raises(ZeroDivisionError, match="a bad image"):
        run_steps(Profiler(tmp_path, (2, 9), logged.append), 1, 20, fail_at=4)
    assert traced_steps(tmp_path / "profile") == [2, 3, 4]
    assert len(logged) == 1


def test_a_folder_that_cannot_be_created_gives_a_warning_and_the_run_continues(
    tmp_path: Path, logged: list[str]
) -> None:
    (tmp_path / "profile").write_text("in the way")
    run_steps(Profiler(tmp_path, (2, 3), logged.append), 1, 5)
    (line,) = logged
    assert line.startswith("warning: ") and f"{tmp_path / 'profile'} cannot be written: " in line and "\n" not in line


def test_a_trace_that_cannot_be_written_gives_a_warning_and_the_run_continues(
    tmp_path: Path, logged: list[str]
) -> None:
    profiler = Profiler(tmp_path, (1, 1), logged.append)
    profiler.begin(1)
    (tmp_path / "profile").rmdir()
    (tmp_path / "profile").write_text("in the way")  # acts like a full disk
    try:
        run_steps(profiler, 1, 3)
        (line,) = logged
        assert (
            line.startswith("warning: ") and f"{tmp_path / 'profile'} cannot be written: " in line and "\n" not in line
        )
    finally:
        (tmp_path / "profile").unlink()
        with contextlib.suppress(RuntimeError):  # JAX 0.10 keeps a trace that it failed to write, 0.12 does not
            jax.profiler.stop_trace()


def test_each_host_writes_into_its_own_folder(
    tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    run_steps(Profiler(tmp_path, (1, 2), logged.append), 1, 3)
    assert traced_steps(tmp_path / "profile" / "host_2") == [1, 2]
