"""What inference computes from the weights once: it is complete, and gives the outputs that the weights give."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from retina_jax import cpu
from retina_jax.config import Config, DetectionConfig, ModelConfig
from retina_jax.model.initialisation import initialise
from retina_jax.model.preparation import prepare
from retina_jax.model.retinanet import RetinaNet
from retina_jax.training.parallel import Driver, local_rows
from retina_jax.training.step import Inputs

TINY = ModelConfig(base_width=8, stage_blocks=(1, 1, 1, 1), fpn_channels=16, head_channels=16, head_convs=1)
RESNEXT = {"backbone": "resnext50_32x4d", "stride_position": "3x3", "p6_from": "p5"}


def images_of(batch: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("config", "platform"),
    [
        (replace(TINY, norm="frozen", dtype="bfloat16"), "gpu"),
        (replace(TINY, norm="frozen"), "cpu"),
        (replace(TINY, norm="frozen_statistics", head_norm="batch", remat=True, **RESNEXT), "gpu"),
        (replace(TINY, norm="batch", remat=True, frozen_stages=0, **RESNEXT), "tpu"),
        (replace(TINY, backbone="resnet18", norm="group", head_norm="group", frozen_stages=0, min_level=2), ""),
    ],
)
def test_prepared_weights_give_the_outputs_of_the_weights(config: ModelConfig, platform: str) -> None:
    """Of all norms and both kinds of head; the weights themselves are not needed then."""
    model, image_sizes = RetinaNet(config, 2, 3), jnp.array([[64, 90]])
    noise = np.random.default_rng(1)
    # Vectors are means, variances, scales and biases: those of 0 and 1 would hide one that is left out.
    variables = jax.tree.map(
        lambda x: jnp.asarray(x + noise.uniform(size=x.shape) * (x.ndim == 1), x.dtype), initialise(model, 0)
    )
    prepared = jax.jit(lambda variables: prepare(model, variables))(variables)

    @jax.jit
    def outputs(variables: dict, images: jax.Array) -> object:
        with cpu.kernels(platform):
            return model.apply(variables, images, image_sizes, method="levels")

    assert set(prepared) == {"prepared"}
    kernels = [x for x in jax.tree.leaves(prepared) if x.ndim == 4]
    assert {x.dtype.name for x in kernels} == {config.dtype}
    images = images_of(1, 64, 96)
    for found, expected in zip(
        *(map(jax.tree.leaves, (outputs(prepared, images), outputs(variables, images)))), strict=True
    ):
        found, expected = (np.asarray(x, np.float32) for x in (found, expected))
        atol = (2e-2 if config.dtype == "bfloat16" else 1e-5) * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("parallel", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_kernels_may_be_stored_in_another_order(parallel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, whose convolutions read them with the output channels first: detections stay the same."""

    def stored(driver: Driver, weight: jax.ShapeDtypeStruct) -> object:
        return Format(Layout((3, 0, 1, 2)), driver.replicated) if weight.ndim == 4 else driver.replicated

    config = Config(detection=DetectionConfig(score_threshold=0.0), model=replace(TINY, backbone="resnet18"))
    driver = Driver(replace(config, parallel=parallel, devices=2), num_classes=3)
    inputs = Inputs(
        images_of(4, 64, 64),
        np.full((4, 2), 64, np.int32),
        np.zeros((4, 2, 4), np.float32),
        np.full((4, 2), -1, np.int32),
        np.ones(4, bool),
    )
    variables = driver.init_state().variables
    expected = local_rows(driver.detect(driver.prepare(variables), driver.shard_batch(inputs)))
    monkeypatch.setattr(Driver, "stored", stored)
    other = replace(driver)
    prepared = other.prepare(variables)
    assert {x.format.layout.major_to_minor for x in jax.tree.leaves(prepared) if x.ndim == 4} == {(3, 0, 1, 2)}
    found = local_rows(other.detect(prepared, other.shard_batch(inputs)))
    assert (expected.labels >= 0).any()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_only_kernels_on_gpus_are_stored_in_another_order(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(Config(model=TINY, devices=1), num_classes=3)
    monkeypatch.setattr(Driver, "platform", platform)
    kernel, vector = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((3, 3, 8, 16), (16,)))
    assert driver.stored(vector) == driver.replicated
    expected = Format(Layout((3, 0, 1, 2)), driver.replicated) if platform == "gpu" else driver.replicated
    assert driver.stored(kernel) == expected


@pytest.mark.parametrize(
    ("platform", "norm", "prepared"),
    [("gpu", "frozen", True), ("cpu", "frozen", False), ("cpu", "batch", True), ("tpu", "batch", False)],
)
def test_weights_are_prepared_where_this_saves_time(
    platform: str, norm: str, prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(Config(model=replace(TINY, norm=norm), devices=1), num_classes=3)
    monkeypatch.setattr(Driver, "platform", platform)
    monkeypatch.setattr(Driver, "prepare", lambda self, variables: {"prepared": variables})
    assert ("prepared" in driver.for_inference({"params": {}})) == prepared
