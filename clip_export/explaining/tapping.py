"""A graph with its places as outputs, run freely, or with every stage given what another graph gave it.

The second way separates where an error is made from where it shows: a stage that is given the reference's tensor can
only differ by what it does itself. All stages run that way in one pass of the graph, each cut from the one before.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_export.choice import CPU_INT8, FP32
from clip_export.errors import BundleIntegrityError
from clip_export.explaining.stages import Place
from clip_export.manifest import REBUILD
from clip_export.precision.ranges import Feeds, open_session

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["AS_THEY_ARE", "Values", "run_tapped", "runnable"]

Values = Mapping[str, np.ndarray]  # by the name of the layer

AS_THEY_ARE = (FP32, CPU_INT8)  # what a CPU computes as the graph says; the others are simulated


@contextmanager
def runnable(path: Path, precision: str) -> Iterator[Path]:
    """The graph that a CPU can run with all roundings of the one at `path`: itself, or its simulation."""
    if precision in AS_THEY_ARE:
        yield path
        return
    from clip_export.precision.simulate import simulate

    with tempfile.TemporaryDirectory(prefix="clip-export-") as work:
        target = Path(work) / path.name
        simulate(path, target)
        yield target


def run_tapped(path: Path, places: Sequence[Place], feeds: Feeds, given: Values | None = None) -> dict[str, np.ndarray]:
    """What the fp32 graph at `path` holds in `places`, by layer, float32, on `feeds`, arrays by input name.

    With `given`, by layer, every stage is fed with what is given for the place that hands on to it. Raises
    BundleIntegrityError where the graph lacks a place.
    """
    import onnx_ir

    model = onnx_ir.load(path)
    taps = _taps(model.graph, places, path.name)
    if given is not None:
        feeds = {**feeds, **_cut(model.graph, places, taps, given)}
    outputs = list(model.graph.outputs)
    for value in taps.values():
        if not value.is_graph_output():
            model.graph.outputs.append(value)
    session = open_session(model, path.parent)
    names = [str(taps[place.layer].name) for place in places]
    asked = list(dict.fromkeys(names + [str(value.name) for value in outputs]))
    found = dict(zip(asked, session.run(asked, dict(feeds)), strict=True))
    return {place.layer: found[name] for place, name in zip(places, names, strict=True)}


def _taps(graph: ir.Graph, places: Sequence[Place], file: str) -> dict[str, ir.Value]:
    """The value of every place, as those that read it see it."""
    nodes = {str(node.name): node for node in graph}
    missing = [place.node for place in places if place.node not in nodes]
    if missing:
        message = f"{file} has no node {missing[0]}, which the fp32 graph has"
        raise BundleIntegrityError(message, hint=REBUILD)
    return {place.layer: _rounded(nodes[place.node].outputs[0]) for place in places}


def _rounded(value: ir.Value) -> ir.Value:
    """`value` after the rounding that a simulation puts behind it, where it puts one and everybody reads that.

    It is a cast to half and one back (simulate.py). A value that is kept in fp32 and read in half by some has other
    readers beside the cast.
    """
    for _ in range(2):
        readers = [node for node, _ in value.uses()]
        if value.is_graph_output() or len(readers) != 1 or readers[0].op_type != "Cast":
            return value
        value = readers[0].outputs[0]
    return value


def _cut(
    graph: ir.Graph, places: Sequence[Place], taps: Mapping[str, ir.Value], given: Values
) -> dict[str, np.ndarray]:
    """Let all readers of what a stage hands on read an input of the graph instead; returns the feeds for these."""
    import onnx_ir as ir

    feeds = {}
    for place in places:
        if not place.handed_on:
            continue
        value, name = taps[place.layer], f"given/{place.layer}"
        fed = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
        for reader, index in list(value.uses()):
            reader.replace_input_with(index, fed)
        graph.inputs.append(fed)
        feeds[name] = np.ascontiguousarray(given[place.layer], dtype=np.float32)
    return feeds
