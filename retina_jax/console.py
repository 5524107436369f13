"""Lines for the person who watches a run: messages, warnings, progress, names of hardware; and the folder of caches."""

import contextlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from retina_jax.errors import bounded, one_line

T = TypeVar("T")
BAR = 20  # columns of a progress bar
SECONDS_IN_TERMINAL, SECONDS_IN_LOG = 0.2, 15.0  # time between two reports of `track`, on a terminal and in a log file


def log(text: str) -> None:
    """Prints the lines of `text` at once, each as `one_line` does but with its spaces. A log that cannot be written, as on a
    full disk, ends nothing."""
    with contextlib.suppress(OSError):
        print("\n".join(map(bounded, text.split("\n"))), flush=True)


def warn(line: str) -> None:
    """Prints a warning as one line."""
    log(one_line(f"warning: {line}"))


class Progress:
    """A report of how much of a task is done: on a terminal one line with a bar, in a log file plain lines.

    rich draws the bar, but only in `update`: a thread would draw between the lines of others. Warnings appear above it.
    """

    def __init__(self, task: str, total: int, done: int = 0, transient: bool = False) -> None:
        """Starts with `done` steps of `total`. A `transient` bar disappears at the end."""
        self._task, self._total, self._first, self._bar = task, total, True, None
        self._since = done, time.monotonic()
        if sys.stdout is None or not sys.stdout.isatty():
            return
        from rich.console import Console  # 60 ms that most commands do not need
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self._console = Console(force_terminal=True, soft_wrap=True)  # other lines stay as they are
        # A killed process would leave the terminal without a cursor.
        self._console.show_cursor = lambda show=True: False
        counted, detail = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[detail]}"))
        columns = counted, BarColumn(BAR), detail
        self._bar = Bar(*columns, console=self._console, auto_refresh=False, transient=transient)
        self._row = self._bar.add_task(task, total=max(total, 1), detail="")

    def update(self, done: int, detail: str = "", excluded: float = 0.0) -> None:
        """Reports that `done` steps are done. A terminal that is too narrow shows the beginning of `detail`. The time left
        is estimated without the seconds `excluded` since the start, such as those in which programs were compiled."""
        first, begun = self._since
        now = time.monotonic() - excluded
        left = (now - begun) / max(done - first, 1) * max(self._total - done, 0)
        counted, eta = f"{self._task} {done}/{self._total}", f"ETA {duration(left)}"
        if self._first:  # the first steps are slower: the time left is estimated from those after the first report
            self._first, self._since, eta = False, (done, now), ""
        if self._bar is None:
            return log("  ".join(filter(None, (counted, detail, eta))))
        room = max(self._console.width - len(counted) - BAR - 2, 0)
        text = f"{eta}  {detail}".strip()[:room]
        self._bar.update(self._row, completed=done, description=counted, detail=text)
        try:
            self._bar.refresh() if self._bar.live.is_started else self._bar.start()
        except OSError:  # the terminal was closed
            self.close()

    def close(self) -> None:
        """Leaves the terminal on a line of its own."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError):
                bar.stop()


def track(task: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Yields `items` and shows how many of `total` came; a task of less than one interval shows nothing."""
    with contextlib.closing(Progress(task, total, transient=True)) as progress:
        interval = SECONDS_IN_LOG if progress._bar is None else SECONDS_IN_TERMINAL
        reported = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            if (now := time.monotonic()) - reported >= interval:
                progress.update(done)
                reported = now


def duration(seconds: float) -> str:
    """Returns hours, minutes and seconds: 0:00:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def devices_line(small: bool) -> str:
    """Returns a line about JAX's devices, with advice on a CPU unless the network and images are `small`."""
    import jax

    number, name = jax.device_count(), hardware()
    if jax.default_backend() != "cpu":
        return f"devices: {number} x {name}"
    advice = "" if small else "; a CPU is fast enough for small images: --data.short-side 256, or configs/demo.py"
    return f"device: CPU ({name}), as {number} device{'s' * (number > 1)}; no GPU or TPU found{advice}"


def cache_folder() -> Path:
    """Returns ~/.cache/retina_jax, or a folder among the temporary files for a user without a home folder."""
    try:
        return Path.home() / ".cache" / "retina_jax"
    except RuntimeError:  # no HOME and no entry in passwd, as in some containers
        return Path(tempfile.gettempdir()) / f"retina_jax-{os.getuid()}"


def hardware() -> str:
    """Returns the name of JAX's device: of the accelerator, or of the processor with the number of available cores."""
    import jax

    device = jax.devices()[0]
    return processor() if device.platform == "cpu" else device.device_kind


def processor() -> str:
    """Returns the processor's name, on Linux, or its architecture, with the number of available cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {cores()} cores"


def cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
