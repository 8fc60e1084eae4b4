"""Graphs or plans in, arrays out: engines that know nothing of CLIP.

One file per backend; the file name, with `-` for `_`, is the registry. Each has `status()`, which says whether it works
here and what would make it work, and `open_engine(path, ...)`. One that compiles graphs into plans also has
`target(...)` and `build_plan(request, ...)`, and opens plans, not graphs.
"""

from __future__ import annotations

import importlib
import pkgutil
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from clip_export.backends.building import BuildReport, BuildRequest, Target
from clip_export.errors import BackendError
from clip_export.progress import Progress

if TYPE_CHECKING:
    from clip_export.backends._cuda import Gpu
    from clip_export.backends.device_array import DeviceArray

# Compilers first: where one of them has a plan that fits, nothing else is as fast.
COMPILERS = ("tensorrt", "tensorrt-rtx")


class Engine(Protocol):
    """A graph that runs. Calling it is safe from several threads."""

    outputs: tuple[str, ...]

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by output name for arrays by input name; raises BackendError."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be called afterwards."""
        ...


class DeviceEngine(Engine, Protocol):
    """An engine of a GPU, which can leave its results there."""

    def run_on_device(self, feeds: Mapping[str, Any], *, outputs: Sequence[str]) -> dict[str, DeviceArray]:
        """Like a call, for numpy arrays or device arrays (DLPack, __cuda_array_interface__); nothing is copied back."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Whether a backend works on this machine. `reason` says what was found, `install` what would help."""

    name: str
    works: bool
    version: str | None
    reason: str
    install: str | None


class Backend(Protocol):
    """What a module of this package offers."""

    def status(self) -> Status:
        """Whether it works here."""
        ...

    def open_engine(
        self, path: Path, *, device: str, threads: int | None, outputs: Sequence[str] | None, options: Any
    ) -> Engine:
        """Open an ONNX file, or a plan; raises BackendError or MissingDependencyError."""
        ...


class Compiler(Backend, Protocol):
    """A backend that compiles graphs into plans."""

    def version(self) -> str:
        """That of the library here. Raises MissingDependencyError."""
        ...

    def target(self, compute_capability: str | None) -> Target:
        """What a build for this GPU is for; None is the GPU of this machine.

        Raises MissingDependencyError, DeviceError or BackendError, saying why, where it cannot be built here.
        """
        ...

    def build_plan(self, request: BuildRequest, *, progress: Progress) -> BuildReport:
        """Compile one graph; raises PlanBuildError, and leaves no file behind then."""
        ...


def names() -> list[str]:
    """The backends that this version knows, best first where several work."""
    private = {"building", "device_array", "profiles"}
    found = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")} - private
    public = {name.replace("_", "-") for name in found}
    return [*(name for name in COMPILERS if name in public), *sorted(public - set(COMPILERS))]


def status(name: str) -> Status:
    """Whether backend `name` works here. Raises BackendError for an unknown name."""
    return _module(name).status()


def choose(name: str | None = None) -> str:
    """`name` if it works here, or the first that does. Raises BackendError with the reasons of those that do not."""
    candidates = [status(candidate) for candidate in ([name] if name is not None else names())]
    for candidate in candidates:
        if candidate.works:
            return candidate.name
    reasons = "; ".join(f"{candidate.name}: {candidate.reason}" for candidate in candidates)
    installs = [candidate.install for candidate in candidates if candidate.install]
    raise BackendError(f"no backend works here ({reasons})", hint=" or ".join(installs) or "see clip-export doctor")


def open_engine(
    name: str,
    path: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    outputs: Sequence[str] | None = None,
    options: Any = None,
) -> Engine:
    """Open the graph or plan at `path` with backend `name` on `device` (`cpu`, `cuda:0`).

    `outputs` are those that a call returns, all by default; `options` are the backend's own. Raises BackendError.
    """
    module = _module(name)
    return module.open_engine(path, device=device, threads=threads, outputs=outputs, options=options)


def compiler(name: str) -> Compiler:
    """The backend `name`, which compiles plans. Raises BackendError, listing those that do."""
    if name not in COMPILERS:
        raise BackendError(f"{name!r} compiles no plans", hint=f"choose one of: {', '.join(COMPILERS)}")
    return cast(Compiler, _module(name))


def gpu(device: str) -> Gpu:
    """The GPU that `device`, as in cuda:0, names. Raises DeviceError or MissingDependencyError where there is none."""
    from clip_export.backends import _cuda

    return _cuda.device_status(_cuda.device_index(device))


def has_driver() -> bool:
    """Whether an NVIDIA driver is installed: somebody who has one may wonder why it is not used."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _module(name: str) -> Backend:
    if name not in names():
        raise BackendError(f"there is no backend {name!r}", hint=f"choose one of: {', '.join(names())}")
    return cast(Backend, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))


__all__ = [
    "COMPILERS",
    "Backend",
    "Compiler",
    "DeviceEngine",
    "Engine",
    "Status",
    "choose",
    "compiler",
    "gpu",
    "has_driver",
    "names",
    "open_engine",
    "status",
]
