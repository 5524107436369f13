"""How far a run is: on a terminal one line with a bar, written over and over; in a log file a plain line each time.

The line is made by rich but written here, at the moments at which there is something new: without a thread of rich's, a
hidden cursor or a standard output that is another's, nothing is left behind by Ctrl-C or a kill, and warnings stand where
they always do.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from retina_jax.console import duration, tell

BAR = 20
"""Columns of the bar."""


class Progress:
    """Progress from `start_step` to `steps`."""

    def __init__(self, start_step: int, steps: int) -> None:
        self._steps = steps
        self._since = start_step, time.monotonic()
        self._shown = False

    def show(self, step: int, mean: Mapping[str, float], *, end_line: bool = False) -> None:
        """The line of a window that ended with `step`; `end_line` leaves it standing on a terminal."""
        first, begun = self._since
        now = time.monotonic()
        left = (now - begun) / max(step - first, 1) * max(self._steps - step, 0)
        if not self._shown:  # what is left is told by the steps after this window, in which the step was compiled
            self._shown, self._since = True, (step, now)
        said = (
            f"loss {mean['loss']:.4f} (class {mean['classification_loss']:.4f} box {mean['box_loss']:.4f})  "
            f"rate {mean['learning_rate']:.2g}  gradient {mean['gradient_norm']:.2f}  "
            f"positives {mean['positives_per_image']:.1f}  {mean['images_per_second']:.1f} img/s  "
            f"data wait {mean['data_wait_percent']:.0f}%  {mean['peak_memory_mib'] / 1024:.1f} GiB"
        )
        counted, eta = f"step {step}/{self._steps}", f"ETA {duration(left)}"
        if not sys.stdout.isatty():
            tell(f"{counted}  {said}  {eta}")
            return
        tell(f"\r\033[K{self._line(step, counted, eta, said)}", "\n" if end_line else "")

    def close(self) -> None:
        """Leave the terminal on a line of its own."""
        if sys.stdout.isatty():
            tell("")

    def _line(self, step: int, counted: str, eta: str, said: str) -> str:
        """As wide as the terminal less one column: a line that wraps cannot be written over. What does not fit is cut."""
        console = Console(file=sys.stdout, force_terminal=True)
        done = round(BAR * min(step / max(self._steps, 1), 1))
        stroke = "━" if console.encoding.startswith("utf") else "-"
        line = Text.assemble((counted, "bold"), "  ", (stroke * done, "green"), (stroke * (BAR - done), "dim"))
        line.append(f"  {eta}  {said}")
        line.truncate(max(shutil.get_terminal_size().columns - 1, 1), overflow="crop")
        with console.capture() as captured:
            console.print(line, end="", soft_wrap=True)
        return captured.get()
