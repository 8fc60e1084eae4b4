"""How graphs of benchmarks/quantization.py are judged: cosines, recall, what is in int8, and their plans.

Every graph is judged by its simulation (clip_export/precision/simulate.py), which rounds wherever its types say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from _quantization_contestants import pack_weights
from _quantization_data import Case

from clip_export import backends
from clip_export.backends.building import BuildRequest, Profile
from clip_export.bundle import Bundle
from clip_export.errors import PlanBuildError
from clip_export.graph.primitives import prepare
from clip_export.judging import Judge, Outputs, Reference
from clip_export.precision.calibrate import Calibration
from clip_export.precision.linears import find_linears
from clip_export.precision.search import Score
from clip_export.quantized_tower import run_simulated
from clip_export.retrieval import Recall, recall_at
from clip_export.shapes import profiles
from clip_export.spec import Tower

GPU = "sm_89"
_LARGEST_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Row:
    """One graph of one contestant.

    `flops` are those of all linear layers for one input of the calibration, `share` is the part of them that multiplies
    int8, `share_with_patches` the same with the patch convolution among them. `plan_bytes` is None where the plan does
    not build; `error` says why.
    """

    contestant: str
    tower: Tower
    golden: Score
    held_out: Score
    flops: float
    share: float
    share_with_patches: float
    plan_bytes: int | None
    build_seconds: float | None
    error: str | None


class Scorer:
    """Judges graphs of one tower against its fp32 graph."""

    def __init__(self, case: Case, tower: Tower, calibration: Calibration, work: Path) -> None:
        self._bundle, self._tower, self._work = case.bundle, tower, work
        self._reference = Reference.of(case.evaluation.towers[tower])
        graph = ir.load(case.bundle.graph_path(tower)).graph
        self._linears = {
            linear.name: 2 * calibration.counts[linear.source] * linear.inputs * linear.outputs
            for linear in find_linears(graph)
        }
        self._patches = {str(node.name): _convolution(node) for node in graph if node.op_type == "Conv"}
        self.expected = _found(self._reference.embeddings())

    def score(self, contestant: str, graph: Path, others: np.ndarray) -> tuple[Row, np.ndarray]:
        """The row of `graph`, and its embeddings of the inputs that everybody is judged by, float32 [n, dim].

        `others` are the reference embeddings of the other tower, among which agreement looks for the nearest.
        """
        packed = pack_weights(graph, self._work / f"{graph.stem}.packed.onnx")
        outputs = run_simulated(packed, self._reference.feeds, self._work)
        golden, held_out = self._scores(outputs, others)
        names = int8_products(graph)
        plan = self._plan(graph)
        row = Row(
            contestant=contestant,
            tower=self._tower,
            golden=golden,
            held_out=held_out,
            flops=sum(self._linears.values()),
            share=_share(self._linears, names),
            share_with_patches=_share(self._linears | self._patches, names),
            plan_bytes=None if isinstance(plan, str) else plan[0],
            build_seconds=None if isinstance(plan, str) else plan[1],
            error=plan if isinstance(plan, str) else None,
        )
        return row, _found(self._reference.embeddings(outputs))

    def _scores(self, outputs: Outputs, others: np.ndarray) -> tuple[Score, Score]:
        """Of the golden samples, and of the inputs that are held out."""
        whole, count = self._reference, self._reference.golden
        parts = [
            Reference(feeds=whole.feeds[part], outputs=whole.outputs[part], golden=golden, rows=rows)
            for part, golden, rows in ((slice(count), count, whole.rows[:0]), (slice(count, None), 0, whole.rows))
        ]
        golden, held_out = (Judge(reference=part, others=others) for part in parts)
        return golden.score(outputs[:count]), held_out.score(outputs[count:])

    def _plan(self, graph: Path) -> tuple[int, float] | str:
        """Bytes and seconds of a plan with one profile, or why there is none."""
        shapes = _profile(self._bundle, self._tower)
        target = prepare(graph, self._work / f"{graph.stem}.prepared.onnx", primitive=False)
        plan = self._work / f"{graph.stem}.plan"
        request = BuildRequest(graph=target, plan=plan, profiles=shapes, compute_capability=GPU)
        try:
            report = backends.compiler("tensorrt-rtx").build_plan(request, progress=lambda *_: None)
        except PlanBuildError as error:
            return str(error)
        plan.unlink()
        return report.plan_bytes, round(report.seconds, 1)


def recall(case: Case, embeddings: Mapping[Tower, np.ndarray]) -> Recall:
    """R@1 of the pairs that everybody is judged by."""
    pictures, captions = (case.evaluation.held_out(tower) for tower in ("image", "text"))
    return recall_at(embeddings["image"], embeddings["text"], 1, labels=captions, pictures=pictures)


def int8_products(graph: Path) -> set[str]:
    """The products of the graph both of whose operands come out of DequantizeLinear."""
    found = set()
    for node in ir.load(graph).graph:
        if node.op_type in ("MatMul", "Conv"):
            producers = [value.producer() if value else None for value in node.inputs[:2]]
            if all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers):
                found.add(str(node.name))
    return found


def _profile(bundle: Bundle, tower: Tower) -> tuple[Profile, ...]:
    context = None if bundle.spec.text is None else bundle.spec.text.context_length
    dynamic = bundle.graph(tower).sequence_dynamic
    lengths = [context] if dynamic and context is not None else None
    return profiles(bundle.spec, tower, sequence_dynamic=dynamic, batches=[_LARGEST_BATCH], lengths=lengths)


def _share(costs: Mapping[str, float], names: set[str]) -> float:
    return sum(cost for name, cost in costs.items() if name in names) / sum(costs.values())


def _convolution(node: ir.Node) -> float:
    """FLOPs of a convolution for one input."""
    weights, result = node.inputs[1], node.outputs[0]
    assert weights is not None and weights.shape is not None and result.shape is not None
    places = [dim for dim in result.shape.dims[2:] if isinstance(dim, int)]  # [batch, channels, height, width]
    return 2.0 * math.prod((*weights.shape.numpy(), *places))


def _found(embeddings: np.ndarray | None) -> np.ndarray:
    if embeddings is None:
        raise SystemExit("error: expected a tower with embeddings")
    return embeddings
