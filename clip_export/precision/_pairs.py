"""QuantizeLinear and DequantizeLinear, one behind the other: what a tensor is once it is held in 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clip_export.precision._held import format_type, half_type, hold_scale
from clip_export.precision._nodes import constant, make_node
from clip_export.precision.formats import Format, FormatName

if TYPE_CHECKING:
    import onnx_ir as ir


class Pairs:
    """QuantizeLinear and DequantizeLinear pairs on tensors of a graph; equal ones are made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[str, FormatName, float, bool], ir.Value] = {}

    def add(self, value: ir.Value, format_: Format, scale: float, before: ir.Node, *, wide: bool = False) -> ir.Value:
        """`value` through a pair, put right before the node that reads it first; with `wide` its scale is fp32."""
        import onnx_ir as ir

        key = (str(value.name), format_.name, scale, wide)
        if key in self._made:
            return self._made[key]
        before_it = sum(made[0] == value.name for made in self._made)
        name = f"{value.name}" + (f"/{before_it + 1}" if before_it else "")
        kind = format_type(format_)
        number = hold_scale(scale, half_type(value), wide=wide)
        held = constant(self._graph, f"{name}/scale", number, ir.DataType.FLOAT if wide else value.dtype)
        zero = constant(self._graph, f"{format_.name}/zero_point", np.zeros((), kind.numpy()), kind)
        down = make_node(
            "QuantizeLinear", [value, held, zero], f"{name}/quantized", dtype=kind, precision=int(ir.DataType.FLOAT)
        )
        read = [down.outputs[0], held, zero]
        up = make_node(
            "DequantizeLinear", read, f"{name}/dequantized", dtype=value.dtype, **output_type(value, wide=wide)
        )
        self._graph.insert_before(before, [down, up])
        self._made[key] = up.outputs[0]
        return up.outputs[0]


def output_type(value: ir.Value, *, wide: bool) -> dict[str, object]:
    """The attribute by which DequantizeLinear gives the type of `value` where its scale is fp32."""
    assert value.dtype is not None
    return {"output_dtype": int(value.dtype)} if wide else {}
