"""Which nodes of an fp32 graph run in half, and why the others do not.

A node runs in half if all that it reads and writes fits, so that a node is of one type. Three things are known only
from elsewhere. Movements take the type that they are given. A tensor whose rounding harms a product further down has
to come exact from where it is made: whatever rounds it on the way stays fp32 with the product. And a LayerNormalization
scales its input up to order 1, so there it is the typical channel that must not vanish, not the largest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from clip_export.errors import PlanBuildError
from clip_export.precision._operators import (
    ELEMENTWISE,
    MOVES,
    PRODUCTS,
    constant_product,
    float_inputs,
    is_constant,
    is_float,
)
from clip_export.precision.fits import (
    HalfType,
    Misfit,
    Reason,
    constant_misfit,
    operand_misfit,
    size_misfit,
    tensor_misfit,
    weights_misfit,
)
from clip_export.precision.linears import in_scopes
from clip_export.precision.ranges import Ranges

if TYPE_CHECKING:
    import onnx_ir as ir

# asked: in a scope that is to stay fp32. operator: an fp32 operator by rule. range: in `kept`. moves: of fp32 numbers.
Rule: TypeAlias = Literal["asked", "operator", "range", "moves"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A node that stays fp32 for what `tensor` holds: `value` is beyond `limit`; see fits.Misfit."""

    node: str
    reason: Reason
    tensor: str
    value: float
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """The names of the nodes that run in half, the rule by which each other one is fp32, and what ranges decided."""

    half: frozenset[str]
    fp32: Mapping[str, Rule]
    kept: tuple[Kept, ...]

    def count(self) -> dict[Rule, int]:
        """How many nodes are fp32, by rule."""
        return dict(sorted(Counter(self.fp32.values()).items()))


def decide(
    graph: ir.Graph, half: HalfType, ranges: Ranges, *, keep: Sequence[str] = (), everything: bool = False
) -> Decisions:
    """Decide for every node of the fp32 `graph` that reads or makes float tensors.

    `keep` are scopes that stay fp32. With `everything` products run in half wherever they are, as on chips that have no
    fp32 ones. Raises PlanBuildError where that would overflow or underflow.
    """
    judge = _Judge(graph, half, ranges, tuple(keep), everything)
    judge.examine()
    if everything:
        _require_products(judge.kept.values(), graph, half)
    return judge.decisions()


@dataclass(slots=True)
class _Judge:
    graph: ir.Graph
    half: HalfType
    ranges: Ranges
    keep: tuple[str, ...]
    everything: bool
    kept: dict[str, Kept] = field(default_factory=dict)

    def examine(self) -> None:
        """Find every misfit, and what stays fp32 for it."""
        for node in self.graph:
            if self._by_rule(node) is None and _floats(node):
                found = self._constants(node) if node.op_type in MOVES else self._misfits(node)
                self._keep(node, next(found, None))
            if constant_product(node):
                self._examine_product(node)
            elif node.op_type == "LayerNormalization":
                self._examine_normalization(node)

    def decisions(self) -> Decisions:
        fp32: dict[str, Rule] = {}
        half: set[str] = set()
        for node in self.graph:
            if not _floats(node):
                continue
            rule = self._rule(node, half)
            if rule is None:
                half.add(str(node.name))
            else:
                fp32[str(node.name)] = rule
        return Decisions(half=frozenset(half), fp32=fp32, kept=tuple(self.kept.values()))

    def _rule(self, node: ir.Node, half: set[str]) -> Rule | None:
        rule = self._by_rule(node)
        if rule is None and node.name in self.kept:
            rule = "range"
        if rule is None and node.op_type in MOVES:
            made = [value.producer() for value in float_inputs(node) if not is_constant(value)]
            if any(producer is None or producer.name not in half for producer in made):
                rule = "moves"
        return rule

    def _by_rule(self, node: ir.Node) -> Rule | None:
        if self.everything and node.op_type in PRODUCTS:
            return None
        name = str(node.name)
        if in_scopes(name, self.keep):
            return "asked"
        if any(value.is_graph_input() for value in float_inputs(node)):
            return "operator"  # what a user gives has no range that could have been measured
        known = node.op_type in ELEMENTWISE or node.op_type in PRODUCTS or node.op_type in MOVES
        return None if known else "operator"

    def _misfits(self, node: ir.Node) -> Iterator[Misfit]:
        """What is wrong with what a computing node reads and makes, the plainest first."""
        for value in node.outputs:
            if is_float(value) and (misfit := self._misfit(value)) is not None:
                yield misfit
        for value in float_inputs(node):
            misfit = None if is_constant(value) else self._misfit(value)
            # Whether a product's operand is too small is said by the product's own measure, channel by channel.
            if misfit is not None and (misfit.reason == "overflow" or not constant_product(node)):
                yield misfit
        if node.op_type == "Attention" and str(node.name) in self.ranges.scores:
            scores = tensor_misfit(self.half, f"{node.name}:scores", self.ranges.scores[str(node.name)])
            if scores is not None and scores.reason == "overflow":
                yield scores
        if not constant_product(node):
            yield from self._constants(node)

    def _misfit(self, value: ir.Value) -> Misfit | None:
        return tensor_misfit(self.half, str(value.name), self.ranges.largest(str(value.name)))

    def _constants(self, node: ir.Node) -> Iterator[Misfit]:
        added = node.op_type in ("Add", "Sub")
        for value in float_inputs(node):
            if is_constant(value):
                scale = self.ranges.largest(str(node.outputs[0].name)) if added else None
                misfit = constant_misfit(self.half, str(value.name), _array(value), scale)
                if misfit is not None:
                    yield misfit

    def _examine_product(self, node: ir.Node) -> None:
        source, weight = node.inputs[0], node.inputs[1]
        assert source is not None and weight is not None
        matrix, channels = _matrix(node, _array(weight)), self._channels(node, str(source.name))
        mine = self._by_rule(node) is None
        if mine:
            self._keep(node, weights_misfit(self.half, str(weight.name), matrix, channels))
        misfit = operand_misfit(self.half, str(source.name), matrix, channels)
        if misfit is not None:
            if mine:
                self._keep(node, misfit)
            self._keep_exact(source, misfit)

    def _channels(self, node: ir.Node, source: str) -> np.ndarray:
        """The largest activation of each row of the matrix, float64 [in]; a convolution's rows share one."""
        assert node.inputs[1] is not None and node.inputs[1].shape is not None
        shape = node.inputs[1].shape
        if node.op_type == "Conv":
            return np.full(int(np.prod(shape.numpy()[1:])), self.ranges.largest(source), dtype=np.float64)
        channels = self.ranges.of(source).astype(np.float64)
        return np.broadcast_to(channels, (int(shape.numpy()[0]),))

    def _examine_normalization(self, node: ir.Node) -> None:
        source = node.inputs[0]
        assert source is not None
        if source.producer() is None:
            return
        misfit = size_misfit(self.half, str(source.name), self.ranges.typical(str(source.name)))
        if misfit is not None:
            self._keep_exact(source, misfit)

    def _keep_exact(self, value: ir.Value, misfit: Misfit) -> None:
        """Keep in fp32 all that rounds `value` on its way from the last product or normalization to here."""
        pending, seen = [value], set()
        while pending:
            node = pending.pop().producer()
            if node is None or node.name in seen or not _floats(node):
                continue
            seen.add(node.name)
            computes = node.op_type not in MOVES
            if computes and self._by_rule(node) is not None:
                continue  # fp32 already: it makes its output exact
            if computes or any(is_constant(source) for source in float_inputs(node)):
                self._keep(node, misfit)
            if not constant_product(node):
                pending += _carriers(node)

    def _keep(self, node: ir.Node, misfit: Misfit | None) -> None:
        if misfit is not None and node.name not in self.kept:
            self.kept[str(node.name)] = Kept(
                node=str(node.name),
                reason=misfit.reason,
                tensor=misfit.tensor,
                value=misfit.value,
                limit=misfit.limit,
            )


def _require_products(kept: Iterable[Kept], graph: ir.Graph, half: HalfType) -> None:
    """Raise PlanBuildError where a product has to run in half and does not fit."""
    products = {node.name for node in graph if node.op_type in PRODUCTS}
    found = [item for item in kept if item.node in products]
    if found:
        first = found[0]
        raise PlanBuildError(
            f"{len(found)} matrix products do not fit {half.name}, and this graph may have no others: {first.node} "
            f"would {first.reason}, {first.tensor} is at {first.value:.3g}, expected "
            f"{_side(first, half)} {first.limit:.3g}",
            hint="build for a GPU of compute capability 8.0 or higher, where these products run in fp32, "
            "or run the bundle's fp32 graph with onnxruntime",
        )


def _side(kept: Kept, half: HalfType) -> str:
    return "at least" if kept.reason == "underflow" and kept.limit != half.eps else "at most"


def _floats(node: ir.Node) -> bool:
    """Whether `node` makes float tensors: what works on shapes and indices alone has no precision to decide."""
    return any(is_float(value) for value in node.outputs)


def _carriers(node: ir.Node) -> list[ir.Value]:
    """The inputs whose rounding shows in the same channel of the output: of attention the values, not the weights."""
    inputs = float_inputs(node)
    return inputs[2:3] if node.op_type == "Attention" else inputs


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    array: np.ndarray = value.const_value.numpy()
    return array


def _matrix(node: ir.Node, weights: np.ndarray) -> np.ndarray:
    """The weights of a product as [in, out]."""
    return weights.reshape(len(weights), -1).T if node.op_type == "Conv" else weights
