"""What a person who watches a run reads: the line about the devices, and progress, one rewritten line with a bar on a
terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import time

import jax
import pytest

from retina_jax import console
from retina_jax.console import BAR, Progress, devices_line, duration, track, warn

DETAIL = "loss 1.5000 (class 1.0000 box 0.5000)  [rate] 0.01"


class Terminal:
    """A real pseudo-terminal of 200 columns that replaces standard output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str = "utf-8", columns: int = 200) -> None:
        self.master, slave = os.openpty()
        self.stream = os.fdopen(slave, "w", encoding=encoding)
        monkeypatch.setattr(sys, "stdout", self.stream)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm-256color")

    def read(self) -> str:
        """Returns everything written since the last call; the output comes in pieces, up to a mark that is written
        after it."""
        print("\0", end="", flush=True, file=self.stream)
        written = b""
        while not written.endswith(b"\0"):
            written += os.read(self.master, 65536)
        return written[:-1].decode()

    def close(self) -> None:
        self.stream.close()
        os.close(self.master)


def plain(text: str) -> str:
    """Removes colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_log_file_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stdout", log)
    progress = Progress("step", 4)
    for step in (2, 4):
        progress.update(step, DETAIL)
    progress.close()
    assert log.getvalue() == f"step 2/4  {DETAIL}\nstep 4/4  {DETAIL}  ETA 0:00:00\n"


def test_a_terminal_that_is_closed_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    progress = Progress("step", 4)
    progress.update(1)
    os.close(terminal.master)
    for step in (2, 3, 4):
        progress.update(step, DETAIL)
    progress.close()
    assert sys.stdout is terminal.stream
    with contextlib.suppress(OSError):
        terminal.stream.close()


def test_a_terminal_gets_one_line_with_a_bar_that_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    progress = Progress("step", 4)
    progress.update(1, DETAIL)
    first = terminal.read()
    progress.update(4, DETAIL)
    second = terminal.read()
    progress.close()
    last = terminal.read()
    terminal.close()
    for written, step, eta in ((first, 1, ""), (second, 4, "ETA 0:00:00  ")):  # the first step compiled
        assert re.fullmatch(rf"(\r\x1b\[2K)?step {step}/4 [━╺]{{{BAR}}} {eta}{re.escape(DETAIL)} *", plain(written))
        assert "\n" not in written
    assert second.startswith("\r\x1b[2K") and last.endswith("\n")
    assert "\x1b[?25l" not in first, "the cursor is never hidden: a kill would leave it so"
    assert re.search(rf"m━{{{BAR // 4}}}\x1b\[0m\x1b\[[0-9;]*m╺", first), "a quarter of the bar"


def test_a_line_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, columns=50)
    Progress("step", 4).update(2, DETAIL)
    assert plain(terminal.read()) == f"step 2/4 {'━' * 10}╺{'━' * 9} {DETAIL}"[:50]
    terminal.close()


def test_a_warning_in_between_has_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    progress = Progress("step", 4)
    progress.update(1, DETAIL)
    warn("the disk is full")
    progress.update(2, DETAIL)
    progress.close()
    lines = [line.rsplit("\x1b[2K", 1)[-1] for line in terminal.read().replace("\r\n", "\n").split("\n")]
    terminal.close()
    assert plain(lines[0]) == "warning: the disk is full" and plain(lines[1]).startswith("step 2/4 ")


def test_a_terminal_without_utf8_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, encoding="ascii")
    Progress("step", 4).update(2, DETAIL)
    assert "step 2/4 ----------" in plain(terminal.read())
    terminal.close()


@pytest.mark.parametrize("terminal", [False, True])
def test_tracked_items_are_reported_at_intervals_and_short_tasks_never(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    shown, interval = Terminal(monkeypatch), console.SECONDS_IN_TERMINAL
    if not terminal:
        shown.close()
        interval = console.SECONDS_IN_LOG
        monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert list(track("short", range(3), 3)) == [0, 1, 2]
    for _ in track("long", range(9), 9):
        clock[0] += 0.4 * interval
    written = plain(shown.read() if terminal else sys.stdout.getvalue())
    assert re.findall(r"long \d/9", written) == (["long 3/9", "long 6/9", "long 9/9"] + ["long 9/9"] * terminal), (
        "a transient bar is drawn and removed at the end"
    )
    assert ("━" in written) == terminal and "short" not in written
    if terminal:
        shown.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3599.6, "1:00:00"), (90061.0, "25:01:01")]
)
def test_durations_carry_seconds_and_minutes(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_time_left_excludes_the_first_window_which_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    log, clock = io.StringIO(), iter([0.0, 100.0, 110.0, 130.0])
    monkeypatch.setattr(sys, "stdout", log)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = Progress("step", 50)
    for step in (10, 20, 30):
        progress.update(step)
    assert re.findall(r"ETA (\S+)", log.getvalue()) == ["0:00:30", "0:00:30"]


def test_the_time_left_leaves_out_the_excluded_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    log, clock = io.StringIO(), iter([0.0, 100.0, 160.0, 240.0])
    monkeypatch.setattr(sys, "stdout", log)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = Progress("step", 50)
    for step, excluded in ((10, 90.0), (20, 140.0), (30, 210.0)):  # 10 s per 10 steps, and 50 and 70 s
        progress.update(step, excluded=excluded)
    assert re.findall(r"ETA (\S+)", log.getvalue()) == ["0:00:30", "0:00:20"]


class Device:
    """A device of JAX that has a name alone."""

    def __init__(self, platform: str, kind: str) -> None:
        self.platform, self.device_kind = platform, kind


@pytest.mark.parametrize(
    ("platform", "count", "small", "line"),
    [
        ("cpu", 1, True, "device: CPU (a processor, 2 cores), as 1 device; no GPU or TPU found"),
        ("cpu", 8, True, "device: CPU (a processor, 2 cores), as 8 devices; no GPU or TPU found"),
        (
            "cpu",
            1,
            False,
            "device: CPU (a processor, 2 cores), as 1 device; no GPU or TPU found; "
            "a CPU is fast enough for small images: --data.short-side 256, or configs/demo.py",
        ),
        ("gpu", 2, False, "devices: 2 x NVIDIA H100"),
        ("gpu", 1, True, "devices: 1 x NVIDIA H100"),
    ],
)
def test_the_line_about_the_devices_has_advice_on_a_cpu_unless_the_images_are_small(
    monkeypatch: pytest.MonkeyPatch, platform: str, count: int, small: bool, line: str
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [Device(platform, "NVIDIA H100")] * count)
    monkeypatch.setattr(jax, "device_count", lambda: count)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(console, "processor", lambda: "a processor, 2 cores")
    assert devices_line(small) == line


def test_a_long_line_above_the_bar_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, columns=50)
    progress = Progress("step", 4)
    progress.update(1, DETAIL)
    console.log(f"written to [bold] {'folder/' * 20}")
    progress.close()
    assert f"written to [bold] {'folder/' * 20}\r\n" in plain(terminal.read())
    terminal.close()
