"""Arrays on a GPU: what engines hand out, and reading those of torch, CuPy and others without a copy.

DLPack and `__cuda_array_interface__` say where an array is; what still computes it is waited for on the GPU, never on
the processor. TensorRT is no part of this: any backend that has a pointer can make a DeviceArray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from clip_export.backends import _cuda, _cuda_memory
from clip_export.errors import BackendError, InputError, MissingDependencyError

CUDA: Final = 2  # kDLCUDA, of DLPack
CPU: Final = 1
_LEGACY_STREAM: Final = 1  # what DLPack and the driver call the default stream
_NO_WAITING: Final = -1


class DeviceArray:
    """A C-contiguous array in the memory of one GPU.

    `pointer` is its address, `owner` whatever keeps that memory: it is referred to while this array or a DLPack view of
    it lives. `ready` marks, in `stream`, when the content is complete; without it, it is complete now.
    """

    def __init__(
        self,
        pointer: int,
        shape: Sequence[int],
        dtype: npt.DTypeLike,
        *,
        owner: object,
        device: int = 0,
        ready: _cuda_memory.Event | None = None,
        stream: _cuda_memory.Stream | None = None,
    ) -> None:
        self.shape: tuple[int, ...] = tuple(int(size) for size in shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.device = device
        self._pointer = int(pointer)
        self._owner: object | None = owner
        self._ready = ready
        self._stream = stream

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return self.size * self.dtype.itemsize

    @property
    def pointer(self) -> int:
        """Its address. Raises BackendError once it is closed."""
        if self._owner is None:
            raise BackendError("this device array is closed", hint="call numpy() or from_dlpack() before close()")
        return self._pointer

    def numpy(self) -> npt.NDArray[Any]:
        """A copy on the host, made when the content is complete."""
        source, array = self.pointer, np.empty(self.shape, dtype=self.dtype)
        self.synchronize()
        if array.nbytes:
            with _cuda.open_device(self.device).current():
                _cuda_memory.to_host(array, source)
        return array

    def synchronize(self) -> None:
        """Block until the content is complete."""
        if self._ready is not None:
            with self._ready.device.current():
                self._ready.synchronize()

    def wait_in(self, stream: Any) -> None:
        """What comes after this in `stream`, a handle or its address, starts when the content is complete."""
        if self._ready is not None:
            with self._ready.device.current():
                _cuda_memory.wait(stream, self._ready)

    def close(self) -> None:
        """Let go of the memory, which is freed when no DLPack view is left.

        Arrays made from `__cuda_array_interface__` are no such views: they must not be used after this.
        """
        self._owner = None

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3: the consumer waits for `stream`, which lives as long as this array."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer if self.size else 0, False),
            "strides": None,
            "version": 3,
            "stream": self._stream.pointer if self._stream is not None and self._ready is not None else None,
        }

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule, for from_dlpack; what the consumer enqueues in `stream` starts when the content is complete."""
        pointer = self.pointer
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"this array is on cuda:{self.device}; numpy() copies it to the host")
        if copy:
            raise BufferError("from_dlpack of a device array makes views, not copies: copy the view")
        if stream != _NO_WAITING:
            self.wait_in(stream or _LEGACY_STREAM)
        return self._view(pointer).__dlpack__(max_version=max_version)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.device

    def _view(self, pointer: int) -> Any:
        """The object of cuda.core that makes capsules; it and they refer to the owner."""
        try:
            from cuda.core import Buffer
            from cuda.core.utils import StridedMemoryView
        except ImportError as error:
            message = f"cuda.core cannot be imported, which hands arrays to others: {error}"
            raise MissingDependencyError(message, hint=_cuda.INSTALL) from error
        with _cuda.open_device(self.device).current():
            memory = Buffer.from_handle(pointer, max(self.nbytes, 1), owner=self._owner)
            return StridedMemoryView.from_buffer(memory, self.shape, dtype=self.dtype)

    def __enter__(self) -> DeviceArray:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._owner is None else ""
        return f"DeviceArray(shape={list(self.shape)}, dtype={self.dtype}, device=cuda:{self.device}{state})"


@dataclass(frozen=True, slots=True)
class DeviceView:
    """Where somebody's array is; `keep` is referred to while it is read."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    keep: object


def is_device_array(value: object) -> bool:
    """Whether `value` is an array in the memory of a GPU."""
    if isinstance(value, DeviceArray):
        return True
    if isinstance(value, np.ndarray):
        return False
    if hasattr(value, "__dlpack_device__"):
        return int(value.__dlpack_device__()[0]) != CPU
    return hasattr(value, "__cuda_array_interface__")


def read(value: Any, name: str, *, device: _cuda.Device, stream: _cuda_memory.Stream) -> DeviceView:
    """Where `value` is; what is enqueued in `stream` from now on reads its complete content.

    `name` is the input's, for messages. Raises InputError for what is no array on that GPU, or has gaps.
    """
    if isinstance(value, DeviceArray):
        _check_device(name, value.device, device)
        value.wait_in(stream.handle)
        return DeviceView(value.pointer, value.shape, value.dtype, value)
    if hasattr(value, "__dlpack_device__"):
        kind, number = value.__dlpack_device__()
        if int(kind) == CUDA:
            _check_device(name, int(number), device)
    view = _strided(value, name, device, stream)
    # DLPack says which GPU in the array's own numbering, __cuda_array_interface__ only by its address.
    _check_device(name, int(view.device_id), device)
    shape = tuple(int(size) for size in view.shape)
    if not contiguous(shape, view.strides):
        hint = "call .contiguous() on it (torch), or ascontiguousarray (CuPy)"
        raise InputError(f"{name}: expected an array without gaps, found strides {list(view.strides)}", hint=hint)
    return DeviceView(int(view.ptr), shape, np.dtype(view.dtype), view)


def contiguous(shape: Sequence[int], strides: Sequence[int] | None) -> bool:
    """Whether `strides`, in elements, are those of an array in C order; an axis of one may have any."""
    if strides is None or 0 in shape:
        return True
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


class _Exported:
    """An array seen through its DLPack methods alone.

    cuda.core reads a torch tensor past them, and in some releases without waiting for who computes it.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    def __dlpack__(self, **options: Any) -> Any:
        return self._value.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._value.__dlpack_device__()


def _strided(value: Any, name: str, device: _cuda.Device, stream: _cuda_memory.Stream) -> Any:
    try:
        from cuda.core.utils import StridedMemoryView
    except ImportError as error:
        message = f"cuda.core cannot be imported, which reads arrays on the GPU: {error}"
        raise MissingDependencyError(message, hint=_cuda.INSTALL) from error
    try:
        with device.current():
            if hasattr(value, "__dlpack__"):
                return StridedMemoryView.from_dlpack(_Exported(value), stream_ptr=stream.pointer)
            return StridedMemoryView.from_cuda_array_interface(value, stream_ptr=stream.pointer)
    except (BufferError, RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError) as error:
        message = f"{name}: this {type(value).__name__} cannot be read as an array on the GPU: {error}"
        raise InputError(message, hint="give a detached array of numbers on the GPU, or a numpy array") from error


def _check_device(name: str, found: int, expected: _cuda.Device) -> None:
    if found != expected.index:
        where = f"cuda:{found}" if found >= 0 else "the host"
        message = f"{name}: expected an array on cuda:{expected.index}, found one on {where}"
        raise InputError(message, hint=f"move it to cuda:{expected.index}, or load with its device")


__all__ = ["DeviceArray", "DeviceView", "contiguous", "is_device_array", "read"]
