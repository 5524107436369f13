"""The complete network: sizes, order of the outputs, prior, padding, precision, initialisation, parameter table."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from retina_jax.config import ModelConfig
from retina_jax.model.initialisation import initialise
from retina_jax.model.layers import convolve
from retina_jax.model.retinanet import Head, Outputs, RetinaNet, normalise
from retina_jax.model.summary import parameter_counts, parameter_table

TINY = ModelConfig(
    base_width=8,
    stage_blocks=(1, 1, 1, 1),
    fpn_channels=16,
    head_channels=16,
    head_convs=1,
    norm="group",
    frozen_stages=0,
)
K, CELL = 3, 9


def pixels(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8))


def run(config: ModelConfig, images: jax.Array, sizes: jax.Array | None = None, seed: int = 0) -> Outputs:
    full = jnp.broadcast_to(jnp.array(images.shape[1:3])[None], (len(images), 2))
    variables = initialise(RetinaNet(config, K, CELL), seed)
    return compiled(config)(variables, images, full if sizes is None else sizes)


@cache
def compiled(config: ModelConfig) -> Callable[..., Outputs]:
    return jax.jit(RetinaNet(config, K, CELL).apply)


def shapes(config: ModelConfig, num_classes: int = 80) -> dict:
    arguments = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(RetinaNet(config, num_classes, CELL).init, jax.random.key(0), *arguments)


def total(variables: dict, leaves: set[str]) -> int:
    flat = flatten_dict(variables, sep="/")
    return sum(math.prod(a.shape) for path, a in flat.items() if path.split("/")[-1] in leaves)


def test_size_is_torchvisions_v1() -> None:
    """It has 34,014,999 parameters with 91 outputs. torchvision stores the frozen affines as buffers and does not count
    them."""
    variables = shapes(ModelConfig(p6_from="p5"), num_classes=91)
    norms = total({"frozen": variables["frozen"]["backbone"]}, {"scale", "bias"})
    assert total(variables, {"kernel", "scale", "bias"}) - norms == 34_014_999


def test_size_is_torchvisions_v2() -> None:
    """It has 38,198,935 parameters with 91 outputs: trained norms, P6 from C5, GroupNorm in the heads."""
    variables = shapes(ModelConfig(norm="batch", frozen_stages=0, head_norm="group"), num_classes=91)
    assert total(variables, {"kernel", "scale", "bias"}) == 38_198_935
    assert sum(a.size for a in jax.tree.leaves(variables["params"])) == 38_198_935


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160), (33, 70)])
def test_every_level_has_nine_anchors_per_cell(height: int, width: int) -> None:
    model = RetinaNet(TINY, K, CELL)
    images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.uint8)
    out = jax.eval_shape(model.apply, initialise(model, 0), images, jax.ShapeDtypeStruct((2, 2), jnp.int32))
    cells = sum(math.ceil(height / 2**level) * math.ceil(width / 2**level) for level in range(3, 8))
    assert out.logits.shape == (2, cells * CELL, K) and out.deltas.shape == (2, cells * CELL, 4)


def test_head_channels_are_anchor_major_and_rows_come_first() -> None:
    config = replace(TINY, head_convs=0)
    head, x = Head(config, CELL, K), jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 5, 16), np.float32))
    kernel = np.random.default_rng(1).standard_normal((3, 3, 16, CELL * K), np.float32)
    weights = {"output": {"kernel": kernel, "bias": np.zeros(CELL * K, np.float32)}}
    out = head.apply({"params": weights}, [x], 3)[0].reshape(4, 5, CELL, K)
    row, column, anchor = 2, 3, 7
    window = x[0, row - 1 : row + 2, column - 1 : column + 2]
    expected = np.einsum("ijc,ijck->k", window, kernel[..., anchor * K : (anchor + 1) * K])
    np.testing.assert_allclose(out[row, column, anchor], expected, rtol=1e-4, atol=1e-4)


def test_heads_are_shared_over_levels_and_not_with_each_other() -> None:
    """Each head has one set of weights for any number of levels, and equal levels get equal outputs."""
    few, many = (shapes(replace(TINY, max_level=level))["params"] for level in (5, 8))
    for head in ("class_head", "box_head"):
        assert jax.tree.map(jnp.shape, few[head]) == jax.tree.map(jnp.shape, many[head])
    model = RetinaNet(TINY, K, CELL)
    params = initialise(model, 0)["params"]
    kernels = [params[head]["conv1"]["kernel"] for head in ("class_head", "box_head")]
    assert not np.array_equal(*kernels)
    # All output convolutions of the pyramid are zero except for the bias, so all cells of all levels are equal.
    fpn = {
        name: {"kernel": np.zeros_like(w["kernel"]), "bias": np.ones_like(w["bias"])}
        for name, w in params["fpn"].items()
    }
    head = replace(TINY, head_convs=0)
    model = RetinaNet(head, K, CELL)
    variables = initialise(model, 0)
    variables["params"]["fpn"] = fpn
    out = jax.jit(model.apply)(variables, pixels(1, 128, 128), jnp.array([[128, 128]]))
    centres = [(start + side // 2 * (side + 1)) * CELL for start, side in ((0, 16), (256, 8), (320, 4))]
    for centre in centres[1:]:  # a cell away from the border, of P3, P4 and P5
        np.testing.assert_allclose(out.logits[0, centre], out.logits[0, centres[0]], rtol=1e-5)


def test_every_anchor_starts_as_foreground_with_the_prior() -> None:
    for prior in (0.01, 0.2):
        probabilities = jax.nn.sigmoid(run(replace(TINY, prior=prior), pixels(2, 64, 64)).logits)
        np.testing.assert_allclose(probabilities.mean(), prior, rtol=0.05)
        np.testing.assert_allclose(probabilities, prior, rtol=0.5)


@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_the_padding_of_an_image_has_no_effect(norm: str) -> None:
    sizes = jnp.array([[40, 64], [64, 1]])
    a, b = np.array(pixels(2, 64, 64)), np.array(pixels(2, 64, 64, seed=1))
    b[0, :40], b[1, :, :1] = a[0, :40], a[1, :, :1]
    first, second = (run(replace(TINY, norm=norm), jnp.asarray(x), sizes) for x in (a, b))
    np.testing.assert_array_equal(first.logits, second.logits)
    np.testing.assert_array_equal(first.deltas, second.deltas)
    inside = run(replace(TINY, norm=norm), jnp.asarray(a))
    assert not np.array_equal(first.logits, inside.logits)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("detectron", (30 - 102.9801, 20 - 115.9465, 10 - 122.7717)),
        ("detectron2", (30 - 103.53, 20 - 116.28, 10 - 123.675)),
        ("imagenet", ((10 / 255 - 0.485) / 0.229, (20 / 255 - 0.456) / 0.224, (30 / 255 - 0.406) / 0.225)),
    ],
)
def test_pixels_are_normalised_by_the_named_convention_and_padding_is_zero(kind: str, expected: tuple) -> None:
    images = jnp.broadcast_to(jnp.array([10, 20, 30], jnp.uint8)[None, None, None], (1, 4, 6, 3))
    x = normalise(images, jnp.array([[3, 5]]), kind)
    np.testing.assert_allclose(x[0, :3, :5], np.broadcast_to(np.float32(expected), (3, 5, 3)), rtol=1e-5)
    assert not x[0, 3:].any() and not x[0, :, 5:].any()


def test_bfloat16_is_close_to_float32_and_stays_bfloat16() -> None:
    images = pixels(2, 64, 64)
    wide, narrow = (run(replace(TINY, head_std=0.1, dtype=dtype), images) for dtype in ("float32", "bfloat16"))
    for a, b in zip(wide, narrow, strict=True):
        assert b.dtype == jnp.bfloat16
        error, spread = np.sqrt(np.square(a - b.astype(jnp.float32)).mean()), np.std(a)
        assert 0 < error < 0.05 * spread  # 22 layers of 0.4 % rounding each leave 3 %


def test_frozen_weights_get_no_gradient_and_trained_ones_do() -> None:
    config = replace(TINY, norm="frozen", frozen_stages=2, input_normalisation="imagenet")
    model = RetinaNet(config, K, CELL)
    variables = initialise(model, 0)
    assert set(variables["params"]["backbone"]) == {"c3", "c4", "c5"}
    assert not any(
        path.split("/")[-1] in ("scale", "mean", "var") for path in flatten_dict(variables["params"], sep="/")
    )

    def loss(params: dict) -> jax.Array:
        out = model.apply({**variables, "params": params}, pixels(1, 64, 64), jnp.array([[64, 64]]), train=True)
        return jnp.square(out.logits).sum() + jnp.square(out.deltas - 1).sum()

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    assert jax.tree.structure(gradient) == jax.tree.structure(variables["params"])
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def test_head_group_norm_replaces_the_bias_of_its_convolution() -> None:
    plain, group = (shapes(replace(TINY, head_norm=norm))["params"]["class_head"] for norm in ("none", "group"))
    assert "bias" in plain["conv1"] and "norm1" not in plain
    assert "bias" not in group["conv1"] and set(group["norm1"]) == {"scale", "bias"}
    assert np.isfinite(run(replace(TINY, head_norm="group"), pixels(1, 64, 64)).logits).all()


def test_head_batch_norms_are_of_one_level_each_between_shared_convolutions() -> None:
    """Compares with NumPy: two levels whose statistics differ are normalised and remembered separately."""
    config, rng = replace(TINY, head_norm="batch", head_convs=1), np.random.default_rng(0)
    variables = initialise(RetinaNet(config, K, CELL), 0)
    assert set(variables["params"]["class_head"]) == {"conv1", *(f"norm1_p{level}" for level in range(3, 8)), "output"}
    head = Head(config, CELL, K)
    own = jax.tree.map(jnp.asarray, {kind: variables[kind]["class_head"] for kind in ("params", "stats")})
    for level, scale in ((3, 1.0), (4, 20.0)):
        x = scale * rng.standard_normal((2, 4, 5, 16)).astype(np.float32)
        convolved = np.asarray(convolve(jnp.asarray(x), own["params"]["conv1"]["kernel"]), np.float64)
        mean, var = convolved.mean((0, 1, 2)), convolved.var((0, 1, 2))
        expected = np.maximum((convolved - mean) / np.sqrt(var + 1e-5), 0).astype(np.float32)
        (out,), updated = head.apply(own, [jnp.asarray(x)], level, train=True, mutable=["stats"])
        last = convolve(jnp.asarray(expected), own["params"]["output"]["kernel"])
        plain = (last + own["params"]["output"]["bias"][None, None, None]).reshape(2, -1, K)
        np.testing.assert_allclose(out, plain, rtol=1e-4, atol=1e-4)
        stats = updated["stats"]
        np.testing.assert_allclose(stats[f"norm1_p{level}"]["mean"], 0.1 * mean, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(stats[f"norm1_p{level}"]["var"], 0.9 + 0.1 * var, rtol=1e-3)
        changed = {name for name in own["stats"] if not np.array_equal(stats[name]["var"], own["stats"][name]["var"])}
        assert changed == {f"norm1_p{level}"}


def test_initial_values_follow_the_rule_of_each_part() -> None:
    model = RetinaNet(ModelConfig(norm="batch", frozen_stages=0, stage_blocks=(1, 1, 1, 1)), 80, CELL)
    variables = initialise(model, 0)
    params = variables["params"]
    backbone, fpn = params["backbone"], params["fpn"]
    assert np.std(params["class_head"]["conv2"]["kernel"]) == pytest.approx(0.01, rel=0.01)
    assert np.std(params["box_head"]["output"]["kernel"]) == pytest.approx(0.01, rel=0.02)
    assert not params["class_head"]["conv2"]["bias"].any() and not params["box_head"]["output"]["bias"].any()
    np.testing.assert_allclose(params["class_head"]["output"]["bias"], -math.log(99), rtol=1e-6)
    assert np.abs(fpn["output4"]["kernel"]).max() == pytest.approx(math.sqrt(3 / (9 * 256)), rel=1e-3)
    assert np.var(fpn["lateral5"]["kernel"]) == pytest.approx(1 / 2048, rel=0.02)
    assert np.var(backbone["c4"]["block1"]["conv2"]["kernel"]) == pytest.approx(2 / (9 * 256), rel=0.02)
    assert np.var(backbone["c4"]["block1"]["shortcut"]["kernel"]) == pytest.approx(2 / 1024, rel=0.02)
    assert (backbone["c4"]["block1"]["norm3"]["scale"] == 1).all()
    assert (variables["stats"]["backbone"]["c4"]["block1"]["norm3"]["var"] == 1).all()
    assert all(a.dtype == np.float32 for a in jax.tree.leaves(variables))


def test_the_initial_value_of_a_weight_does_not_depend_on_other_weights() -> None:
    def flat(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
        collections = initialise(RetinaNet(config, K, CELL), seed)
        return {path: a for c in collections.values() for path, a in flatten_dict(c, sep="/").items()}

    base = flat(TINY, 0)
    other = flat(replace(TINY, frozen_stages=5, max_level=8, head_convs=2, norm="batch"), 0)
    common = base.keys() & other.keys()
    assert "backbone/c5/block1/conv2/kernel" in common
    assert all(np.array_equal(base[path], other[path]) for path in common)
    reseeded = flat(TINY, 1)
    assert all(np.array_equal(base[p], reseeded[p]) != p.endswith("/kernel") for p in base)


def test_all_collections_always_exist() -> None:
    for config in (TINY, replace(TINY, norm="frozen"), replace(TINY, norm="batch", frozen_stages=5)):
        assert set(initialise(RetinaNet(config, K, CELL), 0)) == {"params", "frozen", "stats"}


def test_initialising_r50_takes_seconds_not_minutes() -> None:
    start = time.process_time()
    initialise(RetinaNet(ModelConfig(), 80, CELL), 0)
    assert time.process_time() - start < 6  # 1 second on one free core


def test_table_counts_every_weight_once_and_shows_frozen_parts() -> None:
    variables = shapes(ModelConfig())
    counts = parameter_counts(variables)
    assert list(counts) == ["stem", "C2", "C3", "C4", "C5", "FPN", "class head", "box head"]
    for column, collection in enumerate(("params", "frozen")):
        assert sum(row[column] for row in counts.values()) == sum(
            a.size for a in jax.tree.leaves(variables[collection])
        )
    assert counts["stem"] == (0, 7 * 7 * 3 * 64 + 4 * 64) and counts["C2"][0] == 0
    lines = parameter_table(variables).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["part", "trained", "frozen"] and lines[-1].startswith("total")
