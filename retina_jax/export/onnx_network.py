"""Nodes of the network: `model.retinanet` in evaluation, written from the parameter tree.

Constants have the names of the parameters, such as backbone/c2/block1/conv1/kernel. A norm whose statistics are known is
multiplied into the kernel before it, as in the model. All maps are complete (the model leaves places of C2 out that no layer
reads).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from retina_jax.config import ModelConfig
from retina_jax.export.onnx_nodes import Graph
from retina_jax.model.layers import EPSILON, largest_divisor
from retina_jax.model.resnet import ARCHITECTURES, Layer, block_layers


class Network:
    """Adds layers to a graph; `weights` are the arrays of all collections by their path, such as fpn/lateral5/kernel."""

    def __init__(self, graph: Graph, variables: dict[str, Any], config: ModelConfig) -> None:
        self.graph, self.config = graph, config
        self.weights = {
            "/".join(key.key for key in path): np.asarray(leaf, np.float32)
            for collection in variables.values()
            for path, leaf in jax.tree.leaves_with_path(collection)
        }

    def levels(self, x: str, channels: tuple[int, ...]) -> list[tuple[str, str]]:
        """Returns the last maps of both heads, [B, anchors * outputs, H, W], of each level, finest first. `channels` is the
        order of the network's input channels in the RGB image x [B, 3, H, W]."""
        kernel = "backbone/stem/conv/kernel"
        self.weights[kernel] = self.weights[kernel][:, :, np.argsort(channels)]
        pyramid = enumerate(self._pyramid(self._backbone(x)), start=self.config.min_level)
        return [(self._head("class_head", x, level), self._head("box_head", x, level)) for level, x in pyramid]

    def _backbone(self, x: str) -> list[str]:
        config = self.config
        x = self._relu(self._conv("backbone/stem/conv", x, 2, norm="backbone/stem/norm"))
        x = self.graph("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        maps = []
        for i, blocks in enumerate(config.stage_blocks or ARCHITECTURES[config.backbone].blocks):
            for number in range(blocks):
                layers = block_layers(config, config.base_width * 2**i, 2 if i > 0 and number == 0 else 1)
                x = self._block(f"backbone/c{i + 2}/block{number + 1}", x, layers)
            maps.append(x)
        return maps

    def _block(self, name: str, x: str, layers: tuple[Layer, ...]) -> str:
        y, stride = x, 1
        for i, layer in enumerate(layers, start=1):
            stride *= layer.stride
            y = self._conv(f"{name}/conv{i}", y, layer.stride, layer.groups, norm=f"{name}/norm{i}")
            y = self._relu(y) if i < len(layers) else y
        if f"{name}/shortcut/kernel" in self.weights:
            x = self._conv(f"{name}/shortcut", x, stride, norm=f"{name}/shortcut_norm")
        return self._relu(self.graph("Add", x, y))

    def _pyramid(self, maps: list[str]) -> list[str]:
        levels: dict[int, str] = {}
        merged = ""
        for level in range(5, self.config.min_level - 1, -1):
            lateral = self._conv(f"fpn/lateral{level}", maps[level - 2])
            # The padded sides are multiples of 32, so each map has exactly twice the sides of the next.
            merged = self.graph("Add", lateral, self._doubled(merged)) if merged else lateral
            levels[level] = self._conv(f"fpn/output{level}", merged)
        top = maps[-1] if self.config.p6_from == "c5" else levels[5]
        for level in range(6, self.config.max_level + 1):
            top = levels[level] = self._conv(f"fpn/output{level}", top if level == 6 else self._relu(top), 2)
        return [levels[level] for level in range(self.config.min_level, self.config.max_level + 1)]

    def _doubled(self, x: str) -> str:
        rule = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "mode": "nearest"}
        return self.graph("Resize", x, "", np.array([1, 1, 2, 2], np.float32), **rule)

    def _head(self, name: str, x: str, level: int) -> str:
        of_level = f"_p{level}" if self.config.head_norm == "batch" else ""
        for i in range(1, self.config.head_convs + 1):
            norm = "" if self.config.head_norm == "none" else f"{name}/norm{i}{of_level}"
            x = self._relu(self._conv(f"{name}/conv{i}", x, norm=norm, of_level=of_level))
        return self._conv(f"{name}/output", x)

    def _relu(self, x: str) -> str:
        return self.graph("Relu", x)

    def _conv(self, name: str, x: str, stride: int = 1, groups: int = 1, norm: str = "", of_level: str = "") -> str:
        """Adds a convolution with its bias, or with the norm that follows it, whose name may end in its level."""
        kernel, bias = self.weights[f"{name}/kernel"], self.weights.get(f"{name}/bias")
        of_norm = {key: self.weights.get(f"{norm}/{key}") for key in ("scale", "bias", "mean", "var")}
        if known := of_norm["var"] is not None:
            gain = of_norm["scale"] / np.sqrt(of_norm["var"] + np.float32(EPSILON))
            kernel, bias = kernel * gain, of_norm["bias"] - of_norm["mean"] * gain
        inputs = [self.graph.constant(kernel.transpose(3, 2, 0, 1), f"{name}{of_level}/kernel")]
        if bias is not None:
            inputs.append(self.graph.constant(bias, f"{norm if known else name}/bias"))
        size = len(kernel)
        shape = {"kernel_shape": [size, size], "strides": [stride, stride], "pads": [size // 2] * 4, "group": groups}
        y = self.graph("Conv", x, *inputs, **shape)
        return self._group_norm(norm, y) if norm and not known else y

    def _group_norm(self, name: str, x: str) -> str:
        """Adds a GroupNorm, with the sums of `layers.group_moments`. Those of ONNX Runtime's InstanceNormalization have an
        error of up to 4e-5 where a map is mostly padding."""
        scale, bias = (self.weights[f"{name}/{key}"] for key in ("scale", "bias"))
        graph, groups = self.graph, largest_divisor(len(scale), self.config.norm_groups)
        mean, square = (
            graph("ReduceMean", graph("Reshape", means, [0, groups, -1]), axes=[2])
            for means in (graph("ReduceMean", y, axes=[2, 3]) for y in (x, graph("Mul", x, x)))
        )
        var = graph("Max", graph("Sub", square, graph("Mul", mean, mean)), np.float32(0))
        deviation = graph("Sqrt", graph("Add", var, np.float32(EPSILON)))
        centred = graph("Sub", graph("Reshape", x, [0, groups, -1]), mean)
        y = graph("Reshape", graph("Div", centred, deviation), graph("Shape", x))
        scale, bias = (
            graph.constant(array[:, None, None], f"{name}/{key}") for array, key in ((scale, "scale"), (bias, "bias"))
        )
        return graph("Add", graph("Mul", y, scale), bias)
