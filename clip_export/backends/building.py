"""What a plan is built from, what its building found out, and how it is run: the words between a compiler and its user.

A plan is the file of an engine that was compiled for one kind of GPU. These dataclasses know neither TensorRT nor CLIP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from clip_export.errors import InputError

Shape: TypeAlias = tuple[int, ...]

PlanBackend: TypeAlias = Literal["tensorrt", "tensorrt-rtx"]
AttentionProof: TypeAlias = Literal["operator", "inspector"]

PORTABLE = "portable"  # in place of a compute capability: one plan for every GPU that the compiler supports


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRange:
    """The shapes that one input may have, from `min` to `max` on every axis; kernels are chosen for `opt`."""

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self) -> None:
        ranks = [len(self.min), len(self.opt), len(self.max)]
        if len(set(ranks)) > 1:
            raise InputError(f"expected min, opt and max with as many axes each, found {ranks}")
        rising = all(0 < low <= mid <= high for low, mid, high in zip(self.min, self.opt, self.max, strict=True))
        if not rising:
            found = f"{list(self.min)}, {list(self.opt)}, {list(self.max)}"
            raise InputError(f"expected positive sizes with min <= opt <= max on every axis, found {found}")

    def holds(self, shape: Shape) -> bool:
        """Whether an array of `shape` may be given."""
        same_rank = len(shape) == len(self.min)
        return same_rank and all(low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True))


Profile: TypeAlias = Mapping[str, ShapeRange]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a plan is built for: `compute_capability` as in "sm_89" or PORTABLE, by `version` of compiler `backend`.

    `gpu` is the name of the GPU of this machine if the plan can run on it, None where it cannot or there is none.
    """

    backend: PlanBackend
    version: str
    compute_capability: str
    gpu: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """One graph to compile into one plan.

    `graph` is an ONNX file, `plan` the file to write. `compute_capability` is as in "sm_89", PORTABLE, or None for the
    GPU of this machine. `timing_cache` is read and written where the compiler has one. The rest is None or False for
    the compiler's own default; `tf32` allows 10-bit mantissas in fp32 layers. `require_fused_attention` makes the build
    fail, naming the layers, where attention was not compiled into one kernel.
    """

    graph: Path
    plan: Path
    profiles: tuple[Profile, ...]
    compute_capability: str | None = None
    workspace_mib: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    hardware_compatibility: bool = False
    version_compatible: bool = False
    strip_weights: bool = False
    refit: bool = False
    tf32: bool = False
    require_fused_attention: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How a plan is run.

    `cuda_graphs`: launch a shape that comes again as a whole. `max_contexts`: how many threads run at once; each takes
    activation memory. `allow_host_code`: open version-compatible plans, which carry code that runs on this machine.
    `refit_from`: the ONNX file with the weights of a plan that was built without them. TensorRT-RTX alone has
    `runtime_cache`, the file that keeps the kernels compiled for this GPU, and `specialization`: kernels for each new
    shape are compiled beside the work ("lazy"), before it ("eager") or never ("none").
    """

    cuda_graphs: bool = True
    max_contexts: int = 4
    allow_host_code: bool = False
    refit_from: Path | None = None
    runtime_cache: Path | None = None
    specialization: Literal["lazy", "eager", "none"] = "lazy"

    def __post_init__(self) -> None:
        if type(self.allow_host_code) is not bool:  # a question of trust is not answered by whatever is not empty
            raise InputError(f"expected allow_host_code True or False, found {self.allow_host_code!r}")
        if type(self.max_contexts) is not int or self.max_contexts < 1:
            raise InputError(f"expected max_contexts of at least 1, found {self.max_contexts!r}")
        if self.specialization not in {"lazy", "eager", "none"}:
            raise InputError(f"expected specialization lazy, eager or none, found {self.specialization!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What a finished build says about its plan.

    `seconds` of building; `plan_bytes`; `peak_memory_mib` of the process that built it; `version` of the compiler;
    `compute_capability` that the plan is for. Where a GPU was at hand: `gpu` its name, `driver` and `cuda` versions,
    `activation_bytes` that one context needs per profile, `inspector` the JSON of EngineInspector. `attention` says how
    it is known that attention is fused ("operator": there is no other way to build it; "inspector"), or is None.

    Of the graph's products whose operands are quantized, `low_precision` names those that run in 8 bits, or is None
    where that is not known, and `dequantized` those that do not; both are empty for a graph without any.
    """

    seconds: float
    plan_bytes: int
    peak_memory_mib: int
    version: str
    compute_capability: str
    attention: AttentionProof | None
    unfused: tuple[str, ...] = ()
    low_precision: tuple[str, ...] | None = ()
    dequantized: tuple[str, ...] = ()
    gpu: str | None = None
    driver: str | None = None
    cuda: str | None = None
    activation_bytes: tuple[int, ...] | None = None
    inspector: str | None = None
    warnings: tuple[str, ...] = ()


__all__ = ["PORTABLE", "BuildReport", "BuildRequest", "EngineOptions", "Profile", "Shape", "ShapeRange", "Target"]
