"""The newest evaluation gone through once more, box by box: its detections beside the truth of the run's data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from retina_jax.classes import unique_names
from retina_jax.coco_scores import Found, Truth, coco_curves, coco_stats
from retina_jax.config_files import override
from retina_jax.data.source import Source
from retina_jax.data.sources import open_source
from retina_jax.evaluation import EvaluationError, check, in_arrays
from retina_jax.run_page.error_breakdown import Errors, sort_errors
from retina_jax.run_page.record import Record

RESULT = {"image_id", "category_id", "bbox", "score"}
"""What a detection has in COCO's results format."""


@dataclass(frozen=True, eq=False)
class Findings:
    """Detections and truth of the evaluated images; category k is `names[k]`, image i is record `rows[i]` of the source."""

    step: int
    source: Source
    names: tuple[str, ...]
    truth: Truth
    found: Found
    errors: Errors
    precision: Float[np.ndarray, "10 101 K"]
    """By IoU, recall and category; -1 where a category has no truth."""
    rows: tuple[int, ...]
    note: str
    """Where the scores now are not those of the evaluation: what that may come from. Else empty."""


def find(record: Record) -> Findings:
    """The findings of the newest evaluation.

    Raises PlainError (ConfigError, DataError, EvaluationError), one line, where there is no evaluation, its detections are
    gone, the data cannot be opened, or the detections are not of this data.
    """
    if not record.evaluations:
        raise EvaluationError(f"{record.folder / 'evaluation'}: holds no evaluation yet")
    step, scores = max(record.evaluations.items())
    path = record.folder / "detections" / f"step_{step:08d}.json"
    try:
        detections = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from None
    if not isinstance(detections, list) or not all(isinstance(d, dict) and d.keys() >= RESULT for d in detections):
        raise EvaluationError(f"{path}: must be a list of COCO results ({', '.join(sorted(RESULT))})")
    source = _open(record)
    # As `assess` has it: the first images of the split.
    rows = {source.records[row].image_id: row for row in range(min(scores["images"], len(source)))}
    image_ids = sorted(rows)
    check(source.truth, detections, image_ids, None)
    truth, found, categories = in_arrays(source.truth, detections, image_ids)
    curves = coco_curves(truth, found, categories)
    now, then = float(coco_stats(curves)[0]), scores["AP"]
    same = abs(now - (-1.0 if then is None else then)) < 1e-6
    note = (
        ""
        if same
        else (
            f"AP of the saved detections on the data of today is {now:.4f}, the evaluation had {then}: the data has changed "
            "since, or the detections are of another evaluation at this step."
        )
    )
    return Findings(
        step,
        source,
        unique_names(sorted(source.categories)),
        truth,
        found,
        sort_errors(truth, found),
        curves.precision[..., 0, -1],
        tuple(rows[image_id] for image_id in image_ids),
        note,
    )


def _open(record: Record) -> Source:
    """The evaluation data; where only the folder of its images is gone, their truth all the same."""
    config, data = record.config, record.config.data
    if data.source == "coco" and not Path(data.val_images).is_dir() and Path(data.val_annotations).is_file():
        # Any folder does: that its images cannot be read is found, and said, when they are to be drawn.
        config = override(config, {"data.val_images": str(Path(data.val_annotations).parent)})
    return open_source(config.data, "val", record.categories)
