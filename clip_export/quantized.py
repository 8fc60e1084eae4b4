"""Precisions of 8 bits: calibrated, quantized, held to a contract, and reported layer by layer.

int8 and fp8 quantize every linear layer of the blocks; auto searches how many of them keep the contract;
a precision map says which. The rest is fp16, as in `fp16` graphs. What misses its contract is not published: the report
is kept and names the worst layers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_export.bundle import Bundle, Graph
from clip_export.choice import CPU_INT8, FP32
from clip_export.errors import ContractError, InputError
from clip_export.feeds import Data, check_varied, gather
from clip_export.judging import SEARCHED_WITH, Judge, Outputs, Reference, run_graph
from clip_export.layer_speed import LayerTime, LayerTimes
from clip_export.manifest import GOLDEN, Contract
from clip_export.output_file import staged_file, writing
from clip_export.precision.cpu import quantize_for_cpu
from clip_export.precision.formats import FormatName, find_format
from clip_export.precision.search import Found, Journal, Mix, Score, search
from clip_export.precision_map import HIGH, PrecisionMap, check_names, check_towers
from clip_export.progress import Progress
from clip_export.quantization import QUANTIZED, SEARCHED, Quantization
from clip_export.quantized_report import (
    QuantizedTower,
    layer_formats,
    tower_report,
    worst_by_error,
    worst_by_score,
)
from clip_export.quantized_terms import Terms
from clip_export.quantized_tower import (
    HALF_PART,
    Prepared,
    Quantizer,
    layer_names,
    prepare_tower,
    run_simulated,
    to_half,
)
from clip_export.spec import Tower

# Part of every key of a search: one more where the same options would give other scores.
_SEARCH_VERSION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """The graphs of a precision by tower, what is to be reported of them (JSON-ready), and their contract."""

    graphs: dict[Tower, Graph]
    report: dict[str, Any]
    contract: Contract


def make_quantized(
    bundle: Bundle,
    staging: Path,
    precision: str,
    *,
    options: Quantization,
    calibration: Sequence[Path],
    calibration_texts: Path | None,
    cache: Path,
    report: Path,
    times: LayerTimes | None,
    progress: Progress,
) -> Made:
    """Write the `precision` graphs of `bundle` and its precision map into `staging`.

    Calibrations and unfinished searches are kept in the directory `cache`. A search goes by what layers take by
    `times`, or by FLOPs without. Raises InputError without calibration data or where a contract asks for pairs that are
    not there; ContractError for what misses the contract and is not allowed to, with the file `report` written.
    """
    data = gather(bundle, calibration, calibration_texts)
    if options.precision_map is not None:
        check_towers(options.precision_map, data.towers, precision, QUANTIZED.get(precision, "int8"))
    if options.max_recall_drop is not None and not data.paired:
        raise InputError(
            "a recall drop is measured on pairs of pictures and captions, and there are none",
            hint="one --calibration DIRECTORY with captions.csv or captions.jsonl in it, and no --calibration-texts",
        )
    check_varied(data)
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=staging) as work:
        maker = _Maker(
            bundle=bundle,
            precision=precision,
            options=options,
            terms=Terms(
                precision=precision,
                options=options,
                data=data,
                references={tower: Reference.of(samples) for tower, samples in data.towers.items()},
            ),
            work=Path(work),
            cache=cache,
            report_path=report,
            times=times,
            progress=progress,
        )
        return maker.make(staging)


def made_from(data: Data, options: Quantization) -> str:
    """Stands for all that a precision of a bundle is made from besides the bundle, in hex; it is in the report."""
    return hashlib.sha256(f"{data.digest} {options.digest}".encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """One precision on its way: its towers, one after another, then both together."""

    bundle: Bundle
    precision: str
    options: Quantization
    terms: Terms
    work: Path
    cache: Path
    report_path: Path
    times: LayerTimes | None
    progress: Progress

    def make(self, staging: Path) -> Made:
        """Quantize every tower, hold them to the contract together, and write their graphs and the map."""
        for tower in self.terms.data.towers:
            self._check_map(tower, dict.fromkeys(layer_names(self.terms.data.towers[tower])))
        towers: dict[Tower, QuantizedTower] = {}
        for tower in self.terms.data.towers:
            towers[tower] = self._tower(tower, staging, {name: made.outputs for name, made in towers.items()})
        outputs = {tower: made.outputs for tower, made in towers.items()}
        scores = {tower: made.found.score for tower, made in towers.items()}
        pairs = self.terms.pairs(outputs)
        missed = list(self.terms.missed(scores, pairs))
        report: dict[str, Any] = {
            "contract": {"min_cosine": self.terms.min_cosine, "max_recall_drop": self.options.max_recall_drop},
            "missed": missed,
            "made_from": made_from(self.terms.data, self.options),
            "method": self.options.ranges_by,
            "towers": {
                tower: made.report | {"score": dataclasses.asdict(scores[tower])} for tower, made in towers.items()
            },
            "pairs": pairs,
        }
        if not any(made.found.mix for made in towers.values()):
            raise self._refused(["no layer is left to quantize", *missed], towers, report)
        if missed and not self.options.allow_below_contract:
            raise self._refused(missed, towers, report)
        formats = {tower: made.formats for tower, made in towers.items()}
        precision_map = PrecisionMap(
            precision=self.precision,
            method=self.options.ranges_by,
            towers=formats,
            attention=self.options.attention,
            half_cosine=self._half_cosine(),
        )
        precision_map.save(staging / f"{self.precision}.map.json")
        return Made(
            graphs={tower: self._graph(tower) for tower in towers},
            report=report,
            contract=Contract(
                min_cosine=self.terms.min_cosine, max_recall_drop=self.options.max_recall_drop, missed=tuple(missed)
            ),
        )

    def _tower(self, tower: Tower, staging: Path, made: Mapping[Tower, Outputs]) -> QuantizedTower:
        """Quantize `tower` beside those that are `made`, by their outputs."""
        samples, reference = self.terms.data.towers[tower], self.terms.references[tower]
        prepared = self._prepared(tower)
        target = staging / f"{tower}.{self.precision}.onnx"
        if self.precision == CPU_INT8:
            return self._cpu_tower(tower, prepared, target, made)
        half = to_half(
            prepared,
            samples,
            self.work / f"{tower}.half.onnx",
            required=self._half_cosine(),
            everything=self.precision.endswith("all"),
            progress=self.progress,
        )
        judge = self.terms.judge(tower, reference, made)
        quantizer = Quantizer(prepared, half, attention=self.options.attention)
        try:
            self._check_map(tower, dict.fromkeys(quantizer.costs) | quantizer.high)
            found = self._found(tower, quantizer, self.terms.judge(tower, reference.spread(SEARCHED_WITH), made), judge)
            quantizer.write(found.mix, target)
            self.progress(f"{tower}: judge the {self.precision} graph", 0, 0)
            outputs = run_simulated(target, reference.feeds, self.work)
            found = dataclasses.replace(found, score=judge.score(outputs))
            kept = self.terms.keeps(found.score)
            if not kept:
                found = self._blamed(tower, quantizer, judge, found)
        finally:
            quantizer.close()
        return QuantizedTower(
            formats=layer_formats(prepared, found.mix),
            outputs=outputs,
            found=found,
            report=tower_report(samples, prepared, found, quantizer.high)
            | {"half": half.report.to_dict(), "attention": quantizer.attention, "cost": self._cost()},
            worst=() if kept else worst_by_score(found),
        )

    def _half_cosine(self) -> float:
        """What the fp16 graph has to keep before anything is quantized: as for the map, or most of what is asked."""
        given = self.options.precision_map
        if given is not None and given.half_cosine is not None:
            return given.half_cosine
        return 1 - HALF_PART * (1 - self.terms.min_cosine)

    def _prepared(self, tower: Tower) -> Prepared:
        given = self.options.precision_map
        format_ = QUANTIZED.get(self.precision, "int8")
        return prepare_tower(
            self.terms.data.towers[tower],
            format_ if given is None else _formats(given.towers[tower], format_),
            method=self.options.ranges_by,
            work=self.work,
            cache=self.cache,
            progress=self.progress,
        )

    def _cpu_tower(
        self, tower: Tower, prepared: Prepared, target: Path, made: Mapping[Tower, Outputs]
    ) -> QuantizedTower:
        """The tower for ONNX Runtime: every layer in int8, the rest fp32; judged on the kernels of this CPU."""
        reference, mix = self.terms.references[tower], self._quantized(tower, prepared.treatments)
        quantize_for_cpu(prepared.smoothed, target, {name: prepared.treatments[name].scale for name in mix})
        outputs = run_graph(target, reference.feeds)
        score = self.terms.judge(tower, reference, made).score(outputs)
        found = Found(mix=mix, score=score, high=(), sensitivity={}, evaluations=1, share=prepared.share(mix))
        report = tower_report(self.terms.data.towers[tower], prepared, found, {}, rest=FP32)
        worst = () if self.terms.keeps(score) else worst_by_error(prepared, found)
        return QuantizedTower(
            formats=layer_formats(prepared, mix), outputs=outputs, found=found, report=report, worst=worst
        )

    def _found(self, tower: Tower, quantizer: Quantizer, sample: Judge, judge: Judge) -> Found:
        """The mix of a tower: searched on a `sample` and confirmed by `judge`, or all that the format or map says."""
        if self.precision in SEARCHED and self.options.precision_map is None:
            costs = self._costs(quantizer)
            key = self._search_key(tower, quantizer, costs)
            path = self.cache / f"{tower}-{key[:16]}"
            found = search(
                costs,
                _scoring(quantizer, sample),
                self.terms.keeps,
                confirm=_remembered(_scoring(quantizer, judge), Journal(path.with_suffix(".confirmed.jsonl"), key)),
                journal=Journal(path.with_suffix(".search.jsonl"), key),
                progress=lambda what, done, total: self.progress(f"{tower}: {what}", done, total),
            )
            return dataclasses.replace(found, share=quantizer.share(found.mix))
        mix = self._quantized(tower, quantizer.costs)
        unknown = Score(cosine=math.nan, mean_cosine=math.nan, agreement=math.nan)
        return Found(mix=mix, score=unknown, high=(), sensitivity={}, evaluations=1, share=quantizer.share(mix))

    def _costs(self, quantizer: Quantizer) -> dict[str, float]:
        """What quantizing each layer saves: seconds where they are measured, and then no layer that saves none."""
        if self.times is None:
            return dict(quantizer.costs)
        measured: dict[str, LayerTime] = {}
        for name, shape in quantizer.shapes(self.times.batch).items():
            self.progress(f"time {name} on {self.times.where}", len(measured), len(quantizer.costs))
            measured[name] = self.times(shape)
        quantizer.leave(
            {name: f"8 bits are no faster than half here: {time}" for name, time in measured.items() if not time.pays}
        )
        return {name: time.saved for name, time in measured.items() if time.pays}

    def _cost(self) -> dict[str, Any]:
        """What a search goes by, JSON-ready."""
        if self.times is None:
            return {"unit": "flops"}
        return {"unit": "seconds", "on": self.times.where, "batch": self.times.batch}

    def _blamed(self, tower: Tower, quantizer: Quantizer, judge: Judge, found: Found) -> Found:
        """`found` with the score of each layer of its mix alone, over all inputs: the report says who is to blame."""
        alone = {}
        for number, name in enumerate(found.mix):
            self.progress(f"{tower}: find the worst layers", number, len(found.mix))
            alone[name] = judge.score(quantizer.run(judge.reference.feeds, [name]))
        return dataclasses.replace(
            found,
            sensitivity={**found.sensitivity, **alone},
            unquantized=judge.score(quantizer.run(judge.reference.feeds, ())),
            evaluations=found.evaluations + len(alone) + 1,
        )

    def _quantized(self, tower: Tower, layers: Iterable[str]) -> tuple[str, ...]:
        """Those of `layers` that the map quantizes; without a map, all."""
        given = self.options.precision_map
        return tuple(name for name in layers if given is None or given.towers[tower][name] != HIGH)

    def _check_map(self, tower: Tower, known: Mapping[str, str | None]) -> None:
        """Raise InputError for a map that does not fit `known`, as `check_names` has it."""
        given = self.options.precision_map
        if given is not None:
            check_names(given.towers[tower], known, f"the {tower} tower")

    def _search_key(self, tower: Tower, quantizer: Quantizer, costs: Mapping[str, float]) -> str:
        """Stands for all that the scores of a search depend on."""
        parts = [
            _SEARCH_VERSION,
            SEARCHED_WITH,
            self.precision,
            self.terms.min_cosine,
            self.options.max_recall_drop,
            tower,
            *(self.bundle.graph_sha256(name) for name in self.terms.data.towers),
            self.bundle.manifest.files[GOLDEN].sha256,
            quantizer.digest,
            list(costs.items()),
            self.terms.data.paired,
            [digest.hex() for samples in self.terms.data.towers.values() for digest in samples.digests(held_out=True)],
            # The second tower's R@1 is measured beside the first one as that was made.
            [digest.hex() for samples in self.terms.data.towers.values() for digest in samples.digests()],
            [self.options.ranges_by, self.options.attention],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _refused(
        self, missed: Sequence[str], towers: Mapping[Tower, QuantizedTower], report: dict[str, Any]
    ) -> ContractError:
        """The error for what missed the contract; the report is written beside the bundle and named."""
        with staged_file(self.report_path) as file, writing(self.report_path):
            file.write(json.dumps(report, indent=2).encode("ascii") + b"\n")
        return self.terms.refusal(missed, towers, self.report_path)

    def _graph(self, tower: Tower) -> Graph:
        return dataclasses.replace(self.bundle.graph(tower), file=f"{tower}.{self.precision}.onnx")


def _scoring(quantizer: Quantizer, judge: Judge) -> Callable[[Mix], Score]:
    return lambda mix: judge.score(quantizer.run(judge.reference.feeds, mix))


def _remembered(evaluate: Callable[[Mix], Score], journal: Journal) -> Callable[[Mix], Score]:
    """`evaluate`, but for what `journal` knows."""

    def score(mix: Mix) -> Score:
        found = journal.find(mix)
        if found is None:
            found = evaluate(mix)
            journal.add(mix, found)
        return found

    return score


def _formats(layers: Mapping[str, str], usual: FormatName) -> dict[str, FormatName]:
    """The format for which each layer of a map is treated: `usual` for those that stay high.

    A search leaves layers out after they were smoothed with the others, and they stay so.
    """
    return {name: usual if format_ == HIGH else find_format(format_).name for name, format_ in layers.items()}
