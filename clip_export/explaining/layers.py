"""What one layer of a graph holds: its weights, the scale of its input, the ranges of what it reads and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clip_export.explaining.explanation import LayerRanges
from clip_export.explaining.measuring import relative_error, rows
from clip_export.explaining.stages import Place, reads
from clip_export.explaining.tapping import Values
from clip_export.precision._operators import is_constant
from clip_export.precision.fits import HALF_TYPES, HalfType, Precision
from clip_export.spec import Tower

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["POSITIONS", "Scale", "half_type", "input_scale", "ranges", "weights"]

# Operator -> what its constants are, by the index of the input.
_ROLES = {
    "MatMul": {1: "weight"},
    "Conv": {1: "weight", 2: "bias"},
    "LayerNormalization": {1: "weight", 2: "bias"},
    "Gather": {0: "weight"},
    "Add": {0: "bias", 1: "bias"},
}
# What is added or put in front before the first block, by role.
POSITIONS = {"weight": "positional_embedding", "class token": "class_embedding"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How the input of a linear layer is held in 8 bits: `step` is what one step is worth, `held` the most it holds."""

    step: float
    held: float


def weights(graph: ir.Graph, module: str) -> dict[str, np.ndarray]:
    """The constants that the nodes of `module` read, float32, by their role: weight and bias, as in torch.

    Linear weights are [out, in]. Where positions are added, they are the parameters that are no module's.
    """
    if module == "positional_embedding":
        named = {role: graph.initializers.get(name) for role, name in POSITIONS.items()}
        return {role: _floats(value) for role, value in named.items() if value is not None}
    found = {}
    for node in graph:
        if str(node.name).rpartition("/")[0] != module:
            continue
        for index, role in _ROLES.get(node.op_type, {}).items():
            value = node.inputs[index] if index < len(node.inputs) else None
            array = None if value is None else _constant(value)
            if array is not None:
                found[role] = array.T if node.op_type == "MatMul" else array
    return found


def input_scale(graph: ir.Graph, layer: str) -> Scale | None:
    """How the linear `layer` of a Q/DQ graph reads its input; None where it reads it as it is."""
    product = next((node for node in graph if node.name == f"{layer}/MatMul"), None)
    up = None if product is None else _source(product)
    down = _source(up) if up is not None and up.op_type == "DequantizeLinear" else None
    if down is None or down.inputs[1] is None or down.outputs[0].dtype is None:
        return None
    step = _constant(down.inputs[1])
    assert step is not None
    largest = 448.0 if "FLOAT8" in down.outputs[0].dtype.name else 127.0
    return Scale(step=float(step), held=largest * float(step))


def ranges(layer: str, values: Values, places: Sequence[Place], tower: Tower, graph: ir.Graph) -> LayerRanges:
    """The ranges of `layer` of the variant `graph`; `values` are what it holds, smoothed as they are in it."""
    known = {place.layer: place for place in places}
    order = list(known)
    source = reads(layer, tower, known) or dict(zip(order[1:], order, strict=False)).get(layer)
    scale, half = input_scale(graph, layer), half_type(graph, known[layer].node)
    array = np.full((1, 1), np.nan) if source is None else np.abs(rows(values[source]))
    beyond = np.zeros_like(array) if scale is None else np.maximum(array - scale.held, 0)
    return LayerRanges(
        layer=layer,
        input=float(array.max()),
        typical_input=float(np.median(array.max(axis=0))),
        output=float(np.abs(values[layer]).max()),
        held=scale.held if scale is not None else None if half is None else half.largest,
        step=None if scale is None else scale.step,
        clipped=0.0 if scale is None else float((beyond > scale.step / 2).mean()),  # less is the last step's rounding
        lost=0.0 if scale is None else relative_error(array - beyond, array),
    )


def half_type(graph: ir.Graph, name: str) -> HalfType | None:
    """The half type that the node `name` gives its result in; None for fp32."""
    dtype = next((node.outputs[0].dtype for node in graph if node.name == name), None)
    precisions: dict[str, Precision] = {"FLOAT16": "fp16", "BFLOAT16": "bf16"}
    precision = None if dtype is None else precisions.get(dtype.name)
    return None if precision is None else HALF_TYPES[precision]


def _constant(value: ir.Value) -> np.ndarray | None:
    """The constant `value`, float32, 8-bit numbers brought back to what they stand for; None where it is computed."""
    if is_constant(value):
        return _floats(value)
    node = value.producer()
    if node is None or node.op_type not in ("DequantizeLinear", "Cast") or node.inputs[0] is None:
        return None
    held = _constant(node.inputs[0]) if is_constant(node.inputs[0]) else None
    if held is None or node.op_type == "Cast":
        return held
    assert node.inputs[1] is not None
    scale = _constant(node.inputs[1])
    assert scale is not None
    product: np.ndarray = held * scale  # one for each output, which is the last axis
    return product


def _floats(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    array: np.ndarray = value.const_value.numpy().astype(np.float32)
    return array


def _source(node: ir.Node) -> ir.Node | None:
    """What makes the first input of `node`, casts aside."""
    value = node.inputs[0]
    made = None if value is None else value.producer()
    return _source(made) if made is not None and made.op_type == "Cast" else made
