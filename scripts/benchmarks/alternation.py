"""Measures variants in turn, one repetition of each, so that other load on the machine affects all alike."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.work import BenchmarkError, Task
from retina_jax.console import processor
from retina_jax.installation import HOME, PACKAGE

SCRIPTS = Path(__file__).parents[1]
"""Folder from which a worker imports `benchmarks`."""
REST = 0.1
"""Seconds between two repetitions: threads of the previous one may still free memory on the same core."""


def measure(
    task: Task, variants: dict[str, str], repetitions: int, python: str = sys.executable
) -> list[dict[str, Any]]:
    """Returns one row of figures per variant.

    Args:
      task: the work.
      variants: name to module with `make(task) -> Work`; the first is this project.
      repetitions: per variant, after the warm-up.
      python: interpreter of all variants except the first.

    Returns:
      Rows in the order of `variants`: cpu_ms and wall_ms, medians of a repetition; peak_mib; ratio and wall_ratio, the
      row's time divided by the first row's (ratio: CPU time, on a GPU wall time); images_per_second; tflops by wall time.

    Raises:
      BenchmarkError: a variant cannot be set up or its process ends; the line names it.
    """
    with ExitStack() as stack:
        workers, made = {}, {}
        for name, module in variants.items():  # set up one after the other, as they time matrix products
            workers[name] = stack.enter_context(started(name, module, task, python if workers else sys.executable))
            made[name] = answer_of(name, workers[name])
        figures: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for _ in range(repetitions):
            for name, worker in workers.items():
                if task.device == "cpu":
                    time.sleep(REST)
                figures[name].append(ask(name, worker))
    rows = [row_of(task, name, made[name], figures[name]) for name in workers]
    for row in rows:
        row["wall_ratio"] = row["wall_ms"] / rows[0]["wall_ms"]
        row["ratio"] = row["wall_ratio"] if task.device == "gpu" else row["cpu_ms"] / rows[0]["cpu_ms"]
    return rows


@contextmanager
def started(name: str, module: str, task: Task, python: str) -> Iterator[subprocess.Popen[str]]:
    """Starts the process of a variant; leaving the `with` block ends it."""
    command = [python, "-m", "benchmarks.worker", module, json.dumps(asdict(task))]
    checkout = [] if HOME == PACKAGE else [str(HOME)]  # an installed package would bring all its neighbours along
    folders = [str(SCRIPTS), *checkout, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment) as process:
        try:
            yield process
        finally:
            with suppress(BrokenPipeError):  # the process has ended; `answer_of` reports why
                process.stdin.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def ask(name: str, worker: subprocess.Popen[str]) -> dict[str, Any]:
    """Runs one repetition and returns its figures."""
    try:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    except BrokenPipeError:
        raise BenchmarkError(f"{name}: its process ended; what it printed is above") from None
    return answer_of(name, worker)


def answer_of(name: str, worker: subprocess.Popen[str]) -> dict[str, Any]:
    """Returns the next answer: of a process just started, what `Work` says; BenchmarkError if it fails or ends."""
    line = worker.stdout.readline()
    if not line:
        raise BenchmarkError(f"{name}: its process ended with status {worker.wait()}; what it printed is above")
    answer = json.loads(line)
    if "error" in answer:
        raise BenchmarkError(f"{name}: {answer['error']}")
    return answer


def row_of(task: Task, name: str, made: dict[str, Any], figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the medians of the repetitions, from a worker's first answer and their figures."""
    cpu, wall = (statistics.median(figure[key] for figure in figures) for key in ("cpu_ms", "wall_ms"))
    peaks = [figure["peak_mib"] for figure in figures if figure["peak_mib"] is not None]
    row = {
        "name": task.name,
        "variant": name,
        "size": task.size,
        "batch": task.batch,
        "backbone": task.backbone,
        "dtype": task.dtype,
        "cores": task.cores,
        "device": task.device,
        "repetitions": len(figures),
        "cpu_ms": cpu,
        "wall_ms": wall,
        "peak_mib": max(peaks, default=None),
    }
    if made["images"]:
        row["images_per_second"] = 1000 * made["images"] / wall
    if made["flops"]:
        row["tflops"] = made["flops"] / wall / 1e9
    row |= {"hardware": processor()} | made["facts"]
    if "tflops" in row and "matmul_tflops" in row:
        row["share_of_matmul"] = row["tflops"] / row["matmul_tflops"]
    return row
