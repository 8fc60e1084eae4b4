"""How the passes add nodes and constants to a graph: typed, shaped, and named after what comes out of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


def make_node(
    operator: str,
    inputs: list[ir.Value],
    name: str,
    *,
    dtype: ir.DataType | None = None,
    shape: ir.Shape | None = None,
    **attributes: object,
) -> ir.Node:
    """A node that is in no graph yet; it and its one output are called `name`. Type and shape are its first input's."""
    import onnx_ir as ir

    node = ir.node(operator, inputs, attributes=attributes or None, name=name)
    value = node.outputs[0]
    value.name, value.dtype, value.shape = name, dtype or inputs[0].dtype, shape or inputs[0].shape
    return node


def constant(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """The initializer `name` of `graph`, holding `array`; the one that is there already where there is one."""
    import onnx_ir as ir

    if name not in graph.initializers:
        tensor = ir.Tensor(array, dtype=dtype, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def drop_unread(graph: ir.Graph, values: list[ir.Value]) -> None:
    """Take those of `values` out of `graph` that are initializers which nothing reads any more."""
    for value in values:
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            graph.initializers.pop(str(value.name), None)
