"""Which products run in 8 bits: those that a graph quantizes, looked up among the layers of its engine. Pure functions.

A product whose operands both come out of DequantizeLinear may be compiled to one kernel that reads 8-bit numbers, or to
one that is given them dequantized, which costs accuracy and gains no time. The compiler does not say; its list of the
engine's layers does, with the types that each reads and the ONNX nodes that went into it. TensorRT-RTX logs that list
after a build, without a GPU, where the verbosity is detailed; the engine inspector has it as JSON, with a GPU.

Whatever does not look as expected proves nothing: then it is not known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_export.backends._trt_inspect import Layer, onnx_nodes
from clip_export.errors import PlanBuildError

LIST_BEGINS = "Layers:"  # of the message with the list
_EIGHT_BITS = frozenset({"Int8", "FP8"})
_KNOWN_TYPES = frozenset({"gemm", "kgen", "runtime_fusion"})  # a product in 8 bits is a gemm, or attention's kgen
_FUSED_ATTENTION = "_gemm_mha"  # how the names of its kernels begin; their type is that of any generated kernel
_TENSORS = r"\[((?: \{ Name: [^{}]*, Datatype: \w+, [^{}]*\},?)*)\]"
_LINE = re.compile(
    rf"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: {_TENSORS}, Constants: {_TENSORS}, Outputs: {_TENSORS}, "
    r"TacticName: .*?, StreamId: \d+, Metadata: (?P<metadata>.*)"
)
_DATATYPE = re.compile(r", Datatype: (\w+)")
_SHOWN = 6  # names in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayer:
    """A layer of an engine: the types of the tensors and of the constants that it reads, the ONNX nodes in it."""

    name: str
    type: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    nodes: frozenset[str]

    @property
    def multiplies(self) -> bool:
        """Whether it is a kernel for a product, or for both products of one attention."""
        return self.type == "gemm" or self._is_attention

    @property
    def in_eight_bits(self) -> bool | None:
        """Whether both factors have one 8-bit type; None where a type, or the second factor, is not shown.

        Weights are the first constant; the others only scale. A second factor that is computed is the second input.
        """
        first, *others = self.inputs or ("",)
        if not first.isalnum():  # "Half", "Int8"; for some kernels an inspector has a sentence instead
            return None
        if first not in _EIGHT_BITS:
            return False
        if self._is_attention:  # queries, keys and values
            return set(others) == {first}
        factors = (*others[:1], *self.constants[:1])
        return first in factors if factors else None

    @property
    def _is_attention(self) -> bool:
        return self.name.startswith(_FUSED_ATTENTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What became of quantized products: those in 8 bits, None where that is not known of all, and those that are not.

    `warning` says what is not as it should be, or is None.
    """

    low_precision: tuple[str, ...] | None
    dequantized: tuple[str, ...]
    warning: str | None


def quantized_products(layers: Sequence[Layer]) -> tuple[str, ...]:
    """The MatMul nodes of a parsed network, in its order, whose operands both come out of DequantizeLinear.

    Reshapes and transposes may lie between. Weights alone in 8 bits are a matter of size, and not asked for a kernel.
    """
    producers = {name: layer for layer in layers for name in layer.outputs}

    def dequantized(name: str) -> bool:
        layer = producers.get(name)
        while layer is not None and layer.type == "SHUFFLE":
            layer = producers.get(layer.inputs[0])
        return layer is not None and layer.type == "DEQUANTIZE"

    products = [layer for layer in layers if layer.type == "MATRIX_MULTIPLY"]
    return tuple(dict.fromkeys(layer.node for layer in products if all(map(dequantized, layer.inputs))))


def read_log(text: str) -> tuple[EngineLayer, ...] | None:
    """The layers in the compiler's message that begins with LIST_BEGINS; None where a line of it is not understood."""
    header, *lines = text.partition("\n\n")[0].rstrip().split("\n")
    found = [_LINE.fullmatch(line) for line in lines]
    if header.strip() != LIST_BEGINS or not found:
        return None
    layers = [_layer_of(match) for match in found if match is not None]
    return tuple(layers) if len(layers) == len(found) else None


def read_inspector(text: str) -> tuple[EngineLayer, ...] | None:
    """The layers in the JSON of the engine inspector; None where it is not detailed, or not understood."""
    try:
        entries = json.loads(text)["Layers"]
    except (ValueError, TypeError, KeyError):
        return None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        return None
    return tuple(
        EngineLayer(
            name=str(entry.get("Name", "")),
            type=str(entry.get("LayerType", "")),
            inputs=_types(entry, "Inputs"),
            constants=_types(entry, "Constants"),
            nodes=onnx_nodes(str(entry.get("Metadata", ""))),
        )
        for entry in entries
    )


def find_low_precision(
    products: Sequence[str], layers: Sequence[EngineLayer] | None, *, graph: str, profiles: int = 1
) -> Finding:
    """Which of the `products` of `graph` run in 8 bits in an engine of `layers`, with kernels for each of `profiles`.

    Raises PlanBuildError where none of them does.
    """
    runs = {product: _runs_in_eight_bits(product, layers or (), profiles) for product in products}
    dequantized = tuple(product for product, low in runs.items() if low is False)
    if products and len(dequantized) == len(products):
        message = f"none of {len(products)} quantized products of {graph} became 8-bit kernels: {_listed(dequantized)}"
        raise PlanBuildError(message, hint="build fp16: on dequantized numbers, 8 bits cost accuracy and gain nothing")
    low = None if None in runs.values() else tuple(product for product, low in runs.items() if low)
    return Finding(low_precision=low, dequantized=dequantized, warning=_warning(runs, dequantized))


def _warning(runs: Mapping[str, bool | None], dequantized: Sequence[str]) -> str | None:
    if dequantized:
        count = f"{len(dequantized)} of {len(runs)} quantized products"
        return f"{count} do not run in 8 bits, but on dequantized numbers: {_listed(dequantized)}"
    unknown = [product for product, low in runs.items() if low is None]
    if not unknown:
        return None
    count = f"{len(unknown)} of {len(runs)} quantized products"
    return (
        f"whether {count} run in 8 bits is not known: the compiler's list of layers does not say ({_listed(unknown)})"
    )


def _runs_in_eight_bits(product: str, layers: Sequence[EngineLayer], profiles: int) -> bool | None:
    """Whether all kernels that multiply for `product` are in 8 bits, and there is one for every profile.

    A kernel that only scales what came out, or dequantizes what goes in, carries the name of the product too. None
    where no layer has the name, or one of a type that is not known here.
    """
    own = [layer for layer in layers if product in layer.nodes]
    if not own or any(layer.type not in _KNOWN_TYPES for layer in own):
        return None
    found = [layer.in_eight_bits for layer in own if layer.multiplies]
    if False in found or len(found) < profiles:
        return False
    return None if None in found else True


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _layer_of(match: re.Match[str]) -> EngineLayer:
    return EngineLayer(
        name=match["name"],
        type=match["type"],
        inputs=tuple(_DATATYPE.findall(match[3])),
        constants=tuple(_DATATYPE.findall(match[4])),
        nodes=onnx_nodes(match["metadata"]),
    )


def _types(entry: Mapping[str, Any], field: str) -> tuple[str, ...]:
    tensors = entry.get(field, [])
    known = [tensor for tensor in tensors if isinstance(tensor, dict)] if isinstance(tensors, list) else []
    # TensorRT 10 has both in one field.
    return tuple(str(tensor.get("Datatype", tensor.get("Format/Datatype", ""))) for tensor in known)


__all__ = [
    "LIST_BEGINS",
    "EngineLayer",
    "Finding",
    "find_low_precision",
    "quantized_products",
    "read_inspector",
    "read_log",
]
