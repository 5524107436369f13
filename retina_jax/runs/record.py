"""A run's folder read back: its config, what it measured, and its evaluations; finished or not."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retina_jax.config import Config, ConfigError
from retina_jax.data.classes import Category
from retina_jax.evaluation.coco_scores import SUMMARY
from retina_jax.runs.folder import read_run

EVALUATION = re.compile(r"step_([0-9]{8})(_[0-9a-f]{8})?\.json")
"""Names of a run's evaluations; those with other settings than the run's (`evaluate.py`) carry a mark after the step."""


@dataclass(frozen=True)
class Record:
    """A run as far as it came."""

    folder: Path
    config: Config
    categories: list[Category]
    """Id and name of each class."""
    saved: dict[str, Any]
    """The whole of config.json: command, commit, versions, facts, changes."""
    windows: list[dict[str, Any]]
    """metrics.jsonl's lines of training, by rising step."""
    evaluations: dict[int, dict[str, Any]]
    """What RUN/evaluation/ holds of the run's own settings, by rising step."""
    variants: list[tuple[int, dict[str, Any]]]
    """(step, scores) of evaluations with other settings, by rising step; `settings` of the scores are those that differ."""
    summary: dict[str, Any] | None
    """summary.json; None: the run has not ended."""

    @property
    def step(self) -> int:
        """The last step that anything is known of."""
        ended = [int(self.summary["steps"])] if self.summary else []
        return max([*ended, *(int(window["step"]) for window in self.windows[-1:]), *self.evaluations, 0])


def read_record(folder: Path) -> Record:
    """The run in `folder`. Raises ConfigError, one line that names the file, where one cannot be what it should."""
    run = read_run(folder)
    evaluations, variants = {}, []
    for path in sorted((folder / "evaluation").glob("*.json")):
        if match := EVALUATION.fullmatch(path.name):
            step, scores = int(match[1]), _evaluation(path)
            if match[2] or scores.get("settings"):
                variants.append((step, scores))
            else:
                evaluations[step] = scores
    summary = read_json(folder / "summary.json") if (folder / "summary.json").is_file() else None
    if summary is not None and not isinstance(summary.get("steps"), int):
        raise ConfigError(f"{folder / 'summary.json'}: steps must be a whole number, not {summary.get('steps')!r}")
    saved, windows = read_json(folder / "config.json"), _windows(folder / "metrics.jsonl")
    return Record(folder, run.config, run.categories, saved, windows, evaluations, variants, summary)


def _evaluation(path: Path) -> dict[str, Any]:
    scores = read_json(path)
    per_class = scores.get("per_class")
    wrong = [name for name in SUMMARY if name not in scores or not _is_score(scores[name])]
    if not isinstance(per_class, dict) or not all(map(_is_score, per_class.values())):
        wrong.append("per_class")
    if not isinstance(scores.get("images"), int):
        wrong.append("images")
    if not isinstance(scores.get("settings", {}), dict):
        wrong.append("settings")
    if wrong:
        raise ConfigError(f"{path}: {wrong[0]} is not what an evaluation has there; score the run again (evaluate.py)")
    return scores


def _is_score(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and 0 <= value <= 1)


def _windows(path: Path) -> list[dict[str, Any]]:
    """The lines of the training; the last of a file that is being written may be half a line, and is left out."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    windows = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            values["step"] = int(values["step"])
        except (ValueError, LookupError, TypeError) as error:
            if number == len(lines):
                break
            raise ConfigError(f"{path}, line {number}: cannot be read: {type(error).__name__}: {error}") from None
        if values.get("event") == "train":
            windows.append(values)
    return windows


# Scores that COCO's evaluation server returned for a run on test-dev: RUN/evaluation/test_dev.json, written by the user.
#
# The file holds fractions, by the server's names (AP, AP_50, AP_75, AP_small, AP_medium, AP_large) or by those of
# RUN/evaluation/step_N.json (AP, AP50, AP75, APs, APm, APl). AP is required; other keys are ignored.

FILE = Path("evaluation") / "test_dev.json"
"""Within a run's folder."""
SERVER_NAMES = {
    "AP": "AP",
    "AP50": "AP_50",
    "AP75": "AP_75",
    "APs": "AP_small",
    "APm": "AP_medium",
    "APl": "AP_large",
}
"""The server's name of each score."""


def read_test_dev(run: Path) -> dict[str, float]:
    """Percent, by the names AP, AP50, AP75, APs, APm, APl; empty if the file does not exist.

    Raises ConfigError if the file is not a JSON object, lacks AP, or holds a score that is not a number from 0 to 1.
    """
    file = run / FILE
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:  # no JSON, no text, too deep, or a number of too many digits
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must hold an object of scores, not a {type(values).__name__}")
    scores = {}
    for name, server_name in SERVER_NAMES.items():
        for key in dict.fromkeys((name, server_name)):
            if key not in values:
                continue
            value = values[key]
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise ConfigError(f"{file}: {key}: invalid value {value!r}; must be a fraction from 0 to 1")
            if scores.setdefault(name, 100.0 * value) != 100.0 * value:
                raise ConfigError(f"{file}: {name} and {server_name} differ; keep one of them")
    if "AP" not in scores:
        raise ConfigError(
            f'{file}: AP is missing; it must hold the server\'s scores, as in {{"AP": 0.391, "AP50": 0.591}}'
        )
    return scores


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ConfigError where it is none."""
    try:
        value = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: must hold an object, not a {type(value).__name__}")
    return value
