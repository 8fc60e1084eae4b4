"""The int8 graph for ONNX Runtime on a CPU: fp32, but for the linear layers that multiply 8-bit integers.

Each reads its input through QuantizeLinear and DequantizeLinear, and its weights through DequantizeLinear. ONNX Runtime
fuses that and the MatMul into MatMulIntegerToFloat: integer products, summed in 32 bits, scaled to fp32 once.

activation  uint8 around a zero point of 128: the numbers of symmetric int8, written as CPU kernels read them
weights     int8, symmetric, one scale for each output

Kernels for unsigned by signed are the fast ones, and without VNNI they are inexact: vpmaddubsw of AVX2 and AVX-512 adds
two neighbouring products in 16 bits and saturates, in silence (`reduce_range` in ONNX Runtime's page on quantization).
Two weights whose sum is within [-128, 128] cannot: 255 x 128 = 32640 is below 2^15. Seven bits for every weight would
guarantee that. Here an output's scale is raised as far as its own pairs need and no further, so that one graph gives
the same sums on all CPUs. Unsigned by unsigned is exact too, and takes about twice as long where there is VNNI.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_export.errors import InputError
from clip_export.precision._nodes import constant, drop_unread, make_node
from clip_export.precision.linears import Linear, find_linears

if TYPE_CHECKING:
    import onnx_ir as ir

_ZERO_POINT = 128  # what uint8 writes for 0
_PAIR_SUM = 127  # of two weights before rounding, which adds at most a half to each: at most 128 after it


def quantize_for_cpu(source: Path, target: Path, scales: Mapping[str, float]) -> None:
    """Write to `target` the fp32 graph at `source` with the linear layers of `scales` in int8.

    `scales` holds, by the name of the MatMul node, what one step of its input is worth: the input is held as
    round(x / scale) within -128..127. The same graph and scales give the same bytes. Raises InputError for a name that
    is no linear layer of the graph, and for a scale that is not a positive fp32 number.
    """
    import onnx_ir

    from clip_export.graph.files import save

    model = onnx_ir.load(source)
    writer = _Writer(model.graph)
    for linear in _chosen(model.graph, scales, source.name):
        writer.write(linear, scales[linear.name])
    save(model, target)


def pair_safe_scales(weights: np.ndarray) -> np.ndarray:
    """One scale for each output of `weights` [inputs, outputs], float32 [outputs]; 1 for an output of zeros.

    Inputs 2i and 2i + 1 are the pair that vpmaddubsw adds. The sum of the positive weights of a pair is at most 127
    steps, and that of the negative ones at least -127, which holds for each weight alone too. So a scale is once to
    twice the largest weight over 127.
    """
    inputs, outputs = weights.shape
    pairs = np.concatenate([weights, np.zeros((inputs % 2, outputs), weights.dtype)]).reshape(-1, 2, outputs)
    positive, negative = np.maximum(pairs, 0).sum(axis=1), np.maximum(-pairs, 0).sum(axis=1)
    largest = np.maximum(positive, negative).max(axis=0, initial=0.0)
    return np.where(largest > 0, largest / _PAIR_SUM, 1.0).astype(np.float32)


def _chosen(graph: ir.Graph, scales: Mapping[str, float], file: str) -> list[Linear]:
    """The linear layers of `scales` in the order of computation. Raises InputError."""
    linears = [linear for linear in find_linears(graph) if linear.name in scales]
    unknown = sorted(set(scales) - {linear.name for linear in linears})
    if unknown:
        message = f"{file}: expected names of linear layers, found {', '.join(unknown)}"
        raise InputError(message, hint="name MatMul nodes with a constant matrix, as find_linears lists them")
    for name, scale in scales.items():
        if not (math.isfinite(scale) and np.float32(scale) > 0):
            message = f"{file}: expected a positive scale for the input of {name}, found {scale}"
            raise InputError(message, hint="calibrate on inputs that are not all the same, or leave this linear out")
    return linears


class _Writer:
    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._nodes = {str(node.name): node for node in graph}
        self._activations: dict[tuple[str, float], ir.Value] = {}
        self._weights: dict[str, ir.Value] = {}

    def write(self, linear: Linear, scale: float) -> None:
        """Let `linear` read its input and its weights through 8 bits."""
        node = self._nodes[linear.name]
        source, weights = node.inputs[0], node.inputs[1]
        assert source is not None and weights is not None
        node.replace_input_with(0, self._activation(source, scale, node))
        node.replace_input_with(1, self._dequantized(weights, node))
        drop_unread(self._graph, [weights])

    def _activation(self, source: ir.Value, scale: float, before: ir.Node) -> ir.Value:
        """`source` through uint8 and back, made once for all that read it at one scale."""
        import onnx_ir as ir

        key = (str(source.name), scale)
        if key not in self._activations:
            name = f"{before.name}/input"
            step = constant(self._graph, f"{name}/scale", np.array(scale, dtype=np.float32))
            zero = constant(self._graph, "uint8/zero_point", np.array(_ZERO_POINT, dtype=np.uint8))
            down = make_node("QuantizeLinear", [source, step, zero], f"{name}/quantized", dtype=ir.DataType.UINT8)
            held = [down.outputs[0], step, zero]
            up = make_node("DequantizeLinear", held, f"{name}/dequantized", dtype=ir.DataType.FLOAT)
            self._graph.insert_before(before, [down, up])
            self._activations[key] = up.outputs[0]
        return self._activations[key]

    def _dequantized(self, weights: ir.Value, before: ir.Node) -> ir.Value:
        """`weights` from int8, made once for all that multiply by them."""
        import onnx_ir as ir

        name = f"{weights.name}/int8"
        if name not in self._weights:
            assert weights.const_value is not None
            array = weights.const_value.numpy()
            scales = pair_safe_scales(array)
            held = constant(self._graph, name, np.rint(array / scales).astype(np.int8))
            step = constant(self._graph, f"{name}/scale", scales)
            up = make_node("DequantizeLinear", [held, step], f"{name}/dequantized", dtype=ir.DataType.FLOAT, axis=1)
            self._graph.insert_before(before, up)
            self._weights[name] = up.outputs[0]
        return self._weights[name]
