"""ONNX Runtime: the backend that runs everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_export.backends import Status
from clip_export.errors import BackendError, MissingDependencyError

if TYPE_CHECKING:
    import onnxruntime

INSTALL = "pip install 'clip-export[cpu]' (or [cuda] for an NVIDIA GPU)"
# Both distributions bring the module onnxruntime: one installed over the other leaves neither whole.
INSTALL_CUDA = "pip uninstall onnxruntime, then pip install 'clip-export[cuda]'; or use device cpu"


def status() -> Status:
    """Whether onnxruntime can be imported, and its version."""
    try:
        import onnxruntime
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Ctrl-C while the library was loading is no missing library
            raise KeyboardInterrupt from error
        found = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
        reason = f"{found[0]} is installed but cannot be imported: {error}" if found else "onnxruntime is not installed"
        return Status(name="onnxruntime", works=False, version=None, reason=reason, install=INSTALL)
    providers = ", ".join(onnxruntime.get_available_providers())
    return Status(name="onnxruntime", works=True, version=onnxruntime.__version__, reason=providers, install=None)


def open_engine(path: Path, *, device: str = "cpu", threads: int | None = None) -> OnnxRuntimeEngine:
    """Open an ONNX file. Raises MissingDependencyError without onnxruntime, BackendError where it cannot be opened."""
    return OnnxRuntimeEngine(path, device=device, threads=threads)


class OnnxRuntimeEngine:
    """One session. ONNX Runtime's `run` may be called from several threads at once."""

    def __init__(self, path: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        ort = _import()
        ort.disable_telemetry_events()
        options = ort.SessionOptions()
        options.log_severity_level = 3  # its warnings speak of its own kernels; errors are raised
        if threads is not None:
            options.intra_op_num_threads = threads
        providers = _providers(device)
        wanted, offered = providers[0][0], ort.get_available_providers()
        if wanted not in offered:
            message = f"{device} needs ONNX Runtime's {wanted}; the one installed offers {', '.join(offered)}"
            raise BackendError(message, hint=INSTALL_CUDA)
        try:
            session = ort.InferenceSession(str(path), options, providers=providers)
        except _failures() as error:
            raise BackendError(f"ONNX Runtime cannot open {path.name}: {error}", hint="rebuild the bundle") from error
        # Asked for CUDA, a session that cannot have it runs on the CPU and only logs that.
        if session.get_providers()[0] != wanted:
            message = f"ONNX Runtime cannot use {wanted} on this machine: there is no GPU, no driver or no CUDA 13"
            raise BackendError(message, hint="check nvidia-smi, or use device cpu")
        self._session: onnxruntime.InferenceSession | None = session
        self.outputs = tuple(output.name for output in session.get_outputs())

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._session is None:
            raise BackendError("this engine is closed", hint="load the bundle again")
        try:
            return dict(zip(self.outputs, self._session.run(self.outputs, dict(feeds)), strict=True))
        except _failures() as error:
            shapes = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in feeds.items())
            raise BackendError(f"ONNX Runtime failed on {shapes}: {error}") from error

    def close(self) -> None:
        self._session = None


def _providers(device: str) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(device, str):
        raise BackendError(f"expected device cpu or cuda:N, found {device!r}")
    if device == "cpu":
        return [("CPUExecutionProvider", {})]
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index.isdigit() or not index):
        raise BackendError(
            f"expected device cpu or cuda:N, found {device!r}", hint="choose cpu, or the number of a GPU"
        )
    # TF32 keeps 10 bits of a float32's 23: not fp32.
    return [("CUDAExecutionProvider", {"device_id": int(index or 0), "use_tf32": 0})]


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("ONNX Runtime is not installed", hint=INSTALL) from error
    return onnxruntime


def _failures() -> tuple[type[Exception], ...]:
    """The exceptions that ONNX Runtime raises: each derives from Exception alone, so they have to be listed."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "NoSuchFile", "NoModel", "EngineError", "RuntimeException", "InvalidProtobuf")
    more = ("ModelLoaded", "NotImplemented", "InvalidGraph", "EPFail")
    found = tuple(getattr(state, name) for name in (*names, *more) if hasattr(state, name))
    return (*found, RuntimeError, ValueError)


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
