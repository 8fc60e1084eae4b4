"""What a linear layer gains from 8 bits on the GPU of this machine, in seconds: the cost that a search goes by there.

FLOPs say what a layer computes and not what it takes: small products are bound by launching, thin ones by reading
weights. So each shape is compiled in half and in 8 bits, as a chain long enough to be seen, and both are timed in turn.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np

from clip_export import backends
from clip_export.backends import DeviceEngine
from clip_export.backends.building import BuildRequest, EngineOptions, ShapeRange, Target
from clip_export.output_file import staged_file, writing
from clip_export.precision.formats import FORMATS, FormatName
from clip_export.precision.quantize import Quantized, quantize
from clip_export.progress import silent
from clip_export.speed import Ratio, compare_speed

if TYPE_CHECKING:
    import onnx_ir as ir

PAIRS = 8  # of products in a chain, there and back: what one call costs besides is the same in both, and falls away
_INPUT, _OUTPUT = "x", "y"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """A product [rows, inputs] x [inputs, outputs], and the format that it may be quantized to."""

    rows: int
    inputs: int
    outputs: int
    format: FormatName


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """Seconds that a layer takes in half and in 8 bits; `pays` where 8 bits are faster beyond noise."""

    half: float
    quantized: float
    pays: bool

    @property
    def saved(self) -> float:
        """Seconds, above 0 where it pays."""
        return self.half - self.quantized

    def __str__(self) -> str:
        return f"{self.quantized * 1e6:.1f} us against {self.half * 1e6:.1f} us"


Measure: TypeAlias = Callable[[LayerShape], LayerTime]


class LayerTimes:
    """What layers take, `batch` inputs at once, on the GPU that `where` names.

    `measure` is asked once for each shape, and what it says is kept in `path`: who goes on with a search has its costs.
    What cannot be read in `path` is measured anew. Raises OutputError where it cannot be written, and what `measure`
    raises.
    """

    def __init__(self, path: Path, measure: Measure, *, batch: int, where: str) -> None:
        self._path, self._measure = path, measure
        self.batch, self.where = batch, where
        self._known = _read(path)

    def __call__(self, shape: LayerShape) -> LayerTime:
        """What a layer of `shape` takes."""
        key = json.dumps([self.where, *dataclasses.astuple(shape)])
        if key not in self._known:
            self._known[key] = self._measure(shape)
            entries = {known: dataclasses.asdict(time) for known, time in self._known.items()}
            with writing(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with staged_file(self._path) as file:
                    file.write(json.dumps(entries, indent=1).encode("ascii"))
        return self._known[key]


def layer_times(target: Target, *, batch: int, cache: Path, work: Path) -> LayerTimes:
    """Times layers on the GPU of `target`, which is that of this machine, `batch` inputs at once.

    Times are kept in the directory `cache`; plans come and go in `work`. Timing raises as `time_layer`.
    """
    assert target.gpu is not None
    where = f"{target.gpu}, {target.backend} {target.version}"
    measure = partial(time_layer, target=target, work=work)
    return LayerTimes(cache / "layers.json", measure, batch=batch, where=where)


def time_layer(shape: LayerShape, target: Target, work: Path) -> LayerTime:
    """Compile chains of `shape` and its transpose in half and in 8 bits for the GPU of this machine, and time them.

    The mean of both directions counts for each: they do the same arithmetic. Raises PlanBuildError, BackendError or
    DeviceError.
    """
    own = EngineOptions(allow_host_code=True)  # it was built here, this minute
    with tempfile.TemporaryDirectory(prefix=".layers-", dir=work) as directory, ExitStack() as stack:
        calls = []
        for graph in write_chains(shape, Path(directory)):
            plan = build_chain(shape, graph, target)
            engine = cast(DeviceEngine, backends.open_engine(target.backend, plan, device="cuda:0", options=own))
            stack.callback(engine.close)
            calls.append(_call(engine, shape))
        first, second = calls
        return layer_time(compare_speed(first, second))


def layer_time(ratio: Ratio) -> LayerTime:
    """One layer's part of chains: the first of `ratio` in half, the second in 8 bits."""
    count = 2 * PAIRS
    return LayerTime(half=ratio.first / count, quantized=ratio.second / count, pays=ratio.pays)


def build_chain(shape: LayerShape, graph: Path, target: Target) -> Path:
    """Compile a chain for `target`; returns the plan, beside the graph. Raises PlanBuildError."""
    plan = graph.with_suffix(".plan")
    sizes = (shape.rows, shape.inputs)
    fixed = ShapeRange(min=sizes, opt=sizes, max=sizes)
    request = BuildRequest(
        graph=graph,
        plan=plan,
        profiles=({_INPUT: fixed},),
        compute_capability=target.compute_capability,
    )
    backends.compiler(target.backend).build_plan(request, progress=silent)
    return plan


def write_chains(shape: LayerShape, directory: Path) -> tuple[Path, Path]:
    """Write PAIRS products there and back, fp16 [rows, inputs] to the same, in half and with every product in 8 bits.

    Weights are random, from a fixed seed: what is multiplied does not matter for how long that takes.
    """
    import onnx_ir

    from clip_export.graph.files import save

    half, quantized = (directory / f"{kind}.onnx" for kind in ("half", "quantized"))
    save(_chain(shape), half)
    names = [str(node.name) for node in onnx_ir.load(half).graph]
    scale = 4 / FORMATS[shape.format].largest  # of rows of about unit length: 4 of their deviations
    quantize(half, quantized, {name: Quantized(format=shape.format, scale=scale) for name in names})
    return half, quantized


def _chain(shape: LayerShape) -> ir.Model:
    import onnx_ir as ir

    rng = np.random.default_rng(0)
    value = _half_value(_INPUT, shape.rows, shape.inputs)
    inputs, nodes, weights = [value], [], []
    for number in range(2 * PAIRS):
        first, second = (shape.inputs, shape.outputs) if number % 2 == 0 else (shape.outputs, shape.inputs)
        array = (rng.standard_normal((first, second), np.float32) / np.sqrt(first)).astype(np.float16)
        tensor = ir.Tensor(array, name=f"{number}.weight")
        weight = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        node = ir.node("MatMul", [value, weight], name=f"{number}/MatMul")
        produced = node.outputs[0]
        produced.name, produced.dtype = f"{number}/MatMul", ir.DataType.FLOAT16
        produced.shape = ir.Shape([shape.rows, second])
        nodes.append(node)
        weights.append(weight)
        value = produced
    value.name = _OUTPUT
    graph = ir.Graph(inputs, [value], nodes=nodes, initializers=weights, opset_imports={"": 23}, name="layers")
    return ir.Model(graph, ir_version=10)


def _half_value(name: str, rows: int, channels: int) -> ir.Value:
    import onnx_ir as ir

    return ir.Value(name=name, shape=ir.Shape([rows, channels]), type=ir.TensorType(ir.DataType.FLOAT16))


def _call(engine: DeviceEngine, shape: LayerShape) -> Callable[[], object]:
    """One run with its input on the device already; done when its output is there."""
    given = engine.run_on_device({_INPUT: np.ones((shape.rows, shape.inputs), np.float16)}, outputs=[_OUTPUT])[_OUTPUT]

    def call() -> None:
        engine.run_on_device({_INPUT: given}, outputs=[_OUTPUT])[_OUTPUT].synchronize()

    return call


def _read(path: Path) -> dict[str, LayerTime]:
    """The times in `path`; none where it is not there or is damaged, since they can be measured again."""
    try:
        found = json.loads(path.read_bytes())
        times = {str(key): LayerTime(**entry) for key, entry in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    sound = all(type(t.half) is type(t.quantized) is float and type(t.pays) is bool for t in times.values())
    return times if sound else {}
