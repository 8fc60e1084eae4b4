"""Passes over an exported graph that keep the numbers: what is left is what an engine needs, under readable names.

The exporter has folded constants already. Here shape arithmetic becomes constant shapes, what is not used goes, and
every node is named after the module that it came from (`blocks.3.mlp.fc1/MatMul`), so that precision passes, engine
inspectors and people speak of the same things.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


def optimize(model: ir.Model, *, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Simplify and rename `model` in place. `inputs` and `outputs` are the graph's, in order."""
    import onnx_ir.passes.common as passes

    _constant_reshapes(model.graph)
    passes.IdentityEliminationPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.DeduplicateInitializersPass()(model)
    _rename(model.graph, inputs, outputs)
    # Scopes, stack traces and signatures of the exporter: they name files of the machine that exported.
    passes.ClearMetadataAndDocStringPass()(model)
    for holder in (model, model.graph, *model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        holder.metadata_props.clear()


def _constant_reshapes(graph: ir.Graph) -> None:
    """Reshapes to a computed shape get a constant one: 0 copies a dynamic axis from the same place of the input.

    The exporter builds [batch, sequence, heads, size] from Shape and Concat nodes; [0, 0, heads, size] says the same.
    """
    import onnx_ir as ir

    for node in graph:
        if node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[0].shape is None:
            continue
        source, target = node.inputs[0].shape, node.outputs[0].shape
        if target is None or any(not isinstance(dim, int) and dim not in source[i : i + 1] for i, dim in _axes(target)):
            continue
        dims = [dim if isinstance(dim, int) else 0 for _, dim in _axes(target)]
        shape = ir.tensor(np.array(dims, dtype=np.int64), name=f"{node.outputs[0].name}_shape")
        value = ir.Value(name=shape.name, shape=shape.shape, type=ir.TensorType(shape.dtype), const_value=shape)
        graph.register_initializer(value)
        node.replace_input_with(1, value)
        node.attributes.pop("allowzero", None)


def _axes(shape: ir.Shape) -> list[tuple[int, int | ir.SymbolicDim]]:
    return list(enumerate(shape))


def _rename(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Names from module scopes: nodes `scope/Op`, their outputs the same, constants after their first consumer."""
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    taken: Counter[str] = Counter()
    for node in graph:
        node.name = _unique(f"{_scope(node)}/{node.op_type}".lstrip("/"), taken)
        for index, value in enumerate(node.outputs):
            value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{index}"
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name
    _rename_initializers(graph, taken)


def _rename_initializers(graph: ir.Graph, taken: Counter[str]) -> None:
    values = list(graph.initializers.values())
    names: dict[int, str] = {}
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and id(value) not in names:
                names[id(value)] = _unique(_initializer_name(node, index, value), taken)
    graph.initializers.clear()
    # In the order of use, which is the order of the model and not of the exporter's bookkeeping.
    order = {identity: position for position, identity in enumerate(names)}
    for value in sorted(values, key=lambda value: order[id(value)]):
        value.name = names[id(value)]
        if value.const_value is not None:
            value.const_value.name = value.name
        graph.register_initializer(value)


def _initializer_name(node: ir.Node, index: int, value: ir.Value) -> str:
    """A parameter keeps its name. A folded one is the weight of a MatMul, [in, out]: the parameter, transposed."""
    name = value.name or ""
    if not name.startswith("val_") and not name.endswith("_shape"):
        return name
    if node.op_type == "MatMul" and index == 1:
        return f"{_scope(node)}.weight"
    return f"{node.name}/{index}"


def _scope(node: ir.Node) -> str:
    """The module that a node came from, "" at the top. The exporter's list ends with the operator's own name."""
    if _SCOPES not in node.metadata_props:  # made by an exporter's rewrite: it belongs to what it rewrote
        producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        return "" if producer is None else _scope(producer)
    scopes = [scope.strip(" '\"") for scope in node.metadata_props[_SCOPES].strip("[]").split(",")]
    return scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_") else ""


def _unique(name: str, taken: Counter[str]) -> str:
    taken[name] += 1
    return name if taken[name] == 1 else f"{name}_{taken[name]}"
