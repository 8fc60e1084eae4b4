"""Attention in 8 bits: taken apart, with pairs of QuantizeLinear and DequantizeLinear before both products.

Pairs before q, k and v of the Attention operator build too, but TensorRT-RTX 1.7 rounds there and then multiplies in
half: a loss without a gain. In this form it multiplies in 8 bits, in one fused kernel where attention is not causal,
and in kernels of their own for products and softmax where it is. int8 holds probabilities in steps of 1/127: attention
that is spread evenly over more than 254 positions is gone. fp8 keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from clip_export.errors import InputError
from clip_export.precision._held import half_type, is_half, scale_misfit
from clip_export.precision._pairs import Pairs
from clip_export.precision.formats import find_format

if TYPE_CHECKING:
    import onnx_ir as ir

    from clip_export.precision.quantize import QuantizedAttention


def quantize_attention(model: ir.Model, attention: Mapping[str, QuantizedAttention]) -> None:
    """Take the Attention nodes named in `attention` apart, in place, with both of their products in 8 bits.

    Raises InputError naming those that are no Attention nodes in half, or whose scales half cannot hold.
    """
    from clip_export.graph.primitives import decompose

    known = {str(node.name) for node in model.graph if node.op_type == "Attention" and is_half(node.inputs[0])}
    for name in attention:
        if name not in known:
            raise _refused(name, "is no Attention node in half here")
    pairs = Pairs(model.graph)
    for name, scores in decompose(model, only=list(attention)).items():
        _quantize(pairs, name, scores, attention[name])


def _refused(name: str, reason: str) -> InputError:
    return InputError(f"expected attention that can be quantized, found: {name} {reason}", hint="leave it in half")


def _quantize(pairs: Pairs, name: str, scores: ir.Value, scales: QuantizedAttention) -> None:
    """Put pairs before the product that gives `scores` and the one behind the softmax."""
    format_ = find_format(scales.format)

    def insert(node: ir.Node, index: int, scale: float) -> None:
        value = _value(node.inputs[index])
        reason = scale_misfit(scale, format_, half_type(value))
        if reason is not None:
            raise _refused(name, reason)
        node.replace_input_with(index, pairs.add(value, format_, scale, node))

    first, softmax = _producer(scores), _behind(scores)
    second = next(node for node, _ in softmax.outputs[0].uses())
    factor = _value(_producer(first.inputs[0]).inputs[1]).const_value  # the query is multiplied by it
    assert factor is not None
    insert(first, 0, scales.query * float(factor.numpy()))
    insert(_producer(first.inputs[1]), 0, scales.key)  # keys are transposed last, in 8 bits
    insert(second, 0, 1 / format_.largest)
    insert(second, 1, scales.value)


def _behind(scores: ir.Value) -> ir.Node:
    """The softmax of `scores`, behind the mask if there is one."""
    node = next(node for node, _ in scores.uses())
    return node if node.op_type == "Softmax" else _behind(node.outputs[0])


def _producer(value: ir.Value | None) -> ir.Node:
    node = _value(value).producer()
    assert node is not None
    return node


def _value(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
