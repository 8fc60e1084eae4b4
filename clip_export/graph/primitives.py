"""Operators that not every compiler has, in terms of those that it has. Passes over any ONNX graph, fp32 or half.

TensorRT has fused kernels for the Attention operator in half precision only, and releases before 10.14 do not parse it.
The form that it recognises as attention instead is [batch, heads, sequence, size], the scale on the query before the
first product, softmax over the last axis.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_export.errors import PlanBuildError

if TYPE_CHECKING:
    import onnx_ir as ir

# Below it a norm is taken to be zero, as torch.nn.functional.normalize has it.
SMALLEST_NORM = 1e-12


def prepare(source: Path, target: Path, *, primitive: bool) -> Path:
    """Write to `target` the graph at `source` as a compiler takes it, and return `target`.

    Where there is an embedding, it is given once more, normalized. With `primitive` attention is taken apart.
    """
    import onnx_ir

    from clip_export.graph.files import save

    model = onnx_ir.load(source)
    if primitive:
        decompose_attention(model)
    add_normalized(model)
    save(model, target)
    return target


def decompose_attention(model: ir.Model, only: Collection[str] | None = None) -> int:
    """Replace Attention nodes of `model` in place by products and a softmax; returns how many.

    `only` names the nodes to replace, all by default. Queries, keys and values are [batch, heads, sequence, size], or
    [batch, sequence, heads * size] with the heads in attributes; the numbers are those of the operator. A mask is bool,
    true where a position is seen. Raises PlanBuildError for another mask, a cache, a soft cap or fewer heads of keys
    than of queries.
    """
    return len(decompose(model, only))


def decompose(
    model: ir.Model, only: Collection[str] | None = None, *, split_scale: bool = False
) -> dict[str, ir.Value]:
    """As `decompose_attention`; returns the scores before mask and softmax, by the name of the node that was replaced.

    `split_scale` puts the root of the scale on queries and keys both, which is how ONNX defines the operator and how
    TensorRT parses it: in half precision the roundings are those.
    """
    nodes = [node for node in model.graph if node.op_type == "Attention" and (only is None or node.name in only)]
    masks: dict[tuple[str, str], ir.Value] = {}
    return {str(node.name): _Decomposition(model.graph, node, split_scale).replace(masks) for node in nodes}


def add_normalized(model: ir.Model) -> bool:
    """Append the output `normalized`, float32: `embedding` over its L2 norm, or over 1e-12 where that is larger.

    Returns False, and changes nothing, where there is no output `embedding`, or `normalized` is there already.
    """
    import onnx_ir as ir

    outputs = {value.name: value for value in model.graph.outputs}
    if "embedding" not in outputs or "normalized" in outputs:
        return False
    embedding = outputs["embedding"]
    add = _Adder(model.graph, "normalized", None)
    if embedding.dtype != ir.DataType.FLOAT:  # the square of a half overflows at 256, and 1e-12 is zero in it
        embedding = add("Cast", [embedding], "embedding", dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT)
    column = None if embedding.shape is None else [*embedding.shape.dims[:-1], 1]
    axis, smallest = add.constant("axis", np.array([-1])), add.constant("smallest", np.float32(SMALLEST_NORM))
    norm = add("ReduceL2", [embedding, axis], "norm", shape=column, keepdims=1)
    divisor = add("Max", [norm, smallest], "divisor", shape=column)
    normalized = add("Div", [embedding, divisor], "Div", shape=embedding.shape)
    normalized.name = "normalized"
    model.graph.outputs.append(normalized)
    return True


class _Adder:
    """Adds nodes `scope/role` to a graph, before the node `at` or at the end, of the type of their first input."""

    def __init__(self, graph: ir.Graph, scope: str, at: ir.Node | None) -> None:
        self._graph, self._scope, self._at = graph, scope, at
        self._taken = {node.name for node in graph} | set(graph.initializers)

    def __call__(
        self,
        operator: str,
        inputs: list[ir.Value],
        role: str,
        *,
        shape: ir.Shape | list[int | ir.SymbolicDim] | None = None,
        dtype: ir.DataType | None = None,
        **attributes: object,
    ) -> ir.Value:
        import onnx_ir as ir

        name = self._unique(role)
        node = ir.node(operator, inputs, attributes=attributes or None, name=name)
        value = node.outputs[0]
        value.name, value.dtype = name, dtype or inputs[0].dtype
        value.shape = inputs[0].shape if shape is None else ir.Shape(shape)
        if self._at is None:
            self._graph.append(node)
        else:
            self._graph.insert_before(self._at, node)
        return value

    def constant(self, role: str, array: np.ndarray | np.generic) -> ir.Value:
        import onnx_ir as ir

        name = self._unique(role)
        tensor = ir.Tensor(np.asarray(array), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _unique(self, role: str) -> str:
        name = f"{self._scope}/{role}".lstrip("/")
        number = 1
        while name in self._taken:
            number += 1
            name = f"{self._scope}/{role}_{number}".lstrip("/")
        self._taken.add(name)
        return name


class _Decomposition:
    """One Attention node and what replaces it, under the scope of its name."""

    def __init__(self, graph: ir.Graph, node: ir.Node, split_scale: bool) -> None:
        self._graph, self._node, self._split = graph, node, split_scale
        self._heads = _integer(node, "q_num_heads")
        _require_plain(node)
        self._add = _Adder(graph, str(node.name).rpartition("/")[0], node)
        self._query, self._key, self._value = (value for value in node.inputs[:3] if value is not None)

    def replace(self, masks: dict[tuple[str, str], ir.Value]) -> ir.Value:
        """Put the primitive form in place of the node; returns the scores."""
        import onnx_ir as ir

        add, old = self._add, self._node.outputs[0]
        query, key, value = (
            self._split_heads(operand, role)
            for operand, role in ((self._query, "query"), (self._key, "key"), (self._value, "value"))
        )
        scores = self._scores(query, key)
        masked = self._masked(scores, query, key, masks)
        probabilities = add("Softmax", [masked], "probabilities", axis=-1)
        mixed = add("MatMul", [probabilities, value], "mixed", shape=query.shape)
        if self._heads:
            mixed = self._join_heads(mixed)
        ir.convenience.replace_all_uses_with(old, mixed, replace_graph_outputs=True)
        self._graph.remove(self._node, safe=True)
        mixed.name, mixed.shape = old.name, old.shape  # consumers, ranges and reports go on speaking of it
        return scores

    def _scores(self, query: ir.Value, key: ir.Value) -> ir.Value:
        add, dtype = self._add, self._query.dtype
        assert query.shape is not None and key.shape is not None and dtype is not None
        given = self._node.attributes.get("scale")
        scale = 1 / math.sqrt(_size(query, 3)) if given is None else float(given.value)
        factor = add.constant("scale", np.asarray(math.sqrt(scale) if self._split else scale, dtype.numpy()))
        query = add("Mul", [query, factor], "scaled_query")
        if self._split:
            key = add("Mul", [key, factor], "scaled_key")
        batch, heads, keys, size = key.shape.dims
        transposed = add("Transpose", [key], "transposed_key", shape=[batch, heads, size, keys], perm=[0, 1, 3, 2])
        return add("MatMul", [query, transposed], "scores", shape=[batch, heads, query.shape[2], keys])

    def _masked(
        self, scores: ir.Value, query: ir.Value, key: ir.Value, masks: dict[tuple[str, str], ir.Value]
    ) -> ir.Value:
        """Scores of hidden positions replaced by the lowest finite number: an infinity minus itself is not a number."""
        assert scores.dtype is not None and query.shape is not None and key.shape is not None
        visible = _mask(self._node)
        if visible is None and not _integer(self._node, "is_causal"):
            return scores
        if visible is None:
            lengths = (str(query.shape[2]), str(key.shape[2]))
            known = "None" not in lengths  # axes without a name may differ from one another
            visible = masks.get(lengths) if known else None
            if visible is None:
                visible = self._visible(query, key)
                masks[lengths] = visible
        lowest = self._add.constant("lowest", np.asarray(_lowest(scores.dtype), scores.dtype.numpy()))
        return self._add("Where", [visible, scores, lowest], "masked_scores", shape=scores.shape, dtype=scores.dtype)

    def _visible(self, query: ir.Value, key: ir.Value) -> ir.Value:
        """Bool [queries, keys], true where the key is not after the query; computed, since both axes are dynamic."""
        import onnx_ir as ir

        add, integer = self._add, ir.DataType.INT64
        assert query.shape is not None and key.shape is not None
        zero, one = add.constant("zero", np.array(0)), add.constant("one", np.array(1))
        axis, first = add.constant("row_axis", np.array([1])), add.constant("first_axis", np.array([0]))

        def positions(value: ir.Value, role: str) -> ir.Value:
            assert value.shape is not None
            shape = add("Shape", [value], f"{role}_shape", shape=[1], dtype=integer, start=2, end=3)
            length = add("Squeeze", [shape, first], f"{role}_length", shape=[], dtype=integer)
            return add("Range", [zero, length, one], f"{role}_positions", shape=[value.shape[2]], dtype=integer)

        columns = positions(key, "key")
        rows = add("Unsqueeze", [positions(query, "query"), axis], "rows", shape=[query.shape[2], 1], dtype=integer)
        shape = [query.shape[2], key.shape[2]]
        return add("LessOrEqual", [columns, rows], "visible", shape=shape, dtype=ir.DataType.BOOL)

    def _split_heads(self, value: ir.Value, role: str) -> ir.Value:
        """[batch, sequence, heads * size] to [batch, heads, sequence, size]; four axes stay as they are."""
        if not self._heads:
            return value
        assert value.shape is not None
        batch, sequence, size = value.shape[0], value.shape[1], _size(value, 2) // self._heads
        shape = self._add.constant(f"{role}_heads", np.array([0, 0, self._heads, size]))
        wide = self._add("Reshape", [value, shape], f"{role}_split", shape=[batch, sequence, self._heads, size])
        heads_first = [batch, self._heads, sequence, size]
        return self._add("Transpose", [wide], f"{role}_transposed", shape=heads_first, perm=[0, 2, 1, 3])

    def _join_heads(self, mixed: ir.Value) -> ir.Value:
        assert mixed.shape is not None
        batch, heads, sequence, size = mixed.shape.dims
        turned = self._add(
            "Transpose", [mixed], "mixed_transposed", shape=[batch, sequence, heads, size], perm=[0, 2, 1, 3]
        )
        width = _size(mixed, 3) * self._heads
        shape = self._add.constant("joined_shape", np.array([0, 0, width]))
        return self._add("Reshape", [turned, shape], "joined", shape=[batch, sequence, width])


def _require_plain(node: ir.Node) -> None:
    """Raise PlanBuildError unless the node is softmax(scale q k) v, causal or masked, with as many heads of each."""
    found = []
    if any(value is not None for value in node.inputs[4:]):
        found.append("a cache as input")
    mask = _mask(node)
    if mask is not None and (not _is_bool(mask) or _integer(node, "is_causal")):
        found.append("a mask that is not bool, or is causal besides")
    if len([value for value in node.outputs if value.name and (value.uses() or value.is_graph_output())]) > 1:
        found.append("more than one output")
    attribute = node.attributes.get("softcap")
    if attribute is not None and attribute.value:
        found.append("a soft cap")
    query, key = node.inputs[0], node.inputs[1]
    if query is None or key is None or query.shape is None or key.shape is None or query.dtype is None:
        found.append("inputs without a shape")
    elif len(query.shape) == 4 and query.shape[1] != key.shape[1]:
        found.append("fewer heads of keys than of queries")
    if _integer(node, "q_num_heads") != _integer(node, "kv_num_heads"):
        found.append("fewer heads of keys than of queries")
    if found:
        raise PlanBuildError(
            f"{node.name}: expected attention of queries, keys and values, found {', '.join(found)}",
            hint="export the checkpoint again with this version of clip-export",
        )


def _mask(node: ir.Node) -> ir.Value | None:
    return node.inputs[3] if len(node.inputs) > 3 else None


def _is_bool(value: ir.Value) -> bool:
    import onnx_ir as ir

    return bool(value.dtype == ir.DataType.BOOL)


def _integer(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else int(attribute.value)


def _size(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise PlanBuildError(f"{value.name}: expected a fixed size on axis {axis}, found {size}")
    return size


def _lowest(dtype: ir.DataType) -> float:
    import onnx_ir as ir

    if dtype == ir.DataType.FLOAT16:
        return float(np.finfo(np.float16).min)
    # bfloat16 has the exponents of float32 and fewer digits: its lowest number, so that rounding makes no infinity
    return -float(np.float32(3.3895314e38))
