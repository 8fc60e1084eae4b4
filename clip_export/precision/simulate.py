"""A half graph as an fp32 graph that rounds: what a GPU computes, on a CPU.

ONNX Runtime's CPU kernels compute chains of float16 nodes in fp32 and drop what lies between, so that rounding and
overflow stay invisible. Here every tensor that the half graph holds in half is cast to half and back where it is made,
weights are the rounded ones, and sums are fp32, as on tensor cores. What overflows in half is infinite here.

An engine may keep more: it may fuse an activation into a product and round once instead of three times. It may not keep
less, so the simulation is the worst that the types of the graph allow. That goes for attention too: the operator is
taken apart as TensorRT's parser does it, queries and keys each times the root of the scale, and scores and
probabilities are rounded as well. A fused kernel keeps the scores in fp32, and rounds probabilities between its two
products.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_export.precision._operators import MOVES

if TYPE_CHECKING:
    import onnx_ir as ir


def simulate(source: Path, target: Path) -> None:
    """Write to `target` the fp32 graph that computes what the half graph at `source` does, rounding by rounding."""
    import onnx_ir

    from clip_export.graph.files import save
    from clip_export.graph.primitives import decompose

    model = onnx_ir.load(source)
    halves = _half_types()
    attention = [str(node.name) for node in model.graph if node.op_type == "Attention"]
    decompose(model, only=attention, split_scale=True)
    for value in list(model.graph.initializers.values()):
        if value.dtype in halves:
            _widen(value)
    for node in list(model.graph):
        _write_roundings(model.graph, node, halves)
    save(model, target)


def _half_types() -> frozenset[ir.DataType]:
    import onnx_ir as ir

    return frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def _write_roundings(graph: ir.Graph, node: ir.Node, halves: frozenset[ir.DataType]) -> None:
    """Make the half outputs of `node` fp32, each with a cast to half and back behind it."""
    import onnx_ir as ir

    for value in node.outputs:
        dtype = value.dtype
        if dtype not in halves:
            continue
        assert dtype is not None
        if node.op_type == "Cast":
            _cast_after(graph, node, value, ir.DataType.FLOAT)
            continue
        value.dtype = ir.DataType.FLOAT
        if node.op_type not in MOVES:  # what is moved was rounded where it was made
            rounded = _cast_after(graph, node, value, dtype)
            producer = rounded.producer()
            assert producer is not None
            _cast_after(graph, producer, rounded, ir.DataType.FLOAT)


def _cast_after(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Add a cast of `value` right after `node`, for all that read `value` so far."""
    import onnx_ir as ir

    name = f"{value.name}/to_{dtype.name.lower()}"
    cast = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=name)
    result = cast.outputs[0]
    result.name, result.dtype, result.shape = name, dtype, value.shape
    for consumer, index in list(value.uses()):
        if consumer is not cast:
            consumer.replace_input_with(index, result)
    graph.insert_after(node, cast)
    return result


def _widen(value: ir.Value) -> None:
    """Store rounded weights in fp32, which holds each of them exactly."""
    import onnx_ir as ir

    tensor = value.const_value
    assert tensor is not None
    name = str(value.name)
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor(np.asarray(tensor.numpy(), dtype=np.float32), name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(tensor.shape),
        name=name,
    )
    value.dtype = ir.DataType.FLOAT
