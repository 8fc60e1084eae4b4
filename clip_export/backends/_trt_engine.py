"""Runs a plan of TensorRT or TensorRT-RTX: numpy or device arrays in, numpy or device arrays out.

Batches are cut and padded to the plan's profiles. Where the memory of the GPU does not suffice, smaller parts are
tried, and that is said once.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from clip_export.backends import _cuda, device_array, profiles
from clip_export.backends._cuda import GpuMemoryError
from clip_export.backends._cuda_memory import Event, Stream
from clip_export.backends._trt_context import Feed, Results, Work
from clip_export.backends._trt_plan import MIB, EngineOptions, Plan, Tensor
from clip_export.backends._trt_pool import SlotPool
from clip_export.backends._trt_results import DeviceResults, HostResults
from clip_export.backends.building import Shape
from clip_export.backends.device_array import DeviceArray, DeviceView
from clip_export.backends.profiles import Part
from clip_export.errors import BackendError, DeviceError, InputError

ResultsT = TypeVar("ResultsT", bound=Results)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """What an engine takes of the GPU's memory, in bytes.

    `weights` once; per thread that runs at the same time, `activations` and `buffers`, those of the inputs, both for
    the profile that takes most.
    """

    weights: int
    activations: int
    buffers: int


def open_engine(
    library: Any,
    path: Path,
    *,
    device: str = "cuda:0",
    outputs: Sequence[str] | None = None,
    options: EngineOptions | None = None,
) -> TensorRtEngine:
    """Open the plan at `path` with the TensorRT `library`.

    `outputs` are those that a call returns, all by default. Raises BackendError for a plan that cannot run here, saying
    why; DeviceError without a GPU or without the memory; MissingDependencyError without cuda-python.
    """
    gpu = _cuda.open_device(_cuda.device_index(device))
    plan = Plan(library, path, gpu, options or EngineOptions())
    try:
        return TensorRtEngine(plan, outputs)
    except BaseException:
        plan.close()
        raise


class TensorRtEngine:
    """An open plan. Calling it is safe from several threads, which share its weights. Made by `open_engine`."""

    def __init__(self, plan: Plan, outputs: Sequence[str] | None = None) -> None:
        self._plan = plan
        self._tensors = {tensor.name: tensor for tensor in plan.outputs}
        self.outputs: tuple[str, ...] = tuple(self._tensors) if outputs is None else self._known(outputs)
        self._pool = SlotPool(plan, plan.options.max_contexts)
        self._inlet = Stream(plan.device)  # where device arrays arrive, before it is known which slot takes them
        self._lock = threading.Lock()
        self._cap: int | None = None  # the most rows of a run, once memory has not sufficed for more
        self._said = False
        self._closed = False

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        """Arrays on the host by output name, for numpy or device arrays by input name.

        Raises InputError for inputs that the plan does not take, BackendError where it fails.
        """
        tensors = [self._tensors[name] for name in self.outputs]

        results = self._run(feeds, lambda rows: HostResults(tensors, rows))
        return {name: results.arrays[name] for name in self.outputs}

    def run_on_device(self, feeds: Mapping[str, Any], *, outputs: Sequence[str]) -> dict[str, DeviceArray]:
        """Like a call, with the results left on the GPU: one array per output, which owns its memory.

        It returns while the GPU still works; whoever reads the arrays through DLPack, `__cuda_array_interface__` or
        numpy() waits for that. Inputs may be changed when it returns.
        """
        tensors = [self._tensors[name] for name in self._known(outputs)]

        return self._run(feeds, lambda rows: DeviceResults(self._plan, tensors, rows)).arrays()

    @property
    def memory_bytes(self) -> MemoryUse:
        """What it takes of the GPU's memory."""
        plan = self._opened()
        numbers = range(len(plan.profiles))
        activations = max(plan.activation_bytes(number) for number in numbers)
        # The outputs are not known before a context is made; next to pixels, embeddings are nothing.
        inputs = max(_input_bytes(plan, number) for number in numbers)
        return MemoryUse(weights=plan.weight_bytes, activations=activations, buffers=2 * inputs)

    def close(self) -> None:
        """Wait for running calls, keep what was compiled for this GPU, and free everything. Twice does no harm."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._pool.close()
        try:
            self._plan.save_cache()
        finally:
            self._plan.close()

    def __enter__(self) -> TensorRtEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, feeds: Mapping[str, Any], make: Callable[[int], ResultsT]) -> ResultsT:
        """Run a batch into what `make` gives for its number of rows, with smaller parts until they fit."""
        plan = self._opened()
        rows = _rows(plan, feeds)
        read, arrival = self._read(feeds)
        rest = {name: feed.shape[1:] for name, feed in read.items()}
        too_large = None
        while True:
            parts = profiles.split(rows, plan.profiles, rest, cap=self._cap)
            results = make(rows)
            try:
                self._run_parts(parts, read, arrival, results)
            except GpuMemoryError as error:
                if self._make_room(parts, rest, error):
                    too_large = too_large or max(part.size for part in parts)
            else:
                self._say(too_large)
                return results

    def _run_parts(
        self, parts: Sequence[Part], feeds: Mapping[str, Feed], arrival: Event | None, results: Results
    ) -> None:
        starts = itertools.accumulate((part.rows for part in parts), initial=0)
        work = [Work(start, part) for start, part in zip(starts, parts, strict=False)]
        for profile, pieces in itertools.groupby(work, key=lambda piece: piece.part.profile):
            with self._pool.lend(profile, self._room(profile)) as slot:
                slot.run(list(pieces), feeds, arrival, results)

    def _room(self, profile: int) -> int:
        most = self._plan.most_rows(profile)
        return most if self._cap is None else min(most, self._cap)

    def _make_room(self, parts: Sequence[Part], rest: Mapping[str, Shape], error: GpuMemoryError) -> bool:
        """Make room for another try; whether that was by smaller parts. Raises DeviceError where there are none."""
        plan = self._plan
        # Memory that is held by idle slots, or by other threads until they are done, is no reason for smaller parts.
        if self._pool.drop_idle() or self._pool.wait_for_others():
            return False
        tried = max(part.size for part in parts)
        least = profiles.smallest(plan.profiles, rest) or 1
        with self._lock:
            if self._cap is not None and self._cap < tried:
                return True  # another thread has just found out the same
            if tried // 2 < least:
                free = plan.device.free_bytes() // MIB
                message = f"not enough GPU memory for a batch of {tried} with {plan.name}: {free} MiB are free"
                hint = "free GPU memory (nvidia-smi shows who holds it), or build with a smaller profile"
                raise DeviceError(f"{message} ({error.message})", hint=hint) from error
            self._cap = tried // 2
        return True

    def _say(self, too_large: int | None) -> None:
        if too_large is None or self._said:
            return
        self._said = True
        message = f"{self._plan.name} ran in batches of {self._cap}: not enough GPU memory for {too_large}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _read(self, feeds: Mapping[str, Any]) -> tuple[dict[str, Feed], Event | None]:
        """The inputs in the order of the plan, checked, and the event after which those on the device are complete."""
        plan = self._plan
        read = {tensor.name: self._read_one(feeds[tensor.name], tensor) for tensor in plan.inputs}
        if not any(isinstance(feed, DeviceView) for feed in read.values()):
            return read, None
        arrival = Event(plan.device)
        with plan.device.current():
            arrival.record(self._inlet)
        return read, arrival

    def _read_one(self, value: Any, tensor: Tensor) -> Feed:
        on_device = device_array.is_device_array(value)
        device, stream = self._plan.device, self._inlet
        feed = (
            device_array.read(value, tensor.name, device=device, stream=stream) if on_device else _host(value, tensor)
        )
        if feed.dtype != tensor.dtype:
            raise InputError(f"{tensor.name}: expected {tensor.dtype}, found {feed.dtype}", hint="convert it first")
        return feed

    def _known(self, outputs: Sequence[str]) -> tuple[str, ...]:
        unknown = [name for name in outputs if name not in self._tensors]
        if unknown or not outputs:
            found = ", ".join(unknown) or "none"
            raise BackendError(f"expected outputs among {', '.join(self._tensors)}, found {found}")
        return tuple(outputs)

    def _opened(self) -> Plan:
        if self._closed:
            raise BackendError("this engine is closed", hint="load the bundle again")
        return self._plan


def _rows(plan: Plan, feeds: Mapping[str, Any]) -> int:
    """How many rows the inputs have. Raises InputError where inputs are missing, too many or of unequal batches."""
    names = [tensor.name for tensor in plan.inputs]
    if set(feeds) != set(names):
        raise InputError(f"expected inputs {', '.join(names)}, found {', '.join(feeds) or 'none'}")
    shapes = {name: tuple(getattr(feeds[name], "shape", ())) or None for name in names}
    batches = {shape[0] if shape else None for shape in shapes.values()}
    batch = batches.pop()
    if batches or batch is None or batch < 1:
        found = ", ".join(f"{name} {list(shape or ())}" for name, shape in shapes.items())
        raise InputError(f"expected the same number of rows, at least one, in every input, found {found}")
    return int(batch)


def _host(value: Any, tensor: Tensor) -> npt.NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value
    found, why = type(value).__name__, ""
    if hasattr(value, "__dlpack__"):  # a torch tensor on the CPU, for one
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError) as error:
            why = f": {error}"
    raise InputError(f"{tensor.name}: expected a numpy array or an array on the GPU, found {found}{why}")


def _input_bytes(plan: Plan, profile: int) -> int:
    spans = plan.profiles[profile]
    return sum(int(np.prod(spans[t.name].max, dtype=np.int64)) * t.dtype.itemsize for t in plan.inputs)


__all__ = ["EngineOptions", "MemoryUse", "TensorRtEngine", "open_engine"]
