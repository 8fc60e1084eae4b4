"""Memory, streams, events and graphs of one GPU: each object owns one thing of the driver and gives it back.

Addresses are ints. Whatever is enqueued or waited for needs the GPU to be current in the calling thread
(`Device.current`); making something sees to that itself. What a finalizer frees, it frees with the right GPU current,
whichever thread runs it, and in a way that a capture going on in that thread survives. Failures of freeing are not
raised: after a lost context everything in it is gone anyway.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_export.backends._cuda import Device, bindings, call
from clip_export.errors import DeviceError


class _Owned:
    """Something that is freed once: by `close`, or when nobody refers to it."""

    def __init__(self, device: Device, free: str, handle: Any) -> None:
        self.device = device
        self._finalizer = weakref.finalize(self, _free, device, free, handle)
        self._finalizer.atexit = False  # the process takes its memory with it; the driver may be gone first

    def close(self) -> None:
        """Free it. The caller sees to it that the GPU no longer works with it."""
        self._finalizer()


def _free(device: Device, name: str, handle: Any) -> None:
    with suppress(DeviceError), device.current(), _beside_captures():
        call(name, handle)


@contextmanager
def _beside_captures() -> Iterator[None]:
    """Let this thread allocate and free though a stream is being captured: here, or by torch in another thread."""
    relaxed = bindings().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = call("cuThreadExchangeStreamCaptureMode", relaxed)
    try:
        yield
    finally:
        call("cuThreadExchangeStreamCaptureMode", before)


class DeviceMemory(_Owned):
    """`nbytes` of GPU memory at `pointer`, aligned to 256 bytes. Raises GpuMemoryError.

    Plain cuMemAlloc: freeing it waits for the GPU, so that whoever still reads a result on another stream is safe.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        with device.current(), _beside_captures():
            handle = call("cuMemAlloc", max(nbytes, 1))
        super().__init__(device, "cuMemFree", handle)
        self.pointer = int(handle)
        self.nbytes = nbytes


class PinnedMemory(_Owned):
    """`nbytes` of host memory that the GPU copies from and to without the processor; `array` is uint8 [nbytes]."""

    def __init__(self, device: Device, nbytes: int) -> None:
        with device.current(), _beside_captures():
            handle = call("cuMemHostAlloc", max(nbytes, 1), 0)
        super().__init__(device, "cuMemFreeHost", handle)
        self.pointer = int(handle)
        self.nbytes = nbytes
        raw = (ctypes.c_uint8 * max(nbytes, 1)).from_address(self.pointer)
        self._bytes: npt.NDArray[np.uint8] = np.ctypeslib.as_array(raw)

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """The first bytes as an array. It must not be used after `close`."""
        count = int(np.prod(shape, dtype=np.int64))
        return self._bytes[: count * dtype.itemsize].view(dtype).reshape(shape)


class Event(_Owned):
    """A point in a stream, to be waited for. One that was never recorded has already passed."""

    def __init__(self, device: Device) -> None:
        flag = bindings().CUevent_flags.CU_EVENT_DISABLE_TIMING
        with device.current():
            self.handle = call("cuEventCreate", int(flag))
        super().__init__(device, "cuEventDestroy", self.handle)

    def record(self, stream: Stream) -> None:
        """Mark all that is in `stream` so far."""
        call("cuEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        """Block the calling thread until what was marked is done."""
        call("cuEventSynchronize", self.handle)


class Stream(_Owned):
    """A queue of work that does not wait for the legacy default stream."""

    def __init__(self, device: Device) -> None:
        flag = bindings().CUstream_flags.CU_STREAM_NON_BLOCKING
        with device.current():
            self.handle = call("cuStreamCreate", int(flag))
        super().__init__(device, "cuStreamDestroy", self.handle)
        self.pointer = int(self.handle)

    def wait(self, event: Event) -> None:
        """Whatever comes after this in the stream starts only when `event` has passed."""
        wait(self.handle, event)

    def synchronize(self) -> None:
        """Block the calling thread until all work of the stream is done."""
        call("cuStreamSynchronize", self.handle)

    def to_device(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue a copy from pinned host memory; it must stay as it is until the copy is done."""
        call("cuMemcpyHtoDAsync", target, source, nbytes, self.handle)

    def to_host(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue a copy to pinned host memory."""
        call("cuMemcpyDtoHAsync", target, source, nbytes, self.handle)

    def on_device(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue a copy within the GPU."""
        call("cuMemcpyDtoDAsync", target, source, nbytes, self.handle)

    def zero(self, target: int, nbytes: int) -> None:
        """Enqueue the writing of zeros."""
        call("cuMemsetD8Async", target, 0, nbytes, self.handle)


def wait(stream: Any, event: Event) -> None:
    """Make a stream, ours or anyone's (a handle, or its address), wait for `event`."""
    call("cuStreamWaitEvent", stream, event.handle, 0)


def to_host(array: npt.NDArray[Any], source: int) -> None:
    """Copy GPU memory into a C-contiguous array, and return when that is done."""
    with _beside_captures():
        call("cuMemcpyDtoH", array.ctypes.data, source, array.nbytes)


class Graph(_Owned):
    """Work that was captured from a stream and can be launched as a whole, with the addresses it had then."""

    def __init__(self, device: Device, handle: Any) -> None:
        super().__init__(device, "cuGraphExecDestroy", handle)
        self._handle = handle

    def launch(self, stream: Stream) -> None:
        """Enqueue it. Raises GpuMemoryError or DeviceError."""
        call("cuGraphLaunch", self._handle, stream.handle)


def capture(stream: Stream, work: Callable[[], None]) -> Graph:
    """The graph of what `work` enqueues in `stream`; none of it runs now.

    Raises DeviceError where something in it cannot be captured, and what `work` raises; the stream can be used on.
    """
    mode = bindings().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    call("cuStreamBeginCapture", stream.handle, mode)
    try:
        work()
    except BaseException:
        with suppress(DeviceError):
            _drop(call("cuStreamEndCapture", stream.handle))
        raise
    graph = call("cuStreamEndCapture", stream.handle)
    try:
        return Graph(stream.device, call("cuGraphInstantiate", graph, 0))
    finally:
        _drop(graph)


def _drop(graph: Any) -> None:
    if graph is not None and int(graph):
        call("cuGraphDestroy", graph)


__all__ = ["DeviceMemory", "Event", "Graph", "PinnedMemory", "Stream", "capture", "to_host", "wait"]
