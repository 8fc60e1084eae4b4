"""Where the outputs of a call go: to arrays on the host, or to one buffer per output on the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_export.backends._cuda_memory import DeviceMemory, Event, Stream
from clip_export.backends._trt_context import Results, Side, Slot, Work
from clip_export.backends._trt_plan import Plan, Tensor
from clip_export.backends.building import Shape
from clip_export.backends.device_array import DeviceArray


class HostResults(Results):
    """Copied back part by part; `arrays` by output name are complete when the run is over."""

    def __init__(self, tensors: Sequence[Tensor], rows: int) -> None:
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        self._tensors = tensors
        self._rows = rows

    def take(self, slot: Slot, side: Side, work: Work, shapes: Mapping[str, Shape]) -> None:
        slot.download.wait(side.computed)
        for tensor in self._tensors:
            tail = shapes[tensor.name][1:]
            if tensor.name not in self.arrays:
                self.arrays[tensor.name] = np.empty((self._rows, *tail), dtype=tensor.dtype)
            nbytes = work.part.rows * _row_bytes(tensor, tail)
            slot.download.to_host(side.pinned(tensor.name).pointer, side.memory[tensor.name].pointer, nbytes)
        side.downloaded.record(slot.download)

    def collect(self, side: Side, work: Work) -> None:
        side.downloaded.synchronize()
        for name, array in self.arrays.items():
            rows = array[work.start : work.start + work.part.rows]
            rows[...] = side.pinned(name).view(rows.shape, array.dtype)


class DeviceResults(Results):
    """Copied, on the GPU, into one buffer for the whole batch, so that the slot's own can be used again at once."""

    def __init__(self, plan: Plan, tensors: Sequence[Tensor], rows: int) -> None:
        self._plan, self._tensors, self._rows = plan, tensors, rows
        self._memory: dict[str, DeviceMemory] = {}
        self._shapes: dict[str, Shape] = {}
        self._ready: Event | None = None
        self._stream: Stream | None = None

    def begin(self, slot: Slot) -> None:
        if self._ready is not None:  # then the last event stands for all slots
            slot.compute.wait(self._ready)

    def take(self, slot: Slot, side: Side, work: Work, shapes: Mapping[str, Shape]) -> None:
        for tensor in self._tensors:
            tail = shapes[tensor.name][1:]
            row = _row_bytes(tensor, tail)
            if tensor.name not in self._memory:
                self._memory[tensor.name] = DeviceMemory(self._plan.device, self._rows * row)
                self._shapes[tensor.name] = (self._rows, *tail)
            target = self._memory[tensor.name].pointer + work.start * row
            slot.compute.on_device(target, side.memory[tensor.name].pointer, work.part.rows * row)

    def end(self, slot: Slot) -> None:
        self._ready, self._stream = Event(self._plan.device), slot.compute
        self._ready.record(slot.compute)

    def arrays(self) -> dict[str, DeviceArray]:
        """One array per output, in the order asked for."""
        return {tensor.name: self._array(tensor) for tensor in self._tensors}

    def _array(self, tensor: Tensor) -> DeviceArray:
        memory = self._memory[tensor.name]
        return DeviceArray(
            memory.pointer,
            self._shapes[tensor.name],
            tensor.dtype,
            owner=memory,
            device=self._plan.device.index,
            ready=self._ready,
            stream=self._stream,
        )


def _row_bytes(tensor: Tensor, tail: Shape) -> int:
    return int(np.prod(tail, dtype=np.int64)) * tensor.dtype.itemsize


__all__ = ["DeviceResults", "HostResults"]
