"""Graphs of a bundle into plans: what the compiler is given, in which order, and what the manifest says of the result.

The graph that is compiled is that of the bundle with two changes. Attention is taken apart where the compiler has no
fused kernel for it (in fp32), or does not know the operator; and where there is an embedding, it is given once more,
normalized, so that nothing more has to run on the GPU.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clip_export import backends
from clip_export.backends.building import BuildReport, BuildRequest
from clip_export.errors import InputError, UnsupportedOperatorError
from clip_export.graph.primitives import prepare
from clip_export.plans import AMPERE_PLUS, Plan
from clip_export.progress import Progress
from clip_export.publish import discard
from clip_export.shapes import batch_bounds

# Peak memory of a build over the size of its graph, rounded up from what docs/benchmarks.md has.
_MEMORY_FACTOR = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """How plans are compiled; None leaves it to the compiler.

    `batches` and `lengths` are the largest batch and number of tokens of each profile, `max_batch` the largest of all.
    `workspace_mib` bounds the scratch memory that kernels may ask for. `timing_cache` is by default a hidden file
    beside the bundle. `jobs` plans are built at once, as far as memory allows. Raises InputError for what cannot be.
    """

    batches: tuple[int, ...] | None = None
    max_batch: int | None = None
    lengths: tuple[int, ...] | None = None
    workspace_mib: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    hardware_compatibility: bool = False
    version_compatible: bool = False
    strip_weights: bool = False
    refit: bool = False
    tf32: bool = False
    require_fused_attention: bool = False
    jobs: int = 1

    def __post_init__(self) -> None:
        batch_bounds(self.batches, self.max_batch)
        level = self.optimization_level
        if level is not None and not 0 <= level <= 5:
            raise InputError(f"expected an optimization level from 0 to 5, found {level}", hint="3 is the default")
        for name, value, most in (("a workspace in MiB", self.workspace_mib, 10**8), ("jobs", self.jobs, 1024)):
            if value is not None and not 1 <= value <= most:
                raise InputError(f"expected {name} from 1 to {most}, found {value}")

    def stated(self) -> dict[str, str]:
        """What a plan depends on besides its graph and profiles, as the manifest has it: only what is not default."""
        names = ("workspace_mib", "optimization_level", "version_compatible")
        values = {name: getattr(self, name) for name in (*names, "strip_weights", "refit", "tf32")}
        stated = {
            name: str(value).lower() for name, value in values.items() if value is not None and value is not False
        }
        return stated | ({"hardware_compatibility": AMPERE_PLUS} if self.hardware_compatibility else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One plan to build: its entry in the manifest as far as it is known before, and the graph to compile."""

    plan: Plan
    graph: Path


def compile_plans(
    jobs: Sequence[Job], directory: Path, *, options: PlanOptions, cache: Path | None, progress: Progress
) -> list[Plan]:
    """Build every plan below `directory`, `options.jobs` at a time; returns their complete entries, in order.

    Raises PlanBuildError, DeviceError, BackendError; the first failure stops the other builds.
    """
    if not jobs:
        return []
    with _workspace(directory) as work:
        builds = [_Build(job, directory, work, options, cache) for job in jobs]
        workers = min(options.jobs, len(builds), _affordable(jobs))
        if workers <= 1:
            return [build(progress) for build in builds]
        return _side_by_side(builds, workers, progress)


class _Build:
    """One build: the graph made ready for the compiler, compiled, and described."""

    def __init__(self, job: Job, directory: Path, work: Path, options: PlanOptions, cache: Path | None) -> None:
        self._job, self._directory, self._work, self._options, self._cache = job, directory, work, options, cache

    def __call__(self, progress: Progress) -> Plan:
        plan = self._job.plan
        title = f"{plan.tower} plan for {plan.compute_capability}"
        progress(f"{title}: prepare the graph", 0, 0)

        def step(phase: str, done: int, total: int) -> None:
            progress(f"{title}: {phase}", done, total)

        # No compiler here has a fused kernel for attention with hidden positions: it is written out.
        masked = "attention_mask" in plan.profiles[0]
        try:
            return self._compile(primitive=plan.precision == "fp32" or masked, step=step)
        except UnsupportedOperatorError as error:
            if "Attention" not in error.operators:
                raise
            # Parsers before 10.14 do not know the operator; they fuse what it is made of, or the inspector says not.
            return self._compile(primitive=True, step=step)

    def _compile(self, *, primitive: bool, step: Progress) -> Plan:
        options, plan = self._options, self._job.plan
        folder = Path(tempfile.mkdtemp(dir=self._work))
        graph = prepare(self._job.graph, folder / self._job.graph.name, primitive=primitive)
        path = self._directory / plan.file
        path.parent.mkdir(parents=True, exist_ok=True)
        request = BuildRequest(
            graph=graph,
            plan=path,
            profiles=plan.profiles,
            compute_capability=plan.compute_capability,
            workspace_mib=options.workspace_mib,
            optimization_level=options.optimization_level,
            timing_cache=options.timing_cache or self._cache,
            hardware_compatibility=options.hardware_compatibility,
            version_compatible=options.version_compatible,
            strip_weights=options.strip_weights,
            refit=options.refit,
            tf32=options.tf32,
            require_fused_attention=options.require_fused_attention,
        )
        report = backends.compiler(plan.backend).build_plan(request, progress=step)
        shutil.rmtree(folder)
        for warning in report.warnings:
            warnings.warn(f"{plan.tower} plan for {plan.compute_capability}: {warning}", stacklevel=2)
        form = {"attention": "primitive" if primitive else "operator"}
        return _described(dataclasses.replace(plan, options=plan.options | form), report, self._directory)


def _described(plan: Plan, report: BuildReport, directory: Path) -> Plan:
    """The plan with what its building found out; the inspector's JSON goes beside it."""
    inspector = None
    if report.inspector is not None:
        inspector = plan.file.removesuffix(".plan") + ".layers.json"
        discard(directory, inspector)
        (directory / inspector).write_text(report.inspector, encoding="utf-8")
    return dataclasses.replace(
        plan,
        seconds=round(report.seconds, 1),
        peak_memory_mib=report.peak_memory_mib,
        attention=report.attention,
        gpu=report.gpu,
        driver=report.driver,
        cuda=report.cuda,
        activation_bytes=report.activation_bytes,
        inspector=inspector,
    )


def _side_by_side(builds: Sequence[_Build], workers: int, progress: Progress) -> list[Plan]:
    """Builds in threads, each of which waits for a process of its own. One that fails, or Ctrl-C, stops them all."""
    stop = threading.Event()

    def watched(step: str, done: int, total: int) -> None:
        if stop.is_set():
            raise _StoppedError
        progress(step, done, total)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(build, watched) for build in builds]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in finished if future.exception() is not None]
            return [future.result() for future in failed or futures]
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _StoppedError(Exception):
    """Ends a build whose neighbour has failed; nobody sees it, since the neighbour's error is what is raised."""


def _affordable(jobs: Sequence[Job]) -> int:
    """How many builds fit into the memory that is free; at least one, and any number where nobody knows."""
    largest = max(sum(path.stat().st_size for path in job.graph.parent.glob(f"{job.graph.name}*")) for job in jobs)
    free = _available_memory()
    return len(jobs) if free is None else max(1, free // (_MEMORY_FACTOR * largest))


def _available_memory() -> int | None:
    """Bytes that can be had without swapping, from Linux's /proc/meminfo; None elsewhere."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


@contextmanager
def _workspace(directory: Path) -> Iterator[Path]:
    """A directory for graphs as the compiler takes them; on the disk of the bundle, since they may be gigabytes."""
    work = Path(tempfile.mkdtemp(prefix=".graphs-", dir=directory))
    try:
        yield work
    finally:
        shutil.rmtree(work)
