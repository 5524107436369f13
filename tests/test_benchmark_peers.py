"""Each peer of a benchmark does the same work as this project's variant, and the output has a row for both."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from benchmarks import parts
from benchmarks.inputs import class_outputs
from benchmarks.peers import optax
from benchmarks.work import Task, Work

from retina_jax.ops.matching import IGNORED

ROOT = Path(__file__).parents[1]
LOSS = Task("loss", "64", 1, "", "float32", 300, 7, 0, 0, "", "", 0, "cpu", 1)
SMALL = {
    "step": ["--size", "64"],
    "forward": ["--size", "64"],
    "detect": ["--size", "64"],
    "loss": ["--rows", "300", "--classes", "7"],
    "match": ["--rows", "300"],
    "nms": ["--rows", "300", "--kept", "40"],
}


def rows_of(name: str, peer: str) -> list[dict]:
    """Runs the benchmark on small inputs; returns the rows of this project and of `peer`."""
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", name, "--peer", peer, "--repetitions", "2", "--json"]
    done = subprocess.run([*command, *SMALL[name]], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_compared(rows: list[dict], peer: str) -> None:
    ours, theirs = rows
    assert (ours["variant"], theirs["variant"]) == ("retina_jax", peer)
    assert ours["ratio"] == 1 and theirs["ratio"] == pytest.approx(theirs["cpu_ms"] / ours["cpu_ms"])
    assert theirs["version"].startswith(peer) and min(row["peak_mib"] for row in rows) > 50


def once(work: Work) -> Any:
    """Runs one repetition and returns its result."""
    work.before()
    return work.run()


@pytest.mark.parametrize("keep_logits", [False, True])
def test_optax_sums_the_same_loss_and_gradient(keep_logits: bool) -> None:
    task = dataclasses.replace(LOSS, keep_logits=keep_logits)
    works = [module.make(task) for module in (parts, optax)]
    first, again = ([once(work) for work in works] for _ in range(2))
    jax.tree.map(
        np.testing.assert_array_equal, first, again
    )  # a repetition does not consume the logits of the next one
    (ours, gradient), (theirs, of_optax) = first
    _, labels = class_outputs(LOSS.rows, LOSS.classes, LOSS.seed)
    ignored = labels == IGNORED
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(gradient[0][~ignored], of_optax, rtol=1e-4, atol=1e-8)  # optax gets no ignored rows
    assert ignored.any() and not np.any(gradient[0][ignored])


def test_the_loss_is_compared_with_optax() -> None:
    assert_compared(rows_of("loss", "optax"), "optax")


@pytest.mark.parity
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_is_compared_with_torchvision(name: str) -> None:
    pytest.importorskip("torchvision", reason="needs torchvision")
    rows = rows_of(name, "torchvision")
    assert_compared(rows, "torchvision")
    assert len({row.get("kept") for row in rows}) == 1
