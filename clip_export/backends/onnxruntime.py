"""ONNX Runtime: the backend that runs everywhere, on the CPU or with its CUDA provider on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_export.backends import Status
from clip_export.backends._ort_binding import dtype_of, run_bound
from clip_export.backends._ort_memory import described, out_of_memory, run_in_halves, says_out_of_memory
from clip_export.backends._ort_session import INSTALL, device_index, failures, open_session, tf32_option
from clip_export.backends.device_array import DeviceArray, is_device_array
from clip_export.errors import BackendError

if TYPE_CHECKING:
    import onnxruntime


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


def open_engine(
    path: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    outputs: Sequence[str] | None = None,
    options: Mapping[str, object] | None = None,
) -> OnnxRuntimeEngine:
    """Open an ONNX file on `cpu` or `cuda:N`.

    `outputs` are those that a call returns, all by default; the one option is `tf32`, which allows 10-bit mantissas in
    fp32 layers on a GPU. Raises MissingDependencyError without onnxruntime, BackendError where the file cannot be
    opened, or where nodes would run on the CPU though a GPU was asked for, DeviceError where there is none.
    """
    return OnnxRuntimeEngine(path, device=device, threads=threads, outputs=outputs, options=options)


class OnnxRuntimeEngine:
    """One session. ONNX Runtime's `run` may be called from several threads at once."""

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        outputs: Sequence[str] | None = None,
        options: Mapping[str, object] | None = None,
    ) -> None:
        session = open_session(path, device=device, threads=threads, tf32=tf32_option(options))
        given = tuple(output.name for output in session.get_outputs())
        self._session: onnxruntime.InferenceSession | None = session
        self._device = device
        self._index = device_index(device)
        self._given = given
        self.outputs = given if outputs is None else self._among_given(outputs)

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by output name. On a GPU that is too small for the batch, its halves run one after the other."""
        return self._run(feeds) if self._index is None else run_in_halves(self._run, feeds)

    def run_on_device(self, feeds: Mapping[str, Any], *, outputs: Sequence[str]) -> dict[str, DeviceArray]:
        """Like a call, for numpy arrays or arrays on the GPU; the results stay there, and nothing is copied back.

        `outputs` are among those of the graph. Raises BackendError on the CPU; DeviceError where the memory of the GPU
        does not suffice, since halves would have to be put together by a copy.
        """
        if self._index is None:
            raise BackendError("the results of device cpu are on the CPU", hint="load with device cuda:0, or call it")
        names, session = self._among_given(outputs), self._opened()
        try:
            values = run_bound(session, feeds, names, device="cuda", index=self._index)
        except failures() as error:
            raise self._failed(feeds, error) from error
        # The session owns the allocator of the memory, and has to outlive it.
        return {
            name: DeviceArray(
                value.data_ptr(), value.shape(), dtype_of(value), owner=(value, session), device=self._index
            )
            for name, value in values.items()
        }

    def close(self) -> None:
        """Free the session; what it left on the device lives on until it is let go."""
        self._session = None

    def _run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        session = self._opened()
        try:
            if any(is_device_array(array) for array in feeds.values()):
                values = run_bound(session, feeds, self.outputs, device="cpu", index=0)
                return {name: value.numpy() for name, value in values.items()}
            return dict(zip(self.outputs, session.run(self.outputs, dict(feeds)), strict=True))
        except failures() as error:
            raise self._failed(feeds, error) from error

    def _opened(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise BackendError("this engine is closed", hint="load the bundle again")
        return self._session

    def _failed(self, feeds: Mapping[str, Any], error: Exception) -> BackendError:
        if self._index is not None and says_out_of_memory(error):
            return out_of_memory(feeds, self._device, error)
        return BackendError(f"ONNX Runtime failed on {described(feeds)}: {error}")

    def _among_given(self, outputs: Sequence[str]) -> tuple[str, ...]:
        unknown = [name for name in outputs if name not in self._given]
        if unknown or not outputs:
            found = ", ".join(unknown) or "none"
            raise BackendError(f"expected outputs among {', '.join(self._given)}, found {found}")
        return tuple(outputs)


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
