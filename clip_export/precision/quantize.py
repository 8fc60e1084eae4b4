"""Half graph -> half graph whose chosen linears multiply in 8 bits, said by QuantizeLinear and DequantizeLinear.

Every linear of the mix reads its input through a pair of both, one scale for the whole tensor, and its weights from
8-bit numbers through DequantizeLinear, one scale for each output. Nothing else changes: sums, norms, activations and
biases stay half or fp32 as they were.

Scales are in the type of the tensor: in TensorRT 10 the output of a DequantizeLinear has the type of its scale, and
scales of two types before one product do not build. TensorRT-RTX then writes the sums of a product in half before the
scales of its outputs are applied, which may be more than half holds: where it is, both scales are fp32. A zero point of
zero says the format of an activation. ONNX would divide in half by such a scale, so `precision` asks for fp32, as in
the simulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_export.errors import InputError
from clip_export.precision._attention import quantize_attention
from clip_export.precision._held import (
    format_type,
    half_type,
    hold_weights,
    is_half,
    scale_misfit,
    weight_scales,
    weights_misfit,
)
from clip_export.precision._nodes import constant, drop_unread, make_node
from clip_export.precision._operators import is_constant
from clip_export.precision._pairs import Pairs, output_type
from clip_export.precision.fits import HEADROOM, HalfType
from clip_export.precision.formats import Format, FormatName, find_format
from clip_export.precision.linears import Linear, find_linears, find_weights

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """How a linear multiplies: its format, and the scale of its input. The scales of its weights follow from them.

    `wide`: scales are fp32, and with them what the compiler holds between the product and its scales.
    """

    format: FormatName
    scale: float
    wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedAttention:
    """How both products of an Attention node multiply: the format, and the scales of its three inputs.

    Probabilities need none: they end at 1.
    """

    format: FormatName
    query: float
    key: float
    value: float


def quantize(
    source: Path,
    target: Path,
    mix: Mapping[str, Quantized],
    *,
    attention: Mapping[str, QuantizedAttention] | None = None,
) -> tuple[str, ...]:
    """Write the half graph at `source` to `target` with the linears of `mix`, by name, and `attention` in 8 bits.

    Returns the names of the linears in the order of computation. The same graph and mix give the same bytes. Raises
    InputError for an unknown format, and naming linears that are not there, do not run in half, or whose scales half
    cannot hold (`refusals` says so beforehand).
    """
    import onnx_ir

    from clip_export.graph.files import save

    model = onnx_ir.load(source)
    linears = chosen(model.graph, mix)
    quantize_attention(model, attention or {})
    writer = _Writer(model.graph)
    for linear in linears:
        writer.write(linear, mix[linear.name])
    save(model, target)
    return tuple(linear.name for linear in linears)


def quantizable(graph: ir.Graph) -> list[Linear]:
    """The linears of `graph` that run in half, in the order of computation."""
    inputs = {str(node.name): node.inputs[0] for node in graph}
    return [linear for linear in find_linears(graph) if is_half(inputs[linear.name])]


def chosen(graph: ir.Graph, mix: Mapping[str, Quantized]) -> list[Linear]:
    """The linears of `mix` in the order of computation. Raises InputError where one cannot be quantized, saying why."""
    reasons = refusals(graph, mix)
    if reasons:
        listed = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        raise InputError(f"expected linears that can be quantized, found: {listed}", hint="leave these out of the mix")
    return [linear for linear in quantizable(graph) if linear.name in mix]


NEEDS_FP32 = "is more than half precision can hold"


def needs_wide(weights: np.ndarray, scale: float, largest: np.ndarray, format_: Format, half: HalfType) -> bool:
    """Whether a product with `weights` [in, out] needs fp32 scales.

    It does where half cannot hold the `scale` of its activations or those of its weights, and where its outputs, over
    the scales of the weights, leave half. `largest` [out] are the largest absolute outputs that were measured; real
    ones may be HEADROOM times as large.
    """
    if scale_misfit(scale, format_, half) is not None or weights_misfit(weights, format_, half) is not None:
        return True
    sums = largest / weight_scales(weights, format_, half).astype(np.float32)
    return not float(sums.max(initial=0.0)) <= half.largest / HEADROOM


def refusals(graph: ir.Graph, mix: Mapping[str, Quantized]) -> dict[str, str]:
    """Why linears of `mix` cannot be quantized in the half graph `graph`, by name; empty where all can."""
    half_linears = {linear.name: linear for linear in quantizable(graph)}
    known = {linear.name for linear in find_linears(graph)}
    reasons = {}
    for name, quantized in mix.items():
        linear = half_linears.get(name)
        if linear is None:
            reasons[name] = NEEDS_FP32 if name in known else "is no linear of this graph"
            continue
        half = half_type(graph.initializers[linear.weight])
        format_ = find_format(quantized.format)
        reason = scale_misfit(quantized.scale, format_, half, wide=quantized.wide)
        if reason is None and not quantized.wide:
            reason = weights_misfit(find_weights(graph, linear), format_, half)
        if reason is not None:
            reasons[name] = reason
    return reasons


class _Writer:
    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._pairs = graph, Pairs(graph)
        self._nodes = {str(node.name): node for node in graph}
        self._weights: dict[tuple[str, FormatName, bool], ir.Value] = {}

    def write(self, linear: Linear, quantized: Quantized) -> None:
        """Let `linear` read its input and its weights through the format."""
        node, format_ = self._nodes[linear.name], find_format(quantized.format)
        source, weights = node.inputs[0], node.inputs[1]
        assert source is not None and weights is not None
        node.replace_input_with(0, self._pairs.add(source, format_, quantized.scale, node, wide=quantized.wide))
        node.replace_input_with(1, self._dequantized(weights, format_, node, wide=quantized.wide))
        drop_unread(self._graph, [weights])
        _keep_whole(self._graph, node)

    def _dequantized(self, weights: ir.Value, format_: Format, before: ir.Node, *, wide: bool) -> ir.Value:
        """`weights` from 8-bit numbers, made when they are written: no large model is in memory as a whole."""
        import onnx_ir as ir

        key = (str(weights.name), format_.name, wide)
        if key in self._weights:
            return self._weights[key]
        tensor, kind = weights.const_value, format_type(format_)
        name = f"{weights.name}/{format_.name}" + ("/wide" if wide else "")
        assert tensor is not None
        scales = weight_scales(tensor.numpy().astype(np.float32), format_, half_type(weights), wide=wide)
        lazy = ir.LazyTensor(
            lambda: ir.Tensor(
                hold_weights(tensor.numpy(), scales, format_).astype(kind.numpy()), dtype=kind, name=name
            ),
            dtype=kind,
            shape=ir.Shape(tensor.shape),
            name=name,
        )
        held = ir.Value(name=name, shape=lazy.shape, type=ir.TensorType(kind), const_value=lazy)
        self._graph.register_initializer(held)
        scale = constant(self._graph, f"{name}/scale", scales, ir.DataType.FLOAT if wide else weights.dtype)
        node = make_node(
            "DequantizeLinear",
            [held, scale],
            f"{name}/dequantized",
            dtype=weights.dtype,
            axis=1,
            **output_type(weights, wide=wide),
        )
        self._graph.insert_before(before, node)
        self._weights[key] = node.outputs[0]
        return node.outputs[0]


def _keep_whole(graph: ir.Graph, product: ir.Node) -> None:
    """Take equal parts of what `product` gives behind a transpose, not by Split.

    TensorRT-RTX 1.7 moves a Split, or Slices, of the last axis into the weights, dequantizes them for it, and then
    multiplies in half. It leaves a [n, ..., columns / n] alone, and needs fewer kernels for q, k and v besides.
    """
    import onnx_ir as ir

    value = product.outputs[0]
    bias = _reader(value, "Add")
    if bias is not None and any(operand is not None and is_constant(operand) for operand in bias.inputs):
        value = bias.outputs[0]
    split = _reader(value, "Split")
    if split is None or value.shape is None:
        return
    if split.attributes.get_int("axis", 0) not in (-1, len(value.shape) - 1):
        return
    sizes = [None if part.shape is None else part.shape[-1] for part in split.outputs]
    if not isinstance(sizes[0], int) or len(set(sizes)) > 1:
        return
    *rows, _ = value.shape.dims
    count, size, name = len(sizes), sizes[0], f"{split.name}/parts"
    wide = constant(graph, f"{name}/shape", np.array([0] * len(rows) + [count, size]))
    parts = make_node("Reshape", [value, wide], name, dtype=value.dtype, shape=ir.Shape([*rows, count, size]))
    order = [len(rows), *range(len(rows)), len(rows) + 1]
    first = make_node(
        "Transpose", [parts.outputs[0]], f"{name}/first", shape=ir.Shape([count, *rows, size]), perm=order
    )
    graph.insert_before(split, [parts, first])
    for index, part in enumerate(split.outputs):
        position = constant(graph, f"parts/{index}", np.array(index))
        taken = make_node("Gather", [first.outputs[0], position], f"{name}/{index}", shape=part.shape, axis=0)
        graph.insert_before(split, taken)
        ir.convenience.replace_all_uses_with(part, taken.outputs[0])
    old = [operand for operand in split.inputs[1:] if operand is not None]
    graph.remove(split, safe=True)
    drop_unread(graph, old)


def _reader(value: ir.Value, operator: str) -> ir.Node | None:
    """The one node that reads `value`, if it is an `operator`."""
    readers = [node for node, _ in value.uses()]
    return readers[0] if len(readers) == 1 and readers[0].op_type == operator else None
