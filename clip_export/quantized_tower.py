"""One tower to 8 bits: calibrated once, smoothed, turned to half, and scored for any mix of quantized layers.

The steps are those of clip_export/precision, in their order; here they get the inputs of a bundle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clip_export.errors import InputError
from clip_export.feeds import Feeds, Samples, golden_feeds
from clip_export.judging import Outputs, run_graph
from clip_export.layer_speed import LayerShape
from clip_export.precision._held import half_type, is_half, scale_misfit
from clip_export.precision.calibrate import Calibration, cached, calibrate, calibration_key
from clip_export.precision.fits import HALF_TYPES
from clip_export.precision.formats import FORMATS, FormatName
from clip_export.precision.half import HalfReport
from clip_export.precision.linears import Linear, find_linears, find_weights
from clip_export.precision.quantize import NEEDS_FP32, Quantized, QuantizedAttention, needs_wide, quantize, refusals
from clip_export.precision.ranges import Ranges, measure, merged
from clip_export.precision.refine import refine
from clip_export.precision.simulate import simulate
from clip_export.precision.smooth import foldable, smooth
from clip_export.precision.switchable import Switched, switchable
from clip_export.precision.treat import Treatment, treat
from clip_export.progress import Progress
from clip_export.variants import KEPT_FP32

if TYPE_CHECKING:
    import onnx_ir as ir

ROWS = 512  # of each layer's input that are kept: scales and smoothing are searched on them
# Of what a contract lets a cosine lose, the part that half precision may take before anything is quantized.
HALF_PART = 0.1


def layer_names(samples: Samples) -> list[str]:
    """The linear layers of the tower of `samples` that 8 bits are for, by the names that a map has for them."""
    import onnx_ir

    graph = onnx_ir.load(samples.bundle.graph_path(samples.tower)).graph
    return [linear.name for linear in find_linears(graph, keep=KEPT_FP32)]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A tower that is ready to be quantized.

    `smoothed` is the fp32 graph with what was found in `treatments` folded in; `costs` are FLOPs for one input, of the
    layers that may be quantized, and `total` those of all linear layers.
    """

    linears: tuple[Linear, ...]
    treatments: Mapping[str, Treatment]
    smoothed: Path
    costs: Mapping[str, float]
    total: float
    calibrated_on: int

    def share(self, mix: Collection[str]) -> float:
        """The part of the tower's linear FLOPs that is in `mix`, 0 to 1."""
        return sum(cost for name, cost in self.costs.items() if name in mix) / self.total


def prepare_tower(
    samples: Samples,
    formats: Mapping[str, FormatName] | FormatName,
    *,
    method: str,
    work: Path,
    cache: Path,
    progress: Progress,
) -> Prepared:
    """Calibrate the tower of `samples`, find how each layer is best quantized, and smooth its graph into `work`.

    `formats` is that of every layer, or of each; what it does not name is not quantized. Calibrations are kept in the
    directory `cache`.
    """
    import onnx_ir

    path = samples.bundle.graph_path(samples.tower)
    model = onnx_ir.load(path)
    every, linears = find_linears(model.graph), find_linears(model.graph, keep=KEPT_FP32)
    calibration = _calibration(samples, every, cache, progress)
    costs = {linear.name: 2 * calibration.counts[linear.source] * linear.inputs * linear.outputs for linear in every}
    wanted = {linear.name: formats if isinstance(formats, str) else formats.get(linear.name) for linear in linears}
    folds = foldable(model, [linear.name for linear in linears])
    treatments = {}
    for number, linear in enumerate(linears):
        progress(f"{samples.tower}: find scales", number, len(linears))
        format_ = wanted[linear.name]
        if format_ is not None:
            treatments[linear.name] = treat(
                linear,
                find_weights(model.graph, linear),
                calibration.rows[linear.source],
                calibration.ranges.of(linear.source),
                FORMATS[format_],
                method=method,
                foldable=linear.name in folds,
            )
    smoothed = work / f"{samples.tower}.smoothed.onnx"
    smooth(path, smoothed, {name: found.divisor for name, found in treatments.items() if found.strength is not None})
    return Prepared(
        linears=tuple(linears),
        treatments=treatments,
        smoothed=smoothed,
        costs={linear.name: costs[linear.name] for linear in linears},
        total=sum(costs.values()),
        calibrated_on=calibration.inputs,
    )


def _calibration(samples: Samples, linears: Sequence[Linear], cache: Path, progress: Progress) -> Calibration:
    path = samples.bundle.graph_path(samples.tower)
    key = calibration_key(samples.bundle.graph_sha256(samples.tower), samples.digests(), rows=ROWS)
    return cached(
        cache / f"{samples.tower}-{key[:16]}.safetensors",
        lambda: calibrate(
            path,
            samples.calibration(),
            sources=list(dict.fromkeys(linear.source for linear in linears)),
            inputs=samples.count,
            rows=ROWS,
            progress=progress,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Half:
    """The smoothed graph in fp16 at `path`, what became of it, and the ranges of the smoothed one.

    `calibrated` are those of inputs to calibrate on; `ranges` are over the golden samples too, for what must not
    overflow.
    """

    path: Path
    report: HalfReport
    calibrated: Ranges
    ranges: Ranges


def to_half(
    prepared: Prepared, samples: Samples, target: Path, *, required: float, everything: bool, progress: Progress
) -> Half:
    """The smoothed graph in fp16 at `target`; as much stays fp32 as the `required` min cosine of golden samples takes.

    Ranges are measured anew: smoothing has moved them, and what overflows in one input does so in the engine.
    """
    golden = list(golden_feeds(samples.bundle, samples.tower))
    calibrated = measure(prepared.smoothed, samples.calibration(), progress=progress)
    ranges = merged(calibrated, measure(prepared.smoothed, golden, progress=progress))
    report = refine(
        prepared.smoothed,
        target,
        precision="fp16",
        ranges=ranges,
        feeds=golden,
        required=required,
        keep=() if everything else KEPT_FP32,
        everything=everything,
        progress=progress,
    )
    return Half(path=target, report=report, calibrated=calibrated, ranges=ranges)


def run_simulated(graph: Path, feeds: Sequence[Feeds], work: Path) -> Outputs:
    """What a GPU computes with the half graph at `graph`, batch by batch, on the CPU."""
    simulation = work / f"{graph.stem}.simulation.onnx"
    simulate(graph, simulation)
    return run_graph(simulation, feeds)


class Quantizer:
    """A half graph whose layers can be quantized in any mix, run on the CPU as a GPU would, and written.

    With `attention` the products inside attention are quantized in every mix, where they can be. `costs` are those of
    the layers that can be; `high` says of each other one, and `attention_high` of each attention, why it cannot.
    """

    def __init__(self, prepared: Prepared, half: Half, *, attention: bool = False) -> None:
        import onnx_ir

        self._prepared, self._half = prepared, half
        graph = onnx_ir.load(half.path).graph
        all_ = {
            linear.name: self._quantized(graph, linear, prepared.treatments[linear.name])
            for linear in prepared.linears
            if linear.name in prepared.treatments
        }
        self.high = refusals(graph, all_)
        self._mix = {name: quantized for name, quantized in all_.items() if name not in self.high}
        self.costs = {name: cost for name, cost in prepared.costs.items() if name in self._mix}
        switches = half.path.with_name(f"{half.path.stem}.switches.onnx")
        self.attention_high: dict[str, str] = {}
        self._attention = self._quantized_attention(graph) if attention else {}
        switchable(half.path, switches, self._mix, attention=self._attention)
        self._switched = Switched(switches)

    def _quantized(self, graph: ir.Graph, linear: Linear, found: Treatment) -> Quantized:
        largest = self._half.ranges.of(linear.name)  # a MatMul's output has its name
        weights = find_weights(graph, linear)
        wide = needs_wide(weights, found.scale, largest, FORMATS[found.format], HALF_TYPES["fp16"])
        return Quantized(format=found.format, scale=found.scale, wide=wide)

    def run(self, feeds: Sequence[Feeds], mix: Collection[str]) -> Outputs:
        """The outputs, batch by batch, with the layers of `mix` quantized."""
        return self._switched.run(feeds, mix)

    def write(self, mix: Collection[str], target: Path) -> None:
        """Write the half graph with the layers of `mix` quantized."""
        chosen = {name: quantized for name, quantized in self._mix.items() if name in mix}
        quantize(self._half.path, target, chosen, attention=self._attention)

    def _quantized_attention(self, graph: ir.Graph) -> dict[str, QuantizedAttention]:
        """The scales of every attention in half, from the largest values of its operands."""
        formats = {quantized.format for quantized in self._mix.values()}
        if len(formats) != 1:
            message = f"attention is quantized in the one format of the layers, found {sorted(formats) or 'none'}"
            raise InputError(message, hint="leave out --quantize-attention")
        format_ = FORMATS[formats.pop()]
        found = {}
        for node in graph:
            if node.op_type != "Attention":
                continue
            name, query = str(node.name), node.inputs[0]
            scales = [self._largest(value) / format_.largest for value in node.inputs[:3]]
            reason: str | None = NEEDS_FP32
            if is_half(query):
                misfits = [scale_misfit(scale, format_, half_type(query)) for scale in scales]
                reason = next(filter(None, misfits), None)
            if reason is None:
                query_scale, key, value = scales
                found[name] = QuantizedAttention(format=format_.name, query=query_scale, key=key, value=value)
            else:
                self.attention_high[name] = reason
        return found

    def _largest(self, value: ir.Value | None) -> float:
        """The largest absolute value of an operand; where a cast made it half, of what was cast."""
        assert value is not None
        maker = value.producer()
        measured = maker.inputs[0] if maker is not None and maker.op_type == "Cast" else value
        assert measured is not None
        return self._half.calibrated.largest(str(measured.name))

    def share(self, mix: Collection[str]) -> float:
        """As that of Prepared."""
        return self._prepared.share(mix)

    @property
    def attention(self) -> dict[str, str]:
        """What became of each attention that was to be quantized: its format, or why it stayed high."""
        return {name: found.format for name, found in self._attention.items()} | self.attention_high

    @property
    def digest(self) -> str:
        """Stands for the half graph and for how each layer would be quantized."""
        path = self._half.path
        parts = [_sha256(file) for file in sorted(path.parent.glob(f"{path.name}*"))]
        parts += [f"{name} {quantized}" for name, quantized in (self._mix | self._attention).items()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def shapes(self, batch: int) -> dict[str, LayerShape]:
        """What each layer that can be quantized multiplies for `batch` inputs of the mean length of the calibration."""
        found = {}
        for linear in self._prepared.linears:
            if linear.name in self._mix:
                rows = self.costs[linear.name] / (2 * linear.inputs * linear.outputs)  # an input
                found[linear.name] = LayerShape(
                    rows=max(1, round(rows * batch)),
                    inputs=linear.inputs,
                    outputs=linear.outputs,
                    format=self._prepared.treatments[linear.name].format,
                )
        return found

    def leave(self, reasons: Mapping[str, str]) -> None:
        """Keep the layers of `reasons` high, for the reasons that it gives."""
        self.high |= reasons
        self.costs = {name: cost for name, cost in self.costs.items() if name not in reasons}

    def close(self) -> None:
        """Let the engine go."""
        self._switched.close()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
