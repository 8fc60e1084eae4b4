"""Types written into a graph: nodes in half, the rest fp32, and a cast wherever a tensor goes from one to the other.

One cast for all consumers of a tensor. Weights that are read in half only become half; those read in both are there
twice. Inputs and outputs of the graph keep their types.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from clip_export.precision._operators import is_constant, is_float
from clip_export.precision.fits import HalfType

if TYPE_CHECKING:
    import onnx_ir as ir


def write_types(model: ir.Model, half: HalfType, nodes: Collection[str]) -> None:
    """Turn the fp32 graph of `model`, in place, into a strongly typed one in which the named `nodes` run in half."""
    writer = _Writer(model, half)
    for node in list(model.graph):
        writer.write(node, in_half=node.name in nodes)
    writer.finish()


class _Writer:
    def __init__(self, model: ir.Model, half: HalfType) -> None:
        import onnx_ir as ir

        self._graph, self._half = model.graph, half
        self._type = ir.DataType[half.name.upper()]
        self._casts: dict[tuple[str, ir.DataType], ir.Value] = {}

    def write(self, node: ir.Node, *, in_half: bool) -> None:
        """Give `node` inputs of one type, and its outputs that type."""
        import onnx_ir as ir

        if node.op_type in ("Shape", "Size"):  # they read no numbers, so they take any type
            return
        wanted = self._type if in_half else ir.DataType.FLOAT
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (ir.DataType.FLOAT, self._type):
                node.replace_input_with(index, self._as(value, wanted))
        if not in_half:
            return
        for value in node.outputs:
            if is_float(value):
                value.dtype = wanted
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", int(wanted))

    def finish(self) -> None:
        """Outputs of the graph in fp32 again, and no weights that nothing reads."""
        import onnx_ir as ir

        for index, value in enumerate(self._graph.outputs):
            if value.dtype == self._type:
                name = value.name
                value.name = f"{name}/{self._half.name}"
                cast = self._cast(value, ir.DataType.FLOAT)
                cast.name = name
                self._graph.outputs[index] = cast
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]
        for value in list(self._graph.initializers.values()):
            plain = str(value.name).removesuffix(f"/{self._half.name}")
            if value.dtype == self._type and plain != value.name and plain not in self._graph.initializers:
                self._rename(value, plain)

    def _as(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        if value.dtype == wanted:
            return value
        key = (str(value.name), wanted)
        if key not in self._casts:
            self._casts[key] = self._constant(value) if is_constant(value) else self._cast(value, wanted)
        return self._casts[key]

    def _cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        import onnx_ir as ir

        name = f"{value.name}/to_{wanted.name.lower()}"
        node = ir.node("Cast", [value], attributes={"to": int(wanted)}, name=name)
        cast = node.outputs[0]
        cast.name, cast.dtype, cast.shape = name, wanted, value.shape
        producer = value.producer()
        assert producer is not None  # an input of the graph in fp32 would have none; ours are integers
        self._graph.insert_after(producer, node)
        return cast

    def _constant(self, value: ir.Value) -> ir.Value:
        """The weights `value` in half, rounded when they are written: a large model is never in memory as a whole."""
        import onnx_ir as ir

        tensor, name = value.const_value, f"{value.name}/{self._half.name}"
        assert tensor is not None
        rounded = ir.LazyTensor(
            lambda: ir.Tensor(self._half.round(tensor.numpy()), name=name),
            dtype=self._type,
            shape=ir.Shape(tensor.shape),
            name=name,
        )
        made = ir.Value(name=name, shape=rounded.shape, type=ir.TensorType(self._type), const_value=rounded)
        self._graph.register_initializer(made)
        return made

    def _rename(self, value: ir.Value, name: str) -> None:
        del self._graph.initializers[value.name]
        value.name = name
        if value.const_value is not None:
            value.const_value.name = name
        self._graph.register_initializer(value)
