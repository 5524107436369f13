"""What an exported file says about its detector: facts for programs, and a model card for people."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import jax

from retina_jax.detector import Detector
from retina_jax.runs.folder import read_run
from retina_jax.runs.record import SCORES, saved_scores
from retina_jax.training.opening import code_commit, package_versions
from retina_jax.training.state import parameters_sha256

CARD = "model_card.md"
SETTINGS = ("short_side", "long_side", "size_rounding", "resize", "resize_rule", "pixels")  # of `data`


def facts(detector: Detector, source: str, renew: str, licence: str = "") -> dict[str, Any]:
    """Returns the facts about a detector that was loaded from `source` and that the command `renew` exports again. Scores
    are those of its step in the run's evaluation; they and the checksum of the data are None for imported weights."""
    data, detection, folder = detector.config.data, detector.config.detection, Path(source)
    run = read_run(folder) if (folder / "config.json").is_file() else None
    scores = saved_scores(folder, detector.step) if run else {}
    return {
        "source": source,
        "step": detector.step,
        "class_names": list(detector.shown_names),
        "category_ids": list(detector.category_ids),
        **{key: getattr(data, key) for key in SETTINGS},
        "bits": None if data.bits == "auto" else data.bits,
        **{key: getattr(detection, key) for key in ("max_detections", "score_threshold")},
        "f1_threshold": detector.f1_threshold,
        "scores": {key: scores[key] for key in (*SCORES, "images") if key in scores} or None,
        "licence": licence or None,
        "data_sha256": run.data_sha256 if run else None,
        "parameters_sha256": parameters_sha256(jax.device_get(detector.variables)),
        "commit": code_commit(),
        "versions": package_versions(),
        "exported": date.today().isoformat(),
        "renew": renew,
    }


def card(facts: dict[str, Any]) -> str:
    """Returns the model card, Markdown, of these facts."""
    scores, threshold = facts["scores"] or {}, facts["f1_threshold"]
    measured = [f"{name} {scores[name]:.3f}" for name in SCORES[:3] if scores.get(name) is not None]
    best = "" if threshold is None else f"; the highest F1 is at {threshold:.3f}"
    until = facts.get("renew_before")
    rows = {
        "source": f"{facts['source']}, step {facts['step']}",
        "classes": ", ".join(facts["class_names"]),
        "input": f"RGB images like those of the training, uint8, of any size; the file resizes them to a short side of "
        f"{facts['short_side']} pixels, or a long side of {facts['long_side']} if smaller ({facts['resize']})",
        "output": f"at most {facts['max_detections']} boxes per image, x1 y1 x2 y2 in pixels of the image",
        "scores": f"{', '.join(measured)} on {scores.get('images')} validation images, with the settings of the run"
        if measured
        else "not measured",
        "threshold": f"scores above {facts['score_threshold']:g} are returned{best}",
        "licence": facts["licence"] or "not stated",
        "training data, SHA-256": facts["data_sha256"] or "unknown",
        "parameters, SHA-256": facts["parameters_sha256"],
        "exported": f"{facts['exported']}, with " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()),
        "expiry": f"renew before {until}; a newer jax may not read it later" if until else "none",
        "renew with": f"`{facts['renew']}`",
    }
    lines = [f"| {name} | {' '.join(text.split()).replace('|', chr(92) + '|')} |" for name, text in rows.items()]
    return "\n".join(["# Model card", "", "| | |", "|---|---|", *lines, ""])
