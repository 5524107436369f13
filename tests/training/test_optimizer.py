"""The paper's schedule and update rule equal numbers computed by hand and a plain NumPy loop."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retina_jax.config import Config, ConfigError, OptimizerConfig
from retina_jax.config_io import override, validate, with_epochs
from retina_jax.training.optimizer import learning_rate_schedule, make_optimizer, rate_warning, schedule_warning

PAPER = OptimizerConfig()


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.01 / 3),
        (250, 0.01 * (1 / 3 + 2 / 3 * 250 / 500)),
        (499, 0.01 * (1 / 3 + 2 / 3 * 499 / 500)),
        (500, 0.01),
        (59_999, 0.01),
        (60_000, 0.001),
        (79_999, 0.001),
        (80_000, 0.0001),
        (89_999, 0.0001),
    ],
)
def test_the_learning_rate_is_that_of_the_paper(step: int, rate: float) -> None:
    np.testing.assert_allclose(learning_rate_schedule(PAPER, 16, 90_000)(step), rate, rtol=1e-5)


def test_the_learning_rate_scales_with_the_batch_only_on_request() -> None:
    scaled = dataclasses.replace(PAPER, scale_learning_rate=True)
    assert float(learning_rate_schedule(PAPER, 64, 90_000)(1000)) == pytest.approx(0.01)
    assert float(learning_rate_schedule(scaled, 64, 90_000)(1000)) == pytest.approx(0.04)
    assert float(learning_rate_schedule(scaled, 2, 90_000)(1000)) == pytest.approx(0.00125)


def test_no_warmup_starts_at_the_peak() -> None:
    assert float(learning_rate_schedule(dataclasses.replace(PAPER, warmup_steps=0), 16, 90_000)(0)) == pytest.approx(
        0.01
    )


@pytest.mark.parametrize(
    ("steps", "boundaries", "warmup", "named"),
    [
        (90_000, (60_000, 80_000), 500, None),
        (80_001, (60_000, 80_000), 500, None),
        (80_000, (60_000, 80_000), 500, "optimizer.boundaries 80000"),
        (300, (60_000, 80_000), 299, "optimizer.boundaries 60000 80000"),
        (300, (400,), 300, "optimizer.boundaries 400 and optimizer.warmup_steps 300"),
        (300, (), 300, "optimizer.warmup_steps 300"),
        (0, (), 0, None),
        (300, (), 0, None),
    ],
)
def test_a_run_that_is_too_short_for_its_schedule_is_refused_by_name(
    steps: int, boundaries: tuple[int, ...], warmup: int, named: str | None
) -> None:
    """Each number is the first step, counted from 0, with the new rate; the last step is steps - 1."""
    config = Config(optimizer=dataclasses.replace(PAPER, boundaries=boundaries, warmup_steps=warmup))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))
    said = schedule_warning(config)
    assert said == named or (named and said.startswith(f"{named}: not reached in training.steps {steps}"))
    assert ("--optimizer.boundaries 200 266" in (said or "")) == (steps == 300 and bool(boundaries))


@pytest.mark.parametrize("steps", [*range(1, 12), 90_000])
def test_the_advised_boundaries_are_accepted_and_reached(steps: int) -> None:
    config = override(Config(), {"training.steps": steps, "optimizer.boundaries": (steps, steps + 1)})
    advised = re.search(r"--optimizer.boundaries (\d+) (\d+)", schedule_warning(config))
    assert (advised is None) == (steps < 4)
    if advised:
        better = override(
            config, {"optimizer.boundaries": tuple(map(int, advised.groups())), "optimizer.warmup_steps": 0}
        )
        assert schedule_warning(validate(better)) is None


def follow(config: OptimizerConfig, gradients: list[dict], params: dict) -> dict:
    optimizer = make_optimizer(config, learning_rate_schedule(config, 16, 90_000))
    state = optimizer.init(params)
    for gradient in gradients:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params, gradient_norm=optax.tree.norm(gradient))
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("decay_biases", [False, True])
def test_sgd_is_decay_then_momentum_then_rate(decay_biases: bool) -> None:
    """Compares with a loop in NumPy float64; the rate drops by ten at step 3 and applies to the complete velocity at
    once."""
    config = dataclasses.replace(PAPER, warmup_steps=2, boundaries=(3,), weight_decay=0.1, decay_biases=decay_biases)
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=(2,))}
    gradients = [{k: rng.normal(size=v.shape) for k, v in start.items()} for _ in range(6)]

    expected, velocity = dict(start), {k: np.zeros_like(v) for k, v in start.items()}
    for step, gradient in enumerate(gradients):
        rate = 0.01 * (0.1 if step >= 3 else 1.0) * min(1.0, 1 / 3 + 2 / 3 * step / 2)
        for name in expected:
            decay = 0.1 if name == "kernel" or decay_biases else 0.0
            velocity[name] = 0.9 * velocity[name] + gradient[name] + decay * expected[name]
            expected[name] = expected[name] - rate * (2.0 if name == "bias" else 1.0) * velocity[name]

    to32 = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
    got = follow(config, [to32(g) for g in gradients], to32(start))
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("decay_biases", [False, True])
def test_normalisation_parameters_never_decay(decay_biases: bool) -> None:
    """This corresponds to detectron2's WEIGHT_DECAY_NORM 0 and torchvision v2's --norm-weight-decay 0; it includes the
    bias of a norm."""
    config = dataclasses.replace(PAPER, weight_decay=0.5, warmup_steps=0, decay_biases=decay_biases)
    two = jnp.array([2.0])
    params = {"conv": {"kernel": two, "bias": two}, "plain": {"kernel": two}, "norm": {"scale": two, "bias": two}}
    moved = follow(config, [jax.tree.map(jnp.zeros_like, params)], params)
    decayed = jax.tree.map(lambda before, after: bool((before != after).all()), params, moved)
    assert decayed == {
        "conv": {"kernel": True, "bias": decay_biases},
        "plain": {"kernel": True},
        "norm": {"scale": False, "bias": False},
    }


def test_clipping_bounds_the_gradient_before_decay() -> None:
    config = dataclasses.replace(
        PAPER, clip_norm=1.0, weight_decay=0.5, warmup_steps=0, momentum=0.0, bias_learning_rate_factor=1.0
    )
    params = {"kernel": jnp.array([2.0, 0.0])}
    got = follow(config, [{"kernel": jnp.array([30.0, 40.0])}], params)
    np.testing.assert_allclose(got["kernel"], [2.0 - 0.01 * (0.6 + 1.0), -0.01 * 0.8], rtol=1e-6)


def test_adamw_equals_optax_adamw() -> None:
    config = dataclasses.replace(
        PAPER, name="adamw", learning_rate=1e-3, weight_decay=0.05, warmup_steps=0, bias_learning_rate_factor=1.0,
        decay_biases=True,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    params = {"kernel": jnp.asarray(rng.normal(size=(4,)), jnp.float32)}
    gradients = [{"kernel": jnp.asarray(rng.normal(size=(4,)), jnp.float32)} for _ in range(5)]
    reference = optax.adamw(1e-3, weight_decay=0.05)
    state, expected = reference.init(params), params
    for gradient in gradients:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = reference.update(gradient, state, expected)
        expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(follow(config, gradients, params)["kernel"], expected["kernel"], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["piecewise", "cosine", "constant"])
def test_each_schedule_is_its_formula_times_the_warm_up(schedule: str) -> None:
    config = dataclasses.replace(PAPER, schedule=schedule, warmup_steps=4, warmup_factor=0.25, boundaries=(6, 8))
    rate = learning_rate_schedule(config, 16, 10)
    for step in range(11):
        shape = {"piecewise": 0.1 ** ((step >= 6) + (step >= 8)), "cosine": (1 + math.cos(math.pi * step / 10)) / 2}
        expected = 0.01 * shape.get(schedule, 1.0) * min(1.0, 0.25 + 0.75 * step / 4)
        np.testing.assert_allclose(rate(step), expected, rtol=1e-5, atol=1e-9)


def test_boundaries_are_not_checked_where_no_schedule_uses_them() -> None:
    assert "boundaries" in (schedule_warning(override(Config(), {"training.steps": 501})) or "")
    assert schedule_warning(override(Config(), {"training.steps": 501, "optimizer.schedule": "cosine"})) is None


@pytest.mark.parametrize(
    ("rate", "batch_size", "changes", "fitting"),
    [
        (0.01, 16, {}, None),
        (0.01, 4, {}, None),
        (0.01, 2, {}, "0.00125"),
        (0.01, 256, {}, "0.16"),
        (0.00125, 2, {}, None),
        (0.01, 2, {"optimizer.scale_learning_rate": True}, None),
        (0.001, 2, {"optimizer.name": "adamw"}, None),
        (0.0, 2, {}, None),
    ],
)
def test_a_rate_that_does_not_fit_the_batch_is_named_with_one_that_does(
    rate: float, batch_size: int, changes: dict, fitting: str | None
) -> None:
    config = override(Config(), {"optimizer.learning_rate": rate, "data.batch_size": batch_size, **changes})
    warning = rate_warning(config)
    assert (warning is None) == (fitting is None)
    if warning:
        assert f"--optimizer.learning-rate {fitting} " in warning
        assert rate_warning(override(config, {"optimizer.learning_rate": float(fitting)})) is None


@pytest.mark.parametrize(
    ("epochs", "images", "batch_size", "steps"),
    [(12.0, 117_266, 16, 87_950), (1.0, 64, 8, 8), (0.7, 10, 1, 7), (1.0, 65, 8, 9), (0.5, 5, 1, 3)],
)
def test_the_last_step_of_the_epochs_is_the_first_that_completes_them(
    epochs: float, images: int, batch_size: int, steps: int
) -> None:
    changes = {"training.epochs": epochs, "optimizer.boundary_epochs": (epochs, 2 * epochs)}
    config = with_epochs(override(Config(), {"data.batch_size": batch_size, **changes}), images)
    assert config.training.steps == config.optimizer.boundaries[0] == steps
    assert with_epochs(config, images) == config == validate(config)
    assert with_epochs(Config(), images) == Config()


def test_boundaries_at_one_step_are_refused() -> None:
    config = override(Config(), {"optimizer.boundary_epochs": (0.4, 0.45), "data.batch_size": 4})
    with pytest.raises(ConfigError, match=r"optimizer.boundary_epochs: invalid value \(0.4, 0.45\)"):
        with_epochs(config, 24)
    assert with_epochs(config, 240).optimizer.boundaries == (24, 27)
