"""pycocotools, called by the same code as this project's evaluator."""

from __future__ import annotations

from benchmarks.scoring import scored
from benchmarks.work import BenchmarkError, Task, Work


def make(task: Task) -> Work:
    """Returns the work of `task`."""
    if task.name != "evaluate":
        raise BenchmarkError(f"pycocotools has no benchmark {task.name}")
    return scored(task, "pycocotools")
