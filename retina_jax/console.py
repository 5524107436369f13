"""What a run says while it runs: one line an event, on the standard output."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from retina_jax.errors import one_line


def tell(line: str, end: str = "\n") -> None:
    """Print `line` at once. A log that cannot be written (a full disk takes those too) ends nothing."""
    try:
        print(line, end=end, flush=True)
    except OSError:
        return


def warn(line: str) -> None:
    """Print a warning on a line of its own, from whatever thread, as `one_line` gives it."""
    tell(("\n" if sys.stdout is not None and sys.stdout.isatty() else "") + one_line(f"warning: {line}"))


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, 0:00:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


# What a figure was measured on, said in words.


def hardware() -> str:
    """JAX's device: the accelerator's name, or the processor's with the cores at hand."""
    import jax

    device = jax.devices()[0]
    return processor() if device.platform == "cpu" else device.device_kind


def processor() -> str:
    """The processor's name as Linux gives it, else its architecture, with the cores at hand."""
    cpuinfo = Path("/proc/cpuinfo")
    name = platform.processor() or platform.machine()
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {cores()} cores"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
