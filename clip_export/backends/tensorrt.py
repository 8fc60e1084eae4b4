"""TensorRT: plans built on the GPU that they run on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_export.backends import DeviceEngine, Status, _trt_build, _trt_library
from clip_export.backends._trt_library import TENSORRT as FLAVOUR
from clip_export.backends.building import BuildReport, BuildRequest, Target
from clip_export.progress import Progress, silent

if TYPE_CHECKING:
    from clip_export.backends.building import EngineOptions

INSTALL = FLAVOUR.install


def status() -> Status:
    """Whether plans run here, or what is missing: the library, the driver, or a GPU that it supports."""
    return _trt_library.status(FLAVOUR)


def version() -> str:
    """That of the library here. Raises MissingDependencyError."""
    return _trt_library.load(FLAVOUR).version


def target(compute_capability: str | None) -> Target:
    """What a build for `compute_capability` ("sm_89", PORTABLE, None for this machine's GPU) is for.

    Raises MissingDependencyError, DeviceError or PlanBuildError, saying why, where it cannot be built here.
    """
    return _trt_library.load(FLAVOUR).target(compute_capability)


def build_plan(request: BuildRequest, *, progress: Progress = silent) -> BuildReport:
    """Compile one graph in a process of its own; _trt_build.build_plan says what it raises."""
    return _trt_build.build_plan(_trt_library.load(FLAVOUR), request, progress=progress)


def open_engine(
    path: Path,
    *,
    device: str = "cuda:0",
    threads: int | None = None,
    outputs: Sequence[str] | None = None,
    options: EngineOptions | None = None,
) -> DeviceEngine:
    """Open a plan on a GPU. Raises BackendError or DeviceError with a sentence, MissingDependencyError."""
    from clip_export.backends import _trt_engine

    library = _trt_library.load(FLAVOUR)
    return _trt_engine.open_engine(library, path, device=device, outputs=outputs, options=options)
