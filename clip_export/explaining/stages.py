"""The places of a tower that are looked at: stages, their layers, and the nodes of a graph that give them.

Nodes are named after the modules of the torch towers (graph/optimize.py), and every pass of this project keeps the
names. So one list of places, read off the fp32 graph, serves its half and 8-bit forms and the torch towers alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clip_export.errors import BundleIntegrityError
from clip_export.manifest import REBUILD
from clip_export.spec import Tower

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["LINEARS", "NORMS", "Place", "places", "reads"]

NORMS: dict[Tower, str] = {"text": "final_norm", "image": "post_norm"}

# What a linear layer of a block reads, which is the place before it.
LINEARS = {"attention.qkv": "norm1", "attention.out": "attention", "mlp.fc1": "norm2", "mlp.fc2": "mlp.activation"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One tensor of a tower: what `module` gives, or what it is given where `before`; `node` makes it in the graph.

    `handed_on`: it is all that the next stage reads of this one.
    """

    stage: str
    layer: str
    module: str
    node: str
    before: bool = False
    handed_on: bool = False


def places(graph: ir.Graph, tower: Tower) -> list[Place]:
    """The places of the fp32 graph of a tower, in the order of computation.

    Raises BundleIntegrityError for a graph that was not written by clip-export: nodes lack the names of modules.
    """
    finder = _Finder(graph)
    return [
        Place(
            stage=stage,
            layer=layer,
            module=module,
            node=finder.before(module) if before else finder.after(module),
            before=before,
            handed_on=handed_on,
        )
        for stage, layer, module, before, handed_on in _listed(tower, finder)
    ]


def reads(layer: str, tower: Tower, all_places: Mapping[str, Place]) -> str | None:
    """The place whose tensor the linear `layer` reads; None for a layer that is no linear one."""
    if layer == "projection":
        return NORMS[tower]
    block, _, name = layer.removeprefix("blocks.").partition(".")
    source = LINEARS.get(name)
    found = f"blocks.{block}.{source}"
    return found if source is not None and found in all_places else None


def _listed(tower: Tower, finder: _Finder) -> Iterator[tuple[str, str, str, bool, bool]]:
    """(stage, layer, module, before, handed on) of every place."""
    if tower == "text":
        yield "token embedding", "token_embedding", "token_embedding", False, False
        yield "token embedding", "positional_embedding", "blocks.0.norm1", True, True
    else:
        yield "patch embedding", "patch_embedding", "patch_embedding", False, True
        yield "positions", "positional_embedding", "pre_norm", True, False
        yield "positions", "pre_norm", "pre_norm", False, True
    for index in range(finder.blocks):
        yield from _block(index)
    if finder.has(NORMS[tower]):  # an image tower that gives hidden states alone has none
        yield "pooling", NORMS[tower], NORMS[tower], False, True
    if finder.has("projection"):
        yield "projection", "projection", "projection", False, False


def _block(index: int) -> Iterator[tuple[str, str, str, bool, bool]]:
    block = f"blocks.{index}"
    for stage, layers, end, before in (
        (f"{block}.attention", ("norm1", "attention.qkv", "attention", "attention.out"), f"{block}.norm2", True),
        (f"{block}.mlp", ("norm2", "mlp.fc1", "mlp.activation", "mlp.fc2"), block, False),
    ):
        for layer in layers:
            yield stage, f"{block}.{layer}", f"{block}.{layer}", False, False
        yield stage, f"{stage} + residual", end, before, True


class _Finder:
    """Finds the nodes of a graph by the modules that they came from."""

    def __init__(self, graph: ir.Graph) -> None:
        self._last: dict[str, ir.Node] = {}  # the last node of a module gives what the module gives
        for node in graph:
            if len(node.outputs) == 1:  # a Split of what was made is no result
                self._last[str(node.name).rpartition("/")[0]] = node

    @property
    def blocks(self) -> int:
        """How many blocks the tower has."""
        return sum(scope.startswith("blocks.") and scope.count(".") == 1 for scope in self._last)

    def has(self, module: str) -> bool:
        """Whether the graph has the module."""
        return module in self._last

    def after(self, module: str) -> str:
        """The node that gives what `module` gives."""
        return str(self._node(module).name)

    def before(self, module: str) -> str:
        """The node that makes what `module` reads."""
        value = self._node(module).inputs[0]
        producer = None if value is None else value.producer()
        if producer is None:
            raise self._unknown(module)
        return str(producer.name)

    def _node(self, module: str) -> ir.Node:
        if module not in self._last:
            raise self._unknown(module)
        return self._last[module]

    def _unknown(self, module: str) -> BundleIntegrityError:
        message = f"expected a graph whose nodes are named after modules, found none of {module}"
        return BundleIntegrityError(message, hint=REBUILD)
