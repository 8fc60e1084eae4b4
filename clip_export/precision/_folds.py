"""Where the channels of a linear layer's input can be divided for free: patterns of operators, found backwards.

A pattern counts only where nothing but the linear layer sees what is divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from clip_export.precision._operators import constant_product, is_constant

if TYPE_CHECKING:
    import onnx_ir as ir

FoldKind: TypeAlias = Literal["normalization", "values", "activation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A constant that takes a divisor up: input `index` of `node`, along the last axis of what the node makes.

    The divisor lies at `start` of that axis; what is outside of it stays. `multiply` where the others divide.
    """

    node: ir.Node
    index: int
    start: int = 0
    multiply: bool = False

    def factor(self, divisor: np.ndarray) -> np.ndarray:
        """What the constant is multiplied by, float64, as long as the last axis."""
        factor = np.ones(_width(self.node.outputs[0]), dtype=np.float64)
        factor[self.start : self.start + len(divisor)] = divisor if self.multiply else 1 / divisor
        return factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """All that has to change for the input of one linear layer to be divided."""

    kind: FoldKind
    targets: tuple[Target, ...]


def find_fold(linear: ir.Node) -> Fold | None:
    """The fold for the input of the MatMul node `linear`, None where there is none."""
    value = linear.inputs[0]
    while (lone := _lone(value)) is not None:
        node = lone.producer()
        if node is None:
            return None
        fold = _fold_at(node)
        if fold is not None or not _keeps_channels(node):
            return fold
        value = node.inputs[0]
    return None


def _fold_at(node: ir.Node) -> Fold | None:
    """The fold where `node` made the channels; nothing but the linear layer may read it."""
    match node.op_type:
        case "LayerNormalization":
            return _normalization(node)
        case "Reshape":
            return _values(node)
        case "Relu":
            targets = _affine(_lone(node.inputs[0]))
            return None if targets is None else Fold(kind="activation", targets=targets)
        case "Mul":
            return _quick_gelu(node)
    return None


def _keeps_channels(node: ir.Node) -> bool:
    """Whether `node` moves whole rows of its first input: channel j of what comes out is channel j of what goes in."""
    if not node.inputs or _width(node.inputs[0]) != _width(node.outputs[0]) or not _width(node.outputs[0]):
        return False
    last = _rank(node.inputs[0]) - 1
    match node.op_type:
        case "Identity" | "Reshape" | "Squeeze" | "Unsqueeze":  # the order in memory stays, and with it the last axis
            return True
        case "Gather" | "GatherElements":
            return _attribute(node, "axis", 0) not in (last, -1)
        case "Slice":
            return not {last, -1} & set(_axes(node, last + 1))
        case "Transpose":
            return "perm" in node.attributes and node.attributes["perm"].as_ints()[-1] == last
    return False


def _axes(node: ir.Node, rank: int) -> list[int]:
    """The axes that a Slice cuts; all of them where that is not known."""
    value = node.inputs[3] if len(node.inputs) > 3 else None
    tensor = None if value is None else value.const_value
    return list(range(rank)) if tensor is None else [int(axis) for axis in tensor.numpy()]


def _normalization(node: ir.Node) -> Fold | None:
    if _attribute(node, "axis", -1) not in (-1, _rank(node.inputs[0]) - 1):
        return None
    constants = {index: value for index, value in enumerate(node.inputs) if index > 0 and value is not None}
    if not constants or not all(is_constant(value) for value in constants.values()):
        return None
    return Fold(kind="normalization", targets=tuple(Target(node=node, index=index) for index in constants))


def _values(merged: ir.Node) -> Fold | None:
    """[batch, sequence, heads * size] -> heads apart -> Attention -> heads together again, which is `merged`.

    Heads and their channels are in the same order on both sides. Fewer heads of values than of queries would be read
    by several: there is no fold for those, nor with a cache, whose values were made before.
    """
    back = _behind(merged.inputs[0], "Transpose")
    attention = _behind(_input(back, 0), "Attention")
    there = _behind(_input(attention, 2), "Transpose")
    parted = _behind(_input(there, 0), "Reshape")
    if back is None or attention is None or there is None or parted is None:
        return None
    heads = _heads(back.outputs[0])
    kept = heads is not None and heads[0] * heads[1] == _width(merged.outputs[0]) == _width(parted.inputs[0])
    if not kept or heads != _heads(parted.outputs[0]) or not (_swaps_heads(back) and _swaps_heads(there)):
        return None
    cached = any(value is not None for value in attention.inputs[4:])
    if cached or any(value.uses() or value.is_graph_output() for value in attention.outputs[1:]):
        return None
    targets = _part_of_matrix(_lone(parted.inputs[0]))
    return None if targets is None else Fold(kind="values", targets=targets)


def _heads(value: ir.Value) -> tuple[int, int] | None:
    """Number and size of the heads of [batch, sequence, heads, size]."""
    if value.shape is None or len(value.shape) != 4:
        return None
    number, size = value.shape[2], value.shape[3]
    return (number, size) if isinstance(number, int) and isinstance(size, int) else None


def _swaps_heads(node: ir.Node) -> bool:
    return "perm" in node.attributes and tuple(node.attributes["perm"].as_ints()) == (0, 2, 1, 3)


def _part_of_matrix(value: ir.Value | None) -> tuple[Target, ...] | None:
    """The constants that make `value`, which may be one part of what a matrix makes."""
    split = None if value is None else value.producer()
    if value is None or split is None or split.op_type != "Split":
        return _affine(value)
    if _attribute(split, "axis", 0) not in (-1, _rank(split.inputs[0]) - 1):
        return None
    before = [_width(part) for part in split.outputs[: split.outputs.index(value)]]
    return _affine(_lone(split.inputs[0]), start=sum(before)) if all(before) else None


def _quick_gelu(node: ir.Node) -> Fold | None:
    """x * sigmoid(c * x), with x from a matrix and read by nothing else."""
    for index in (0, 1):
        sigmoid = _behind(node.inputs[1 - index], "Sigmoid")
        scaled = _behind(_input(sigmoid, 0), "Mul")
        x = node.inputs[index]
        if x is None or scaled is None or x not in scaled.inputs or x.is_graph_output():
            continue
        constant = 1 - scaled.inputs.index(x)
        factor = scaled.inputs[constant]
        if {user for user, _ in x.uses()} == {node, scaled} and factor is not None and is_constant(factor):
            targets = _affine(x)
            if targets is not None:
                scale = Target(node=scaled, index=constant, multiply=True)
                return Fold(kind="activation", targets=(*targets, scale))
    return None


def _affine(value: ir.Value | None, start: int = 0) -> tuple[Target, ...] | None:
    """The constants that make `value`: a matrix and, where there is one, a bias. The caller says who may read it."""
    node = None if value is None else value.producer()
    if node is None or not _width(node.outputs[0]):
        return None
    if node.op_type == "MatMul":
        return (Target(node=node, index=1, start=start),) if constant_product(node) else None
    if node.op_type != "Add":
        return None
    for index, bias in enumerate(node.inputs):
        matrix = _affine(_behind_value(node.inputs[1 - index], "MatMul"), start)
        if bias is not None and is_constant(bias) and matrix is not None:
            return (*matrix, Target(node=node, index=index, start=start))
    return None


def _lone(value: ir.Value | None) -> ir.Value | None:
    """`value` where one node reads it, once, and it is no output of the graph."""
    alone = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
    return value if alone else None


def _behind(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node that makes `value` for one reader alone, where it is an `operator`."""
    lone = _lone(value)
    node = None if lone is None else lone.producer()
    return node if node is not None and node.op_type == operator else None


def _behind_value(value: ir.Value | None, operator: str) -> ir.Value | None:
    return None if _behind(value, operator) is None else value


def _input(node: ir.Node | None, index: int) -> ir.Value | None:
    return node.inputs[index] if node is not None and index < len(node.inputs) else None


def _width(value: ir.Value | None) -> int:
    """The size of the last axis of `value`; 0 where it is not fixed."""
    last = value.shape[-1] if value is not None and value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else 0


def _rank(value: ir.Value | None) -> int:
    return len(value.shape) if value is not None and value.shape is not None else 0


def _attribute(node: ir.Node, name: str, default: int) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else default
