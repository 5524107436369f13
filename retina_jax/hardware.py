"""What a figure was measured on, said in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path


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
