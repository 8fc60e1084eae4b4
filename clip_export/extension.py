"""More in a bundle that is there: precision variants and compiled plans, from its own graphs alone. No torch.

bundle -> ranges -> half graph -> contract -> plans -> the same bundle, published at once. A variant that misses the
accuracy contract is not published, and no plan is built from it. What the bundle held before is not touched.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_export import backends
from clip_export.backends.building import PORTABLE, EngineOptions, Profile, Target
from clip_export.bundle import Bundle, Graph, write_manifest
from clip_export.choice import CPU_INT8, FP32, GRAPHS, Choice, choose, of_plans
from clip_export.compilation import Job, PlanOptions, compile_plans
from clip_export.errors import InputError, MissingDependencyError
from clip_export.feeds import gather
from clip_export.graph.files import missing
from clip_export.layer_speed import LayerTimes, layer_times
from clip_export.manifest import REPORT, SECOND
from clip_export.output_file import check_place, writing
from clip_export.paying import CPU_BATCHES, require_paid
from clip_export.plans import NORMALIZED, Plan, plan_folder
from clip_export.progress import Progress, silent
from clip_export.publish import discard, extended
from clip_export.quantization import QUANTIZED, Quantization
from clip_export.quantized import made_from, make_quantized
from clip_export.shapes import batch_bounds, profiles
from clip_export.spec import Tower
from clip_export.variants import make_variant
from clip_export.verification import CONTRACTS, Replay, replay, replay_choice, require_contract

PRECISIONS = tuple(CONTRACTS)
# TensorRT-RTX has no fp32 matrix product for sm_75, "FP32 GEMM is not supported": there all but 8 bits is fp16.
_ALL_HALF = {"fp16": "fp16all", "int8": "int8all", "auto": "autoall"}
_FP8_FROM = 89  # compute capability 8.9 is the first with fp8 products


def extend(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    precision: str = "fp16",
    engine: str | None = None,
    gpus: Sequence[str] = (),
    towers: Sequence[Tower] | None = None,
    options: PlanOptions | None = None,
    calibration: Sequence[str | os.PathLike[str]] = (),
    calibration_texts: str | os.PathLike[str] | None = None,
    quantization: Quantization | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Add `precision` graphs, and plans of `engine` compiled from them, to the bundle at `bundle`; returns it anew.

    `precision` is fp32, fp16, bf16, int8, fp8, auto (as many layers in int8 as a search finds to keep the contract),
    int8cpu for ONNX Runtime on CPUs, or one that ends in all for chips without fp32 matrix products; `engine` is
    tensorrt or tensorrt-rtx, None for the graphs alone; `gpus` are compute capabilities as in sm_89, or portable, by
    default the GPU of this machine. `calibration` pictures and `calibration_texts`, a file with a text a line, are
    inputs on which ranges are measured besides the golden samples; 8 bits are made from nothing else, as `quantization`
    says. What is there already is kept, unless `force` makes it anew.

    Raises InputError, BundleError, BackendError, PlanBuildError, ContractError or SpeedError. The bundle is then as it
    was.
    """
    path = bundle.path if isinstance(bundle, Bundle) else Path(bundle)
    asked = _Asked(
        precision=precision,
        engine=engine,
        gpus=tuple(gpus),
        towers=towers,
        options=options or PlanOptions(),
        inputs=_Calibration([Path(picture) for picture in calibration], _path(calibration_texts)),
        quantization=quantization or Quantization(),
        force=force,
    )
    for report in _extend(path, asked, None, progress):
        with writing(report):
            report.unlink(missing_ok=True)  # of an earlier attempt, and no longer true
    return Bundle.open(path, check_files=False)


def _extend(path: Path, asked: _Asked, beside: Path | None, progress: Progress) -> list[Path]:
    """As `extend`; what is kept beside the bundle is named after `beside`, by default after the bundle itself.

    Returns where failures of what was made are reported, for the caller to remove when all is published.
    """
    reports = list[Path]()
    targets = find_targets(asked.engine, asked.gpus, asked.precision, asked.options)
    asked.quantization.require(asked.precision)
    with extended(path) as (opened, staging):
        chosen = _towers(opened, asked.towers)
        for tower in chosen if targets else ():
            _profiles(opened, tower, opened.graph(tower).sequence_dynamic, asked.options)  # raises before the long work
        place = opened.path if beside is None else beside
        if opened.second is not None:
            # Not beside it: that is inside the bundle, and holds nothing but the bundle's own files.
            reports += _extend(staging / SECOND, asked, place.with_name(f"{place.name}.{SECOND}"), progress)
        staged = _Staged(opened, staging, place, asked.quantization, progress)
        variants = dict.fromkeys([_variant(target, asked.precision) for target in targets] or [asked.precision])
        new = [name for name in variants if name != "fp32" and (asked.force or name not in staged.variants)]
        for name in set(variants) - set(new):
            _require_same(opened, name, asked.inputs, asked.quantization)
        for name in new:
            served = [target for target in targets if _variant(target, asked.precision) == name]
            staged.add_variant(name, asked.inputs, times=staged.layer_times(served, asked.options))
        for target in targets:
            staged.add_plans(target, _variant(target, asked.precision), chosen, asked.options, force=asked.force)
    return reports + list(map(staged.failure_report, new))


def _require_same(bundle: Bundle, precision: str, inputs: _Calibration, asked: Quantization) -> None:
    """Raise InputError where the graphs that are there were made from other data, or asked for otherwise.

    Where nothing is said, they are taken as they are.
    """
    settled = dataclasses.replace(asked, allow_slower=False) == Quantization()  # that one is about plans
    if not inputs and settled:
        return
    known = bundle.report().get("precisions", {}).get(precision, {}).get("made_from")
    if inputs and known is not None and known == made_from(gather(bundle, inputs.pictures, inputs.texts), asked):
        return
    raise InputError(
        f"{precision} graphs are there already, and would have to be made anew for this data or contract",
        hint="--force makes them anew; leave out the calibration and the contract to keep them",
    )


def find_targets(engine: str | None, gpus: Sequence[str], precision: str, options: PlanOptions) -> list[Target]:
    """What `extend` would build for. Raises, before minutes of work, what it would raise for that."""
    if precision not in PRECISIONS:
        raise InputError(f"there is no precision {precision!r}", hint=f"choose one of: {', '.join(PRECISIONS)}")
    if engine is None and gpus:
        raise InputError("a GPU was given, and no engine to build for it", hint="add --engine tensorrt-rtx")
    _require_onnx()
    if engine is None:
        return []
    if engine == "tensorrt-rtx" and options.hardware_compatibility:
        message = "tensorrt-rtx has no hardware compatibility to ask for"
        raise InputError(message, hint="--gpu portable builds one plan for sm_80 and later")
    if precision == CPU_INT8:
        message = f"{CPU_INT8} is for ONNX Runtime on CPUs, and {engine} was asked for"
        raise InputError(message, hint="leave out the engine, or build int8 with it")
    compiler = backends.compiler(engine)
    found = [compiler.target(gpu) for gpu in dict.fromkeys(gpus)] or [compiler.target(None)]
    for target in found:
        turing = target.backend == "tensorrt-rtx" and target.compute_capability == "sm_75"
        if turing and not _variant(target, precision).endswith("all"):
            message = f"tensorrt-rtx multiplies in fp16 and int8 alone on sm_75, and {precision} was asked for"
            raise InputError(message, hint="build fp16 or int8 for that GPU")
        _require_fp8(target, precision, hardware_compatibility=options.hardware_compatibility)
    return found


def _require_fp8(target: Target, precision: str, *, hardware_compatibility: bool) -> None:
    """Raise InputError where fp8 was asked for, and not every GPU that the plan is for multiplies in it."""
    capability = target.compute_capability
    everywhere = capability == PORTABLE or hardware_compatibility
    if QUANTIZED.get(precision) == "fp8" and (everywhere or int(capability.removeprefix("sm_")) < _FP8_FROM):
        which = "every GPU from sm_80 on" if everywhere else capability
        message = f"fp8 was asked for {which}, and GPUs before sm_{_FP8_FROM} have no fp8 products"
        raise InputError(message, hint="build int8 for it, or name a GPU from sm_89 on")


def _require_onnx() -> None:
    lacking = missing("onnx", "onnx_ir", "ml_dtypes")
    if lacking:
        message = f"changing graphs needs {', '.join(lacking)}, not installed here"
        raise MissingDependencyError(message, hint="pip install 'clip-export[tensorrt-rtx]', or onnx onnx-ir ml-dtypes")


def _path(path: str | os.PathLike[str] | None) -> Path | None:
    return None if path is None else Path(path)


def _variant(target: Target, precision: str) -> str:
    """The graphs that a target takes for a precision that was asked for."""
    turing = (target.backend, target.compute_capability) == ("tensorrt-rtx", "sm_75")
    return _ALL_HALF.get(precision, precision) if turing else precision


def _towers(bundle: Bundle, asked: Sequence[Tower] | None) -> tuple[Tower, ...]:
    unknown = set(asked or ()) - set(bundle.spec.towers)
    if unknown:
        held = " and ".join(bundle.spec.towers)
        raise InputError(f"{bundle.path} has no {' and '.join(sorted(unknown))} tower, only {held}")
    return tuple(tower for tower in bundle.spec.towers if asked is None or tower in asked)


@dataclass(frozen=True, slots=True)
class _Calibration:
    """Inputs on which ranges are measured besides the golden samples; false if there are none."""

    pictures: Sequence[Path]
    texts: Path | None

    def __bool__(self) -> bool:
        return bool(self.pictures) or self.texts is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What `extend` was asked for."""

    precision: str
    engine: str | None
    gpus: Sequence[str]
    towers: Sequence[Tower] | None
    options: PlanOptions
    inputs: _Calibration
    quantization: Quantization
    force: bool


class _Staged:
    """A bundle that is being extended: what it will hold, and the directory where that is put.

    What is kept for later builds, and reports of what failed, are beside and named after `place`.
    """

    def __init__(
        self, bundle: Bundle, staging: Path, place: Path, quantization: Quantization, progress: Progress
    ) -> None:
        self._bundle = bundle
        self._directory = staging
        self._place = place
        self._quantization = quantization
        self._progress = progress
        self._contracts = dict(bundle.manifest.contracts)
        self.variants: dict[str, dict[Tower, Graph]] = dict(bundle.manifest.variants)
        self._plans = {plan.file: plan for plan in bundle.manifest.plans}
        self._report = bundle.report()
        self.write()

    def layer_times(self, targets: Sequence[Target], options: PlanOptions) -> LayerTimes | None:
        """What layers take on the GPU of this machine at the largest batch, or None where no target is for that."""
        here = next((target for target in targets if target.gpu is not None), None)
        if here is None:
            return None
        batch = batch_bounds(options.batches, options.max_batch)[-1]
        return layer_times(here, batch=batch, cache=self._calibrations, work=self._directory)

    def add_variant(self, precision: str, inputs: _Calibration, *, times: LayerTimes | None = None) -> None:
        """Make the graphs of one precision; a search goes by `times` where there are any.

        Raises ContractError where they are not close enough to fp32.
        """
        source = self._staged()
        for old in (*self._directory.glob(f"*.{precision}.onnx*"), self._directory / f"{precision}.map.json"):
            discard(self._directory, old.name)
        self._contracts.pop(precision, None)
        if precision in QUANTIZED or precision == CPU_INT8:
            measured = self._quantized(source, precision, inputs, times)
        else:
            self.variants[precision], kept = make_variant(
                source,
                self._directory,
                precision,
                calibration=inputs.pictures,
                calibration_texts=inputs.texts,
                progress=self._progress,
            )
            measured = {"towers": kept}
        self.write()
        found = replay(self._staged(), device="cpu", precision=precision, progress=self._progress)
        self._settle(precision, found)
        if precision == CPU_INT8 and not self._quantization.allow_slower:
            candidate, baseline = (choose(self._staged(), backend=GRAPHS, precision=name) for name in (precision, FP32))
            measured["speed"] = require_paid(self._staged(), candidate, baseline, CPU_BATCHES)
        measured["agreement"] = found.to_dict()["rows"]
        self._report.setdefault("precisions", {})[precision] = measured
        self.write()

    def failure_report(self, precision: str) -> Path:
        """Where it is said how a precision missed its contract, if it does."""
        return self._place.with_name(f"{self._place.name}.{precision}.report.json")

    def _settle(self, precision: str, found: Replay) -> None:
        """Hold the graphs to their contract; where that may be missed, it is marked as what it is."""
        contract = self._contracts.get(precision)
        if contract is None or not self._quantization.allow_below_contract:
            if self._held(precision):
                require_contract(found)
            return
        below = [row for row in found.rows if not row.passed]
        if contract.kept and below:
            missed = tuple(f"min cosine of {row.tower} {row.output} is {row.min_cosine:.7f}" for row in below)
            self._contracts[precision] = dataclasses.replace(contract, missed=missed)
            self.write()

    @property
    def _calibrations(self) -> Path:
        return self._place.with_name(f".{self._place.name}.calibration")

    def _quantized(
        self, source: Bundle, precision: str, inputs: _Calibration, times: LayerTimes | None
    ) -> dict[str, Any]:
        check_place(self.failure_report(precision))
        made = make_quantized(
            source,
            self._directory,
            precision,
            options=self._quantization,
            calibration=inputs.pictures,
            calibration_texts=inputs.texts,
            cache=self._calibrations,
            times=times,
            report=self.failure_report(precision),
            progress=self._progress,
        )
        self.variants[precision], self._contracts[precision] = made.graphs, made.contract
        return made.report

    def _held(self, precision: str) -> bool:
        """Whether it has to keep its contract: all do but those that were let pass."""
        contract = self._contracts.get(precision)
        return contract is None or contract.kept

    def add_plans(
        self, target: Target, precision: str, towers: Sequence[Tower], options: PlanOptions, *, force: bool
    ) -> None:
        """Compile the graphs of one precision for one kind of GPU, and try the plans where that GPU is here."""
        staged = self._staged()
        wanted = _entries(staged, towers, target, precision, options)
        jobs = [
            Job(plan=plan, graph=staged.graph_path(plan.tower, precision))
            for plan in wanted
            if force or not self._serves(plan, options)
        ]
        for job in jobs:
            discard(self._directory, job.plan.file)
        cache = self._place.with_name(f".{target.backend}-{target.version}-{target.compute_capability}.timing")
        made = compile_plans(jobs, self._directory, options=options, cache=cache, progress=self._progress)
        self._plans |= {plan.file: plan for plan in made}
        self.write()
        if made and target.gpu is not None:
            choice = of_plans({plan.tower: plan for plan in made})
            own = EngineOptions(allow_host_code=True)  # it was built here, this minute
            found = replay_choice(self._staged(), choice, options=own, progress=self._progress)
            if self._held(precision):
                require_contract(found)
            if precision in QUANTIZED and not self._quantization.allow_slower:
                self._require_faster_plans(target, precision, choice, options)

    def _require_faster_plans(self, target: Target, precision: str, candidate: Choice, options: PlanOptions) -> None:
        """Compare plans of 8 bits with those of fp16, which are built for it where the bundle has none, and stay."""
        plain = "fp16all" if precision.endswith("all") else "fp16"
        if plain not in self.variants:
            self.add_variant(plain, _Calibration([], None))
        towers = tuple(candidate.plans)
        wanted = [plan.file for plan in _entries(self._staged(), towers, target, plain, options)]
        if any(file not in self._plans for file in wanted):
            self.add_plans(target, plain, towers, options, force=False)
        baseline = of_plans({self._plans[file].tower: self._plans[file] for file in wanted})
        batches = sorted(set(batch_bounds(options.batches, options.max_batch)))
        measured = require_paid(self._staged(), candidate, baseline, batches)
        self._report["precisions"][precision].setdefault("speed", {})[target.compute_capability] = measured
        self.write()

    def _serves(self, wanted: Plan, options: PlanOptions) -> bool:
        """Whether the plan is there already, with all that is asked of it."""
        plan = self._plans.get(wanted.file)
        if plan is None or plan.graph_sha256 != wanted.graph_sha256:
            return False
        return plan.attention is not None or not options.require_fused_attention

    def write(self) -> None:
        """The report and the manifest, which vouches for all that is there now."""
        report = self._directory / REPORT
        report.write_text(json.dumps(self._report, indent=2) + "\n", encoding="utf-8")
        manifest = self._bundle.manifest
        write_manifest(
            self._directory,
            name=manifest.name,
            spec=manifest.spec,
            provenance=manifest.provenance,
            variants=self.variants,
            contracts=self._contracts,
            plans=tuple(self._plans[file] for file in sorted(self._plans)),
            known=self._bundle,
        )

    def _staged(self) -> Bundle:
        return Bundle.open(self._directory, check_files=False)


def _profiles(bundle: Bundle, tower: Tower, sequence_dynamic: bool, options: PlanOptions) -> tuple[Profile, ...]:
    batches = batch_bounds(options.batches, options.max_batch)
    return profiles(bundle.spec, tower, sequence_dynamic=sequence_dynamic, batches=batches, lengths=options.lengths)


def _entries(
    bundle: Bundle, towers: Sequence[Tower], target: Target, precision: str, options: PlanOptions
) -> list[Plan]:
    """The manifest's entries of plans that are still to be built; what only a build finds out is left empty.

    Their folder is named after both towers, whichever are built: so they meet in it.
    """
    graphs = {tower: bundle.graph(tower, precision) for tower in bundle.spec.towers}
    shapes = {tower: _profiles(bundle, tower, graph.sequence_dynamic, options) for tower, graph in graphs.items()}
    hashes = {tower: bundle.graph_sha256(tower, precision) for tower in graphs}
    folder = plan_folder(
        backend=target.backend,
        version=target.version,
        compute_capability=target.compute_capability,
        precision=precision,
        graphs=hashes,
        profiles=shapes,
        options=options.stated(),
    )
    return [
        Plan(
            file=f"{folder}/{tower}.plan",
            tower=tower,
            backend=target.backend,
            version=target.version,
            compute_capability=target.compute_capability,
            precision=precision,
            graph=graph.file,
            graph_sha256=hashes[tower],
            profiles=tuple(dict(profile) for profile in shapes[tower]),
            outputs=(*graph.outputs, NORMALIZED) if "embedding" in graph.outputs else graph.outputs,
            options=options.stated(),
            seconds=0.0,
            peak_memory_mib=0,
        )
        for tower, graph in graphs.items()
        if tower in towers
    ]
