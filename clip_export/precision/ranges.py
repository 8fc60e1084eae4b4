"""What the tensors of a graph hold: the largest absolute values that real inputs give, measured in fp32.

The graph runs with a maximum and a minimum after every float tensor, and only these come out: memory does not grow with
the number of tensors, and a graph of a gigabyte needs one copy of its weights, the engine's.

`measure` is all that a caller needs. `Recorder` and `open_session` are its parts, for a pass that asks the same graph
for more in the same run (`calibrate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_export.errors import ExportError, InputError, MissingDependencyError
from clip_export.precision._operators import is_float
from clip_export.progress import Progress, silent

if TYPE_CHECKING:
    import onnx_ir as ir

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """The largest absolute value of every tensor of one graph, over all that it was measured on.

    `channels` holds, by tensor, one value for each position of the last axis, or one for all where that axis has no
    fixed size. `scores` holds, by Attention node, the largest product of queries and keys, scaled and before the mask.
    """

    channels: Mapping[str, np.ndarray]
    scores: Mapping[str, float]

    def of(self, tensor: str) -> np.ndarray:
        """The largest absolute value of each channel of `tensor`. Raises ExportError where it was not measured."""
        if tensor not in self.channels:
            raise ExportError(
                f"no range was measured for {tensor}", hint="measure the same graph that is to be converted"
            )
        return self.channels[tensor]

    def largest(self, tensor: str) -> float:
        """The largest absolute value of `tensor`; infinite where it overflowed.

        A value that is not a number may go unseen: ONNX Runtime's maxima pass over most of them.
        """
        return float(self.of(tensor).max(initial=0.0))

    def typical(self, tensor: str) -> float:
        """The median channel's largest absolute value, of the channels that are not always zero."""
        channels = self.of(tensor)
        alive = channels[channels != 0]
        return float(np.median(alive)) if len(alive) else 0.0


def merged(first: Ranges, second: Ranges) -> Ranges:
    """The ranges of one graph over all that both were measured on."""
    return Ranges(
        channels={name: np.maximum(array, second.of(name)) for name, array in first.channels.items()},
        scores={name: max(score, second.scores[name]) for name, score in first.scores.items()},
    )


def measure(path: Path, feeds: Iterable[Feeds], *, progress: Progress = silent) -> Ranges:
    """Run the fp32 graph at `path` on `feeds`, arrays by input name, batch after batch.

    Raises InputError where `feeds` is empty, MissingDependencyError without onnxruntime or onnx-ir.
    """
    import onnx_ir

    model = onnx_ir.load(path)
    recorder = Recorder(model)
    session = open_session(model, path.parent)
    count = 0
    for count, batch in enumerate(feeds, start=1):
        progress("measure the ranges", count, 0)
        recorder.add(run(session, batch))
    if not count:
        raise InputError("expected inputs to measure ranges on, found none", hint="give at least one batch")
    return recorder.ranges()


class Recorder:
    """The ranges of a graph while it runs, merged batch by batch.

    Puts probes into `model`, whose outputs they replace, and opens its attention to get at the scores. More outputs may
    be added after that.
    """

    def __init__(self, model: ir.Model) -> None:
        self._probes = _instrument(model)
        self._merged: dict[str, np.ndarray] = {}

    def add(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Take in what one run of the graph gave, by output name."""
        for name, (low, high) in self._probes.ends.items():
            largest = np.atleast_1d(np.maximum(np.abs(outputs[low]), np.abs(outputs[high])))
            self._merged[name] = np.maximum(self._merged[name], largest) if name in self._merged else largest

    def ranges(self) -> Ranges:
        """The ranges over all that was added, which is one run at least."""
        scores = {name: float(self._merged[key].max(initial=0.0)) for name, key in self._probes.scores.items()}
        return Ranges(channels={name: self._merged[name] for name in self._probes.tensors}, scores=scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probes:
    """`ends` names the graph's outputs that are the maximum and the minimum of a tensor; `scores` are by node."""

    ends: Mapping[str, tuple[str, str]]
    tensors: tuple[str, ...]
    scores: Mapping[str, str]


def _instrument(model: ir.Model) -> _Probes:
    """Replace the outputs of `model` by the ends of its float tensors; attention is opened to get at its scores."""
    from clip_export.graph.primitives import decompose

    tensors = tuple(str(value.name) for node in model.graph for value in node.outputs if is_float(value))
    scores = {node: str(value.name) for node, value in decompose(model).items()}
    wanted = {*tensors, *scores.values()}
    axes: dict[int, ir.Value] = {}
    ends = {}
    model.graph.outputs.clear()
    for node in list(model.graph):
        for value in node.outputs:
            if value.name in wanted:
                ends[str(value.name)] = _probe(model.graph, node, value, axes)
    return _Probes(ends=ends, tensors=tensors, scores=scores)


def _probe(graph: ir.Graph, node: ir.Node, value: ir.Value, axes: dict[int, ir.Value]) -> tuple[str, str]:
    """Add the maximum and the minimum of `value` right after the node that makes it, so that it can be freed."""
    import onnx_ir as ir

    shape = value.shape
    by_channel = shape is not None and len(shape) > 1 and isinstance(shape[-1], int)
    reduced = list(range(len(shape) - 1)) if by_channel and shape is not None else []
    inputs = [value]
    if reduced:
        inputs.append(_axes(graph, len(reduced), axes))
    names = []
    for operator in ("ReduceMin", "ReduceMax"):
        probe = ir.node(operator, inputs, attributes={"keepdims": 0}, name=f"{value.name}/{operator}")
        output = probe.outputs[0]
        output.name, output.dtype = f"{value.name}/{operator}", value.dtype
        output.shape = ir.Shape([shape[-1]] if by_channel and shape is not None else [])
        graph.insert_after(node, probe)
        graph.outputs.append(output)
        names.append(output.name)
    return names[0], names[1]


def _axes(graph: ir.Graph, count: int, known: dict[int, ir.Value]) -> ir.Value:
    import onnx_ir as ir

    if count not in known:
        tensor = ir.Tensor(np.arange(count), name=f"all_axes_but_the_last_of_{count + 1}")
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        known[count] = value
    return known[count]


def open_session(model: ir.Model, directory: Path) -> Any:
    """A session on `model` as it is in memory; weights beside the graph are read from `directory`, not copied."""
    import onnx_ir

    try:
        import onnxruntime
    except ImportError as error:
        hint = "pip install 'clip-export[cpu]' (or [cuda] for an NVIDIA GPU)"
        raise MissingDependencyError("measuring ranges needs ONNX Runtime, not installed here", hint=hint) from error
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Fused nodes would hide tensors, and packed weights would be a second copy of them.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    # Left alone it runs all probes last and keeps every tensor until then; and its arena never gives memory back.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory.resolve()))
    serialized = onnx_ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


def run(session: Any, batch: Feeds) -> dict[str, np.ndarray]:
    """All outputs of `session` on one batch, by name."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(batch)), strict=True))
