"""A network small enough to train in a test, and batches for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from retina_jax.config import Config, OptimizerConfig
from retina_jax.config_io import override
from retina_jax.training.step import Inputs


@pytest.fixture
def tiny() -> Config:
    """ResNet-18 of width 8 with one block per stage, P4 and P5, heads of their last convolution only.

    Its norms are constant: tracing and compiling a step then takes half the time that it takes with GroupNorm.
    """
    return override(
        Config(optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2, boundaries=(4,))),
        {
            "data.batch_size": 8,
            "data.max_boxes": 4,
            "model.backbone": "resnet18",
            "model.base_width": 8,
            "model.stage_blocks": (1, 1, 1, 1),
            "model.norm": "frozen",
            "model.frozen_stages": 0,
            "model.min_level": 4,
            "model.max_level": 5,
            "model.fpn_channels": 8,
            "model.head_channels": 8,
            "model.head_convs": 0,
            "model.num_classes": 3,
            "anchors.size_factor": 1.0,
        },
    )


@pytest.fixture
def make_inputs() -> Callable[..., Inputs]:
    """Returns random images with 0 to 3 boxes each; the first image has none."""

    def make(seed: int, batch_size: int = 8, canvas: tuple[int, int] = (64, 64), classes: int = 3) -> Inputs:
        rng = np.random.default_rng(seed)
        height, width = canvas
        boxes = np.zeros((batch_size, 4, 4), np.float32)
        labels = np.full((batch_size, 4), -1, np.int32)
        for row in range(1, batch_size):
            for g in range(rng.integers(1, 4)):
                x, y = rng.uniform(0, width / 2), rng.uniform(0, height / 2)
                boxes[row, g] = x, y, x + rng.uniform(12, width / 2), y + rng.uniform(12, height / 2)
                labels[row, g] = rng.integers(classes)
        return Inputs(
            images=rng.integers(0, 256, (batch_size, height, width, 3)).astype(np.uint8),
            image_sizes=np.tile(np.array([[height, width]], np.int32), (batch_size, 1)),
            boxes_xyxy=boxes,
            labels=labels,
            valid=np.ones((batch_size,), bool),
        )

    return make
