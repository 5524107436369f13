"""Checkpoints: what is saved comes back to the bit, on any number of devices, and the right ones are kept."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from retina_jax.config import Config, ConfigError
from retina_jax.config_files import override
from retina_jax.training.checkpoints import Checkpoints
from retina_jax.training.parallel import Driver
from retina_jax.training.state import TrainState, parameters_sha256


def state_of(config: Config, devices: int, step: int = 0) -> TrainState:
    driver = Driver(override(config, {"devices": devices}), 3)
    state = driver.first_state()
    return driver.place_state(
        state.replace(step=np.asarray(step, np.int32), normaliser=np.asarray(step / 7, np.float32))
    )


def test_a_state_comes_back_to_the_bit_on_other_devices(tiny: Config, tmp_path: Path) -> None:
    saved = state_of(tiny, 8, step=5)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, saved)
    other = state_of(override(tiny, {"seed": 1}), 2)
    assert parameters_sha256(other.variables) != parameters_sha256(saved.variables)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore(other)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(saved), jax.device_get(restored))
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)} == {2}


def test_the_newest_and_the_best_are_kept(tiny: Config, tmp_path: Path) -> None:
    state = state_of(tiny, 1)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step, ap in ((1, 0.1), (2, 0.5), (3, None), (4, 0.3), (5, None), (6, 0.2), (7, None)):
            checkpoints.save(step, state, ap)
            checkpoints.wait()
        assert checkpoints.steps() == [2, 6, 7]
        assert checkpoints.best() == 2
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.steps() == [2, 6, 7] and checkpoints.best() == 2


def test_saving_the_same_step_again_changes_nothing(tiny: Config, tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state_of(tiny, 1, step=3))
        checkpoints.wait()
        checkpoints.save(3, state_of(tiny, 1, step=9))
        checkpoints.wait()
        assert int(checkpoints.restore(state_of(tiny, 1)).step) == 3


def test_a_missing_step_says_which_there_are(tiny: Config, tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with pytest.raises(ConfigError, match="holds no checkpoint"):
            checkpoints.restore(state_of(tiny, 1))
        checkpoints.save(3, state_of(tiny, 1))
        checkpoints.wait()
        with pytest.raises(ConfigError, match=r"--step 4: .* holds 3"):
            checkpoints.restore(state_of(tiny, 1), 4)


def test_checksum_sees_every_bit_and_name() -> None:
    one = {"params": {"a": np.zeros((2, 3), np.float32), "b": np.ones(3, np.float32)}, "frozen": {}, "stats": {}}
    same = {"stats": {}, "frozen": {}, "params": {"b": np.ones(3, np.float32), "a": np.zeros((2, 3), np.float32)}}
    assert parameters_sha256(one) == parameters_sha256(same)
    flipped = np.ones(3, np.float32)
    flipped[2] = np.nextafter(np.float32(1), np.float32(2))
    for other in (
        {**one, "params": {**one["params"], "b": flipped}},
        {**one, "params": {"a": np.zeros((3, 2), np.float32), "b": one["params"]["b"]}},
        {**one, "params": {"a": one["params"]["a"], "c": one["params"]["b"]}},
        {**one, "frozen": {"c": one["params"]["b"]}},
    ):
        assert parameters_sha256(other) != parameters_sha256(one)
