"""The step over devices: training is the same with any driver and number of devices."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import jax
import numpy as np
import pytest

from retina_jax.config import Config, ConfigError, ModelConfig
from retina_jax.config_io import override
from retina_jax.cpu import convolution, winograd
from retina_jax.training.parallel import Driver
from retina_jax.training.state import TrainState, parameters_sha256
from retina_jax.training.step import Inputs

Make = Callable[..., Inputs]
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute")


def with_drivers(config: Config, parallel: str, devices: int, **changes: object) -> Config:
    """The config, for batches of 8, with this driver; `__` in a name is a dot."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return override(config, {"data.batch_size": 8, "parallel": parallel, "devices": devices, **named})


@cache
def driver_of(config: Config) -> Driver:
    """Returns one driver per config."""
    return Driver(config, config.model.num_classes)


@cache
def initial_variables(model: ModelConfig) -> dict:
    """Returns the initial variables on the host, the same for every driver."""
    return jax.device_get(Driver(Config(model=model), model.num_classes).init_state().variables)


def first_state(driver: Driver) -> TrainState:
    return driver.init_state(initial_variables(driver.config.model))


@cache
def program(config: Config, batch_size: int, padded_shape: tuple[int, int], dtype: np.dtype) -> jax.stages.Compiled:
    """Returns the compiled step for such batches, so that it is compiled once for its text and for its results."""
    images = np.zeros((batch_size, *padded_shape, 3), dtype)
    boxes, labels = np.zeros((batch_size, 4, 4), np.float32), np.zeros((batch_size, 4), np.int32)
    inputs = Inputs(images, np.zeros((batch_size, 2), np.int32), boxes, labels, np.ones((batch_size,), bool))
    driver = driver_of(config)
    return driver.step.lower(first_state(driver), driver.shard_batch(inputs)).compile()


def program_for(config: Config, inputs: Inputs) -> jax.stages.Compiled:
    return program(config, len(inputs.images), inputs.images.shape[1:3], inputs.images.dtype)


def run(config: Config, batches: list[Inputs]) -> tuple[list[dict[str, float]], dict]:
    """Returns the metrics of each step, and the final variables on the host."""
    driver = driver_of(config)
    state, metrics = first_state(driver), []
    for inputs in batches:
        state, measured = program_for(config, inputs)(state, driver.shard_batch(inputs))
        metrics.append({k: float(v) for k, v in measured.items()})
    return metrics, jax.device_get(state.variables)


def compiled_step(config: Config, inputs: Inputs) -> str:
    return program_for(config, inputs).as_text()


def assert_one_exchange(text: str) -> None:
    """Asserts that there is one all-reduce and no other collective."""
    assert len(re.findall(r"= .*\ball-reduce(?:-start)?\(", text)) == 1
    assert not [name for name in COLLECTIVES if name in text]


def test_training_is_the_same_with_any_driver_and_number_of_devices(tiny: Config, make_inputs: Make) -> None:
    """Eight steps of the same batches under jit on 1 and 8 devices and under pmap on 2 give the same losses and
    parameters, up to the order in which float32 numbers are added. Gradients cross between devices in one
    all-reduce."""
    batches = [make_inputs(seed) for seed in range(8)]
    reference, parameters = run(with_drivers(tiny, "jit", 1), batches)
    assert len({round(m["loss"], 4) for m in reference}) == 8  # the losses of different batches differ
    for parallel, devices in (("jit", 8), ("pmap", 2)):
        metrics, got = run(with_drivers(tiny, parallel, devices), batches)
        for step, (expected, measured) in enumerate(zip(reference, metrics, strict=True)):
            for name, value in expected.items():
                assert measured[name] == pytest.approx(value, rel=5e-6, abs=1e-7), (parallel, devices, step, name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), parameters, got)
    assert_one_exchange(compiled_step(with_drivers(tiny, "jit", 8), batches[0]))


@pytest.mark.parametrize(
    ("normaliser", "accumulating"),
    [
        ("global", "jit"),
        ("per_device", "jit"),
        pytest.param("per_image", "pmap", marks=pytest.mark.slow),
        pytest.param("ema", "pmap", marks=pytest.mark.slow),
    ],
)
def test_normalisers_agree_between_drivers_and_under_accumulation(
    tiny: Config, make_inputs: Make, normaliser: str, accumulating: str
) -> None:
    """8 images on 4 devices under jit are 2 micro-batches of 2 images on each of 2 devices, under jit and under pmap."""
    batches = [make_inputs(seed) for seed in range(3)]
    own = {"loss__normaliser": normaliser}
    # Under `per_image`, the default, jit on one device is the reference of the test above.
    expected, parameters = run(with_drivers(tiny, "jit", 1 if normaliser == "per_image" else 4, **own), batches)
    accumulated, got = run(with_drivers(tiny, accumulating, 2, **own, training__accumulate=2), batches)
    for at_once, in_parts in zip(expected, accumulated, strict=True):
        assert in_parts == pytest.approx(at_once, rel=1e-5, abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), parameters, got)


def test_accumulation_mines_each_image_and_leaves_out_invalid_ones(tiny: Config, make_inputs: Make) -> None:
    """2 micro-batches on each of 2 devices under pmap equal the batch on 8 devices under jit. In both cases gradients
    cross in one all-reduce."""
    batches = [make_inputs(seed)._replace(valid=np.arange(8) != 5) for seed in range(2)]
    mined = {"loss.kind": "cross_entropy", "loss.mining": "ohem_1_3", "loss.mining_batch": 16, "model.head_std": 0.3}
    mining = override(tiny, mined)
    on_eight = with_drivers(mining, "jit", 8)
    accumulating = with_drivers(mining, "pmap", 2, training__accumulate=2)
    reference, parameters = run(on_eight, batches)
    parts, got = run(accumulating, batches)
    for expected, measured in zip(reference, parts, strict=True):
        assert expected["positives_per_image"] > 1 and expected["gradient_norm"] > 0
        assert measured == pytest.approx(expected, rel=1e-5, abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), parameters, got)
    for config in (on_eight, accumulating):
        assert_one_exchange(compiled_step(config, batches[0]))


def skipping(tiny: Config, parallel: str) -> Config:
    return with_drivers(tiny, parallel, 2, training__skip_non_finite=2, model__frozen_stages=2)


def in_floats(make_inputs: Make) -> list[Inputs]:
    """Returns three batches of float images, which can contain NaN."""
    batches = [make_inputs(seed) for seed in range(3)]
    return [inputs._replace(images=inputs.images.astype(np.float32)) for inputs in batches]


@pytest.mark.parametrize("parallel", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_a_non_finite_step_is_skipped(tiny: Config, make_inputs: Make, parallel: str) -> None:
    """The step is counted, everything else stays as before; without the option the parameters are lost."""
    config = skipping(tiny, parallel)
    batches = in_floats(make_inputs)
    poisoned = batches[1]._replace(images=batches[1].images * np.float32(np.nan))
    driver, step = driver_of(config), program_for(config, poisoned)
    state, _ = step(first_state(driver), driver.shard_batch(batches[0]))
    before = jax.device_get(state)
    state, measured = step(state, driver.shard_batch(poisoned))
    after = jax.device_get(state)
    assert not np.isfinite(measured["loss"]) and measured["skipped"] == 1
    assert after.step == 2 and after.skipped == 1
    assert after.opt_state[-1].count == 2  # of the schedule, whose boundaries are steps of the run
    kept = (*before.opt_state[:-1], after.opt_state[-1])
    before = before.replace(step=after.step, skipped=after.skipped, opt_state=kept)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    state, measured = step(state, driver.shard_batch(batches[2]))
    assert np.isfinite(measured["loss"]) and measured["skipped"] == 1 and int(state.step) == 3
    assert parameters_sha256(jax.device_get(state.variables)) != parameters_sha256(after.variables)
    if parallel == "jit":  # under pmap the same code skips the step
        _, lost = run(override(config, {"training.skip_non_finite": 0}), [batches[0], poisoned])
        assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(lost["params"]))


@pytest.mark.parametrize("parallel", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_batch_norm_statistics_are_of_the_global_batch(tiny: Config, make_inputs: Make, parallel: str) -> None:
    batches = [make_inputs(seed) for seed in range(2)]
    reference, expected = run(with_drivers(tiny, "jit", 1, model__norm="batch"), batches)
    assert expected["stats"]
    metrics, got = run(with_drivers(tiny, parallel, 4, model__norm="batch"), batches)
    for a, b in zip(reference, metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), expected["stats"], got["stats"])


def test_winograds_convolutions_gather_no_batch(
    tiny: Config, make_inputs: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Winograd's method is used for maps of 4 x 4 here."""
    taken = []
    whole = winograd.convolution
    monkeypatch.setattr(convolution, "FEW_PRODUCTS", 0)
    monkeypatch.setattr(convolution, "WINOGRAD_PLACES", 16)
    monkeypatch.setattr(winograd, "convolution", lambda x, kernel: taken.append(x.shape) or whole(x, kernel))
    wide = override(tiny, {"model.fpn_channels": 32, "model.head_channels": 32})
    inputs = make_inputs(0, batch_size=4)
    config = with_drivers(wide, "jit", 4, data__batch_size=4)
    text = program.__wrapped__(config, 4, (64, 64), inputs.images.dtype).as_text()  # not kept for other tests
    assert taken and {shape[1:3] for shape in taken} == {(4, 4)}
    assert_one_exchange(text)


@pytest.mark.parametrize(("kernels", "norm"), [(True, "frozen"), (False, "frozen"), (True, "frozen_statistics")])
def test_a_step_copies_no_kernel(tiny: Config, make_inputs: Make, kernels: bool, norm: str) -> None:
    """Each kernel is updated in place. XLA copied kernels when an update could precede a gradient that still reads the
    kernel."""
    text = compiled_step(with_drivers(tiny, "jit", 1, cpu_kernels=kernels, model__norm=norm), make_inputs(0))
    entry = text[text.index("\nENTRY ") :]
    assert len(re.findall(r"= f32\[\d+,\d+,\d+,\d+\]\S* parameter\(", entry)) > 20
    assert re.findall(r"= f32\[\d+,\d+,\d+,\d+\]\S* copy\(%\w*params", entry) == []


def test_in_bfloat16_gradients_and_sums_cross_in_float32(tiny: Config, make_inputs: Make) -> None:
    """Read before compilation: XLA for CPUs would turn sums of bfloat16 into float32."""
    config = with_drivers(tiny, "jit", 2, model__dtype="bfloat16")
    driver = driver_of(config)
    text = driver.step.lower(first_state(driver), driver.shard_batch(make_inputs(0))).as_text()
    crossing = re.findall(r"stablehlo\.all_reduce.*?\}\) .*?: \((.*?)\) ->", text, re.DOTALL)
    assert "bf16" in text and len(crossing) > 20
    assert {dtype for types in crossing for dtype in re.findall(r"(b?f\d+|i\d+)>", types)} == {"f32"}


def test_grouped_convolutions_gather_no_batch(tiny: Config, make_inputs: Make) -> None:
    """The compiler would gather the batch for each of them if the step were written for the complete batch."""
    resnext = override(tiny, {"model.backbone": "resnext101_32x8d"})
    assert_one_exchange(compiled_step(with_drivers(resnext, "jit", 4), make_inputs(0)))


def test_an_invalid_image_has_no_effect(tiny: Config, make_inputs: Make) -> None:
    """The loss and the parameters after the step do not depend on the content of its row."""
    inputs, config = make_inputs(3), with_drivers(tiny, "jit", 1)
    valid = inputs.valid.copy()
    valid[2] = False
    other = inputs.images.copy()
    other[2] = 255 - other[2]
    boxes = inputs.boxes_xyxy.copy()
    boxes[2] = 0
    one, first = run(config, [inputs._replace(valid=valid)])
    two, second = run(config, [inputs._replace(valid=valid, images=other, boxes_xyxy=boxes)])
    assert one == two
    assert parameters_sha256(first) == parameters_sha256(second)
    whole, _ = run(config, [inputs])
    assert whole[0]["positives_per_image"] > one[0]["positives_per_image"]


def test_frozen_parameters_never_change(tiny: Config, make_inputs: Make) -> None:
    config = skipping(tiny, "jit")
    before = jax.device_get(first_state(driver_of(config)).frozen)
    _, after = run(config, in_floats(make_inputs))
    assert len(jax.tree.leaves(before)) > 10
    jax.tree.map(np.testing.assert_array_equal, before, after["frozen"])


def test_the_step_equals_a_plain_implementation(tiny: Config, make_inputs: Make) -> None:
    """Compares with jax.grad of the mean over images of each loss divided by its positives, and with SGD by hand."""
    from retina_jax.losses.total import image_losses
    from retina_jax.ops.anchors import anchor_grid

    config = with_drivers(tiny, "jit", 1)
    driver, inputs = driver_of(config), make_inputs(7)
    state = jax.device_get(first_state(driver))
    images, sizes, boxes, labels = (jax.numpy.asarray(x) for x in inputs[:4])
    anchors = anchor_grid((64, 64), config.anchors, config.model)

    def loss(params: dict) -> jax.Array:
        outputs = driver.model.apply({**state.variables, "params": params}, images, sizes)
        parts = image_losses(
            [outputs.logits], [outputs.deltas], anchors, boxes, labels,
            matching=config.matching, loss=config.loss,
        )  # fmt: skip
        return ((parts.classification + parts.box) / jax.numpy.maximum(parts.positives, 1.0)).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(state.params)
    rate = 0.01 / 3  # step 0 of the warm-up

    def moved(path: tuple, w: np.ndarray, g: np.ndarray) -> np.ndarray:
        kernel = path[-1].key == "kernel"
        return w - (rate * (g + 1e-4 * w) if kernel else 2 * rate * g)

    expected = jax.tree_util.tree_map_with_path(moved, state.params, gradients)
    metrics, got = run(config, [inputs])
    assert metrics[0]["loss"] == pytest.approx(float(value), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected, got["params"])


def test_uneven_batches_and_absent_devices_are_named(tiny: Config) -> None:
    with pytest.raises(ConfigError, match=r"^data\.batch_size: 6\b.* 8 devices"):
        Driver(with_drivers(tiny, "jit", 8, data__batch_size=6), 3).check_batch_size()
    with pytest.raises(ConfigError, match=r"^data\.batch_size: 8\b.* 8 devices.* 4 .*training\.accumulate.* 32\b"):
        Driver(with_drivers(tiny, "jit", 8, training__accumulate=4), 3).check_batch_size()
    with pytest.raises(ConfigError, match=r"^devices: 99\b.* 8\b"):
        _ = Driver(with_drivers(tiny, "jit", 99), 3).mesh
