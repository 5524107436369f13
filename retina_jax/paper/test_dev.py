"""Scores that COCO's evaluation server returned for a run on test-dev: RUN/evaluation/test_dev.json, written by the user.

The file holds fractions, by the server's names (AP, AP_50, AP_75, AP_small, AP_medium, AP_large) or by those of
RUN/evaluation/step_N.json (AP, AP50, AP75, APs, APm, APl). AP is required; other keys are ignored.
"""

from __future__ import annotations

import json
from pathlib import Path

from retina_jax.config import ConfigError

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
