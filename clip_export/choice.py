"""Which engine runs a bundle here: a plan that fits this GPU, or its graphs; and if no plan fits, why."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from clip_export import backends
from clip_export.bundle import Bundle
from clip_export.errors import BackendError, BundleError, NoPlanError
from clip_export.plan_selection import Machine, explain
from clip_export.plans import Plan
from clip_export.spec import Tower

GRAPHS = "onnxruntime"  # the backend that runs graphs; the others run plans
FP32 = "fp32"
CPU_INT8 = "int8cpu"  # the one precision besides fp32 whose graphs a CPU runs as they are
GPU = "cuda:0"
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
        named = [f"{plan.backend} {plan.version}, {plan.compute_capability}" for plan in self.plans.values()]
        return " and ".join(dict.fromkeys(named)) or f"{self.backend}, {self.device}"


def choose(
    bundle: Bundle,
    *,
    backend: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    host_code: bool = False,
) -> Choice:
    """What runs `bundle` here. See `clip_export.load`; `host_code` lets plans be chosen that carry code."""
    serving = () if precision is None else (precision, f"{precision}all")  # fp16 may be answered by fp16all
    if serving and not set(serving) & bundle.manifest.variants.keys():
        held = ", ".join(bundle.manifest.variants)
        raise BundleError(f"{bundle.path} holds no {precision} graphs, only {held}", hint="choose one of these")
    if backend is None:
        best = best_plans(bundle, device, precision, host_code=host_code)
        return best or _graphs(bundle, backends.choose(GRAPHS), device, precision)
    if backend in backends.COMPILERS:
        return _plans(bundle, backend, GPU if device is None else device, precision, host_code)
    return _graphs(bundle, backends.choose(backend), device, precision)


def best_plans(
    bundle: Bundle, device: str | None = None, precision: str | None = None, *, host_code: bool = False
) -> Choice | None:
    """The plans of the first compiler that works here and has some that fit; None where there are none.

    Where a GPU is here and the bundle has plans, but none can be run, a warning says why.
    """
    held = {plan.backend for plan in bundle.manifest.plans}
    reasons = []
    for name in backends.COMPILERS:
        if name not in held or device == "cpu":
            continue
        status = backends.status(name)
        if not status.works:
            reasons.append(f"{name}: {status.reason}")
            continue
        try:
            return _plans(bundle, name, GPU if device is None else device, precision, host_code)
        except NoPlanError as error:
            reasons.append(str(error))
    if reasons and backends.has_driver():
        warnings.warn(f"no plan runs here, but {GRAPHS}: {'; '.join(reasons)}", stacklevel=3)
    return None


def _plans(bundle: Bundle, backend: str, device: str, precision: str | None, host_code: bool) -> Choice:
    version = backends.compiler(backend).version()
    gpu = backends.gpu(device)
    machine = Machine(
        backend=backend,
        version=version,
        compute_capability=gpu.compute_capability,
        free_bytes=gpu.free_bytes,
        host_code=host_code,
    )
    selection = bundle.select_plans(machine, precision=precision)
    if not selection.chosen:
        raise explain(selection, bundle=os.fspath(bundle.path))
    return of_plans(selection.chosen, device)


def of_plans(plans: Mapping[Tower, Plan], device: str = GPU) -> Choice:
    """Exactly these plans, all of one compiler and precision, whether they fit or not."""
    first = next(iter(plans.values()))
    largest = max(shapes.max[0] for plan in plans.values() for profile in plan.profiles for shapes in profile.values())
    return Choice(
        backend=first.backend,
        device=device,
        precision=first.precision,
        plans=dict(plans),
        batch_size=_RUNS_AT_ONCE * largest,
    )


def _graphs(bundle: Bundle, backend: str, device: str | None, precision: str | None) -> Choice:
    choice = Choice(
        backend=backend, device="cpu" if device is None else device, precision=FP32 if precision is None else precision
    )
    if choice.precision == CPU_INT8 and choice.device != "cpu":
        raise BackendError(
            f"{CPU_INT8} graphs are for CPUs, not for {choice.device}", hint="plans of int8 are for GPUs"
        )
    if choice.precision not in (FP32, CPU_INT8) and choice.device == "cpu":
        raise BackendError(
            f"{choice.precision} graphs are for GPUs: a CPU computes them in fp32 and hides every overflow",
            hint="leave out the precision, or use device cuda:0; clip-export verify simulates them honestly",
        )
    return choice
