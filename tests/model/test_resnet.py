"""Backbones: published sizes, shapes, strides, and frozen parts."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jaxtyping import Array

from retina_jax import cpu
from retina_jax.config import ModelConfig
from retina_jax.model import resnet
from retina_jax.model.initialisation import draw_weight
from retina_jax.model.resnet import ARCHITECTURES, ResNet, block_layers, strides_early

TINY = ModelConfig(base_width=8, stage_blocks=(1, 1, 1, 1), min_level=2)  # all maps


def shapes(config: ModelConfig, height: int = 64, width: int = 64) -> dict:
    return jax.eval_shape(
        ResNet(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    )


def variables_of(config: ModelConfig) -> dict:
    """Returns random variables of a backbone without the rest of the network."""
    return jax.tree_util.tree_map_with_path(
        lambda path, a: draw_weight("backbone/" + "/".join(key.key for key in path[1:]), a.shape, config, 0),
        shapes(config),
    )


PUBLISHED = {
    # torchvision's counts (resnext101_32x4d: timm's) less the last layer (fc): 25,028,904 - 2,049,000 for resnext50_32x4d
    "resnet18": 11_176_512,
    "resnet34": 21_284_672,
    "resnet50": 23_508_032,
    "resnet101": 42_500_160,
    "resnext50_32x4d": 22_979_904,
    "resnext101_32x4d": 42_128_704,
    "resnext101_32x8d": 86_742_336,
    "resnext101_64x4d": 81_406_272,
}


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_parameter_count_is_the_published_one(backbone: str) -> None:
    leaves = flatten_dict(shapes(ModelConfig(backbone=backbone)), sep="/")
    counted = {path: a for path, a in leaves.items() if path.split("/")[-1] not in ("mean", "var")}
    assert sum(math.prod(a.shape) for a in counted.values()) == PUBLISHED[backbone]


@pytest.mark.parametrize("backbone", ARCHITECTURES)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (65, 31)])
def test_sides_are_those_of_the_image_over_the_stride_rounded_up(backbone: str, height: int, width: int) -> None:
    config = replace(TINY, backbone=backbone)
    images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    maps = jax.eval_shape(ResNet(config).apply, shapes(config), images)
    expansion = 4 if ARCHITECTURES[backbone].bottleneck else 1
    for i, c in enumerate(maps):
        stride = 4 * 2**i
        assert c.shape == (2, math.ceil(height / stride), math.ceil(width / stride), 8 * 2**i * expansion)


def test_stride_position_moves_the_stride_and_not_the_shapes() -> None:
    first, second, last = block_layers(replace(TINY, stride_position="1x1"), 8, 2)
    assert (first.stride, second.stride, last.stride) == (2, 1, 1)
    first, second, last = block_layers(replace(TINY, stride_position="3x3"), 8, 2)
    assert (first.stride, second.stride, last.stride) == (1, 2, 1)
    a, b = (replace(TINY, stride_position=position) for position in ("1x1", "3x3"))
    assert jax.tree.map(jnp.shape, shapes(a)) == jax.tree.map(jnp.shape, shapes(b))
    variables, images = (
        variables_of(a),
        jnp.asarray(np.random.default_rng(0).standard_normal((1, 64, 64, 3), np.float32)),
    )
    outputs = [jax.jit(ResNet(config).apply)(variables, images) for config in (a, b)]
    assert [x.shape for x in outputs[0]] == [x.shape for x in outputs[1]]
    np.testing.assert_array_equal(outputs[0][0], outputs[1][0])  # C2 has no stride
    assert np.abs(outputs[0][1] - outputs[1][1]).max() > 0.1 * np.abs(outputs[0][1]).max()


@pytest.mark.parametrize(
    ("norm", "blocks", "low", "frozen"), [("frozen", 1, 3, 0), ("frozen_statistics", 2, 4, 0), ("batch", 1, 3, 5)]
)
@pytest.mark.parametrize(("forms", "height", "width"), [("cpu", 65, 31), ("tpu", 160, 64)])
def test_places_that_no_layer_reads_are_not_computed(
    monkeypatch: pytest.MonkeyPatch, forms: str, height: int, width: int, norm: str, blocks: int, low: int, frozen: int
) -> None:
    """Maps and gradients equal those of the complete maps, with fewer operations."""
    config = replace(TINY, stage_blocks=(blocks,) * 4, norm=norm, min_level=low, frozen_stages=frozen)
    variables, rng = variables_of(config), np.random.default_rng(0)
    params = variables.get("params", {})
    images = jnp.asarray(rng.standard_normal((1, height, width, 3), np.float32))

    def sums(params: dict, images: Array) -> tuple[Array, tuple[Array, ...]]:
        maps = ResNet(config).apply({**variables, "params": params}, images)
        return sum(jnp.square(x).sum() for x in maps), maps

    def compiled() -> jax.stages.Compiled:
        with cpu.kernels(forms):
            return jax.jit(lambda *a: jax.grad(sums, argnums=(0, 1), has_aux=True)(*a)).lower(params, images).compile()

    early = compiled()
    monkeypatch.setattr(resnet, "strides_early", lambda config, number: False)
    late = compiled()
    found, expected = (program(params, images) for program in (early, late))
    assert len(found[1]) == 6 - low
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()), found, expected)
    assert early.cost_analysis()["flops"] < 0.95 * late.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("norm", "frozen", "position", "train", "joined"),
    [
        ("frozen", 2, "1x1", True, 4),
        ("frozen_statistics", 0, "3x3", True, 4),
        ("batch", 2, "1x1", False, 4),
        ("batch", 2, "3x3", True, 1),
        ("group", 0, "1x1", True, 0),
    ],
)
def test_on_gpus_a_shortcut_is_part_of_the_last_convolution(
    norm: str, frozen: int, position: str, train: bool, joined: int
) -> None:
    """Maps, gradients and running statistics equal those of separate convolutions, if the norms are known before the map."""
    config = replace(TINY, norm=norm, frozen_stages=frozen, stride_position=position)
    variables, images = (
        variables_of(config),
        jnp.asarray(np.random.default_rng(0).standard_normal((2, 35, 64, 3), np.float32)),
    )
    others = {name: value for name, value in variables.items() if name != "params"}

    def sums(params: dict, images: Array) -> tuple[Array, Any]:
        of_model = ResNet(config).apply({**others, "params": params}, images, train, mutable=["stats"])
        return sum(jnp.square(x).sum() for x in of_model[0]), of_model

    results, convolutions = [], []
    for forms in ("gpu", ""):
        with cpu.kernels(forms):
            program = partial(jax.grad, has_aux=True, argnums=(0, 1))(sums)
            results.append(jax.jit(lambda *a: program(*a))(variables.get("params", {}), images))  # noqa: B023
            jaxpr = jax.make_jaxpr(lambda *a: sums(*a)[1][0])(variables.get("params", {}), images)
            convolutions.append(str(jaxpr).count("= conv_general_dilated["))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()), *results)
    assert convolutions[1] - convolutions[0] == joined


def test_maps_that_are_read_completely_are_complete() -> None:
    plain = replace(TINY, min_level=3)
    assert [strides_early(plain, number) for number in (2, 3, 4, 5)] == [True, False, False, False]
    changes = (
        {"norm": "group"},
        {"norm": "batch", "frozen_stages": 1},
        {"backbone": "resnet18"},
        {"stride_position": "3x3"},
        {"min_level": 2},
    )
    assert not any(strides_early(replace(plain, **change), 2) for change in changes)


def test_resnext_has_32_groups_of_8_channels_and_fewer_if_it_is_narrow() -> None:
    config = ModelConfig(backbone="resnext101_32x8d")
    assert block_layers(config, 64, 1)[1] == (256, 3, 1, 32)
    assert block_layers(config, 3, 1)[1] == (12, 3, 1, 12)
    assert block_layers(ModelConfig(backbone="resnext101_64x4d"), 64, 1)[1] == (256, 3, 1, 64)
    assert block_layers(ModelConfig(backbone="resnext50_32x4d"), 64, 1)[1] == (128, 3, 1, 32)


@pytest.mark.parametrize("norm", ["frozen", "frozen_statistics", "group", "batch"])
@pytest.mark.parametrize("frozen_stages", range(6))
def test_frozen_stages_have_no_trained_parameters(norm: str, frozen_stages: int) -> None:
    parts = ["stem", "c2", "c3", "c4", "c5"]
    variables = shapes(replace(TINY, norm=norm, frozen_stages=frozen_stages))
    assert set(variables.get("params", {})) == set(parts[frozen_stages:])
    assert set(parts[:frozen_stages]) <= set(variables.get("frozen", {}))
    assert set(variables.get("stats", {})) == (set(parts[frozen_stages:]) if norm == "batch" else set())
    names = {path.split("/")[-1] for path in flatten_dict(variables.get("params", {}), sep="/")}
    assert names <= ({"kernel"} if norm == "frozen" else {"kernel", "scale", "bias"})


def test_remat_changes_neither_tree_nor_values_nor_gradients() -> None:
    config = replace(TINY, norm="batch", frozen_stages=1)
    variables, images = variables_of(config), jnp.asarray(np.random.default_rng(0).random((2, 64, 64, 3), np.float32))

    def value_and_gradient(config: ModelConfig) -> tuple:
        def loss(params: dict) -> tuple:
            maps, updates = ResNet(config).apply({**variables, "params": params}, images, train=True, mutable=["stats"])
            return sum(jnp.square(x).mean() for x in maps), updates

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    plain, remat = value_and_gradient(config), value_and_gradient(replace(config, remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), plain, remat)


def test_synchronised_batch_norm_under_pmap_equals_jit_on_the_complete_batch() -> None:
    devices = 8
    config = replace(TINY, backbone="resnet18", norm="batch", frozen_stages=0)
    variables = variables_of(config)
    images = jnp.asarray(np.random.default_rng(0).random((devices, 64, 64, 3), np.float32))

    def forward(model: ResNet, variables: dict, images: jax.Array) -> tuple:
        maps, updates = model.apply(variables, images, train=True, mutable=["stats"])
        return maps[-1], updates["stats"]

    joint, stats = jax.jit(lambda v, x: forward(ResNet(config), v, x))(variables, images)
    one_a_device = jax.pmap(lambda v, x: forward(ResNet(config, "data"), v, x), "data", in_axes=(None, 0))
    split, split_stats = one_a_device(variables, images.reshape(devices, 1, 64, 64, 3))
    np.testing.assert_allclose(split.reshape(joint.shape), joint, rtol=1e-3, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-5), split_stats, stats)
    jax.tree.map(lambda a: np.testing.assert_array_equal(a[0], a[-1]), split_stats)
