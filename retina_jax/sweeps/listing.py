"""What `--list` shows: each point, how far it has come, and what it costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retina_jax.config import Config
from retina_jax.data.transforms import buckets
from retina_jax.model.summary import forward_flops
from retina_jax.sweeps.manifest import Row
from retina_jax.sweeps.state import State, state_of

PAPER_CLASSES = 80
"""Counted with where `model.num_classes` is the data's."""


def mean_canvas(config: Config) -> tuple[int, int]:
    """A canvas (height, width) of the mean area of those that training pads to, all taken as equally frequent."""
    shapes = buckets(config.data, config.data.jitter_short_sides or (config.data.short_side,))
    side = min(shapes[0])
    return side, round(sum(math.prod(shape) for shape in shapes) / len(shapes) / side)


def training_pflop(config: Config) -> float:
    """10^15 operations that training takes: a step is three forward passes of each of its images."""
    forward = forward_flops(config, config.model.num_classes or PAPER_CLASSES, mean_canvas(config))
    return 3 * forward * config.data.batch_size * config.training.steps / 1e15


def seconds_per_pflop(states: Sequence[State], costs: Sequence[float]) -> float | None:
    """The rate of the points that are done; None while none is."""
    done = [
        (state.seconds, cost)
        for state, cost in zip(states, costs, strict=True)
        if state.kind == "done" and state.seconds
    ]
    return sum(seconds for seconds, _ in done) / sum(cost for _, cost in done) if done else None


def listing(workdir: Path | None, rows: Sequence[Row]) -> str:
    """One line a point and one for their sum.

    `workdir` None: none is begun. Hours are what a done point took, and what the others are expected to take at its rate.
    """
    states = {row.point.folder: state_of(workdir, row.point) if workdir else State("waiting") for row in rows}
    costs = {row.point.folder: training_pflop(row.point.config) for row in rows}
    rate = seconds_per_pflop(list(states.values()), list(costs.values()))

    def hours(folder: str) -> list[str]:
        if rate is None:
            return []
        took = states[folder].seconds
        return [f"~{costs[folder] * rate / 3600:.2f}" if took is None else f"{took / 3600:.2f}"]

    seeds = len({row.point.seed for row in rows}) > 1
    table = [["index", "point", "state", "PFLOP"] + ["hours"] * (rate is not None) + ["folder", "overrides"]]
    for row in rows:
        name = " = ".join(row.labels) + (f" (seed {row.point.seed})" if seeds else "")
        folder = row.point.folder
        numbers = [_number(costs[folder]), *hours(folder)]
        table.append([str(row.index), name, str(states[folder]), *numbers, folder, _told(row.point.overrides)])
    left = math.fsum(cost for folder, cost in costs.items() if states[folder].kind not in ("done", "diverged"))
    counts = Counter(state.kind for state in states.values())
    expected = "" if rate is None else f", {left * rate / 3600:.2f} hours as the done ones went"
    return (
        f"{_aligned(table)}\n{len(states)} distinct runs: {', '.join(f'{n} {kind}' for kind, n in counts.items())}; "
        f"{_number(math.fsum(costs.values()))} PFLOP, {_number(left)} left{expected}"
    )


def _told(overrides: Mapping[str, Any]) -> str:
    def value(v: Any) -> str:
        return ",".join(map(value, v)) if isinstance(v, tuple) else f"{v:.4g}" if isinstance(v, float) else str(v)

    return " ".join(f"{name}={value(v)}" for name, v in overrides.items()) or "none: the base itself"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)


# Options that take several words, read and left out before the command line is parsed as a whole.


def words_of(argv: Sequence[str], option: str) -> list[str]:
    """The values given to `option`: words_of(["--a", "1", "2", "--b"], "--a") is ["1", "2"]."""
    return [word for name, word in _named(argv) if name == option and word]


def without(argv: Sequence[str], options: Sequence[str]) -> list[str]:
    """The command line without these options and their values."""
    kept: list[str] = []
    taking = True
    for word in argv:
        if word.startswith("--"):
            taking = word.partition("=")[0] not in options
        if taking:
            kept.append(word)
    return kept


def _named(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each value with the option it is given to."""
    option = ""
    for word in argv:
        if word.startswith("--"):
            option, _, word = word.partition("=")
        yield option, word
