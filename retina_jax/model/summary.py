"""The cost of a network in operations, counted without running it, and its numbers of trained and frozen parameters."""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.extend import core

from retina_jax import cpu
from retina_jax.config import Config, ModelConfig
from retina_jax.model.retinanet import RetinaNet
from retina_jax.ops.anchors import anchors_per_cell, level_sizes


def forward_flops(config: Config, num_classes: int, padded_hw: tuple[int, int]) -> int:
    """Counts the operations of the forward pass of one image, padded to `padded_hw` = (height, width) pixels.

    A multiply-add counts as two. Taps on the padding of a convolution are counted, and maps are complete, also where
    `resnet.strides_early` leaves places out. Normalisation, activations and sums are not counted: they are below a hundredth
    of the total.
    """
    # With norm "group" maps are complete; the other values change no operation.
    model = replace(config.model, norm="group", prior=0.5, head_std=1.0, backbone_weights="")
    # Only the last 3x3 convolutions of the heads depend on the anchors: a sweep over them traces one network.
    cells = sum(height * width for height, width in level_sizes(padded_hw, model))
    channels = model.head_channels if model.head_convs else model.fpn_channels
    of_anchor = 2 * 9 * channels * (num_classes + 4) * cells
    return _network_flops(model, num_classes, padded_hw) + (anchors_per_cell(config.anchors) - 1) * of_anchor


@functools.cache
def _network_flops(config: ModelConfig, num_classes: int, padded_hw: tuple[int, int]) -> int:
    """Counts the operations with one anchor per cell."""
    model = RetinaNet(config, num_classes, 1)
    images = jax.ShapeDtypeStruct((1, *padded_hw, 3), jnp.uint8)
    image_sizes = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    with cpu.kernels(""):  # `init` makes the parameters and applies the network to them in one trace
        return jaxpr_flops(jax.make_jaxpr(model.init)(jax.random.key(0), images, image_sizes).jaxpr)


def jaxpr_flops(jaxpr: core.Jaxpr) -> int:
    """Counts the operations of the convolutions and matrix products in a program, including its sub-programs. The body of a
    scan counts once per iteration, that of another loop once. Of the branches of a conditional the most expensive counts."""
    total = 0
    for equation in jaxpr.eqns:
        out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = equation.params["dimension_numbers"].rhs_spec[0]
            # The kernel's input channels are those of one group. A gradient has zeros between the pixels of a strided map.
            zeros = math.prod(equation.params["lhs_dilation"])
            total += 2 * out * math.prod(kernel) // (kernel[outputs] * zeros)
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * out * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        parts = {key: [jaxpr_flops(part) for part in _parts(value)] for key, value in equation.params.items()}
        devices = equation.params["mesh"].size if equation.primitive.name == "shard_map" else 1  # each runs the body
        runs = equation.params["length"] if equation.primitive.name == "scan" else devices
        total += runs * sum(max(of, default=0) if key == "branches" else sum(of) for key, of in parts.items())
    return total


def _parts(value: Any) -> Iterator[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _parts(item)


PARTS = {
    **{"backbone/stem": "stem", "backbone/c2": "C2", "backbone/c3": "C3", "backbone/c4": "C4", "backbone/c5": "C5"},
    **{"fpn": "FPN", "class_head": "class head", "box_head": "box head"},
}


def parameter_counts(variables: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns the (trained, frozen) numbers of parameters of each part, in the order of the forward pass.

    `variables` are the collections of the network, as arrays or shapes. Means and variances of frozen BatchNorm count as
    frozen; running statistics (`stats`) are not parameters.
    """
    counts = {part: [0, 0] for part in PARTS.values()}
    for column, collection in enumerate(("params", "frozen")):
        for path, leaf in flatten_dict(variables.get(collection, {}), sep="/").items():
            part = next(part for prefix, part in PARTS.items() if path.startswith(prefix + "/"))
            counts[part][column] += math.prod(leaf.shape)
    return {part: (trained, frozen) for part, (trained, frozen) in counts.items()}


def parameter_table(variables: Mapping[str, Any]) -> str:
    """Returns `parameter_counts` as a table with a last line for the complete network, without a trailing newline."""
    counts = parameter_counts(variables)
    counts["total"] = tuple(sum(column) for column in zip(*counts.values(), strict=True))
    header = f"{'part':<12}{'trained':>14}{'frozen':>14}"
    rows = [f"{part:<12}{trained:>14,}{frozen:>14,}" for part, (trained, frozen) in counts.items()]
    return "\n".join([header, *rows])
