"""A half graph as an fp32 graph that rounds: what a GPU computes, on a CPU.

ONNX Runtime's CPU kernels compute chains of float16 nodes in fp32 and drop what lies between, so that rounding and
overflow stay invisible. Here every tensor that the half graph holds in half is cast to half and back where it is made,
weights are the rounded ones, and sums are fp32, as on tensor cores. What overflows in half is infinite here.

An engine may keep more: it may fuse an activation into a product and round once instead of three times. It may not keep
less, so the simulation is the worst that the types of the graph allow. That goes for attention too: the operator is
taken apart as TensorRT's parser does it, queries and keys each times the root of the scale, and scores and
probabilities are rounded as well. A fused kernel keeps the scores in fp32, and rounds probabilities between its two
products.

QuantizeLinear and DequantizeLinear are written out as well: weights are what DequantizeLinear gives for them, and
activations are divided, rounded and multiplied in fp32. ONNX Runtime would turn the operators themselves into integer
kernels, which on some processors saturate where no GPU does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_export.errors import InputError
from clip_export.precision._held import dequantized, format_of, half_type
from clip_export.precision._nodes import constant, drop_unread, make_node
from clip_export.precision._operators import MOVES, is_constant
from clip_export.precision.formats import Format

if TYPE_CHECKING:
    import onnx_ir as ir


def simulate(source: Path, target: Path) -> None:
    """Write to `target` the fp32 graph that computes what the half graph at `source` does, rounding by rounding."""
    import onnx_ir

    from clip_export.graph.files import save

    model = onnx_ir.load(source)
    write_simulation(model)
    save(model, target)


def write_simulation(model: ir.Model) -> None:
    """Turn the half graph of `model`, in place, into the fp32 graph that computes what it does."""
    from clip_export.graph.primitives import decompose

    graph, halves = model.graph, _half_types()
    attention = [str(node.name) for node in graph if node.op_type == "Attention"]
    decompose(model, only=attention, split_scale=True)
    for node in list(graph):
        if node.op_type == "QuantizeLinear":
            _write_quantization(graph, node)
        elif node.op_type == "DequantizeLinear":
            _write_dequantization(graph, node)
    for value in list(graph.initializers.values()):
        if value.dtype in halves:
            _widen(value)
    for node in list(graph):
        _write_roundings(graph, node, halves)


def rounded_to(graph: ir.Graph, value: ir.Value, scale: ir.Value, format_: Format, name: str) -> list[ir.Node]:
    """Nodes that hold `value` over `scale` in the format, in fp32; the last one gives it. They are in no graph yet.

    The constants that they need are added to `graph`.
    """
    import onnx_ir as ir

    lowest = -128.0 if format_.name == "int8" else -format_.largest
    bounds = [
        constant(graph, f"{format_.name}/{role}", np.array(bound, np.float32))
        for role, bound in (("lowest", lowest), ("largest", format_.largest))
    ]
    single = ir.DataType.FLOAT
    divided = make_node("Div", [value, scale], f"{name}/divided", dtype=single)
    bounded = make_node("Clip", [divided.outputs[0], *bounds], f"{name}/bounded")
    if format_.name == "int8":
        return [divided, bounded, make_node("Round", [bounded.outputs[0]], name)]
    kind = ir.DataType.FLOAT8E4M3FN
    down = make_node("Cast", [bounded.outputs[0]], f"{name}/fp8", dtype=kind, to=int(kind), saturate=1)
    return [divided, bounded, down, make_node("Cast", [down.outputs[0]], name, dtype=single, to=int(single))]


def _write_quantization(graph: ir.Graph, node: ir.Node) -> None:
    """In place of QuantizeLinear, what it computes: the same numbers, in fp32."""
    _require_no_zero_point(node)
    value, scale = node.inputs[0], node.inputs[1]
    held = node.outputs[0]
    assert value is not None and scale is not None and held.dtype is not None
    nodes = rounded_to(graph, value, scale, format_of(held.dtype), f"{held.name}/fp32")
    _replace(graph, node, nodes)


def _require_no_zero_point(node: ir.Node) -> None:
    """Raise InputError for a zero point that is not zero: what is quantized here is symmetric, as TensorRT takes it."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None and (zero.const_value is None or zero.const_value.numpy().astype(np.float32).any()):
        raise InputError(f"expected a zero point of 0 in {node.name}, found another", hint="quantize symmetrically")


def _write_dequantization(graph: ir.Graph, node: ir.Node) -> None:
    """In place of DequantizeLinear a product, rounded as all that is in half; of weights, what it makes of them."""
    _require_no_zero_point(node)
    held, scale, result = node.inputs[0], node.inputs[1], node.outputs[0]
    assert held is not None and scale is not None
    if is_constant(held):
        _write_weights(graph, node)
        return
    product = make_node("Mul", [held, scale], f"{result.name}/fp32", dtype=result.dtype)
    _replace(graph, node, [product])


def _replace(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    import onnx_ir as ir

    read = [value for value in node.inputs if value is not None]
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(node.outputs[0], nodes[-1].outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    drop_unread(graph, read)


def _write_weights(graph: ir.Graph, node: ir.Node) -> None:
    """The fp32 weights that DequantizeLinear gives, made when they are written."""
    import onnx_ir as ir

    held, scale, result = node.inputs[0], node.inputs[1], node.outputs[0]
    assert held is not None and scale is not None
    numbers, scales = held.const_value, scale.const_value
    assert numbers is not None and scales is not None
    half, name = half_type(result), str(result.name)
    axis = node.attributes["axis"].as_int() if scales.size > 1 else 0
    broadcast = [-1 if place == axis else 1 for place in range(len(numbers.shape))]
    weights = ir.LazyTensor(
        lambda: ir.Tensor(dequantized(numbers.numpy(), scales.numpy().reshape(broadcast), half), name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(numbers.shape),
        name=name,
    )
    made = ir.Value(name=name, shape=weights.shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=weights)
    ir.convenience.replace_all_uses_with(result, made)
    graph.remove(node, safe=True)
    graph.register_initializer(made)
    drop_unread(graph, [held, scale])


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
