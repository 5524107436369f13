"""What was run: the command, the code, the machine, and each setting that is not the paper's."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from statistics import median
from typing import Any

from retina_jax.classes import unique_names
from retina_jax.config import Config
from retina_jax.config_files import flatten
from retina_jax.console import duration
from retina_jax.evaluation import number
from retina_jax.pages.page import paragraphs
from retina_jax.run_page.record import Record


def headline(record: Record) -> str:
    """The run in a sentence or two: how far it came, how long it took, what it reached."""
    steps, last = record.config.training.steps, record.step
    if record.summary is not None:
        state = f"Finished after {last} steps"
        seconds = record.summary.get("seconds")
        state += f" in {duration(seconds)}" if isinstance(seconds, int | float) else ""
    else:
        state = f"Not finished: step {last} of {steps}"
    if record.evaluations:
        step, scores = max(record.evaluations.items())
        reached = ", ".join(f"{name} {number(scores[name])}" for name in ("AP", "AP50", "AP75"))
        state += f". {reached} on {scores['images']} images at step {step}"
    return state + "."


def what_was_run(record: Record) -> str:
    """Lists of the facts and of the settings."""
    own, paper = flatten(record.config), flatten(Config())
    # None is taken from the data.
    changed = [(name, value) for name, value in own.items() if value != paper[name] and paper[name] is not None]
    rows = [(name, show(value), show(paper[name])) for name, value in changed]
    resumed = record.saved.get("changes") or []
    changes = [f"After step {c.get('after_step')}: {c.get('field')}." for c in resumed if isinstance(c, dict)]
    every = definitions([(name, show(value)) for name, value in own.items()])
    return (
        definitions(facts(record))
        + "<h3>Settings that are not the paper's</h3>"
        + (_differences(rows) if rows else paragraphs(["None."]))
        + (paragraphs(["Changed when the run was resumed:", *changes]) if changes else "")
        + f"<details><summary>every setting</summary>{every}</details>"
    )


def facts(record: Record) -> list[tuple[str, str]]:
    """(name, value) of what config.json, summary.json and metrics.jsonl tell; what is not known is left out."""
    saved, versions = record.saved, dict(record.saved.get("versions") or {})
    first = saved.get("first_start") or {}
    named = [
        ("command", _command(saved.get("command"))),
        ("first command", _command(first.get("command")) if first.get("command") != saved.get("command") else None),
        ("git commit", saved.get("commit")),
        ("first commit", first.get("commit") if first.get("commit") != saved.get("commit") else None),
        ("devices", versions.pop("devices", None)),
        ("speed", _speed(record.windows)),
        ("versions", ", ".join(f"{package} {version}" for package, version in versions.items())),
        ("classes", _classes(unique_names(record.categories))),
        *dict(saved.get("facts") or {}).items(),
    ]
    if record.summary is not None:
        named += [(name.replace("_", " "), record.summary.get(name)) for name in ("images", "parameters_sha256")]
    return [(str(name), str(value)) for name, value in named if value]


def definitions(rows: Sequence[tuple[str, str]]) -> str:
    """A list of names and values."""
    return '<dl class="facts">' + "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in rows) + "</dl>"


def _differences(rows: Sequence[tuple[str, str, str]]) -> str:
    """Each setting with this run's value and the paper's."""
    items = "".join(
        f"<li>{escape(name)} <b>{escape(own)}</b> <small>paper: {escape(paper)}</small></li>"
        for name, own, paper in rows
    )
    return f'<ul class="settings">{items}</ul>'


def show(value: Any) -> str:
    """A setting as it is typed on a command line; floats to six digits."""
    if isinstance(value, tuple | list):
        return " ".join(map(show, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value) if value != "" else "none"


def _command(words: Any) -> str | None:
    return "python " + shlex.join(map(str, words)) if isinstance(words, list) else None


def _speed(windows: Sequence[dict[str, Any]]) -> str | None:
    """Medians: the first windows hold compilation."""
    parts = []
    for metric, text in (
        ("images_per_second", "{:.1f} images/s"),
        ("data_wait_percent", "{:.0f} % of the time waiting for data"),
    ):
        values = [w[metric] for w in windows if isinstance(w.get(metric), int | float)]
        parts += [text.format(median(values))] if values else []
    peak = max((w["peak_memory_mib"] for w in windows if isinstance(w.get("peak_memory_mib"), int | float)), default=0)
    parts += [f"peak memory {peak / 1024:.1f} GiB"] if peak else []
    return ", ".join(parts) + " (medians of the windows)" if parts else None


def _classes(names: Sequence[str]) -> str:
    return f"{len(names)}: " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
