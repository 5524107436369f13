"""Averaged parameters (EMA): the plain recurrence under every driver, restored exactly from checkpoints, absent if
switched off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import override
from retina_jax.detector import load_detector
from retina_jax.training.checkpoints import Checkpoints
from retina_jax.training.opening import open_run
from retina_jax.training.parallel import Driver
from retina_jax.training.state import TrainState, parameters_sha256
from retina_jax.training.step import Inputs, ema_decay

Make = Callable[..., Inputs]
DECAY = 0.2  # above the warm-up's 0.1 and 0.18, below its 0.25: both sides of the minimum occur


def averaged(config: Config, **changes: Any) -> Config:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return override(config, {"optimizer.ema_decay": DECAY, "devices": 2, **named})


@functools.cache
def driver_of(config: Config) -> Driver:
    return Driver(config, 3)


def learnt(state: TrainState) -> dict[str, Any]:
    return jax.device_get({"params": state.params, "stats": state.stats})


def assert_equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def assert_near(one: Any, other: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), jax.device_get(one), jax.device_get(other)
    )


@settings(max_examples=50, deadline=None)
@given(updates=st.integers(0, 10**6), decay=st.floats(0.001, 0.99999))
def test_the_decay_warms_up(updates: int, decay: float) -> None:
    got = float(ema_decay(jnp.int32(updates), decay))
    assert got == pytest.approx(min(decay, (1 + updates) / (10 + updates)), rel=1e-6)


WITH_STATISTICS = {"model__norm": "batch"}
IN_PARTS = {"parallel": "pmap", "training__accumulate": 2, "training__skip_non_finite": 1}


@pytest.fixture
def make_floats(make_inputs: Make) -> Make:
    """Returns float images, which can contain NaN."""

    def make(seed: int) -> Inputs:
        inputs = make_inputs(seed)
        return inputs._replace(images=inputs.images.astype(np.float32))

    return make


@pytest.mark.parametrize("own", [WITH_STATISTICS, IN_PARTS], ids=["jit", "pmap"])
def test_the_average_is_the_plain_recurrence(tiny: Config, make_floats: Make, own: dict[str, Any]) -> None:
    """The recurrence runs over the parameters and BatchNorm statistics after each step, in float64."""
    driver = driver_of(averaged(tiny, **own))
    state = driver.init_state()
    mean = jax.tree.map(np.float64, learnt(state))
    assert_equal(state.ema, learnt(state))
    for step in range(4):
        state, _ = driver.step(state, driver.shard_batch(make_floats(step)))
        d = min(DECAY, (1 + step) / (10 + step))
        mean = jax.tree.map(lambda m, x, d=d: d * m + (1 - d) * np.float64(x), mean, learnt(state))
    assert_near(state.ema, mean)
    assert bool(state.stats) == (own is WITH_STATISTICS)
    assert_equal(state.detector(), {**state.ema, "frozen": state.frozen})
    assert_equal(state.detector("raw"), state.variables)
    assert parameters_sha256(state.detector()) != parameters_sha256(state.detector("raw"))


def test_a_skipped_step_changes_neither_the_average_nor_its_warm_up(tiny: Config, make_floats: Make) -> None:
    driver = driver_of(averaged(tiny, **IN_PARTS))
    poisoned = make_floats(0)._replace(images=make_floats(0).images * np.float32(np.nan))
    state, _ = driver.step(driver.init_state(), driver.shard_batch(make_floats(0)))
    before = jax.device_get(state.ema)
    state, _ = driver.step(state, driver.shard_batch(poisoned))
    assert int(state.skipped) == 1
    assert_equal(state.ema, before)
    state, _ = driver.step(state, driver.shard_batch(make_floats(1)))
    second = 2 / 11  # the second update, of three steps
    assert_near(state.ema, jax.tree.map(lambda m, x: second * m + (1 - second) * x, before, learnt(state)))


def test_a_resumed_average_equals_the_uninterrupted_one_to_the_last_bit(
    tiny: Config, make_floats: Make, tmp_path: Path
) -> None:
    driver = driver_of(averaged(tiny, **WITH_STATISTICS))

    def train_on(state: TrainState, steps: range) -> TrainState:
        for step in steps:
            state, _ = driver.step(state, driver.shard_batch(make_floats(step)))
        return state

    unbroken = jax.device_get(train_on(driver.init_state(), range(4)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, train_on(driver.init_state(), range(2)))
        resumed = train_on(checkpoints.restore(driver.init_state()), range(2, 4))
    assert_equal(resumed, unbroken)
    assert parameters_sha256(resumed.all_parameters) == parameters_sha256(unbroken.all_parameters)


def test_a_loaded_detector_uses_the_averages_unless_raw_parameters_are_requested(tiny: Config, tmp_path: Path) -> None:
    config = averaged(tiny, devices=1)
    state = Driver(config, 3).init_state()
    state = state.replace(ema=jax.tree.map(lambda leaf: leaf + 1, state.ema))
    open_run(tmp_path, config, ("a", "b", "c"), (1, 2, 3))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(0, state)
    assert_equal(load_detector(tmp_path).variables, {**state.ema, "frozen": state.frozen})
    raw = override(config, {"detection.parameters": "raw"})
    assert_equal(load_detector(tmp_path, config=raw).variables, state.variables)


@flax.struct.dataclass
class StateBefore:
    """The state as it was saved before EMA existed."""

    step: Any
    params: Any
    frozen: Any
    stats: Any
    opt_state: Any
    normaliser: Any
    skipped: Any


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_runs_without_averages_read_checkpoints_from_before_ema(tiny: Config, tmp_path: Path, norm: str) -> None:
    driver = Driver(override(tiny, {"devices": 1, "model.norm": norm}), 3)
    state = driver.init_state()
    assert type(state) is TrainState and state.all_parameters == state.detector() == state.variables
    before = StateBefore(**{name: getattr(state, name) for name in StateBefore.__dataclass_fields__})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, before)
        assert_equal(checkpoints.restore(driver.init_state()), state)
        checkpoints.save(2, state)
        assert_equal(checkpoints.restore(before, 2), before)
        with pytest.raises(ConfigError, match=r"ema/params/.*: missing in the checkpoint"):
            checkpoints.restore(Driver(averaged(tiny, model__norm=norm), 3).init_state(), 1)
