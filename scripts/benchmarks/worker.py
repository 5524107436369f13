"""Runs one variant in its own process: `python -m benchmarks.worker MODULE TASK` runs one repetition per line of input.

Answers are JSON lines; output of libraries goes to standard error. With its own process, each variant has its own libraries,
threads and peak memory.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

WARM_UP = 3


def main(module: str, task: str) -> None:
    """Runs repetitions until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    wanted = json.loads(task)
    if wanted["cores"] and hasattr(os, "sched_setaffinity"):
        # Before any library counts the cores and starts its threads.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-wanted["cores"] :])
    if wanted["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["JAX_PLATFORMS"] = "cpu"
    from benchmarks.work import BenchmarkError, Task
    from retina_jax.errors import no_device

    advice = "--device cpu times the CPU"
    try:
        variant = importlib.import_module(module)
        if wanted["device"] == "gpu" and not has_gpu():  # before the inputs are made, which may take minutes
            raise BenchmarkError(f"--device gpu: no GPU is found here; {advice}")
        work = variant.make(Task(**wanted))
        for _ in range(WARM_UP):
            work.before()
            work.run()
    # BenchmarkError, and JAX's and torch's errors, are RuntimeErrors; without a device JAX also raises an AssertionError.
    except (ImportError, RuntimeError, AssertionError) as error:
        expected = isinstance(error, (ImportError, BenchmarkError)) or "out of memory" in str(error).lower()
        line = str(error).splitlines()[0] if expected else "jax" in sys.modules and no_device(error, advice)
        if not line:
            raise
        answer(error=line)
        return
    facts = {"hardware": accelerator()} | work.facts if wanted["device"] == "gpu" else work.facts
    answer(images=work.images, flops=work.flops, facts=facts)
    reset_peak()
    for _ in sys.stdin:
        work.before()
        wall, cpu = time.perf_counter(), time.process_time()
        work.run()
        answer(
            cpu_ms=1000 * (time.process_time() - cpu),
            wall_ms=1000 * (time.perf_counter() - wall),
            peak_mib=peak_mib(wanted["device"]),
        )


def reset_peak() -> None:
    """Resets the kernel's peak memory of this process."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def has_gpu() -> bool:
    """Whether the library of this variant finds a GPU."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    return torch.cuda.is_available() if torch else jax is not None and jax.default_backend() == "gpu"


def accelerator() -> str:
    """Returns the accelerator's name."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch else sys.modules["jax"].devices()[0].device_kind


def peak_mib(device: str) -> float | None:
    """Returns the peak memory of this process since `reset_peak`, or of arrays on the accelerator; None if unknown."""
    if device == "gpu":
        if "torch" in sys.modules:
            return sys.modules["torch"].cuda.max_memory_allocated() / 2**20
        stats = sys.modules["jax"].devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] / 2**20 if stats else None
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else None


if __name__ == "__main__":
    main(*sys.argv[1:])
