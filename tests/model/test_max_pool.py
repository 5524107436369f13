"""The gradient of max pooling on the CPU, compared with XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

from retina_jax import cpu
from retina_jax.cpu.pooling import gradient
from retina_jax.model.layers import max_pool


def few_values(shape: tuple[int, ...], seed: int, values: int = 3) -> jax.Array:
    """Draws small integers, of which many windows hold several largest ones."""
    return jnp.asarray(np.random.default_rng(seed).integers(-values, values, shape), jnp.float32)


def gradient_by(form: str, x: jax.Array, dy: jax.Array) -> jax.Array:
    with cpu.kernels(form):
        return jax.jit(lambda x, dy: jax.vjp(max_pool, x)[1](dy)[0])(x, dy)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 1), (1, 5), (6, 9), (9, 6), (7, 2), (8, 8)])
def test_the_gradient_equals_xlas(height: int, width: int) -> None:
    x = few_values((20, height, width, 2), height)
    dy = few_values((20, -(-height // 2), -(-width // 2), 2), width, 9)
    np.testing.assert_array_equal(gradient_by("cpu", x, dy), gradient_by("", x, dy))


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_no_gradient_is_lost_in_windows_of_special_numbers(special: float) -> None:
    x, dy = few_values((8, 7, 7, 2), 0), few_values((8, 4, 4, 2), 1, 9)
    x = jnp.where(few_values(x.shape, 2) < -1, special, x).at[0].set(special)
    np.testing.assert_array_equal(gradient_by("cpu", x, dy).sum((1, 2)), dy.sum((1, 2)))


def test_the_gradient_in_bfloat16_equals_xlas() -> None:
    x, dy = (few_values(shape, 0).astype(jnp.bfloat16) for shape in ((2, 9, 8, 3), (2, 5, 4, 3)))
    found = gradient_by("cpu", x, dy)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found, gradient_by("", x, dy))


def test_the_form_is_that_of_cpus() -> None:
    x, dy = few_values((1, 6, 6, 2), 0), few_values((1, 3, 3, 2), 1)
    forms = {
        form: str(jax.make_jaxpr(lambda x, dy, form=form: gradient_by(form, x, dy))(x, dy)) for form in ("cpu", "")
    }
    assert "select_and_scatter" in forms[""] and "select_and_scatter" not in forms["cpu"]


def test_under_vmap_and_on_several_devices() -> None:
    x, dy = few_values((4, 2, 5, 6, 3), 0), few_values((4, 2, 3, 3, 3), 1)
    expected = [gradient_by("", *images) for images in zip(x, dy, strict=True)]
    np.testing.assert_array_equal(jax.vmap(gradient)(x, dy), expected)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    split = jax.shard_map(gradient, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    found = jax.jit(split)(x.reshape(8, 5, 6, 3), dy.reshape(8, 3, 3, 3))
    np.testing.assert_array_equal(found, jnp.concatenate(expected))


@pytest.mark.parametrize("batch", [1, 3])
def test_exported_with_a_symbolic_batch_size(batch: int) -> None:
    (b,) = export.symbolic_shape("b")
    x, dy = few_values((batch, 7, 4, 2), 0), few_values((batch, 4, 2, 2), 1)
    shapes = [jax.ShapeDtypeStruct((b, *a.shape[1:]), a.dtype) for a in (x, dy)]
    program = export.export(jax.jit(lambda x, dy: jax.vjp(max_pool, x)[1](dy)[0]), platforms=("cpu", "cuda"))(*shapes)
    assert "select_and_scatter" in program.mlir_module()  # for other devices
    np.testing.assert_array_equal(program.call(x, dy), gradient_by("", x, dy))
