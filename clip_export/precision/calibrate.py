"""What 8 bits are chosen from: one pass over real inputs that brings the ranges of a graph, and rows of its tensors.

A scale that clips, or a divisor for every channel, is judged by what it does to real values; ranges alone cannot say.
But the tensors before the linear layers hold gigabytes over a data set, so a bounded sample of their rows is drawn,
and inside the graph: k rows of a batch come out, not the tensor. Every input has its share of the sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors

from clip_export.errors import ExportError, InputError
from clip_export.output_file import reason, staged_file, writing
from clip_export.precision._nodes import constant, make_node
from clip_export.precision.ranges import Feeds, Ranges, Recorder, open_session, run
from clip_export.progress import Progress, silent

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Calibration", "cached", "calibrate", "calibration_key"]

# Part of every key and every file: one more where other rows are drawn or the file changes, so that none is misread.
_VERSION = "clip-export calibration 1"
_SEED = 0
_POSITIONS = "positions of the sample"  # a float64 vector in [0, 1); no exported name has spaces


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """What the tensors before linear layers held on real inputs.

    `ranges` are those of every float tensor of the graph, over all data. By tensor: `rows`, float32 [n, channels], are
    a sample of its rows, and `counts` says how many rows an input has on average, so a linear layer takes
    2 * count * inputs * outputs operations for each. `inputs` is how many inputs (batch elements) were seen.
    """

    ranges: Ranges
    rows: Mapping[str, np.ndarray]
    counts: Mapping[str, float]
    inputs: int

    def save(self, path: Path) -> None:
        """Write `path` as safetensors, whole or not at all. Raises OutputError where it cannot be written."""
        tensors = self._to_tensors()
        data = to_safetensors({**tensors, "digest": _digest(tensors)})
        with staged_file(path) as file, writing(path):
            file.write(data)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote. Raises InputError for a file that is missing, damaged or something else."""
        hint = "remove it: it is measured again from the same inputs"
        try:
            tensors = load_file(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {reason(error)}", hint=hint) from error
        # KeyError: safetensors.numpy looks the dtype up in a table of those that numpy has.
        except (SafetensorError, KeyError) as error:
            raise InputError(
                f"{path}: expected a calibration, found no safetensors file: {error}", hint=hint
            ) from error
        written = tensors.pop("digest", np.zeros(0, dtype=np.uint8))
        if not np.array_equal(written, _digest(tensors)):
            raise InputError(f"{path}: expected a calibration, found one of another version or damaged", hint=hint)
        return cls._from_tensors(tensors)

    def _to_tensors(self) -> dict[str, np.ndarray]:
        """Every number by its kind and the name that it belongs to."""
        tensors = {f"channels {name}": array for name, array in self.ranges.channels.items()}
        tensors |= {f"scores {name}": np.array(score, dtype=np.float64) for name, score in self.ranges.scores.items()}
        tensors |= {f"rows {name}": array for name, array in self.rows.items()}
        tensors |= {f"counts {name}": np.array(count, dtype=np.float64) for name, count in self.counts.items()}
        return {**tensors, "inputs": np.array(self.inputs, dtype=np.int64)}

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> Calibration:
        kinds: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in ("channels", "scores", "rows", "counts")}
        for key, array in tensors.items():
            kind, _, name = key.partition(" ")
            if name:
                kinds[kind][name] = array
        return cls(
            ranges=Ranges(channels=kinds["channels"], scores=_floats(kinds["scores"])),
            rows=kinds["rows"],
            counts=_floats(kinds["counts"]),
            inputs=int(tensors["inputs"]),
        )


def calibrate(
    path: Path,
    feeds: Iterable[Feeds],
    *,
    sources: Sequence[str],
    inputs: int,
    rows: int = 512,
    progress: Progress = silent,
) -> Calibration:
    """Run the fp32 graph at `path` on `feeds`, batch after batch, and keep ranges and a sample of rows.

    `sources` are the tensors [..., channels] to sample, `inputs` how many batch elements `feeds` will bring, counted
    along the first axis of every array. The sample has at most `rows` rows of a tensor, none twice, and fewer where
    there are few: a tensor of one row an input cannot give more than `inputs`. The same inputs in the same batches give
    the same rows. Memory does not grow with the data.

    Raises InputError where `feeds` is empty, brings more than `inputs` or has arrays of different lengths; ExportError
    for a tensor that the graph does not have or whose rows have no fixed size, and where one of them holds infinity or
    NaN, since no scale can serve that; MissingDependencyError without onnxruntime or onnx-ir.
    """
    import onnx_ir

    model = onnx_ir.load(path)
    recorder = Recorder(model)
    sampler = _Sampler(model, sources, inputs=inputs, rows=rows)
    session = open_session(model, path.parent)
    for batch in feeds:
        outputs = run(session, {**batch, **sampler.draw(_batch_size(batch))})
        sampler.add(outputs)
        recorder.add(outputs)
        progress("calibrate", sampler.seen, inputs)
    if not sampler.seen:
        raise InputError("expected inputs to calibrate on, found none", hint="give at least one image or text")
    return Calibration(ranges=recorder.ranges(), rows=sampler.take_rows(), counts=sampler.counts(), inputs=sampler.seen)


def calibration_key(graph_sha256: str, data: Iterable[bytes], *, rows: int) -> str:
    """The SHA-256, in hex, of all that a calibration depends on: the graph, the inputs in their order, and `rows`.

    `data` is whatever tells one set of inputs from another; where one item ends and the next begins counts.
    """
    digest = hashlib.sha256(f"{_VERSION}\n{graph_sha256}\n{rows}\n".encode())
    for item in data:
        digest.update(len(item).to_bytes(8, "little"))
        digest.update(item)
    return digest.hexdigest()


def cached(path: Path, make: Callable[[], Calibration]) -> Calibration:
    """The calibration at `path` where it is there and whole; otherwise what `make` gives, saved there.

    A damaged file is replaced. Directories above `path` are made. Raises OutputError where it cannot be written, and
    what `make` raises, which leaves `path` as it was.
    """
    if path.exists():
        try:
            return Calibration.load(path)
        except InputError:
            pass  # nothing is lost: it is made again, below
    made = make()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outputs:
    """The names of what the graph says of one source: its sampled rows, how many it has, and 0 if it is finite."""

    rows: str
    count: str
    finite: str


class _Sampler:
    """Draws rows of `sources` while a graph runs: adds to `model` what gathers them, and keeps what it gave.

    Positions are stratified: one at random in each of k equal parts of a batch. That covers the batch better than k
    independent draws do, and steps of one length would meet the same token of every input. Where two of them fall on
    one row, it is taken once.
    """

    def __init__(self, model: ir.Model, sources: Sequence[str], *, inputs: int, rows: int) -> None:
        if inputs < 1 or rows < 1:
            raise InputError(f"expected inputs and rows to sample, found {inputs} inputs and {rows} rows")
        self._outputs = _add_sampling(model, sources)
        self._expected, self._wanted = inputs, rows
        self._random = np.random.default_rng(_SEED)
        self._rows: dict[str, list[np.ndarray]] = {source: [] for source in self._outputs}
        self._totals = dict.fromkeys(self._outputs, 0)
        self.seen = 0

    def draw(self, batch: int) -> Feeds:
        """Where to take rows in the next batch: its share of the sample, so that all shares add up to it."""
        before = self._wanted * self.seen // self._expected
        self.seen += batch
        if self.seen > self._expected:
            raise InputError(
                f"expected {self._expected} inputs to calibrate on, found {self.seen} or more",
                hint="say how many there are: each has its share of the sample",
            )
        count = self._wanted * self.seen // self._expected - before
        # Float32 draws end at 1 - 2^-24, so that no position reaches 1: in float64 nothing here is rounded up to it.
        offsets = self._random.random(count, dtype=np.float32).astype(np.float64)
        return {_POSITIONS: (np.arange(count) + offsets) / max(count, 1)}

    def add(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Keep what one run gave. Raises ExportError where a source was not finite."""
        for source, names in self._outputs.items():
            if outputs[names.finite].item() != 0:
                raise ExportError(
                    f"expected finite numbers in {source}, found infinity or NaN on the first {self.seen} inputs",
                    hint="the fp32 graph itself overflows: check the checkpoint with clip-export verify",
                )
            self._rows[source].append(outputs[names.rows])
            self._totals[source] += int(outputs[names.count][0])

    def take_rows(self) -> dict[str, np.ndarray]:
        """The sample, float32 [n, channels] by source; what is handed out is not kept, since it is large."""
        return {source: np.concatenate(self._rows.pop(source)) for source in self._outputs}

    def counts(self) -> dict[str, float]:
        """The mean number of rows of an input, by source."""
        return {source: total / self.seen for source, total in self._totals.items()}


def _add_sampling(model: ir.Model, sources: Sequence[str]) -> dict[str, _Outputs]:
    """Make `model` give rows of each of `sources`, at the positions in [0, 1) that become an input of it."""
    import onnx_ir as ir

    values = {value.name: value for node in model.graph for value in node.outputs}
    positions = ir.Value(name=_POSITIONS, shape=ir.Shape(["positions"]), type=ir.TensorType(ir.DataType.DOUBLE))
    model.graph.inputs.append(positions)
    found = {}
    for source in dict.fromkeys(sources):
        if source not in values:
            raise ExportError(f"expected a tensor {source} to sample, found none", hint="take sources from this graph")
        found[source] = _sample(model.graph, values[source], positions)
    return found


def _sample(graph: ir.Graph, value: ir.Value, positions: ir.Value) -> _Outputs:
    """Gather rows of `value` right after the node that makes it, so that it can be freed."""
    import onnx_ir as ir

    shape = value.shape
    if value.dtype != ir.DataType.FLOAT or shape is None or len(shape) < 2 or not isinstance(shape[-1], int):
        raise ExportError(
            f"expected {value.name} to be float32 [..., channels], found {value.dtype} {shape}",
            hint="only what a linear layer reads has rows to sample",
        )
    nodes = _sampling_nodes(graph, value, positions, shape[-1])
    producer = value.producer()
    assert producer is not None
    graph.insert_after(producer, list(nodes.values()))
    rows, count, finite = (nodes[key].outputs[0] for key in ("Gather", "Shape", "ReduceSum"))
    graph.outputs.extend([rows, count, finite])
    return _Outputs(rows=str(rows.name), count=str(count.name), finite=str(finite.name))


def _sampling_nodes(graph: ir.Graph, value: ir.Value, positions: ir.Value, channels: int) -> dict[str, ir.Node]:
    """The nodes of `_sample` in their order, by operator."""
    import onnx_ir as ir

    double, whole = ir.DataType.DOUBLE, ir.DataType.INT64
    nodes: dict[str, ir.Node] = {}

    def add(operator: str, inputs: list[ir.Value], shape: list[int | str], **options: Any) -> ir.Value:
        name = f"{value.name}/{operator} of the sample"
        nodes[operator] = make_node(operator, inputs, name, shape=ir.Shape(shape), **options)
        return nodes[operator].outputs[0]

    rows_of = constant(graph, f"rows of {channels} of the sample", np.array([-1, channels], dtype=np.int64))
    flat = add("Reshape", [value, rows_of], ["rows", channels])
    # What is finite is nothing less itself. The rest gives NaN, which a sum keeps; a maximum may pass over it.
    nothing = add("Sub", [flat, flat], ["rows", channels])
    add("ReduceSum", [nothing], [1, 1], keepdims=1)
    count = add("Shape", [flat], [1], dtype=whole, start=0, end=1)
    exact = add("CastLike", [count, positions], [1], dtype=double)
    places = add("Mul", [positions, exact], ["positions"])
    indices = add("Cast", [places], ["positions"], dtype=whole, to=int(whole))  # towards zero
    distinct = add("Unique", [indices], ["sampled"])
    add("Gather", [flat, distinct], ["sampled", channels], axis=0)
    return nodes


def _batch_size(batch: Feeds) -> int:
    """The length of the first axis, which all arrays share."""
    lengths = {name: len(array) for name, array in batch.items()}
    if len(set(lengths.values())) != 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items()) or "none"
        raise InputError(
            f"expected arrays of one length in a batch, found {found}", hint="the first axis is that of the inputs"
        )
    return next(iter(lengths.values()))


def _floats(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(array) for name, array in arrays.items()}


def _digest(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The SHA-256 of names, types, shapes and bytes: safetensors itself notices no changed number."""
    digest = hashlib.sha256(_VERSION.encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"\n{name}\n{array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return np.frombuffer(digest.digest(), dtype=np.uint8)
