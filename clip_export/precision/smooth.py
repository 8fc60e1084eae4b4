"""Smoothing: the channels of a linear layer's input divided, its weights multiplied, and the function as it was.

An 8-bit activation has one scale for all channels, so one channel that is a hundred times larger takes the bits of all
others. Weights have a scale for each output and suffer less. Dividing channel j of the input by d[j] and multiplying
row j of the weights by it moves the trouble from one to the other (SmoothQuant: Xiao et al. 2022, arXiv:2211.10438). It
costs nothing at run time where the division can be taken up by constants that are there already:

normalization   LayerNormalization: gamma and beta over d
values          attention mixes positions and no channels: the values' columns of the matrix before it, and bias, over d
activation      relu(x / d) = relu(x) / d; and QuickGELU, x sigmoid(c x): the x before it over d, c becomes a vector c d

The exact GELU, with erf, has neither property nor constant, and its linear layer stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_export.errors import InputError
from clip_export.precision._folds import Fold, FoldKind, Target, find_fold
from clip_export.precision.linears import Linear, find_linears

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Fold", "FoldKind", "Target", "foldable", "smooth"]


def foldable(model: ir.Model, names: Collection[str]) -> dict[str, Fold]:
    """Those linear layers of `names`, MatMul nodes, whose input can be divided for free, in the order of the graph.

    Raises InputError for a name that is no linear layer of `model`.
    """
    linears = _linears(model.graph, names)
    found = {str(node.name): find_fold(node) for node in model.graph if node.name in linears}
    return {name: fold for name, fold in found.items() if fold is not None}


def smooth(source: Path, target: Path, divisors: Mapping[str, np.ndarray]) -> None:
    """Write to `target` the fp32 graph at `source` with the inputs of linear layers divided channel by channel.

    `divisors` holds, by the name of the MatMul node, one positive number for each channel, [inputs]. The graph computes
    what it did but for fp32 rounding, with the same nodes and names of tensors. Raises InputError for a name that is no
    linear layer, for a layer that is not foldable, and for divisors that do not fit it.
    """
    import onnx_ir

    from clip_export.graph.files import save

    model = onnx_ir.load(source)
    linears, folds = _linears(model.graph, divisors), foldable(model, divisors)
    if fixed := [name for name in divisors if name not in folds]:
        raise InputError(
            f"{source.name}: expected inputs that can be divided, found those of {', '.join(fixed)}",
            hint="name linear layers alone behind a normalization, attention, ReLU or QuickGELU, as `foldable` does",
        )
    nodes = {str(node.name): node for node in model.graph if node.name in folds}
    for name, fold in folds.items():
        divisor = _checked(linears[name], divisors[name])
        for part in fold.targets:
            _rescale(model.graph, part.node, part.index, part.factor(divisor))
        _rescale(model.graph, nodes[name], 1, divisor[:, None])
    save(model, target)


def _linears(graph: ir.Graph, names: Collection[str]) -> dict[str, Linear]:
    linears = {linear.name: linear for linear in find_linears(graph)}
    if unknown := [name for name in names if name not in linears]:
        raise InputError(
            f"expected linear layers of the graph, found {', '.join(unknown)}",
            hint=f"name MatMul nodes with constant weights: {', '.join(linears) or 'this graph has none'}",
        )
    return {name: linears[name] for name in names}


def _checked(linear: Linear, divisor: np.ndarray) -> np.ndarray:
    exact = np.asarray(divisor, dtype=np.float64)
    if exact.shape != (linear.inputs,) or not (np.isfinite(exact) & (exact > 0)).all():
        low, high = exact.min(initial=np.inf), exact.max(initial=-np.inf)
        raise InputError(
            f"{linear.name}: expected {linear.inputs} divisors, finite and above zero, "
            f"found shape {list(exact.shape)}, {low:g} to {high:g}",
            hint="give one divisor for each row of the weights; 1 leaves a channel alone",
        )
    return exact


def _rescale(graph: ir.Graph, node: ir.Node, index: int, factor: np.ndarray) -> None:
    """Multiply a constant by `factor`, for `node` alone. It happens when the graph is written, one tensor at a time."""
    import onnx_ir as ir

    value = _own(graph, node, index)
    tensor, name = value.const_value, str(value.name)
    assert tensor is not None
    shape = ir.Shape(np.broadcast_shapes(tuple(tensor.shape.numpy()), factor.shape))
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor((tensor.numpy() * factor).astype(np.float32), name=name),
        dtype=ir.DataType.FLOAT,
        shape=shape,
        name=name,
    )
    value.shape = shape


def _own(graph: ir.Graph, node: ir.Node, index: int) -> ir.Value:
    """The constant that `node` reads at `index`, copied where others read it too: equal constants are stored once."""
    import onnx_ir as ir

    shared = node.inputs[index]
    assert shared is not None
    if len(shared.uses()) == 1:
        return shared
    mine = ir.Value(
        name=f"{node.name}/{index}/smoothed", shape=shared.shape, type=shared.type, const_value=shared.const_value
    )
    graph.register_initializer(mine)
    node.replace_input_with(index, mine)
    return mine
