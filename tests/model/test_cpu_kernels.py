"""The switch of the CPU kernels is read when a program is traced; programs that may be lowered for other devices choose
then."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from retina_jax import cpu
from retina_jax.config import Config
from retina_jax.config_io import from_dict, override, to_dict
from retina_jax.model.layers import convolve
from retina_jax.training.parallel import Driver
from retina_jax.training.step import Inputs, train_step

TINY = override(
    Config(),
    {
        "model.backbone": "resnet18", "model.base_width": 4, "model.stage_blocks": (1, 1, 1, 1), "model.max_level": 5,
        "model.fpn_channels": 8, "model.head_channels": 8, "model.head_convs": 1, "data.batch_size": 1, "devices": 1,
    },
)  # fmt: skip
X, KERNEL = jnp.ones((1, 4, 4, 32)), jnp.ones((1, 1, 32, 32))


def branches(function: Callable, *arguments: object) -> int:
    """Returns the number of choices by platform in a traced program."""
    return str(jax.make_jaxpr(function)(*arguments)).count("platform_index")


def gradients(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.grad(lambda x, kernel: convolve(x, kernel).sum(), (0, 1))(x, kernel)


def test_the_switch_decides_while_a_program_is_traced() -> None:
    program = jax.jit(convolve)
    assert cpu.enabled()  # the tests' backend is the CPU
    for on in (True, False, True):
        with cpu.kernels("cpu" if on else ""):
            assert cpu.enabled() == on
            assert ("dot_general" in str(program.trace(X, KERNEL).jaxpr)) == on
            assert ("dot_general" in str(jax.make_jaxpr(gradients)(X, KERNEL))) == on
            assert branches(gradients, X, KERNEL) == 0
    with cpu.kernels(None):
        assert cpu.enabled() and branches(gradients, X, KERNEL) > 0


def test_an_exported_program_has_a_form_for_cpus_and_a_plain_one() -> None:
    with cpu.kernels("exported"):
        program = export.export(jax.jit(convolve), platforms=("cpu", "cuda"))(X, KERNEL)
        assert branches(gradients, X, KERNEL) > 0
    text = program.mlir_module()
    assert "stablehlo.dot_general" in text and "stablehlo.convolution" in text
    np.testing.assert_allclose(program.call(X, KERNEL), convolve(X, KERNEL), rtol=1e-6)


def test_on_another_backend_no_program_has_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not cpu.enabled()
    assert branches(lambda x, kernel: convolve(x, kernel), X, KERNEL) == 0


def test_a_step_without_kernels_or_in_the_form_for_gpus_has_the_same_result() -> None:
    inputs = Inputs(
        images=np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8),
        image_sizes=np.full((1, 2), 64, np.int32),
        boxes_xyxy=np.array([[[8, 8, 40, 40]]], np.float32),
        labels=np.zeros((1, 1), np.int32),
        valid=np.ones(1, bool),
    )
    losses, by_xla = {}, {}
    for on in (True, False):
        driver = Driver(override(TINY, {"cpu_kernels": on}), 2)
        state, batch = driver.init_state(), driver.shard_batch(inputs)
        by_xla[on] = driver.step.lower(state, batch).as_text().count("stablehlo.convolution")
        _, metrics = driver.step(state, batch)
        losses[on] = [float(metrics[name]) for name in ("loss", "gradient_norm")]
    assert losses[False] == pytest.approx(losses[True], rel=1e-5)
    assert by_xla[True] < by_xla[False]
    parts = {"model": driver.model, "config": driver.config, "optimizer": driver.optimizer, "schedule": driver.schedule}
    with cpu.kernels("gpu"):
        _, metrics = jax.jit(partial(train_step, **parts, num_devices=1, axis_name=None))(driver.init_state(), inputs)
    assert [float(metrics[name]) for name in ("loss", "gradient_norm")] == pytest.approx(losses[True], rel=1e-5)


def test_configs_without_the_field_have_the_kernels() -> None:
    saved = to_dict(override(Config(), {"cpu_kernels": False}))
    assert not from_dict(saved).cpu_kernels
    del saved["cpu_kernels"]
    assert from_dict(saved).cpu_kernels


@pytest.mark.parametrize("first", [-1.5, np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stored_map_and_its_gradient_are_unchanged(first: float, dtype: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 5)), dtype).at[0, 0, 0, 0].set(first)
    x = x.at[1].set(0)
    for forms in ("cpu", "", "exported"):
        with cpu.kernels(forms):
            y, pullback = jax.vjp(jax.jit(cpu.stored), x)
            for found in (y, *pullback(x), jax.vmap(cpu.stored)(x[None])[0]):
                np.testing.assert_allclose(found.astype(np.float32), x.astype(np.float32), rtol=0, atol=1e-29)
            assert cpu.stored(x[:0]).shape == (0, 3, 4, 5)


def test_a_residual_network_computes_each_sum_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of operations grows linearly with the number of blocks."""

    def operations(blocks: int) -> float:
        config = override(TINY, {"model.stage_blocks": (1, 1, blocks, 1)})
        driver = Driver(config, 2)
        inputs = Inputs(
            images=np.zeros((1, 64, 64, 3), np.uint8), image_sizes=np.full((1, 2), 64, np.int32),
            boxes_xyxy=np.zeros((1, 1, 4), np.float32), labels=np.full((1, 1), -1, np.int32), valid=np.ones(1, bool),
        )  # fmt: skip
        program = driver.losses.lower(driver.init_state().variables, driver.shard_batch(inputs)).compile()
        return program.cost_analysis()["flops"]

    first, second, third = (operations(blocks) for blocks in (2, 4, 6))
    assert third - second == pytest.approx(second - first, rel=0.002)
    monkeypatch.setattr(cpu, "_stored", lambda x: x)
    first, second, third = (operations(blocks) for blocks in (2, 4, 6))
    assert third - second > 1.01 * (second - first)  # else `stored` is not needed
