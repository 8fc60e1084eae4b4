"""The linear layers of a graph: the products with a constant matrix, which are what 8 bits pay for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clip_export.precision._operators import constant_product

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A MatMul node with a matrix [inputs, outputs] of weights; `source` is the tensor that it multiplies."""

    name: str
    source: str
    weight: str
    inputs: int
    outputs: int


def find_linears(graph: ir.Graph, *, keep: Sequence[str] = ()) -> list[Linear]:
    """The linear layers of `graph` in the order of computation, without those in the scopes `keep`."""
    found = []
    for node in graph:
        if node.op_type != "MatMul" or not constant_product(node) or in_scopes(str(node.name), keep):
            continue
        source, weight = node.inputs[0], node.inputs[1]
        assert source is not None and weight is not None and weight.shape is not None
        inputs, outputs = weight.shape.numpy()
        found.append(
            Linear(
                name=str(node.name), source=str(source.name), weight=str(weight.name), inputs=inputs, outputs=outputs
            )
        )
    return found


def find_weights(graph: ir.Graph, linear: Linear) -> np.ndarray:
    """The matrix of `linear`, [inputs, outputs]."""
    tensor = graph.initializers[linear.weight].const_value
    assert tensor is not None
    array: np.ndarray = tensor.numpy()
    return array


def in_scopes(name: str, scopes: Sequence[str]) -> bool:
    """Whether the node `name` is one of `scopes`, or inside one of them."""
    return any(name == scope or name.startswith((f"{scope}/", f"{scope}.")) for scope in scopes)
