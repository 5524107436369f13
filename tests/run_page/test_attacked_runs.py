"""Small files of a run's folder, damaged: the run's page, its detector's start and a resumed run end in one line or heal."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attacks import attack, both_shares, damaged

from retina_jax.reports.run_page import run_page
from retina_jax.runs.folder import Clock, best_step, read_run, record_fact
from retina_jax.runs.record import f1_threshold, finish_run, read_record
from retina_jax.sweeps.status import ended
from retina_jax.training.metrics import Metrics
from retina_jax.training.opening import open_run

FILES = {
    "config.json": 3, "summary.json": 1, "seconds.json": 1, "evaluation/step_00000040.json": 2,
    "detections/step_00000040.json": 1, "metrics.jsonl": 3, "checkpoints/40/metrics/metrics": 1,
}  # fmt: skip
"""Each file, and its share of the cases."""
DEEP = "[" * 200_000
VALUES = ("null", '"x"', "-1", "Infinity", "NaN", "1e400", "1" + "0" * 400, "[]", "{}", "true", DEEP + "]" * 200_000,
          '"\\u001b[31m\\n' + "A" * 100_000 + '"', '"\\ud800"', "[[1]]", '{"a": 1}')  # fmt: skip
"""JSON values, and what Python's json reads besides them."""
CONTENTS = (b"", bytes(range(256)), DEEP.encode(), b'{"a":' * 200_000, b"\xff\xfe{\x00}\x00", b"\0" * 100)


def places(value: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yields the path of every value in a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*above, key)
        yield from places(inner, (*above, key))


def with_another_value(text: str, rng: random.Random) -> str:
    """Returns the JSON with one value replaced by one of VALUES, or deleted."""
    made = copy.deepcopy(json.loads(text))
    where = rng.choice([(), *places(made)])
    if not where:
        return rng.choice(VALUES)
    inner = made
    for key in where[:-1]:
        inner = inner[key]
    if rng.random() < 0.1:
        del inner[where[-1]]
    else:
        inner[where[-1]] = "@mark@"
    return json.dumps(made).replace('"@mark@"', rng.choice(VALUES), 1)


def mangled(content: bytes, lines: bool, rng: random.Random) -> bytes:
    """Returns the content of a small file after an accident, or from a stranger."""
    how = rng.random()
    if how < 0.1:
        return rng.choice(CONTENTS)
    if how < 0.4:
        return damaged(content, rng)
    if not lines:
        return with_another_value(content.decode(), rng).encode()
    every = content.decode().splitlines()
    row = rng.randrange(len(every))
    every[row] = with_another_value(every[row], rng)
    return "".join(f"{line}\n" for line in every).encode()


def use(folder: Path) -> None:
    """Reads and continues a run as report.py, predict.py, sweep.py and train.py do."""
    run_page(folder)
    assert isinstance(read_record(folder).step, int)
    best, threshold = best_step(folder / "checkpoints"), f1_threshold(folder, 40)
    assert best in (None, 40) and (threshold is None or 0 <= threshold <= 1)
    run = read_run(folder)
    ended(folder, run.config)
    with Clock(folder, resumed=True) as clock, Metrics(run, 40):
        assert math.isfinite(clock.seconds)
    record_fact(run, "name", "value")
    open_run(folder, run.config, run.class_names, run.category_ids, run.data_sha256, run.num_microbatches)
    finish_run(run, 40, 12.0, "0" * 64)


@both_shares
def test_attacked_files_of_a_run_heal_or_are_refused_in_one_line(
    tiny_run: Path, tmp_path: Path, share: float, capfd: pytest.CaptureFixture[str]
) -> None:
    for file, text in (("seconds.json", "12.5"), ("checkpoints/40/metrics/metrics", '{"AP": 0.5}')):
        (tiny_run / file).parent.mkdir(parents=True, exist_ok=True)
        (tiny_run / file).write_text(text)
    record_fact(read_run(tiny_run), "name", "value")
    use(shutil.copytree(tiny_run, tmp_path / "intact"))
    rows = []
    for name, parts in FILES.items():
        content, folder = (tiny_run / name).read_bytes(), tmp_path / "attacked"

        def case(rng: random.Random, name: str = name, content: bytes = content, folder: Path = folder) -> str:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tiny_run, folder)
            (folder / name).write_bytes(mangled(content, name.endswith("jsonl"), rng))
            use(folder)
            return "read or healed"

        counts = attack(f"run folder, {name}", 30 * parts if share == 1 else 1, case)
        rows.append(f"\n| run folder, {name} | {counts.total()} | {dict(counts)} |")
    printed = capfd.readouterr()
    lines = (printed.out + printed.err).splitlines()
    assert all(line.isprintable() and len(line) < 1200 for line in lines) and "Traceback" not in printed.err
    with capfd.disabled():
        print(*rows)
