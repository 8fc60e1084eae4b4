"""Whether attention became one kernel: read from the parsed network, and from the inspector's JSON. Pure functions.

An `Attention` operator that may not be taken apart is proof in itself: without a fused kernel there is no plan. Where
attention is written out as MatMul, Softmax, MatMul, the engine inspector names for each layer of the engine the ONNX
nodes that went into it: the three of one attention have to be in the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_GEMM = re.compile("gemm|matrix_?multiply", re.IGNORECASE)  # types of engine layers that multiply and do no more
_OPAQUE = re.compile("foreignnode", re.IGNORECASE)  # a whole region as one entry says nothing of its kernels
_REACH = 12  # layers between a Softmax and its MatMuls: scale, mask, casts, and the parser's helpers for shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer of the parsed network: the ONNX node it came from ("" for the parser's own), its type, its tensors."""

    node: str
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One attention that is written out: the ONNX nodes of Q·K, Softmax and P·V."""

    scores: str
    softmax: str
    values: str

    @property
    def scope(self) -> str:
        """What the nodes are named under: `blocks.0.attention` for `blocks.0.attention/Softmax`."""
        return self.softmax.rpartition("/")[0] or self.softmax


def onnx_node(metadata: str) -> str:
    """The ONNX node in the metadata of a network layer, "" where there is none."""
    found = _ONNX_NODE.search(metadata)
    return found[1] if found else ""


def onnx_nodes(metadata: str) -> frozenset[str]:
    """All ONNX nodes in the metadata of an engine's layer."""
    return frozenset(_ONNX_NODE.findall(metadata))


def attention_sites(layers: Sequence[Layer]) -> tuple[Site, ...]:
    """Every Softmax that has a MatMul before and after it. Masks, scales, casts and reshapes may lie between."""
    producer = {name: layer for layer in layers for name in layer.outputs}
    consumers: dict[str, list[Layer]] = {}
    for layer in layers:
        for name in layer.inputs:
            consumers.setdefault(name, []).append(layer)

    def before(layer: Layer) -> list[Layer]:
        return [producer[name] for name in layer.inputs if name in producer]

    def after(layer: Layer) -> list[Layer]:
        return [consumer for name in layer.outputs for consumer in consumers.get(name, [])]

    sites = []
    for layer in layers:
        if layer.type == "SOFTMAX":
            scores, values = _nearest_matmul(layer, before), _nearest_matmul(layer, after)
            if scores is not None and values is not None:
                sites.append(Site(scores=scores.node, softmax=layer.node, values=values.node))
    return tuple(sites)


def unfused(inspector: str, sites: Sequence[Site]) -> tuple[str, ...]:
    """The scopes of those `sites` that are not one kernel in the engine that `inspector`, its JSON, describes.

    A site is fused if one layer holds all three nodes and no other layer multiplies on its own for one of them: a
    transposition that was split off a MatMul carries the MatMul's name too.
    """
    entries = json.loads(inspector).get("Layers", [])
    # With names only (low verbosity) an entry is a string: nothing is known of it, so nothing counts as fused.
    layers = [(str(entry.get("LayerType", "")), _nodes(entry)) for entry in entries if isinstance(entry, dict)]
    return tuple(dict.fromkeys(site.scope for site in sites if not _is_fused(site, layers)))


def _is_fused(site: Site, layers: Sequence[tuple[str, frozenset[str]]]) -> bool:
    wanted = {site.scores, site.softmax, site.values}
    together = any(wanted <= nodes for _, nodes in layers)
    alone = any(_GEMM.search(kind) and nodes & wanted and not wanted <= nodes for kind, nodes in layers)
    return together and not alone


def _nodes(entry: dict[str, Any]) -> frozenset[str]:
    if _OPAQUE.search(str(entry.get("Name", ""))) or entry.get("LayerType") == "Myelin":
        return frozenset()
    return onnx_nodes(str(entry.get("Metadata", "")))


def _nearest_matmul(start: Layer, neighbours: Callable[[Layer], list[Layer]]) -> Layer | None:
    frontier, seen = [start], {id(start)}
    for _ in range(_REACH):
        frontier = [layer for near in frontier for layer in neighbours(near) if id(layer) not in seen]
        for layer in frontier:
            if layer.type == "MATRIX_MULTIPLY":
                return layer
        seen.update(map(id, frontier))
        frontier = [layer for layer in frontier if layer.type != "SHAPE"]  # the size of a tensor leads elsewhere
    return None


__all__ = ["Layer", "Site", "attention_sites", "onnx_node", "onnx_nodes", "unfused"]
