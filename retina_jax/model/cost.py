"""What a network costs: the operations of its convolutions and matrix products, counted without running it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from retina_jax.anchors import anchors_per_cell
from retina_jax.config import Config, ModelConfig
from retina_jax.model.retinanet import RetinaNet


def forward_flops(config: Config, num_classes: int, canvas: tuple[int, int]) -> int:
    """Operations of one image's forward pass on a canvas of (height, width) pixels.

    A multiply-add counts two. Taps of a convolution that fall on its padding are counted as all others; normalisation,
    activations and sums are not counted: they are under a hundredth of the rest.
    """
    return _network_flops(config.model, num_classes, anchors_per_cell(config.anchors), canvas)


@functools.cache
def _network_flops(config: ModelConfig, num_classes: int, cell: int, canvas: tuple[int, int]) -> int:
    model = RetinaNet(config, num_classes, cell)
    images = jax.ShapeDtypeStruct((1, *canvas, 3), jnp.uint8)
    image_sizes = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images, image_sizes)
    return jaxpr_flops(jax.make_jaxpr(model.apply)(variables, images, image_sizes).jaxpr)


def jaxpr_flops(jaxpr: core.Jaxpr) -> int:
    """Operations of the convolutions and matrix products in a program, those in its parts included.

    A part is counted once: a loop's body does not tell how often it runs. Of alternatives the most expensive counts.
    """
    total = 0
    for equation in jaxpr.eqns:
        # Something of which no output is wanted any more has none.
        out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = equation.params["dimension_numbers"].rhs_spec[0]
            # Its input channels are those of one group. In a gradient zeros stand between the pixels of a strided map.
            zeros = math.prod(equation.params["lhs_dilation"])
            total += 2 * out * math.prod(kernel) // (kernel[outputs] * zeros)
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * out * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        parts = {key: [jaxpr_flops(part) for part in _parts(value)] for key, value in equation.params.items()}
        total += sum(max(of, default=0) if key == "branches" else sum(of) for key, of in parts.items())
    return total


def _parts(value: Any) -> Iterator[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _parts(item)
