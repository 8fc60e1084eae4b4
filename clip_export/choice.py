"""Which engine runs a bundle here: a plan that fits this GPU, or its graphs; and if no plan fits, why."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field

from clip_export import backends
from clip_export.bundle import Bundle
from clip_export.errors import BackendError, InputError, MissingDependencyError, NoPlanError
from clip_export.plan_selection import Machine, explain
from clip_export.plans import Plan
from clip_export.spec import Tower

GRAPHS = "onnxruntime"  # the backend that runs graphs; the others run plans
FP32 = "fp32"
_GPU = "cuda:0"
_CPU_BATCH = 32
_RUNS_AT_ONCE = 4  # batches of a plan in one call, so that one is copied while another is computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What runs each tower: `backend` on `device`, the graphs of `precision` or, for towers in `plans`, those.

    `batch_size` is what an engine is best given at once. `title` says it all in the words of a report.
    """

    backend: str
    device: str
    precision: str
    plans: dict[Tower, Plan] = field(default_factory=dict)
    batch_size: int = _CPU_BATCH

    @property
    def title(self) -> str:
        """As in "tensorrt-rtx 1.7.1.116, sm_89" or "onnxruntime, cpu"."""
        if not self.plans:
            return f"{self.backend}, {self.device}"
        plan = next(iter(self.plans.values()))
        return f"{plan.backend} {plan.version}, {plan.compute_capability}"


def choose(
    bundle: Bundle,
    *,
    backend: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    fallback: str | None = None,
) -> Choice:
    """What runs `bundle` here. See `clip_export.load` for the arguments and errors."""
    if fallback not in (None, GRAPHS):
        raise InputError(f"expected fallback {GRAPHS} or none, found {fallback!r}")
    if backend is None:
        return best_plans(bundle, device, precision) or _graphs(bundle, backends.choose(GRAPHS), device, precision)
    if backend not in backends.COMPILERS:
        return _graphs(bundle, backends.choose(backend), device, precision)
    try:
        return _plans(bundle, backend, device or _GPU, precision)
    except (BackendError, MissingDependencyError) as error:
        if fallback is None:
            raise
        warnings.warn(f"running on {fallback} instead of {backend}: {error.message}", stacklevel=3)
        return _graphs(bundle, backends.choose(fallback), None, None)


def best_plans(bundle: Bundle, device: str | None = None, precision: str | None = None) -> Choice | None:
    """The plans of the first compiler that works here and has some that fit; None where there are none.

    That a compiler works and the bundle's plans for it do not fit is a warning, which says why.
    """
    held = {plan.backend for plan in bundle.manifest.plans}
    for name in backends.COMPILERS:
        if name not in held or device == "cpu" or not backends.status(name).works:
            continue
        try:
            return _plans(bundle, name, device or _GPU, precision)
        except NoPlanError as error:
            warnings.warn(f"running on {GRAPHS}: {error}", stacklevel=3)
    return None


def _plans(bundle: Bundle, backend: str, device: str, precision: str | None) -> Choice:
    version = backends.compiler(backend).version()
    gpu = backends.gpu(device)
    machine = Machine(
        backend=backend,
        version=version,
        compute_capability=gpu.compute_capability,
        free_bytes=gpu.free_bytes,
    )
    selection = bundle.select_plans(machine, precision=precision)
    chosen = selection.chosen
    if not chosen:
        raise explain(selection, bundle=os.fspath(bundle.path))
    largest = max(shapes.max[0] for plan in chosen.values() for profile in plan.profiles for shapes in profile.values())
    return Choice(
        backend=backend,
        device=device,
        precision=next(iter(chosen.values())).precision,
        plans=chosen,
        batch_size=_RUNS_AT_ONCE * largest,
    )


def _graphs(bundle: Bundle, backend: str, device: str | None, precision: str | None) -> Choice:
    choice = Choice(backend=backend, device=device or "cpu", precision=precision or FP32)
    if choice.precision != FP32 and choice.device == "cpu":
        raise BackendError(
            f"{choice.precision} graphs are for GPUs: a CPU computes them in fp32 and hides every overflow",
            hint="leave out the precision, or use device cuda:0; clip-export verify simulates them honestly",
        )
    return choice
