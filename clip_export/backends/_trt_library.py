"""TensorRT and TensorRT-RTX: importing either, and what the one that is installed can do.

The two share one API under two module names. What a release offers is found by asking for the attribute, never by its
version: releases from 10.12 to 11 and RTX from 1.2 differ in which attributes there are.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clip_export.backends import Status
from clip_export.backends._trt_layers import LIST_BEGINS
from clip_export.backends.building import PORTABLE, PlanBackend, Target
from clip_export.errors import ClipExportError, DeviceError, MissingDependencyError, PlanBuildError

if TYPE_CHECKING:
    from clip_export.backends._cuda import Gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """One of the two: its `module`, the `backend` it is here, the first release with all we need, how to get it."""

    module: str
    backend: PlanBackend
    title: str
    least: str
    install: str
    libraries: str


TENSORRT = Flavour(
    module="tensorrt",
    backend="tensorrt",
    title="TensorRT",
    least="10.12",
    install="pip install 'clip-export[tensorrt]'",
    libraries="install tensorrt-cu13-libs (or -cu12-libs, as your CUDA is) from NVIDIA's own package index, in the "
    "version of the bindings; backend tensorrt-rtx installs whole from PyPI",
)
TENSORRT_RTX = Flavour(
    module="tensorrt_rtx",
    backend="tensorrt-rtx",
    title="TensorRT-RTX",
    least="1.2",
    install="pip install 'clip-export[tensorrt-rtx]'",
    libraries="pip install --force-reinstall tensorrt-rtx-cu13-libs, in the version of the bindings",
)
FLAVOURS = {flavour.module: flavour for flavour in (TENSORRT, TENSORRT_RTX)}

# Without any of these nothing can be built or run; what only some releases have is asked for where it is used.
REQUIRED = (
    "EngineInspector.get_engine_information",
    "IBuilderConfig.builder_optimization_level",
    "ICudaEngine.device_memory_size_v2",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.infer_shapes",
    "IExecutionContext.set_input_shape",
    "IExecutionContext.set_tensor_address",
    "ILayer.metadata",
    "IProgressMonitor.step_complete",
    "OnnxParser.parse_from_file",
    "ParserError.node_operator",
)
LOG_LIMIT = 200  # messages kept: a failing compiler repeats itself for every kernel that it tried
_KEPT = ("WARNING", "ERROR", "INTERNAL_ERROR")
_NOT_TARGETS = ("NONE", "CURRENT")


class Library:
    """An imported TensorRT: `flavour`, the module itself as `trt`, and its `version`."""

    def __init__(self, flavour: Flavour, trt: Any) -> None:
        self.flavour = flavour
        self.trt = trt
        self.version = str(trt.__version__)
        self.title = f"{flavour.title} {self.version}"

    @property
    def builds_anywhere(self) -> bool:
        """Whether it builds for named GPUs instead of for the one that is here: then it tunes where the plan is loaded.

        Such a compiler has nothing to put into a timing cache and no levels of hardware compatibility.
        """
        return hasattr(self.trt, "ComputeCapability")

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """Those that can be named for a build: ("sm_75", ...), rising. Empty where it builds for this GPU only."""
        if not self.builds_anywhere:
            return ()
        named = set(self.trt.ComputeCapability.__members__) - set(_NOT_TARGETS)
        return tuple(f"sm_{number}" for number in sorted(int(name.removeprefix("SM")) for name in named))

    def logger(self) -> Any:
        """A new ILogger that prints nothing: what is worth a word is in its `messages`, as (severity, text).

        `layers` is the last list of an engine's layers among what it was told, "" before there is one.
        """
        trt = self.trt

        class Messages(trt.ILogger):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.messages: list[tuple[str, str]] = []
                self.layers = ""

            def log(self, severity: Any, text: str) -> None:
                if severity.name in _KEPT and len(self.messages) < LOG_LIMIT:
                    self.messages.append((severity.name, text))
                elif severity.name == "VERBOSE" and text.startswith(LIST_BEGINS):  # one of thousands: no other is kept
                    self.layers = text

        return Messages()

    def target(self, compute_capability: str | None) -> Target:
        """What a build for `compute_capability` is for; None is the GPU of this machine.

        Raises DeviceError where a GPU is needed and there is none, PlanBuildError where it cannot build for that one.
        """
        gpu, reason = _gpu_or_reason()
        if gpu is None and (compute_capability is None or not self.builds_anywhere):
            raise DeviceError(self._no_gpu(reason), hint=self._no_gpu_hint()) from reason
        wanted = compute_capability or (gpu.compute_capability if gpu is not None else "")
        self._check_known(wanted, gpu)
        name = gpu.name if gpu is not None and self._runs(wanted, gpu.compute_capability) else None
        return Target(backend=self.flavour.backend, version=self.version, compute_capability=wanted, gpu=name)

    def supports(self, gpu_compute_capability: str) -> bool:
        """Whether such a GPU can run plans of this library: with named targets, one of them or a later one."""
        known = self.compute_capabilities
        return not known or gpu_compute_capability in known or _number(gpu_compute_capability) > _number(known[-1])

    def _runs(self, wanted: str, here: str) -> bool:
        if wanted != PORTABLE:
            return wanted == here
        return self.supports(here) and _number(here) >= 80  # a portable plan leaves Turing out

    def _check_known(self, wanted: str, gpu: Gpu | None) -> None:
        if not self.builds_anywhere:
            if gpu is not None and wanted != gpu.compute_capability:
                message = f"{self.title} builds only for the GPU of this machine, {gpu.name} ({gpu.compute_capability})"
                hint = "build on a machine with that GPU, or use backend tensorrt-rtx, which builds for others"
                raise PlanBuildError(f"{message}; asked for {wanted}", hint=hint)
            return
        known = self.compute_capabilities
        if wanted != PORTABLE and wanted not in known:
            hint = (
                f"choose one of them, or {PORTABLE}: one plan for sm_80 and later; for other GPUs use backend tensorrt"
            )
            raise PlanBuildError(f"{self.title} builds for {', '.join(known)}; found {wanted}", hint=hint)

    def _no_gpu(self, reason: ClipExportError | None) -> str:
        found = "" if reason is None else f": {reason.message}"
        if self.builds_anywhere:
            return f"no GPU is here whose plan {self.title} could build{found}"
        return f"{self.title} builds on the GPU that the plan is for, and finds none{found}"

    def _no_gpu_hint(self) -> str:
        if self.builds_anywhere:
            return f"say which GPU: {', '.join(self.compute_capabilities)}, or {PORTABLE} for sm_80 and later"
        return "build on the machine with that GPU, or use backend tensorrt-rtx, which builds anywhere"


def load(flavour: Flavour) -> Library:
    """Import it. Raises MissingDependencyError: not installed, installed without its libraries, or too old."""
    try:
        trt = importlib.import_module(flavour.module)
    except ModuleNotFoundError as error:
        if error.name == flavour.module:
            raise MissingDependencyError(f"{flavour.title} is not installed", hint=flavour.install) from error
        raise _incomplete(flavour, error) from error
    except (ImportError, OSError) as error:
        raise _incomplete(flavour, error) from error
    missing = _missing(trt)
    if missing:
        version = getattr(trt, "__version__", "of no version")
        message = f"{flavour.title} {version} is too old: it lacks {', '.join(missing)}"
        raise MissingDependencyError(message, hint=f"install {flavour.title} {flavour.least} or later")
    return Library(flavour, trt)


def status(flavour: Flavour) -> Status:
    """Whether plans run here: it can be imported, and a GPU that it supports has a driver."""
    try:
        library = load(flavour)
    except MissingDependencyError as error:
        return Status(name=flavour.backend, works=False, version=None, reason=error.message, install=error.hint)
    builds = "builds plans here, and runs none" if library.builds_anywhere else "neither builds nor runs plans here"
    gpu, missing = _gpu_or_reason()
    if gpu is None:
        reason, hint = (missing.message, missing.hint) if missing is not None else ("no GPU was found", None)
        return _status(library, works=False, reason=f"{builds}: {reason}", install=hint)
    if not library.supports(gpu.compute_capability):
        known = ", ".join(library.compute_capabilities)
        reason = f"{builds}: {gpu.name} is {gpu.compute_capability}, not one of {known}"
        return _status(library, works=False, reason=reason, install="use backend tensorrt on this GPU")
    reason = f"{gpu.name} ({gpu.compute_capability}), driver {gpu.driver}, CUDA {gpu.cuda}"
    return _status(library, works=True, reason=reason, install=None)


def current_gpu() -> Gpu:
    """The GPU of this machine. Raises DeviceError or MissingDependencyError, saying what is missing."""
    from clip_export.backends import _cuda

    return _cuda.device_status()


def _gpu_or_reason() -> tuple[Gpu | None, ClipExportError | None]:
    try:
        return current_gpu(), None
    except (DeviceError, MissingDependencyError) as error:
        return None, error


def _status(library: Library, *, works: bool, reason: str, install: str | None) -> Status:
    version = library.version
    return Status(name=library.flavour.backend, works=works, version=version, reason=reason, install=install)


def _incomplete(flavour: Flavour, error: Exception) -> MissingDependencyError:
    message = f"{flavour.title} is installed, but cannot load its libraries: {error}"
    return MissingDependencyError(message, hint=flavour.libraries)


def _missing(trt: Any) -> list[str]:
    missing = [path for path in REQUIRED if not _has(trt, path)]
    # Where networks may be weakly typed, they must also be allowed to be strongly typed; from 11 on there is no choice.
    strong = _has(trt, "NetworkDefinitionCreationFlag.STRONGLY_TYPED") or not _has(trt, "BuilderFlag.FP16")
    return missing if strong else [*missing, "NetworkDefinitionCreationFlag.STRONGLY_TYPED"]


def _has(trt: Any, path: str) -> bool:
    found = trt
    for part in path.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def _number(compute_capability: str) -> int:
    digits = compute_capability.removeprefix("sm_").rstrip("af")  # sm_90a, sm_120f: variants of one chip
    return int(digits) if digits.isdigit() else 0


__all__ = [
    "FLAVOURS",
    "TENSORRT",
    "TENSORRT_RTX",
    "Flavour",
    "Library",
    "current_gpu",
    "load",
    "status",
]
