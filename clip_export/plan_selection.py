"""Which plan of a bundle runs on this machine, and why each other does not. Pure: no library and no GPU is asked.

A plan that TensorRT cannot take ends in a message about magic tags, so everything that can be known beforehand is
decided here, from the manifest alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from clip_export.backends.building import PORTABLE
from clip_export.errors import NoPlanError
from clip_export.plans import AMPERE_PLUS, Plan
from clip_export.spec import Tower

__all__ = ["PREFERENCE", "Machine", "Selection", "explain", "select"]

# Where nobody asks for a precision. fp16 first: the same speed as bf16 with eight times its resolution, and what fp16
# cannot hold stayed fp32 when the graph was made. fp16all is fp16 for chips that need all of it so. fp32 is always
# right, and several times slower. What is not in this table loses accuracy, and is taken only where it is asked for.
PREFERENCE = ("fp16", "fp16all", "bf16", "fp32")

# What TensorRT-RTX 1.7 can be asked to build for; for any other GPU a portable plan is worth a try.
_RTX_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
_AMPERE = 80  # sm_80: portable plans of TensorRT-RTX and the level AMPERE_PLUS both begin there
_SHOWN = 20  # lines of an error message


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a plan has to fit: the backend and the version of its library here, this GPU, its free bytes if known.

    `host_code` says that plans may be taken which carry code for this machine.
    """

    backend: str
    version: str
    compute_capability: str
    free_bytes: int | None = None
    host_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """One plan a tower, all of one precision, or none at all; and of each other plan, why it was passed over.

    `towers` and `precision` are what was asked for.
    """

    machine: Machine
    towers: tuple[Tower, ...]
    precision: str | None
    chosen: dict[Tower, Plan]
    passed_over: tuple[tuple[Plan, str], ...]


def select(
    plans: Iterable[Plan],
    machine: Machine,
    *,
    towers: Sequence[Tower],
    graphs: Mapping[str, str],
    sizes: Mapping[str, int] | None = None,
    precision: str | None = None,
) -> Selection:
    """Choose a plan for each of `towers`; plans of other towers are not looked at.

    `graphs` is graph file -> graph_sha256 as the bundle has it now, `sizes` plan file -> bytes; `precision` is by
    default the best of PREFERENCE that every tower has. `Bundle.select_plans` fills them in.
    """
    wanted = [plan for plan in plans if plan.tower in towers]
    misfits = {plan.file: list(_misfits(plan, machine, precision, graphs, sizes or {})) for plan in wanted}
    fitting = [plan for plan in wanted if not misfits[plan.file]]
    chosen = _best(fitting, machine, towers)
    passed_over = tuple(
        (plan, "; ".join(misfits[plan.file]) or _outdone(plan, fitting, chosen, machine, towers))
        for plan in wanted
        if plan not in chosen.values()
    )
    return Selection(machine=machine, towers=tuple(towers), precision=precision, chosen=chosen, passed_over=passed_over)


def explain(selection: Selection, *, bundle: str = "BUNDLE") -> NoPlanError:
    """The error for a selection that chose nothing: each plan and why not, and the command that builds one."""
    machine = selection.machine
    place = f"{machine.backend} {machine.version} on {machine.compute_capability}"
    towers = " and ".join(selection.towers)
    lines = [f"  {plan.file}: {reason}" for plan, reason in selection.passed_over]
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"  and {len(lines) - _SHOWN} more"]
    if lines:
        message = "\n".join([f"no plan of the bundle fits {place}, for {towers}:", *lines])
    else:
        message = f"the bundle holds no plan for {towers}; {place} needs one"
    target = machine.compute_capability if machine.compute_capability in _RTX_TARGETS else PORTABLE
    gpu = f" --gpu {target}" if machine.backend == "tensorrt-rtx" else ""
    precision = selection.precision or PREFERENCE[0]
    command = f"clip-export build {shlex.quote(bundle)} --engine {machine.backend}{gpu} --precision {precision}"
    return NoPlanError(message, hint=f"build one with: {command}")


def _misfits(
    plan: Plan, machine: Machine, precision: str | None, graphs: Mapping[str, str], sizes: Mapping[str, int]
) -> Iterable[str]:
    """Every reason why `plan` cannot be taken, none where it fits."""
    if plan.backend != machine.backend:
        yield f"compiled by {plan.backend}, not by {machine.backend}"
        return  # versions of another compiler compare to nothing
    if precision is not None and plan.precision not in (precision, f"{precision}all"):
        yield f"its precision is {plan.precision}, asked for is {precision}"
    if precision is None and plan.precision not in PREFERENCE:
        yield f"its precision {plan.precision} is taken only where it is asked for"
    yield from _version_misfit(plan, machine)
    yield from _gpu_misfit(plan, machine)
    if "version_compatible" in plan.options and not machine.host_code:
        yield "version compatible, so it carries code, and EngineOptions(allow_host_code=True) was not given"
    if graphs.get(plan.graph) != plan.graph_sha256:
        yield f"compiled from an earlier {plan.graph}, which has changed since"
    size = sizes.get(plan.file)
    if size is not None and machine.free_bytes is not None and size > machine.free_bytes:
        need, free = _mib(size), machine.free_bytes // 2**20
        yield f"its weights take {need} MiB of GPU memory, {free} MiB are free"


def _version_misfit(plan: Plan, machine: Machine) -> Iterable[str]:
    """TensorRT reads plans of its own version; version compatible ones of the major version before its own too.

    https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/support-matrix.html (10 to 11 is the one pair
    from 10.12 on). TensorRT-RTX reads those of its own version alone.
    """
    built, here = _numbers(plan.version), _numbers(machine.version)
    if built == here:
        return
    compiled = f"compiled by {plan.backend} {plan.version}"
    if "version_compatible" not in plan.options or plan.backend == "tensorrt-rtx":
        yield f"{compiled}, the version here is {machine.version}"
    elif built > here:
        yield f"{compiled}, newer than {machine.version} here"
    elif here[:1] > (built[0] + 1,):
        yield f"{compiled}, which is too old even for a version compatible plan: the version here is {machine.version}"


def _gpu_misfit(plan: Plan, machine: Machine) -> Iterable[str]:
    this = f"this GPU is {machine.compute_capability}"
    if plan.compute_capability == machine.compute_capability:
        return
    if plan.compute_capability == PORTABLE or plan.options.get("hardware_compatibility") == AMPERE_PLUS:
        if _sm(machine.compute_capability) < _AMPERE:
            yield f"built for sm_{_AMPERE} and later, {this}"
    else:
        yield f"built for {plan.compute_capability}, {this}"


def _best(fitting: Sequence[Plan], machine: Machine, towers: Sequence[Tower]) -> dict[Tower, Plan]:
    """The best plan of each tower, in the first precision that all towers have: half of a pair has no meaning."""
    for precision in _preferred(plan.precision for plan in fitting):
        of_tower = {
            tower: [plan for plan in fitting if plan.tower == tower and plan.precision == precision] for tower in towers
        }
        if all(of_tower.values()):
            return {tower: max(held, key=lambda plan: _merits(plan, machine)) for tower, held in of_tower.items()}
    return {}


def _preferred(precisions: Iterable[str]) -> list[str]:
    ranks = {precision: rank for rank, precision in enumerate(PREFERENCE)}
    return sorted(set(precisions), key=lambda precision: (ranks.get(precision, len(ranks)), precision))


def _merits(plan: Plan, machine: Machine) -> tuple[int, tuple[int, ...], int, str]:
    """What makes one of two fitting plans the better one, most important first: higher is better."""
    exact = plan.compute_capability == machine.compute_capability
    tuned = exact + (exact and "hardware_compatibility" not in plan.options)  # compatible kernels are slower
    return tuned, _numbers(plan.version), len(plan.profiles), plan.file


_MERITS = ("is built for this GPU alone", "is of a newer version", "has more profiles", "comes later by name")


def _outdone(
    plan: Plan, fitting: Sequence[Plan], chosen: Mapping[Tower, Plan], machine: Machine, towers: Sequence[Tower]
) -> str:
    """Why a plan that fits was not chosen."""
    beside = {other.tower for other in fitting if other.precision == plan.precision}
    alone = [tower for tower in towers if tower not in beside]
    if alone:
        return f"fits, but no {plan.precision} plan of the {' and '.join(alone)} tower does"
    better = chosen[plan.tower]
    if better.precision != plan.precision:
        return f"fits, but {better.precision} is preferred to {plan.precision}"
    pairs = zip(_merits(better, machine), _merits(plan, machine), _MERITS, strict=True)
    return f"fits, but {better.file} " + next(why for one, other, why in pairs if one != other)


def _numbers(version: str) -> tuple[int, ...]:
    """`10.13.3.9+cu12` as (10, 13, 3, 9).

    >>> _numbers("1.7.1")
    (1, 7, 1)
    """
    release = re.match(r"\d{1,9}(\.\d{1,9})*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else (0,)


def _sm(compute_capability: str) -> int:
    number = re.fullmatch(r"sm_(\d{2,3})[a-z]?", compute_capability)
    return int(number[1]) if number else 0


def _mib(size: int) -> int:
    return -(-size // 2**20)
