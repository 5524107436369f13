"""Operations counted in a program equal counts by hand and XLA's."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from retina_jax import cpu
from retina_jax.config import AnchorConfig, Config, ModelConfig
from retina_jax.model.retinanet import RetinaNet
from retina_jax.model.summary import forward_flops, jaxpr_flops
from retina_jax.ops.anchors import anchors_per_cell

SMALL = ModelConfig(backbone="resnet18", base_width=16, fpn_channels=32, head_channels=32)


def convolve(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "VALID", dimension_numbers=layout, feature_group_count=groups
    )


@pytest.mark.parametrize(("stride", "groups", "side"), [(1, 1, 18), (2, 1, 9), (1, 4, 18), (2, 8, 9)])
def test_a_convolution_counts_two_operations_per_tap(stride: int, groups: int, side: int) -> None:
    x, kernel = jnp.zeros((2, 20, 20, 16)), jnp.zeros((3, 3, 16 // groups, 24))
    counted = jaxpr_flops(jax.make_jaxpr(lambda x, k: convolve(x, k, stride, groups))(x, kernel).jaxpr)
    assert counted == 2 * (2 * side * side * 24) * (3 * 3 * 16 // groups)
    xla = jax.jit(lambda x, k: convolve(x, k, stride, groups)).lower(x, kernel).cost_analysis()
    assert counted == xla["flops"]


def test_a_matrix_product_counts_two_operations_per_multiplication() -> None:
    a, b = jnp.zeros((2, 5, 7, 3)), jnp.zeros((3, 11))
    counted = jaxpr_flops(jax.make_jaxpr(lambda a, b: lax.dot_general(a, b, (((3,), (0,)), ((), ()))))(a, b).jaxpr)
    assert counted == 2 * (2 * 5 * 7) * 3 * 11


def test_parts_of_a_program_are_counted() -> None:
    a = jnp.zeros((4, 4))
    product = jax.checkpoint(jax.jit(lambda a: a @ a))
    assert jaxpr_flops(jax.make_jaxpr(lambda a: product(a) + a @ a)(a).jaxpr) == 2 * 2 * 4**3
    scanned = jax.make_jaxpr(lambda a: lax.scan(lambda a, _: (a @ a, None), a, length=3)[0])(a)
    assert jaxpr_flops(scanned.jaxpr) == 3 * 2 * 4**3
    both = jaxpr_flops(jax.make_jaxpr(lambda a: lax.cond(True, lambda a: a @ a, lambda a: a, a))(a).jaxpr)
    assert both == 2 * 4**3


def test_a_network_counts_what_xla_counts() -> None:
    """XLA leaves out the taps on padding, and counts norms and sums too."""
    config = Config(model=SMALL)
    model = RetinaNet(SMALL, 6, anchors_per_cell(config.anchors))
    images, sizes = jax.ShapeDtypeStruct((1, 256, 320, 3), jnp.uint8), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images, sizes)
    # Compiled for a GPU, which uses the plain convolution only.
    traced = jax.jit(model.apply).trace(variables, images, sizes)
    xla = traced.lower(lowering_platforms=("cuda",)).cost_analysis()
    assert forward_flops(config, 6, (256, 320)) == pytest.approx(xla["flops"], rel=0.05)


def test_the_last_convolutions_cost_by_anchors_and_classes() -> None:
    """One more class adds one output of the class head per anchor and cell."""
    config = Config(model=SMALL, anchors=AnchorConfig(ratios=(1.0,), scales=(1.0, 1.5)))
    cells = sum((256 >> level) ** 2 for level in range(3, 8))
    more = forward_flops(config, 7, (256, 256)) - forward_flops(config, 6, (256, 256))
    assert more == 2 * cells * 2 * 9 * 32


@pytest.mark.parametrize("head_convs", [0, 1])
def test_more_anchors_cost_as_in_the_traced_network(head_convs: int) -> None:
    """The cost is that of a network with one anchor per cell and a term for the others."""
    config = Config(
        model=replace(SMALL, head_convs=head_convs, head_channels=16), anchors=AnchorConfig(scales=(1.0, 1.5))
    )
    model = RetinaNet(config.model, 5, 6)
    images, sizes = jax.ShapeDtypeStruct((1, 64, 128, 3), jnp.uint8), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    with cpu.kernels(""):
        traced = jax.make_jaxpr(model.init)(jax.random.key(0), images, sizes)
    assert forward_flops(config, 5, (64, 128)) == jaxpr_flops(traced.jaxpr)


def test_recomputing_does_not_change_the_forward_pass() -> None:
    plain = forward_flops(Config(model=SMALL), 3, (64, 64))
    again = forward_flops(Config(model=ModelConfig(**{**vars(SMALL), "remat": True})), 3, (64, 64))
    assert plain == again
