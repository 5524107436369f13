"""The pyramid: up-sampling, the inputs of P6 and P7, sizes of the levels."""

import math
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retina_jax.config import ModelConfig
from retina_jax.model.fpn import FPN, upsample
from retina_jax.model.initialisation import draw_weight
from retina_jax.model.layers import Conv

TINY = ModelConfig(fpn_channels=16)


def backbone_maps(height: int, width: int) -> tuple[jax.Array, ...]:
    generator = np.random.default_rng(0)
    sides = [(math.ceil(height / 2**level), math.ceil(width / 2**level)) for level in range(2, 6)]
    return tuple(jnp.asarray(generator.standard_normal((1, *s, 4 * 2**i), np.float32)) for i, s in enumerate(sides))


def pyramid(config: ModelConfig, maps: tuple[jax.Array, ...]) -> tuple[dict, dict[int, jax.Array]]:
    """Returns random variables, and the levels by number."""
    shapes = jax.eval_shape(FPN(config).init, jax.random.key(0), maps)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, a: draw_weight("fpn/" + "/".join(key.key for key in path[1:]), a.shape, config, 0), shapes
    )
    levels = jax.jit(FPN(config).apply)(variables, maps)
    return variables, dict(zip(range(config.min_level, config.max_level + 1), levels, strict=True))


@pytest.mark.parametrize("coarse", range(1, 9))
@pytest.mark.parametrize("odd", [0, 1])
def test_upsampling_is_nearest_neighbour_to_the_finer_side(coarse: int, odd: int) -> None:
    """floor(i * in / out) is the nearest neighbour of PyTorch and Caffe2, for sides 2n and 2n - 1."""
    fine = 2 * coarse - odd
    x = np.random.default_rng(0).standard_normal((2, coarse, coarse, 3), np.float32)
    source = np.arange(fine) * coarse // fine
    np.testing.assert_array_equal(upsample(jnp.asarray(x), (fine, fine)), x[:, source][:, :, source])


@pytest.mark.parametrize(("low", "high"), [(3, 7), (2, 5), (2, 6), (4, 9), (5, 5)])
@pytest.mark.parametrize(("height", "width"), [(128, 64), (100, 37)])
def test_level_l_is_the_image_over_2_to_the_l_rounded_up(low: int, high: int, height: int, width: int) -> None:
    config = replace(TINY, min_level=low, max_level=high)
    shapes = jax.eval_shape(
        lambda maps: FPN(config).init_with_output(jax.random.key(0), maps)[0], backbone_maps(height, width)
    )
    assert [s.shape for s in shapes] == [
        (1, math.ceil(height / 2**level), math.ceil(width / 2**level), 16) for level in range(low, high + 1)
    ]


@pytest.mark.parametrize("p6_from", ["c5", "p5"])
def test_relu_precedes_p7_and_not_p6(p6_from: str) -> None:
    maps = backbone_maps(128, 128)
    variables, levels = pyramid(replace(TINY, p6_from=p6_from, max_level=8), maps)

    def strided(level: int, x: jax.Array) -> jax.Array:
        return Conv(16, 3, 2, bias=True).apply({"params": variables["params"][f"output{level}"]}, x)

    np.testing.assert_allclose(levels[6], strided(6, maps[-1] if p6_from == "c5" else levels[5]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(levels[7], strided(7, nn.relu(levels[6])), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(levels[8], strided(8, nn.relu(levels[7])), rtol=1e-4, atol=1e-5)


def test_top_down_path_adds_the_sum_above_before_the_output_convolution() -> None:
    maps = backbone_maps(64, 64)
    variables, levels = pyramid(TINY, maps)

    def conv(name: str, k: int, x: jax.Array) -> jax.Array:
        return Conv(16, k, bias=True).apply({"params": variables["params"][name]}, x)

    m5 = conv("lateral5", 1, maps[3])
    m4 = conv("lateral4", 1, maps[2]) + upsample(m5, (4, 4))
    np.testing.assert_allclose(levels[5], conv("output5", 3, m5), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(levels[4], conv("output4", 3, m4), rtol=1e-4, atol=1e-5)
