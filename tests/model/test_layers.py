"""Convolution and norm: padding, strides, groups, statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retina_jax import cpu
from retina_jax.model.layers import Conv, Norm, batch_moments, convolve, group_moments, largest_divisor


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def reference_conv(x: np.ndarray, kernel: np.ndarray, stride: int, pad: int) -> np.ndarray:
    """Applies PyTorch's definition: pads zeros on all sides; floor((n + 2 pad - k) / stride) + 1 positions."""
    k = kernel.shape[0]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = (range(0, n - k + 1, stride) for n in x.shape[1:3])
    out = [[np.einsum("bijc,ijcd->bd", x[:, r : r + k, c : c + k], kernel) for c in columns] for r in rows]
    return np.array(out).transpose(2, 0, 1, 3)


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.parametrize(("k", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_padding_is_half_the_kernel_on_all_sides(size: tuple[int, int], k: int, stride: int) -> None:
    x, kernel, bias = draw(2, *size, 3), draw(k, k, 3, 4, seed=1), draw(4, seed=2)
    conv = Conv(4, k, stride, bias=True)
    out = conv.apply({"params": {"kernel": kernel, "bias": bias}}, jnp.asarray(x))
    np.testing.assert_allclose(out, reference_conv(x, kernel, stride, k // 2) + bias, rtol=1e-4, atol=1e-4)


def test_same_padding_would_shift_a_strided_convolution() -> None:
    """This is the reason for explicit padding: on even sides XLA's SAME gives other numbers."""
    x, kernel = jnp.asarray(draw(1, 8, 8, 3)), draw(3, 3, 3, 4, seed=1)
    ours = Conv(4, 3, 2).apply({"params": {"kernel": kernel}}, x)
    same = jax.lax.conv_general_dilated(
        x, jnp.asarray(kernel), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert ours.shape == same.shape
    assert np.abs(ours - same).max() > 1


@pytest.mark.parametrize("k", [1, 3])
def test_grouped_convolution_is_a_block_diagonal_one(k: int) -> None:
    groups, width = 4, 3
    x, kernel = jnp.asarray(draw(2, 6, 6, groups * width)), draw(k, k, width, groups * 2, seed=1)
    dense = np.zeros((k, k, groups * width, groups * 2), np.float32)
    for g in range(groups):
        dense[:, :, g * width : (g + 1) * width, g * 2 : (g + 1) * 2] = kernel[..., g * 2 : (g + 1) * 2]
    grouped = Conv(groups * 2, k, groups=groups).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(
        grouped, Conv(groups * 2, k).apply({"params": {"kernel": dense}}, x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("k", "stride", "groups", "channels", "features"),
    [
        (1, 1, 1, 128, 130),
        (1, 2, 1, 128, 128),
        (3, 1, 1, 128, 5),
        (3, 2, 1, 128, 8),
        (3, 1, 32, 256, 256),
        (3, 2, 2, 256, 8),
    ],
)
def test_the_forms_for_tpus_equal_the_plain_convolution(
    k: int, stride: int, groups: int, channels: int, features: int
) -> None:
    x, kernel = jnp.asarray(draw(2, 5, 6, channels)), jnp.asarray(draw(k, k, channels // groups, features, seed=1))
    found, programs = [], set()
    for platform in ("tpu", ""):
        with cpu.kernels(platform):

            def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
                return jnp.square(convolve(x, kernel, stride, groups)).sum()

            value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, kernel)
            found.append((value, *gradients))
            programs.add(str(jax.make_jaxpr(lambda x, kernel: convolve(x, kernel, stride, groups))(x, kernel)))
    for got, expected in zip(*found, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)
    assert len(programs) == 2


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("name", ["bias", "norm/bias"])
def test_the_gradient_of_a_bias_is_summed_in_float32(platform: str, name: str) -> None:
    """GPUs add bfloat16 numbers in bfloat16: a sum of many would not grow any more."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            if name == "bias":
                return Conv(5, 3, bias=True, dtype=jnp.dtype("bfloat16"))(x)
            norm = Norm("frozen_statistics", dtype=jnp.dtype("bfloat16"))
            return norm(x, conv=Conv(5, 3, dtype=jnp.dtype("bfloat16"), name="conv"))

    x = jnp.ones((2, 40, 40, 3), jnp.bfloat16)
    variables = Layer().init(jax.random.key(0), x)
    frozen = {kind: value for kind, value in variables.items() if kind != "params"}
    with cpu.kernels(platform):
        jaxpr = str(
            jax.make_jaxpr(
                jax.grad(lambda params: Layer().apply({"params": params, **frozen}, x).astype(jnp.float32).sum())
            )(variables["params"])
        )
    assert "f32[5] = reduce_sum" in jaxpr
    assert "bf16[5] = reduce_sum" not in jaxpr


def test_frozen_weights_are_in_a_separate_collection() -> None:
    x = jnp.zeros((1, 4, 4, 2))
    assert set(Conv(3, 3, bias=True).init(jax.random.key(0), x)) == {"params"}
    assert set(Conv(3, 3, bias=True, frozen=True).init(jax.random.key(0), x)) == {"frozen"}
    for kind, frozen, collections in [
        ("frozen", False, {"frozen"}),
        ("frozen", True, {"frozen"}),
        ("group", False, {"params"}),
        ("group", True, {"frozen"}),
        ("batch", False, {"params", "stats"}),
        ("batch", True, {"frozen"}),
    ]:
        assert set(Norm(kind, frozen=frozen).init(jax.random.key(0), x)) == collections


@given(number=st.integers(1, 300), at_most=st.integers(1, 64))
@settings(max_examples=50, deadline=None)
def test_largest_divisor_divides_and_no_larger_one_does(number: int, at_most: int) -> None:
    found = largest_divisor(number, at_most)
    assert number % found == 0 and found <= at_most
    assert all(number % d for d in range(found + 1, min(number, at_most) + 1))


def test_frozen_norm_is_the_affine_of_batch_norm_in_evaluation() -> None:
    x = draw(2, 3, 3, 4)
    weights = {name: draw(4, seed=i) for i, name in enumerate(("scale", "bias", "mean"), 1)}
    weights["var"] = np.square(draw(4, seed=9)) + np.float32(0.1)
    expected = (x - weights["mean"]) / np.sqrt(weights["var"] + 1e-5) * weights["scale"] + weights["bias"]
    frozen = Norm("frozen").apply({"frozen": weights}, jnp.asarray(x), train=True)
    np.testing.assert_allclose(frozen, expected, rtol=1e-5, atol=1e-5)
    split = {"params": {k: weights[k] for k in ("scale", "bias")}, "stats": {k: weights[k] for k in ("mean", "var")}}
    np.testing.assert_allclose(Norm("batch").apply(split, jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)
    batch_frozen = Norm("batch", frozen=True).apply({"frozen": weights}, jnp.asarray(x), train=True)
    np.testing.assert_array_equal(batch_frozen, frozen)
    fixed = {"params": split["params"], "frozen": split["stats"]}
    y, updated = Norm("frozen_statistics").apply(fixed, jnp.asarray(x), train=True, mutable=["stats"])
    np.testing.assert_array_equal(y, frozen)
    assert not updated.get("stats")
    shapes = jax.eval_shape(Norm("frozen_statistics").init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, fixed)


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 24), (16, 16)])
def test_group_norm_equals_flax(channels: int, groups: int) -> None:
    x = jnp.asarray(3 * draw(2, 5, 7, channels) + 2)
    weights = {"scale": draw(channels, seed=1), "bias": draw(channels, seed=2)}
    ours = Norm("group", 32).apply({"params": weights}, x)
    with jax.numpy_rank_promotion("allow"):
        theirs = nn.GroupNorm(groups, epsilon=1e-5).apply({"params": weights}, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@given(
    shape=st.sampled_from([(1, 1, 1), (3, 4, 5)]),  # few shapes: each is compiled
    groups=st.sampled_from([1, 2, 6]),
    offset=st.floats(-5, 5),
    scale=st.floats(0.1, 10),
)
@settings(max_examples=25, deadline=None)
def test_moments_are_mean_and_variance(shape: tuple[int, int, int], groups: int, offset: float, scale: float) -> None:
    x = np.float32(scale) * (draw(*shape, 6) + np.float32(offset))
    mean, var = group_moments(jnp.asarray(x), groups)
    grouped = x.astype(np.float64).reshape(shape[0], -1, groups, 6 // groups)
    np.testing.assert_allclose(mean[:, 0, 0, :: 6 // groups], grouped.mean((1, 3)), rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(var[:, 0, 0, :: 6 // groups], grouped.var((1, 3)), rtol=1e-3, atol=1e-4 * scale**2)
    mean, var = batch_moments(jnp.asarray(x), None)
    np.testing.assert_allclose(mean[0, 0, 0], x.astype(np.float64).mean((0, 1, 2)), rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(var[0, 0, 0], x.astype(np.float64).var((0, 1, 2)), rtol=1e-3, atol=1e-4 * scale**2)


def test_batch_norm_normalises_and_moves_its_running_statistics_a_tenth() -> None:
    x = 3 * draw(4, 5, 5, 2) + np.float32(7)
    norm = Norm("batch")
    variables = norm.init(jax.random.key(0), jnp.asarray(x))
    y, updates = norm.apply(variables, jnp.asarray(x), train=True, mutable=["stats"])
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var((0, 1, 2)), 1, rtol=1e-4)
    np.testing.assert_allclose(updates["stats"]["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(updates["stats"]["var"], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-4)


def test_norm_computes_in_float32_and_returns_its_dtype() -> None:
    x = jnp.asarray(100 + draw(2, 4, 4, 8), jnp.bfloat16)
    norm = Norm("group", 2, dtype=np.dtype("bfloat16"))
    variables = norm.init(jax.random.key(0), x)
    y = norm.apply(variables, x)
    exact = Norm("group", 2).apply(variables, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("kind", ["frozen", "frozen_statistics", "batch"])
def test_a_known_norm_multiplies_the_kernel_or_the_outputs(kind: str, platform: str) -> None:
    """On CPUs a frozen norm multiplies the convolution's result and not the kernel; all others do the reverse."""

    class Both(nn.Module):
        folded: bool

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            conv, norm = Conv(6, 3, name="conv"), Norm(kind, name="norm")
            return norm(x, conv=conv) if self.folded else norm(conv(x))

    x = jnp.asarray(draw(2, 5, 6, 4))
    variables = jax.tree.map(
        lambda a: jnp.abs(jnp.asarray(draw(*a.shape, seed=a.size))) + 0.5, Both(True).init(jax.random.key(0), x)
    )
    with cpu.kernels(platform):
        one, two = (Both(folded).apply(variables, x) for folded in (True, False))
        program = jax.make_jaxpr(lambda x: Both(True).apply(variables, x))(x)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    multiplied = {e.outvars[0].aval.shape for e in program.eqns if e.primitive.name == "mul"}
    outputs = platform == "cpu" and kind == "frozen"
    assert ((2, 5, 6, 6) in multiplied) == outputs
    assert ((3, 3, 4, 6) in multiplied) == (not outputs)
