"""Every form of a convolution equals the plain one. Inputs are small integers, whose float32 sums are exact in any
order."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from retina_jax import cpu
from retina_jax.cpu import convolution, winograd
from retina_jax.cpu.convolution import by_columns, by_windows, kernel_gradient, map_gradient
from retina_jax.model.layers import _convolve, convolve

Form = Callable[[jax.Array, jax.Array], jax.Array]


@pytest.fixture(autouse=True)
def every_form_for_small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps of these tests are small enough for XLA's own convolution."""
    monkeypatch.setattr(convolution, "FEW_PRODUCTS", 0)


class Case(NamedTuple):
    """A shape; together the cases cover all branches of the module."""

    batch: int
    height: int
    width: int
    channels: int
    features: int
    k: int
    stride: int
    groups: int


CASES = [
    Case(1, 2, 2, 32, 33, 3, 1, 1),  # columns all the way
    Case(1, 1, 1, 32, 40, 3, 1, 1),  # one pixel
    Case(1, 1, 1, 40, 32, 3, 2, 1),
    Case(1, 3, 1, 48, 50, 1, 2, 1),  # few places
    Case(2, 1, 1, 36, 32, 1, 1, 1),
    Case(1, 5, 4, 36, 32, 3, 2, 1),
    Case(2, 3, 4, 32, 34, 3, 1, 1),  # columns in the gradients alone
    Case(2, 8, 7, 32, 32, 3, 1, 1),  # taps, columns in the map's gradient
    Case(2, 9, 8, 32, 32, 3, 1, 1),  # taps, the plain gradient by the map
    Case(2, 9, 8, 34, 32, 3, 2, 1),  # taps of the map
    Case(1, 6, 5, 32, 32, 5, 1, 1),
    Case(2, 5, 5, 32, 36, 1, 1, 1),
    Case(2, 5, 6, 32, 36, 1, 2, 1),
    Case(2, 5, 6, 4, 36, 1, 2, 1),  # narrow
    Case(2, 5, 6, 32, 6, 3, 1, 1),
    Case(1, 10, 11, 3, 64, 7, 2, 1),  # the stem
    Case(2, 6, 6, 8, 12, 3, 1, 4),
    Case(2, 7, 6, 8, 8, 3, 2, 4),
    Case(1, 1, 1, 32, 32, 3, 1, 8),
    Case(1, 5, 4, 6, 6, 1, 2, 3),
    Case(1, 4, 6, 6, 6, 3, 1, 6),  # as many groups as channels
    Case(1, 7, 7, 8, 4, 5, 2, 2),
    Case(2, 32, 34, 32, 34, 3, 1, 1),  # Winograd
    Case(1, 37, 33, 33, 32, 3, 1, 1),  # odd sides, and a row of blocks in vain
]
COLUMNS, FEW, TAPS, STRIDED, GROUPS, STRIDED_GROUPS, WINOGRAD = (CASES[i] for i in (0, 6, 7, 9, 16, 17, 22))


def integers(case: Case, seed: int = 0, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws a feature map, a kernel and a gradient of the output."""
    rng = np.random.default_rng(seed)
    h, w = -(-case.height // case.stride), -(-case.width // case.stride)
    shapes = [
        (case.batch, case.height, case.width, case.channels),
        (case.k, case.k, case.channels // case.groups, case.features),
        (case.batch, h, w, case.features),
    ]
    return tuple(jnp.asarray(rng.integers(-4, 5, shape).astype(np.float32), dtype) for shape in shapes)


def value_and_gradients(form: Form, x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    y, pullback = jax.vjp(form, x, kernel)
    return y, *pullback(dy)


def both(case: Case) -> tuple[Callable[..., tuple[jax.Array, ...]], ...]:
    """Returns two functions of (x, kernel, dy), which give value and gradients by `convolve` with CPU kernels and by
    XLA's own convolution."""
    forms = [
        lambda x, kernel, form=form: form(x, kernel, case.stride, case.groups)
        for form in (convolve, _convolve.__wrapped__)
    ]
    return tuple(jax.jit(partial(value_and_gradients, form)) for form in forms)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution_and_its_gradients_equal_the_plain_ones(case: Case) -> None:
    ours, plain = both(case)
    arrays = integers(case)
    for a, b in zip(ours(*arrays), plain(*arrays), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_form_is_correct_for_every_shape(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of the form only affects speed."""
    x, kernel, dy = integers(case, seed=1)
    y, dx, dkernel = both(case)[1](x, kernel, dy)
    k, stride, groups = case[5:]
    if groups == 1:
        np.testing.assert_array_equal(jax.jit(by_columns, static_argnums=2)(x, kernel, stride), y)
    ours = jax.jit(lambda x, kernel, dy: map_gradient(dy, kernel, stride, groups, x.shape[1:3]))(x, kernel, dy)
    np.testing.assert_array_equal(ours, dx)
    ours = jax.jit(lambda x, dy: kernel_gradient(x, dy, k, stride, groups))(x, dy)
    np.testing.assert_array_equal(ours, dkernel)
    if groups > 1 and stride == 1:  # windows by slices, as above, and by a table
        np.testing.assert_array_equal(jax.jit(by_windows, static_argnums=2)(x, kernel, groups), y)
        monkeypatch.setattr(convolution, "FEW_NUMBERS", 0)
        ours = jax.jit(lambda x, dy: kernel_gradient(x, dy, k, stride, groups))(x, dy)
        np.testing.assert_array_equal(ours, dkernel)
    if (k, stride, groups) == (3, 1, 1):
        np.testing.assert_array_equal(jax.jit(winograd.convolution)(x, kernel), y)
        np.testing.assert_array_equal(jax.jit(winograd.map_gradient)(dy, kernel), dx)
        np.testing.assert_array_equal(jax.jit(winograd.kernel_gradient)(x, dy), dkernel)


@pytest.mark.parametrize(("height", "at_a_time"), [(21, 1), (22, 1), (12, 4), (14, 2), (1, 1)])
def test_winograd_with_any_number_of_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, height: int, at_a_time: int
) -> None:
    case = Case(2, height, 9, 8, 6, 3, 1, 1)
    monkeypatch.setattr(winograd, "REUSED", 0)
    monkeypatch.setattr(winograd, "CACHED", at_a_time * 16 * 5 * (8 + 6))
    x, kernel, dy = integers(case)
    y, dx, dkernel = both(case)[1](x, kernel, dy)
    assert winograd._rows(x, 6).number <= at_a_time
    for function, arguments, expected in (
        (winograd.convolution, (x, kernel), y),
        (winograd.map_gradient, (dy, kernel), dx),
        (winograd.kernel_gradient, (x, dy), dkernel),
    ):
        np.testing.assert_array_equal(jax.jit(uncached(function))(*arguments), expected)


def uncached(function: Callable) -> Callable:
    """Returns a function of its own, whose trace no other test finds."""
    return lambda *arguments: function.__wrapped__(*arguments)


def test_winograd_keeps_nothing_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `after`, XLA computes transformed kernels and padded maps of the backward pass in the forward pass."""
    functions = {name: getattr(winograd, name) for name in ("convolution", "map_gradient", "kernel_gradient")}
    kernels, x = [jnp.ones((3, 3, 32, 32))] * 4, jnp.ones((1, 32, 32, 32))

    def temporaries() -> int:
        def loss(kernels: list[jax.Array], x: jax.Array) -> jax.Array:
            for kernel in kernels:
                x = jax.nn.relu(convolve(x, kernel))
            return x.sum()

        with cpu.kernels("cpu"):
            return jax.jit(jax.grad(loss)).lower(kernels, x).compile().memory_analysis().temp_size_in_bytes

    needed = temporaries()
    for name, without in (("after", lambda x, _: x), ("_zeros", lambda shape, _: jnp.zeros(shape))):
        monkeypatch.undo()
        monkeypatch.setattr(convolution, "FEW_PRODUCTS", 0)
        monkeypatch.setattr(winograd, name, without)
        for function_name, function in functions.items():
            monkeypatch.setattr(winograd, function_name, uncached(function))
        assert needed < 0.9 * temporaries()


def test_winograd_rounds_about_as_much_as_the_plain_sum() -> None:
    """Compares with sums in float64, on numbers that use all their digits."""
    rng = np.random.default_rng(0)
    shapes = (1, 40, 40, 64), (3, 3, 64, 64), (1, 40, 40, 64)
    wide = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    with jax.enable_x64(True):
        exact = [np.asarray(a) for a in both(WINOGRAD)[1](*(np.asarray(a, np.float64) for a in wide))]
    ours, plain = both(WINOGRAD)
    for a, b, c in zip(ours(*wide), plain(*wide), exact, strict=True):
        error, of_plain = (np.abs(np.asarray(found, np.float64) - np.asarray(c)).max() / np.std(c) for found in (a, b))
        assert 0 < error < 5e-6 and error < 10 * of_plain


def test_winograd_is_used_only_where_it_is_faster() -> None:
    def loops(platform: str, dtype: str = "float32", **change: int) -> int:
        case = WINOGRAD._replace(**change)
        exported = export.export(both(case)[0], platforms=(platform,))(*integers(case, dtype=dtype))
        return exported.mlir_module().count("stablehlo.while")

    assert loops("cpu") == 3
    assert loops("cuda") == loops("tpu") == 0
    for change in ({"stride": 2}, {"k": 5}, {"features": 24}, {"height": 20}):
        assert loops("cpu", **change) == 0, change
    assert loops("cpu", groups=2) == 6  # of `cpu.stored`: twice for windows and once for the kernel, in both passes
    assert loops("cpu", "bfloat16") == 0


def test_a_small_convolution_is_left_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    def products(case: Case) -> int:
        exported = export.export(both(case)[0], platforms=("cpu",))(*integers(case))
        return exported.mlir_module().count("stablehlo.dot_general")

    for case in (COLUMNS, TAPS, STRIDED, WINOGRAD):
        number = case.height * case.width * case.channels * case.features * case.k**2
        monkeypatch.setattr(convolution, "FEW_PRODUCTS", number)
        assert products(case) == 0
        monkeypatch.setattr(convolution, "FEW_PRODUCTS", number - 1)
        assert products(case) > 0
    monkeypatch.setattr(convolution, "FEW_PRODUCTS", 10**9)
    monkeypatch.setattr(convolution, "SMALL_KERNEL", 9 * 32 * 32)
    assert products(TAPS) == 0 and products(WINOGRAD) > 0


RANDOM = [COLUMNS, FEW, TAPS, STRIDED, GROUPS, STRIDED_GROUPS, WINOGRAD]
PAIRS = {case: both(case) for case in RANDOM}


@given(case=st.sampled_from(RANDOM), seed=st.integers(0, 2**32 - 1), poison=st.sampled_from([0.0, np.nan, np.inf]))
@settings(max_examples=40, deadline=None)
def test_cpu_kernels_equal_the_plain_convolution_for_any_numbers(case: Case, seed: int, poison: float) -> None:
    """Non-finite values stay non-finite, except for taps that meet only padding at the position of the value."""
    x, kernel, dy = integers(case, seed)
    dy = dy.at[0, 0, 0, 0].add(poison)
    ours, plain = PAIRS[case]
    for name, a, b in zip(["y", "dx", "dkernel"], ours(x, kernel, dy), plain(x, kernel, dy), strict=True):
        finite = np.isfinite(b)
        if case == WINOGRAD and not np.isfinite(poison):  # which spoils the whole block, and the image's gradient
            finite = np.isfinite(a)
        # `cpu.after` and `cpu.stored` add 1e-30 next to a NaN.
        np.testing.assert_allclose(np.where(finite, a, 0), np.where(finite, b, 0), rtol=0, atol=1e-25)
        assert np.isfinite(a).all() == (name == "y" or np.isfinite(poison))


@pytest.mark.parametrize("case", [COLUMNS, TAPS, GROUPS, STRIDED_GROUPS], ids=str)
def test_bfloat16_is_summed_in_float32(case: Case) -> None:
    """Outputs and gradients are the exact ones, rounded once."""
    ours, plain = both(case)
    narrow = ours(*integers(case, dtype="bfloat16"))
    exact = plain(*integers(case))
    for a, b in zip(narrow, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


@pytest.mark.parametrize("case", [COLUMNS, TAPS, STRIDED_GROUPS, WINOGRAD], ids=str)
def test_under_vmap_and_remat(case: Case) -> None:
    ours, plain = both(case)
    x, kernel, dy = (jnp.stack(pair) for pair in zip(integers(case, 2), integers(case, 3), strict=True))
    expected = [plain(*(a[i] for a in (x, kernel, dy))) for i in range(2)]
    mapped = jax.jit(jax.vmap(ours))(x, kernel, dy)
    form = jax.checkpoint(lambda x, kernel: convolve(x, kernel, case.stride, case.groups))
    for i in range(2):
        again = jax.jit(partial(value_and_gradients, form))(x[i], kernel[i], dy[i])
        for all_of, remat, exact in zip(mapped, again, expected[i], strict=True):
            np.testing.assert_array_equal(all_of[i], exact)
            np.testing.assert_array_equal(remat, exact)


@pytest.mark.parametrize("case", [FEW, TAPS, GROUPS, STRIDED_GROUPS, WINOGRAD], ids=str)
def test_on_several_devices_by_jit_shard_map_and_pmap(case: Case) -> None:
    case = case._replace(batch=4)
    ours, plain = both(case)
    x, kernel, dy = integers(case)
    exact = plain(x, kernel, dy)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    split = NamedSharding(mesh, P("data"))
    by_jit = ours(jax.device_put(x, split), jax.device_put(kernel, NamedSharding(mesh, P())), jax.device_put(dy, split))

    def own(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, dx, dkernel = ours(x, kernel, dy)
        return y, dx, jax.lax.psum(dkernel, "data")

    images, everywhere = P("data"), P()
    specs = {"in_specs": (images, everywhere, images), "out_specs": (images, images, everywhere)}
    by_map = jax.jit(jax.shard_map(own, mesh=mesh, check_vma=False, **specs))(x, kernel, dy)
    by_pmap = jax.pmap(own, "data", in_axes=(0, None, 0), out_axes=(0, 0, None), devices=jax.devices()[:4])(
        x[:, None], kernel, dy[:, None]
    )
    by_pmap = by_pmap[0][:, 0], by_pmap[1][:, 0], by_pmap[2]
    for found in (by_jit, by_map, by_pmap):
        for a, b in zip(found, exact, strict=True):
            np.testing.assert_array_equal(a, b)


def test_groups_use_matrix_products_only_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 4, 4, 8, 8, 3, 1, 4)

    def program(platform: str) -> str:
        return export.export(both(case)[0], platforms=(platform,))(*integers(case)).mlir_module()

    on_cpu, on_gpu = program("cpu"), program("cuda")
    assert "stablehlo.convolution" not in on_cpu and "stablehlo.dot_general" in on_cpu
    monkeypatch.setattr(convolution, "FEW_NUMBERS", 3 * 3 * 4 * 4 * 8 - 1)
    assert program("cpu").count("stablehlo.convolution") == 1  # the forward pass
    assert on_gpu.count("stablehlo.convolution") == 3 and "stablehlo.dot_general" not in on_gpu


@pytest.mark.parametrize("case", [COLUMNS, TAPS, STRIDED_GROUPS, WINOGRAD], ids=str)
def test_one_exported_program_serves_all_devices(case: Case) -> None:
    ours, plain = both(case)
    arrays = integers(case)
    exported = export.export(ours, platforms=("cpu", "cuda", "tpu"))(*arrays)
    for a, b in zip(exported.call(*arrays), plain(*arrays), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_gradient_is_exported_for_any_number_of_images() -> None:
    case = Case(1, 1, 2, 64, 64, 1, 1, 1)
    ours, plain = both(case)
    (batch,) = export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in integers(case)]
    x, dy = (jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in (shapes[0], shapes[2]))
    exported = export.export(ours, platforms=("cpu",))(x, shapes[1], dy)
    for number in (1, 3):
        arrays = integers(case._replace(batch=number))
        for a, b in zip(exported.call(*arrays), plain(*arrays), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", [COLUMNS, TAPS, STRIDED, GROUPS, WINOGRAD], ids=str)
def test_a_gradient_that_is_not_needed_is_not_computed(case: Case) -> None:
    """The first trained convolution has a map without a gradient."""
    x, kernel, _ = integers(case)

    def flops(arguments: int | tuple[int, int]) -> float:
        with cpu.kernels("cpu"):
            gradient = jax.grad(lambda x, kernel: convolve(x, kernel, case.stride, case.groups).sum(), arguments)
            return jax.jit(gradient).lower(x, kernel).compile().cost_analysis()["flops"]

    assert flops(1) < 0.75 * flops((0, 1))


def test_gradients_are_exported_with_a_symbolic_batch_size() -> None:
    (batch,) = export.symbolic_shape("b")
    for case in (COLUMNS, TAPS, WINOGRAD):
        x, kernel, _ = integers(case)
        gradient = jax.grad(lambda x, kernel, case=case: convolve(x, kernel, case.stride).sum(), (0, 1))
        shape = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
        program = export.export(jax.jit(gradient), platforms=("cpu", "cuda"))(shape, kernel)
        for a, b in zip(program.call(x, kernel), gradient(x, kernel), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
