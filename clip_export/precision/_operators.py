"""What the passes know of operators: which compute, which only move numbers, which are float tensors at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

# Their outputs hold numbers of their inputs, unchanged: they take the type that they are given, and round nothing.
MOVES = frozenset(
    {"Concat", "Expand", "Gather", "GatherElements", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)
# Products run on tensor cores: half operands, fp32 sums, one rounding of the result.
PRODUCTS = frozenset({"Attention", "Conv", "MatMul"})
# One result per element. Softmax is among them: its sums are fp32 in every kernel.
ELEMENTWISE = frozenset({"Add", "Cast", "Div", "Gelu", "Mul", "Sigmoid", "Softmax", "Sub", "Where"})


def is_float(value: ir.Value | None) -> bool:
    """Whether `value` is a float32 tensor."""
    import onnx_ir as ir

    return value is not None and value.dtype == ir.DataType.FLOAT


def float_inputs(node: ir.Node) -> list[ir.Value]:
    """The float32 tensors that `node` reads, constants among them."""
    return [value for value in node.inputs if value is not None and is_float(value)]


def is_constant(value: ir.Value) -> bool:
    """Whether `value` is a weight: known when the graph is built."""
    return bool(value.is_initializer())


def constant_product(node: ir.Node) -> bool:
    """Whether `node` multiplies by weights: a convolution, or a MatMul with a constant matrix on the right."""
    if len(node.inputs) < 2 or node.inputs[1] is None or not is_constant(node.inputs[1]):
        return False
    matrix = node.inputs[1].shape
    return node.op_type == "Conv" or (node.op_type == "MatMul" and matrix is not None and len(matrix) == 2)
