"""The contestants of benchmarks/quantization.py: from the same fp32 graph and the same inputs to graphs for TensorRT.

fp16               nothing in 8 bits
naive              every linear layer of the blocks in int8, one scale for all weights of a layer, min-max ranges
without smoothing  one scale for each output, ranges by least squared error
ours               with smoothing besides: `--precision int8`
ours, searched     as much of it as keeps the contract: `--precision auto`
ModelOpt           NVIDIA's, as it comes; and on MatMul and Conv alone, with its `max` ranges

The first five share what stays in half. ModelOpt is given those inputs too that ours keeps back for its choices.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from _quantization_data import everything

import clip_export
from clip_export.bundle import Bundle
from clip_export.feeds import Samples
from clip_export.graph.files import save
from clip_export.judging import SEARCHED_WITH, Judge, Reference
from clip_export.precision.calibrate import Calibration
from clip_export.precision.formats import FORMATS
from clip_export.precision.linears import find_linears, find_weights
from clip_export.precision.quantize import Quantized, quantize, refusals
from clip_export.precision.search import Found, Score, search
from clip_export.precision.treat import treat
from clip_export.progress import Progress
from clip_export.quantized_tower import HALF_PART, Half, Prepared, Quantizer, prepare_tower, to_half
from clip_export.verification import CONTRACTS

MODELOPT = {
    "ModelOpt": ["--method", "entropy"],
    "ModelOpt, MatMul and Conv": ["--method", "max", "--operators", "MatMul", "Conv"],
}
_INT8 = FORMATS["int8"]


class Contestants:
    """Makes the graphs of one tower, each once, into `work`; `notes` are what is to be said of them, JSON-ready."""

    def __init__(self, samples: Samples, work: Path, progress: Progress) -> None:
        self._samples, self._work, self._progress = samples, work, progress
        self.notes: dict[str, Any] = {}
        cache = work / "cache"
        self._smoothed = prepare_tower(samples, "int8", method="mse", work=work, cache=cache, progress=progress)
        self.calibration = Calibration.load(next(cache.glob(f"{samples.tower}-*.safetensors")))

    def make(self, modelopt: Path | None) -> Iterator[tuple[str, Path]]:
        """The name and the graph of each contestant; ModelOpt's with the python of its own environment."""
        yield "fp16", self._fp16()
        plain = self._plain("mse")
        half = self._half(plain, "plain")
        yield "naive", self._naive(half)
        yield "without smoothing", self._packed(plain, half, self._target("unsmoothed"))
        yield from self._ours()
        if modelopt is not None:
            feeds = self._work / f"{self._samples.tower}.npz"
            np.savez(feeds, allow_pickle=False, **everything(self._samples))
            for name, options in MODELOPT.items():
                yield name, self._modelopt(modelopt, feeds, name, options)

    def _target(self, name: str) -> Path:
        return self._work / f"{self._samples.tower}.{name}.onnx"

    def _fp16(self) -> Path:
        pictures = [item for item in self._samples.items if isinstance(item, Path)]
        bundle = self._samples.bundle
        if "fp16" not in Bundle.open(bundle.path).manifest.variants:
            bundle = clip_export.extend(bundle.path, precision="fp16", calibration=pictures, progress=self._progress)
        return Bundle.open(bundle.path).graph_path(self._samples.tower, "fp16")

    def _half(self, prepared: Prepared, name: str) -> Half:
        return to_half(
            prepared,
            self._samples,
            self._target(f"{name}-half"),
            required=1 - HALF_PART * (1 - CONTRACTS["int8"]),
            everything=False,
            progress=self._progress,
        )

    def _plain(self, method: str) -> Prepared:
        """As `prepare_tower` has it, without smoothing."""
        path, treatments = self._samples.bundle.graph_path(self._samples.tower), {}
        graph = ir.load(path).graph
        for linear in self._smoothed.linears:
            treatments[linear.name] = treat(
                linear,
                find_weights(graph, linear),
                self.calibration.rows[linear.source],
                self.calibration.ranges.of(linear.source),
                _INT8,
                method=method,
                foldable=False,
            )
        return dataclasses.replace(self._smoothed, treatments=treatments, smoothed=path)

    def _packed(self, prepared: Prepared, half: Half, target: Path) -> Path:
        """The half graph with every linear layer that can be in int8."""
        mix = {name: Quantized(format="int8", scale=treatment.scale) for name, treatment in prepared.treatments.items()}
        refused = refusals(ir.load(half.path).graph, mix)
        quantize(half.path, target, {name: quantized for name, quantized in mix.items() if name not in refused})
        return target

    def _naive(self, half: Half) -> Path:
        packed = self._packed(self._plain("minmax"), half, self._target("naive-packed"))
        return write_per_tensor(packed, half.path, self._target("naive"))

    def _ours(self) -> Iterator[tuple[str, Path]]:
        quantizer = Quantizer(self._smoothed, self._half(self._smoothed, "smoothed"))
        try:
            target = self._target("ours")
            quantizer.write(tuple(quantizer.costs), target)
            yield "ours", target
            found = self._searched(quantizer)
        finally:
            quantizer.close()
        self.notes["search"] = {
            "evaluations": found.evaluations,
            "high": {high.linear: high.why for high in found.high},
            "refused": quantizer.high,
        }
        target = self._target("searched")
        quantizer.write(found.mix, target)
        yield "ours, searched", target

    def _searched(self, quantizer: Quantizer) -> Found:
        """As `auto` does it: on inputs spread over those that are held out, with the last word to all of them."""
        reference = Reference.of(self._samples)

        def scoring(reference: Reference) -> Callable[[frozenset[str]], Score]:
            judge = Judge(reference=reference)
            return lambda mix: judge.score(quantizer.run(reference.feeds, mix))

        def keeps(score: Score) -> bool:
            return score.cosine >= CONTRACTS["auto"]

        return search(
            quantizer.costs,
            scoring(reference.spread(SEARCHED_WITH)),
            keeps,
            confirm=scoring(reference),
            progress=self._progress,
        )

    def _modelopt(self, python: Path, feeds: Path, name: str, options: list[str]) -> Path:
        self._progress(f"{self._samples.tower}: {name}", 0, 0)
        target = self._target(name.replace(", ", "-").replace(" ", "-"))
        script, graph = Path(__file__).with_name("_modelopt.py"), self._samples.bundle.graph_path(self._samples.tower)
        command = [str(python), str(script), str(graph), str(feeds), str(target), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"error: {name} failed on the {self._samples.tower} tower:\n{done.stderr[-2000:]}")
        self.notes[name] = json.loads(done.stdout.splitlines()[-1])
        return target


def write_per_tensor(packed: Path, half: Path, target: Path) -> Path:
    """Write the graph at `packed` with one scale for the weights of each int8 layer; `half` has them as they were."""
    model, source = ir.load(packed), ir.load(half).graph
    nodes = {str(node.name): node for node in model.graph}
    for linear in find_linears(source):
        weights = nodes[linear.name].inputs[1]
        node = None if weights is None else weights.producer()
        if node is None:
            continue  # not in int8
        held, scales = node.inputs[0], node.inputs[1]
        assert held is not None and scales is not None
        exact = find_weights(source, linear).astype(np.float32)
        scale = np.array(np.abs(exact).max() / _INT8.largest, dtype=np.float16)
        numbers = _INT8.round(exact / np.float32(scale)).astype(np.int8)
        held.const_value = ir.Tensor(np.clip(numbers, -127, 127), name=held.name)
        scales.const_value = ir.Tensor(scale, name=scales.name)
        scales.shape = ir.Shape([])
        node.attributes.pop("axis")
    save(model, target)
    return target


def pack_weights(source: Path, target: Path) -> Path:
    """Write `source` with its weights in int8 where it quantizes them as it runs, as ModelOpt's graphs do."""
    model = ir.load(source)
    for node in list(model.graph):
        tensor = node.inputs[0].const_value if node.op_type == "QuantizeLinear" and node.inputs[0] else None
        if tensor is None:
            continue
        scales = node.inputs[1]
        assert scales is not None and scales.const_value is not None
        array, scale = tensor.numpy().astype(np.float32), scales.const_value.numpy().astype(np.float32)
        if scale.size > 1:
            axis = node.attributes["axis"].as_int()
            scale = scale.reshape([-1 if place == axis else 1 for place in range(array.ndim)])
        name = str(node.outputs[0].name)
        numbers = ir.Tensor(_INT8.round(array / scale).astype(np.int8), name=f"{name}/held")
        held = ir.Value(name=numbers.name, shape=numbers.shape, type=ir.TensorType(numbers.dtype), const_value=numbers)
        model.graph.register_initializer(held)
        ir.convenience.replace_all_uses_with(node.outputs[0], held)
        model.graph.remove(node, safe=True)
    save(model, target)
    return target
