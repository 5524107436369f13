"""The progress line: on a terminal one line written over, in a log plain lines."""

from __future__ import annotations

import io
import os
import re
import sys
import time

import pytest

from retina_jax.console import duration, warn
from retina_jax.training.progress import BAR, Progress

MEAN = {
    "loss": 1.5, "classification_loss": 1.0, "box_loss": 0.5, "learning_rate": 0.01, "gradient_norm": 2.0,
    "positives_per_image": 3.0, "images_per_second": 4.0, "data_wait_percent": 5.0, "peak_memory_mib": 1024.0,
}  # fmt: skip
SAID = (
    "loss 1.5000 (class 1.0000 box 0.5000)  rate 0.01  gradient 2.00  positives 3.0  4.0 img/s  data wait 5%  1.0 GiB"
)


class Terminal:
    """A real pseudo-terminal of 200 columns in place of the standard output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str = "utf-8", columns: int = 200) -> None:
        self.master, slave = os.openpty()
        monkeypatch.setattr(sys, "stdout", os.fdopen(slave, "w", encoding=encoding))
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm-256color")

    def read(self) -> str:
        """All that was written since: it comes in pieces, up to a mark written after it."""
        print("\0", end="", flush=True)
        written = b""
        while not written.endswith(b"\0"):
            written += os.read(self.master, 65536)
        return written[:-1].decode()

    def close(self) -> None:
        sys.stdout.close()
        os.close(self.master)


def plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_log_gets_a_plain_line_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stdout", log)
    progress = Progress(0, 4)
    for step in (2, 4):
        progress.show(step, MEAN)
    progress.close()
    first, second = log.getvalue().splitlines()
    assert re.fullmatch(rf"step 2/4  {re.escape(SAID)}  ETA 0:00:00", first) and second.startswith("step 4/4  loss")
    assert "\x1b" not in log.getvalue() and "\r" not in log.getvalue()


def test_a_terminal_gets_one_line_with_a_bar_that_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    progress = Progress(0, 4)
    progress.show(1, MEAN)
    first = terminal.read()
    progress.show(4, MEAN, end_line=True)
    last = terminal.read()
    terminal.close()
    for written, step in ((first, 1), (last, 4)):
        assert written.startswith("\r\x1b[K") and f"step {step}/4  {'━' * BAR}  ETA 0:00:00  {SAID}" in plain(written)
        assert "\x1b[?25l" not in written, "the cursor is never hidden: a kill would leave it so"
    assert "\n" not in first and last.endswith("\n")
    done = re.search(r"\x1b\[[0-9;]*m(━+)\x1b\[0m\x1b\[2m(━+)", first)
    assert (len(done[1]), len(done[2])) == (BAR // 4, BAR - BAR // 4)


def test_a_line_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, columns=50)
    Progress(0, 4).show(2, MEAN)
    written = plain(terminal.read()).removeprefix("\r\x1b[K")
    terminal.close()
    assert written == f"step 2/4  {'━' * BAR}  ETA 0:00:00  loss"[:49]


def test_a_warning_in_between_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    progress = Progress(0, 4)
    progress.show(1, MEAN)
    warn("the disk is full")
    progress.show(2, MEAN)
    lines = plain(terminal.read()).replace("\r\n", "\n").split("\n")
    terminal.close()
    assert lines[1] == "warning: the disk is full" and "step 1/4" in lines[0] and "step 2/4" in lines[2]


def test_a_terminal_without_utf8_gets_what_it_can_show(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, encoding="ascii")
    Progress(0, 4).show(2, MEAN)
    assert f"step 2/4  {'-' * BAR}  ETA" in plain(terminal.read())
    terminal.close()


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3599.6, "1:00:00"), (90061.0, "25:01:01")]
)
def test_durations_carry(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_the_time_left_leaves_out_the_first_window_which_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    log, clock = io.StringIO(), iter([0.0, 100.0, 110.0, 130.0])
    monkeypatch.setattr(sys, "stdout", log)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = Progress(0, 50)
    for step in (10, 20, 30):
        progress.show(step, MEAN)
    assert re.findall(r"ETA (\S+)", log.getvalue()) == ["0:06:40", "0:00:30", "0:00:30"]
