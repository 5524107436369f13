"""What a network costs: the operations of its convolutions and matrix products, counted without running it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.extend import core

from retina_jax.config import Config, ModelConfig
from retina_jax.model.retinanet import RetinaNet
from retina_jax.ops.anchors import anchors_per_cell


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


# What is trained and what is frozen, in numbers: layers frozen by surprise are a common cause of poor training.

ROOMS = {
    "backbone/stem": "stem",
    "backbone/c2": "C2",
    "backbone/c3": "C3",
    "backbone/c4": "C4",
    "backbone/c5": "C5",
    "fpn": "FPN",
    "class_head": "class head",
    "box_head": "box head",
}


def parameter_counts(variables: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(trained, frozen) numbers of each part of the network, in the order of the forward pass.

    Args:
      variables: the collections of the network; arrays or shapes will do.

    Returns:
      part -> (numbers in `params`, numbers in `frozen`). Means and variances of a frozen BatchNorm count as frozen; running
      statistics (`stats`) are no parameters and are not counted.
    """
    sizes = {
        collection: {path: math.prod(leaf.shape) for path, leaf in flatten_dict(variables[collection], sep="/").items()}
        for collection in ("params", "frozen")
        if collection in variables
    }

    def count(collection: str, prefix: str) -> int:
        return sum(size for path, size in sizes.get(collection, {}).items() if path.startswith(prefix + "/"))

    return {room: (count("params", prefix), count("frozen", prefix)) for prefix, room in ROOMS.items()}


def parameter_table(variables: Mapping[str, Any]) -> str:
    """`parameter_counts` as a table for people, with a last line for the whole network. No trailing newline."""
    counts = parameter_counts(variables)
    counts["total"] = tuple(sum(column) for column in zip(*counts.values(), strict=True))
    header = f"{'part':<12}{'trained':>14}{'frozen':>14}"
    rows = [f"{room:<12}{trained:>14,}{frozen:>14,}" for room, (trained, frozen) in counts.items()]
    return "\n".join([header, *rows])
