"""The folder of a run without training: its files are real, its detections are generated from the ground truth."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from retina_jax.config import Config, DataConfig, ScenesConfig, TrainingConfig
from retina_jax.data.datasets import open_source
from retina_jax.evaluation.coco_scores import evaluate_coco
from retina_jax.runs.files import write_json
from retina_jax.runs.record import finish_run
from retina_jax.training.metrics import Metrics
from retina_jax.training.opening import open_run

STEPS = 40


@pytest.fixture
def tiny_run(tmp_path: Path) -> Path:
    """Writes a run of 40 steps, evaluated at 20 and 40 on 8 scenes of 3 classes, with errors of every kind."""
    scenes = ScenesConfig(
        folder=str(tmp_path / "scenes"), train_images=2, val_images=8, size=64, classes=3, max_side=30.0
    )
    data = DataConfig(source="scenes", scenes=scenes)
    training = TrainingConfig(steps=STEPS, tensorboard=False)
    config = Config(data=data, training=training)
    source = open_source(data, "val")
    run = open_run(tmp_path / "run", config, source.class_names, source.category_ids, source.sha256, 1)
    with Metrics(run, 0) as metrics:
        for step in range(1, STEPS + 1):
            of_step = {
                name: jnp.float32(1 / step) for name in ("loss", "classification_loss", "box_loss", "learning_rate")
            }
            of_step |= {name: jnp.float32(2.0) for name in ("gradient_norm", "parameter_norm", "positives_per_image")}
            metrics.add(step, {**of_step, "skipped": jnp.int32(0)}, [1], 0.001)
            if step % 5 == 0:
                metrics.flush()
            if step % 20 == 0:
                found = detections(source.ground_truth, list(source.category_ids), error=10 / step)
                scores = evaluate_coco(source.ground_truth, found, [record.image_id for record in source.records])
                write_json(run.path("detections", step), found)
                write_json(
                    run.path("evaluation", step),
                    {"step": step, "images": len(source), **scores.summary, "per_class": scores.per_class},
                )
        finish_run(run, STEPS, 12.0, "0" * 64)
    return run.folder


def detections(truth: dict, category_ids: list[int], error: float) -> list[dict]:
    """Returns up to two detections per object, shifted by `error` of its side, some of another class, and some on
    background."""
    rng, found = np.random.default_rng(0), []
    for a in truth["annotations"]:
        x, y, w, h = a["bbox"]
        for _ in range(rng.integers(0, 3)):
            moved = [x + error * w * rng.normal(), y + error * h * rng.normal(), w, h]
            category = a["category_id"] if rng.uniform() < 0.8 else int(rng.choice(category_ids))
            found.append({"image_id": a["image_id"], "category_id": category, "bbox": list(map(float, moved))})
        if rng.uniform() < 0.3:
            found.append({"image_id": a["image_id"], "category_id": a["category_id"], "bbox": [50.0, 50.0, 9.0, 9.0]})
    return [{**one, "score": float(score)} for one, score in zip(found, rng.uniform(0.05, 1, len(found)), strict=True)]
