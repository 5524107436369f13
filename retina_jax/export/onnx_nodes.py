"""Collects the nodes of an ONNX graph. Operators and their attributes have the names of ONNX's specification."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
from onnx import GraphProto, TensorProto, ValueInfoProto, helper, numpy_helper

Value = str | int | float | Sequence[int] | np.ndarray | np.generic
"""Input of a node: the name of another node's output, or a constant. Python's numbers become int64 or float32."""


class Graph:
    """Nodes and constants of a graph. `graph("Add", a, b)` adds a node and returns the name of its output."""

    def __init__(self, outer: Graph | None = None) -> None:
        """`outer`: the graph whose values this graph, a branch or the body of a loop, may use."""
        self.nodes: list[Any] = []
        self._constants: dict[tuple, TensorProto] = outer._constants if outer else {}
        self._numbers: Iterator[int] = outer._numbers if outer else count()

    def __call__(self, operator: str, *inputs: Value, **attributes: Any) -> str:
        return self.several(1, operator, *inputs, **attributes)[0]

    def several(self, outputs: int, operator: str, *inputs: Value, **attributes: Any) -> list[str]:
        """Adds a node and returns the names of its outputs."""
        name = f"{operator}_{next(self._numbers)}"
        names = [name if i == 0 else f"{name}_{i}" for i in range(outputs)]
        given = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        self.nodes.append(helper.make_node(operator, given, names, name=name, **attributes))
        return names

    def constant(self, value: Value, name: str = "") -> str:
        """Returns the name of a constant; equal ones are stored once."""
        array = np.asarray(value, np.float32 if type(value) is float else None)
        key = name, array.dtype.str, array.shape, array.tobytes()
        if key not in self._constants:
            name = name or f"constant_{next(self._numbers)}"
            self._constants[key] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        return self._constants[key].name

    def cast(self, value: Value, dtype: type) -> str:
        """Converts numbers to a numpy type; positive ones are truncated to integers."""
        return self("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def item(self, vector: Value, index: int | str) -> str:
        """Returns element `index` of a vector, or of the first axis of an array."""
        return self("Gather", vector, index, axis=0)

    def clip(self, value: Value, low: Value, high: Value) -> str:
        """Returns min(max(value, low), high)."""
        return self("Min", self("Max", value, low), high)

    def either(self, condition: str, then: str, branch: Graph, otherwise: str, other: Graph) -> str:
        """Returns the value `then` of `branch` where the condition holds, else `otherwise` of `other`."""
        graphs = (branch.branch("then", [], [then]), other.branch("else", [], [otherwise]))
        return self("If", condition, then_branch=graphs[0], else_branch=graphs[1])

    def branch(self, name: str, inputs: Sequence[ValueInfoProto], outputs: Sequence[str]) -> GraphProto:
        """Returns the nodes as the graph of an attribute; the constants belong to the outermost graph."""
        infos = [helper.make_empty_tensor_value_info(output) for output in outputs]
        return helper.make_graph(self.nodes, name, inputs, infos)

    def loop_body(self, names: Sequence[str], new: str) -> GraphProto:
        """Returns the nodes as the body of a Loop with one state. `names` are those of the number of the iteration, the
        condition and the old state; `new` is the new state."""
        kinds = TensorProto.INT64, TensorProto.BOOL
        inputs = [helper.make_tensor_value_info(name, kind, []) for name, kind in zip(names, kinds, strict=False)]
        inputs.append(helper.make_empty_tensor_value_info(names[2]))
        return self.branch("body", inputs, [self("Identity", names[1]), new])

    def complete(
        self, name: str, inputs: Sequence[ValueInfoProto], outputs: dict[str, tuple[str, ValueInfoProto]]
    ) -> GraphProto:
        """Returns the outermost graph. `outputs`: for each name the value that it has, and its type and shape."""
        for renamed, (value, _) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [renamed], name=f"output_{renamed}"))
        infos = [info for _, info in outputs.values()]
        return helper.make_graph(self.nodes, name, inputs, infos, initializer=list(self._constants.values()))
