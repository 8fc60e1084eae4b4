"""One simulation of every mix of quantized linears: a switch for each, so that a search opens one session.

Each linear that may be quantized becomes an If: its product as the half graph has it, or what `quantize` and `simulate`
would make of it, the same operators on the same numbers. So any mix gives the bits that its own simulation gives, and
only what is switched on is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_export import backends
from clip_export.errors import InputError
from clip_export.precision._attention import quantize_attention
from clip_export.precision._held import dequantized, half_type, hold_scale, hold_weights, weight_scales
from clip_export.precision._nodes import constant, make_node
from clip_export.precision.fits import HalfType
from clip_export.precision.formats import find_format
from clip_export.precision.quantize import Quantized, QuantizedAttention, chosen
from clip_export.precision.ranges import Feeds
from clip_export.precision.simulate import rounded_to, write_simulation

if TYPE_CHECKING:
    import onnx_ir as ir

_SWITCH = "quantize "


def switchable(
    source: Path,
    target: Path,
    mix: Mapping[str, Quantized],
    *,
    attention: Mapping[str, QuantizedAttention] | None = None,
) -> None:
    """Write to `target` the simulation of the half graph at `source` with a switch for every linear of `mix`.

    A switch is an input `quantize <linear>`, bool []. `attention` is quantized in all mixes. The weights are there
    twice, in fp32: 8 bytes for each. Raises as `quantize`.
    """
    import onnx_ir

    from clip_export.graph.files import save

    model = onnx_ir.load(source)
    linears = chosen(model.graph, mix)
    halves = {linear.name: half_type(model.graph.initializers[linear.weight]) for linear in linears}
    quantize_attention(model, attention or {})
    write_simulation(model)
    nodes = {str(node.name): node for node in model.graph}
    for name, half in halves.items():
        _add_switch(model.graph, nodes[name], mix[name], half)
    save(model, target)


class Switched:
    """A session on what `switchable` wrote, on the CPU; `linears` are those that have a switch, in order."""

    def __init__(self, path: Path) -> None:
        import onnx_ir

        inputs = [str(value.name) for value in onnx_ir.load(path).graph.inputs]
        self.linears = tuple(name.removeprefix(_SWITCH) for name in inputs if name.startswith(_SWITCH))
        self._engine = backends.open_engine("onnxruntime", path)

    def run(self, feeds: Sequence[Feeds], on: Collection[str]) -> list[dict[str, np.ndarray]]:
        """What the graph gives for each of `feeds`, by output name, with the linears `on` quantized.

        Raises InputError for a linear that has no switch.
        """
        unknown = sorted(set(on) - set(self.linears))
        if unknown:
            raise InputError(
                f"expected linears that have a switch, found {', '.join(unknown)}",
                hint="write the switchable graph with these in its mix",
            )
        switches = {f"{_SWITCH}{name}": np.array(name in on) for name in self.linears}
        return [self._engine({**batch, **switches}) for batch in feeds]

    def close(self) -> None:
        """Free the session."""
        self._engine.close()


def _add_switch(graph: ir.Graph, product: ir.Node, quantized: Quantized, half: HalfType) -> None:
    """Put an If in place of `product`, whose branches give its result without and with quantization."""
    import onnx_ir as ir

    name, result = str(product.name), product.outputs[0]
    switch = ir.Value(name=f"{_SWITCH}{name}", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    graph.inputs.append(switch)
    source, weights = product.inputs[0], product.inputs[1]
    assert source is not None and weights is not None
    plain = make_node("MatMul", [source, weights], f"{name}/plain", shape=result.shape)
    changed = _quantized(graph, product, quantized, half)
    branches = {"then_branch": _branch(changed), "else_branch": _branch([plain])}
    choice = make_node("If", [switch], f"{name}/switched", dtype=result.dtype, shape=result.shape, **branches)
    graph.insert_before(product, choice)
    ir.convenience.replace_all_uses_with(result, choice.outputs[0], replace_graph_outputs=True)
    graph.remove(product, safe=True)


def _branch(nodes: list[ir.Node]) -> ir.Graph:
    import onnx_ir as ir

    return ir.Graph([], [nodes[-1].outputs[0]], nodes=nodes, name=str(nodes[-1].name))


def _quantized(graph: ir.Graph, product: ir.Node, quantized: Quantized, half: HalfType) -> list[ir.Node]:
    """The product of what is left of its operands in 8 bits, as `simulate` writes it."""
    import onnx_ir as ir

    name, format_ = f"{product.name}/{quantized.format}", find_format(quantized.format)
    source, weights = product.inputs[0], product.inputs[1]
    assert source is not None and weights is not None and weights.const_value is not None
    step = hold_scale(quantized.scale, half, wide=quantized.wide)
    scale = constant(graph, f"{name}/scale", step.astype(np.float32))
    held = rounded_to(graph, source, scale, format_, f"{name}/held")
    multiplied = make_node("Mul", [held[-1].outputs[0], scale], f"{name}/multiplied")
    kind = ir.DataType[half.name.upper()]
    down = make_node("Cast", [multiplied.outputs[0]], f"{name}/half", dtype=kind, to=int(kind))
    single = ir.DataType.FLOAT
    up = make_node("Cast", [down.outputs[0]], f"{name}/input", dtype=single, to=int(single))
    tensor = weights.const_value

    def make() -> ir.Tensor:
        exact = tensor.numpy()  # rounded to half before, and wide since
        scales = weight_scales(exact, format_, half, wide=quantized.wide)
        return ir.Tensor(dequantized(hold_weights(exact, scales, format_), scales, half), name=f"{name}/weights")

    lazy = ir.LazyTensor(make, dtype=single, shape=ir.Shape(tensor.shape), name=f"{name}/weights")
    made = ir.Value(name=lazy.name, shape=lazy.shape, type=ir.TensorType(single), const_value=lazy)
    graph.register_initializer(made)
    last = make_node("MatMul", [up.outputs[0], made], name, shape=product.outputs[0].shape)
    return [*held, multiplied, down, up, last]
