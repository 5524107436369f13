"""configs/strong_r50_800.py differs from torchvision's recipe only as documented, and takes steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from retina_jax.config_io import load_config, override, validate
from retina_jax.presets import PRESETS
from retina_jax.training.parallel import Driver
from retina_jax.training.state import AveragedState
from retina_jax.training.step import Inputs

CONFIG = Path(__file__).parents[2] / "configs" / "strong_r50_800.py"
OWN = (
    "anchors.style",
    "data.buckets",
    "data.pixels",
    "data.size_rounding",
    "detection.max_detections",
)
"""Conventions in which the recipe follows this project instead of torchvision."""


def test_the_strong_recipe_equals_torchvisions_except_for_conventions() -> None:
    config = validate(load_config(CONFIG))
    preset = {name: value for name, value in PRESETS["torchvision_v2"].items() if name not in OWN}
    assert override(config, preset) == config
    assert all(override(config, {name: PRESETS["torchvision_v2"][name]}) != config for name in OWN)
    published = load_config(CONFIG.with_name("torchvision_v2_r50_800.py"))
    assert (config.training, config.optimizer.boundaries) == (published.training, published.optimizer.boundaries)
    assert config.optimizer.ema_decay > 0


@pytest.mark.slow
def test_the_strong_recipe_takes_two_finite_steps(make_inputs: Callable[..., Inputs]) -> None:
    """The network is narrow and shallow here, on two devices."""
    small = {
        "model.backbone": "resnet18", "model.base_width": 4, "model.stage_blocks": (1, 1, 1, 1), "model.fpn_channels": 8,
        "model.head_channels": 8, "model.head_convs": 1, "model.num_classes": 3, "model.min_level": 5, "model.max_level": 6,
        "data.batch_size": 4, "data.max_boxes": 4, "devices": 2,
    }  # fmt: skip
    driver = Driver(validate(override(load_config(CONFIG), small)), 3)
    state = driver.init_state()
    assert isinstance(state, AveragedState)
    before = jax.device_get(state)
    for seed in range(2):
        state, measured = driver.step(state, driver.shard_batch(make_inputs(seed, batch_size=4)))
        assert all(np.isfinite(value) for value in measured.values())
        assert measured["loss"] > 0 and measured["gradient_norm"] > 0
    after = jax.device_get(state)
    for kind in ("params", "stats", "ema"):
        pairs = zip(jax.tree.leaves(getattr(before, kind)), jax.tree.leaves(getattr(after, kind)), strict=True)
        assert sum(not np.array_equal(a, b) for a, b in pairs) > 5, kind
    jax.tree.map(np.testing.assert_array_equal, after.frozen, before.frozen)
