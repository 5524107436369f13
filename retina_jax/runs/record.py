"""What a run has measured, read from its folder: metrics, evaluations, and the summary, which is written at its end."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retina_jax.config import Config, ConfigError
from retina_jax.data.classes import Category
from retina_jax.runs.files import DAMAGED, finite_json, read_json, write_json
from retina_jax.runs.folder import Run, read_run

SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of the scores of an evaluation, each a fraction from 0 to 1, or None if it is undefined."""
LARGEST = 1e300  # numbers beyond it are not finite, or would not be after arithmetic
EVALUATION = re.compile(r"step_([0-9]{8})(_[0-9a-f]{8})?\.json")
"""Names of evaluations; those with other settings than the run's (`evaluate.py`) have a hash after the step."""
TEST_DEV_FILE = Path("evaluation") / "test_dev.json"
"""Within a run's folder: scores of COCO's evaluation server on test-dev, which the user writes there."""
SERVER_NAMES = {"AP": "AP", "AP50": "AP_50", "AP75": "AP_75", "APs": "AP_small", "APm": "AP_medium", "APl": "AP_large"}
"""The server's name of each score."""


@dataclass(frozen=True)
class RunRecord:
    """The measurements of a run so far."""

    folder: Path
    config: Config
    categories: list[Category]  # id and name of each class
    saved: dict[str, Any]  # the contents of config.json: command, commit, versions, facts, changes
    windows: list[dict[str, Any]]  # the training lines of metrics.jsonl, by step
    validation: list[dict[str, Any]]  # the evaluation lines of metrics.jsonl, by step; `loss` is the validation loss
    evaluations: dict[int, dict[str, Any]]  # by step, the evaluations with the run's own settings
    variants: list[tuple[int, dict[str, Any]]]
    """(step, scores) of evaluations with other settings, by step; `settings` of the scores are those that differ."""
    summary: dict[str, Any] | None  # summary.json; None: the run has not ended

    @property
    def step(self) -> int:
        """The last step that is known of."""
        ended = [self.summary["steps"]] if self.summary else []
        return max([*ended, *(window["step"] for window in self.windows[-1:]), *self.evaluations, 0])


def read_record(folder: Path) -> RunRecord:
    """Returns the run in `folder`. Raises ConfigError, which names the file and field, if one is invalid."""
    run = read_run(folder)
    evaluations, variants = {}, []
    for path in sorted((folder / "evaluation").glob("*.json")):
        if match := EVALUATION.fullmatch(path.name):
            step, scores = int(match[1]), _evaluation(path)
            if match[2] or scores.get("settings"):
                variants.append((step, scores))
            else:
                evaluations[step] = scores
    lines = read_metrics(folder)
    windows, validation = ([line for line in lines if line.get("event") == kind] for kind in ("train", "evaluation"))
    path = folder / "summary.json"
    summary = read_json(path) if path.is_file() else None
    if summary is not None and not isinstance(summary.get("steps"), int):
        raise ConfigError(f"{path}: steps: invalid value {summary.get('steps')!r}; must be an integer")
    saved = read_json(folder / "config.json")
    return RunRecord(folder, run.config, run.categories, saved, windows, validation, evaluations, variants, summary)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl without non-finite numbers; not an incomplete last line; [] without a file. Raises
    ConfigError for a damaged line."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if not 0 <= (step := int(values["step"])) < 2**63:
                raise ValueError(f"step is {str(step)[:40]}")
            finite = {k: v for k, v in values.items() if not isinstance(v, int | float) or abs(v) < LARGEST}
            found.append({**finite, "step": step})
        except DAMAGED as error:
            if number < len(lines):
                raise ConfigError(f"{path}, line {number}: cannot be read: {type(error).__name__}: {error}") from None
    return found


def finish_run(
    run: Run, step: int, seconds: float, parameters_sha256: str, ended: str = "training.steps"
) -> dict[str, Any]:
    """Writes and returns RUN/summary.json: length, the field that `ended` training, last evaluation, and the checksum by
    which two runs are compared. Raises ConfigError if the evaluation is damaged."""
    evaluations = sorted((run.folder / "evaluation").glob(f"step_{'[0-9]' * 8}.json"))
    summary = {
        "steps": step,
        "images": step * run.config.data.batch_size,
        "seconds": round(seconds, 1),
        "ended": ended,
        "evaluation": _evaluation(evaluations[-1]) if evaluations else None,
        "parameters_sha256": parameters_sha256,
    }
    write_json(run.folder / "summary.json", summary)
    return summary


def _evaluation(path: Path) -> dict[str, Any]:
    scores = read_json(path)
    per_class = scores.get("per_class")
    valid = {name: name in scores and is_score(scores[name]) for name in SCORES}
    valid["per_class"] = isinstance(per_class, dict) and all(map(is_score, per_class.values()))
    valid["images"] = isinstance(scores.get("images"), int)
    valid["settings"] = isinstance(scores.get("settings", {}), dict)
    for name, is_valid in valid.items():
        if not is_valid:
            raise ConfigError(f"{path}: {name}: missing or invalid; evaluate the run again (evaluate.py)")
    return scores


def is_score(value: object) -> bool:
    """Returns whether this can be a score: a number from 0 to 1, or None."""
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)


def saved_scores(folder: Path, step: int) -> dict[str, Any]:
    """Returns the evaluation of a step with the run's own settings; {} if it was not evaluated, or the file is damaged."""
    try:
        scores = finite_json((folder / "evaluation" / f"step_{step:08d}.json").read_bytes())
    except DAMAGED:
        return {}
    return scores if isinstance(scores, dict) else {}


def f1_threshold(folder: Path, step: int) -> float | None:
    """Returns the score with the highest F1 in the evaluation of a step; None if there is no such number."""
    value = saved_scores(folder, step).get("f1_threshold")  # evaluations of earlier versions lack it
    return value if isinstance(value, float) and 0 <= value <= 1 else None


def read_test_dev(folder: Path) -> dict[str, float]:
    """Returns the scores of COCO's evaluation server in percent, by AP, AP50, AP75, APs, APm, APl; {} without the file. It
    holds fractions, by these names or the server's; AP is required, other keys are ignored. Raises ConfigError."""
    file = folder / TEST_DEV_FILE
    if not file.is_file():
        return {}
    values, scores = read_json(file), {}
    for name, server_name in SERVER_NAMES.items():
        given = {key: values[key] for key in (name, server_name) if key in values}
        for key, value in given.items():
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise ConfigError(f"{file}: {key}: invalid value {value!r}; must be a fraction from 0 to 1")
            scores[name] = 100.0 * value
        if len({*given.values()}) > 1:
            raise ConfigError(f"{file}: {name} and {server_name} differ; keep one of them")
    if "AP" not in scores:
        example = '{"AP": 0.391, "AP50": 0.591}'
        raise ConfigError(f"{file}: AP is missing; it must hold the server's scores, as in {example}")
    return scores
