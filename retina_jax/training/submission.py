"""Detections as COCO's evaluation server takes them, for images whose labels are not public (test-dev)."""

from __future__ import annotations

import json
from pathlib import Path

from retina_jax import hosts
from retina_jax.training.run import Run, write_json


def write_submission(run: Run, step: int, variant: str, annotations: str) -> Path:
    """Writes RUN/detections/detections_<split>_<run>_results.json from what `assess` wrote there; returns its path.

    The split is the name of the file `annotations` (image_info_test-dev2017.json: test-dev2017). Coordinates are rounded to
    hundredths of a pixel, scores to six digits. An earlier submission of the run is replaced.
    """
    split = Path(annotations).stem.removeprefix("image_info_")
    path = run.folder / "detections" / f"detections_{split}_{run.folder.resolve().name}_results.json"
    if hosts.first():
        results = json.loads(run.path("detections", step, f"{variant}.json").read_text())
        rounded = [
            {**r, "bbox": [round(side, 2) for side in r["bbox"]], "score": round(r["score"], 6)} for r in results
        ]
        write_json(path, rounded, indent=None)
    return path
