"""One execution context with its streams and buffers: where a batch is copied in, run and copied out.

Three streams: while the GPU computes one part of a batch, the next is copied to it and the one before is copied back.
Two sides: each has its own buffers, so that neighbouring parts do not wait for each other. A side's buffers stay where
they are, which is what CUDA graphs ask for.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from clip_export.backends._cuda_memory import DeviceMemory, Event, Graph, PinnedMemory, Stream, capture
from clip_export.backends._trt_plan import Plan, Tensor
from clip_export.backends.building import Shape
from clip_export.backends.device_array import DeviceView
from clip_export.backends.profiles import Part
from clip_export.errors import BackendError, DeviceError

Key: TypeAlias = tuple[tuple[str, Shape], ...]  # the input shapes of a run
Feed: TypeAlias = npt.NDArray[Any] | DeviceView

RUNS_BEFORE_GRAPH: Final = 1  # the second run of a shape is captured: what comes twice comes again
MOST_GRAPHS: Final = 16  # of one slot; each has an execution context of its own


@dataclass(frozen=True, slots=True)
class Work:
    """The part of a batch that starts at row `start`."""

    start: int
    part: Part


class Side:
    """One set of buffers, as large as the slot allows, and how far the GPU is with them."""

    def __init__(self, plan: Plan, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> None:
        self._plan = plan
        self._pinned: dict[str, PinnedMemory] = {}
        self.memory = {name: DeviceMemory(plan.device, nbytes) for name, nbytes in {**inputs, **outputs}.items()}
        self.uploaded, self.computed, self.downloaded = (Event(plan.device) for _ in range(3))
        self.runs: Counter[Key] = Counter()
        self.graphs: dict[Key, Graph] = {}

    def pinned(self, name: str) -> PinnedMemory:
        """The staging memory of a tensor, made when it is first needed: device arrays need none."""
        if name not in self._pinned:
            self._pinned[name] = PinnedMemory(self._plan.device, self.memory[name].nbytes)
        return self._pinned[name]

    def close(self) -> None:
        """Free everything; the GPU must be done with it."""
        for graph in self.graphs.values():
            graph.close()
        self.graphs.clear()
        for owned in (*self._pinned.values(), *self.memory.values(), self.uploaded, self.computed, self.downloaded):
            owned.close()


class Slot:
    """What one thread at a time needs to run `profile` of a plan with up to `rows` rows. Raises GpuMemoryError."""

    def __init__(self, plan: Plan, profile: int, rows: int) -> None:
        self.plan, self.profile, self.rows = plan, profile, rows
        self._closed = False
        self._sides: list[Side] = []
        self._streams: list[Stream] = []
        self._activations: DeviceMemory | None = None
        self._contexts: list[Any] = []  # one, or one for each side
        self._captured: list[Any] = []  # the contexts that graphs were captured from, or were to be
        self._configured: dict[int, tuple[Side, Key]] = {}  # by number of the context
        self._shapes: dict[Key, dict[str, Shape]] = {}
        # With less than the profile's memory, its layout changes with the shapes, which captured graphs do not allow.
        self._shrunk = rows < plan.most_rows(profile)
        self._graphs_left = MOST_GRAPHS if plan.own_graphs and not self._shrunk else 0
        try:
            self._open()
        except BaseException as error:
            self.close(error)
            raise

    @property
    def compute(self) -> Stream:
        """The stream of the network itself."""
        return self._streams[0]

    @property
    def upload(self) -> Stream:
        """The stream of copies to the GPU."""
        return self._streams[1]

    @property
    def download(self) -> Stream:
        """The stream of copies back."""
        return self._streams[2]

    def run(self, work: Sequence[Work], feeds: Mapping[str, Feed], arrival: Event | None, results: Results) -> None:
        """Run parts of a batch, which all are of this slot's profile, into `results`. After an error, close the slot.

        `feeds` are in the order of the plan's inputs; those on the device are complete when `arrival` has passed.
        """
        with self.plan.device.current():
            if arrival is not None:
                self.upload.wait(arrival)
            results.begin(self)
            for turn, piece in enumerate(work):
                side = self._sides[turn % 2]
                if turn >= 2:
                    results.collect(side, work[turn - 2])
                self._fill(side, piece, feeds)
                shapes = {name: (piece.part.size, *feed.shape[1:]) for name, feed in feeds.items()}
                results.take(self, side, piece, self._launch(side, shapes))
            for turn in range(max(len(work) - 2, 0), len(work)):
                results.collect(self._sides[turn % 2], work[turn])
            results.end(self)
            if arrival is not None:
                self.upload.synchronize()  # from now on the caller may change or free what it gave

    def close(self, error: BaseException | None = None) -> None:
        """Wait for the GPU, and free everything: also what the frames of `error`, if there was one, refer to."""
        if self._closed:
            return
        self._closed = True
        if error is not None:  # somebody may keep it for long; a context has to go while its GPU is current
            traceback.clear_frames(error.__traceback__)
        with suppress(DeviceError), self.plan.lock, self.plan.device.current():
            for stream in self._streams:
                with suppress(DeviceError):  # of a context that is lost, nothing can be waited for
                    stream.synchronize()
            for side in self._sides:
                side.close()
            self._captured.clear()
            self._contexts.clear()
        if self._activations is not None:
            self._activations.close()
        self._streams.clear()  # a device array may still refer to one, and say so to others

    def __del__(self) -> None:
        if not sys.is_finalizing() and hasattr(self, "_streams"):
            self.close()

    def _open(self) -> None:
        plan, device = self.plan, self.plan.device
        with device.current():
            for _ in range(3):
                self._streams.append(Stream(device))
            largest = plan.largest_shapes(self.profile, self.rows)
            if not self._shrunk:
                self._activations = DeviceMemory(device, plan.activation_bytes(self.profile))
            # A library that captures by itself keeps one graph a context, and captures anew where addresses change.
            for _ in range(2 if plan.library_graphs else 1):
                self._contexts.append(plan.new_context(self.profile, self.compute))
                outputs = self._set_shapes(self._contexts[-1], largest)
                self._give_memory(self._contexts[-1])
            for _ in range(2):
                self._sides.append(Side(plan, _bytes(plan.inputs, largest), _bytes(plan.outputs, outputs)))

    def _fill(self, side: Side, piece: Work, feeds: Mapping[str, Feed]) -> None:
        """Enqueue the copies of one part to the GPU; rows of padding are zeros."""
        side.uploaded.synchronize()  # until the last copy from the staging memory is done, it must not be written
        staged = {name: _stage(side, name, piece, feed) for name, feed in feeds.items() if isinstance(feed, np.ndarray)}
        self.upload.wait(side.computed)  # until the last run has read its inputs, they must not be overwritten
        for name, feed in feeds.items():
            target = side.memory[name].pointer
            row = int(np.prod(feed.shape[1:], dtype=np.int64)) * feed.dtype.itemsize
            if name in staged:
                self.upload.to_device(target, staged[name].pointer, piece.part.size * row)
            elif isinstance(feed, DeviceView):
                self.upload.on_device(target, feed.pointer + piece.start * row, piece.part.rows * row)
                if piece.part.size > piece.part.rows:
                    self.upload.zero(target + piece.part.rows * row, (piece.part.size - piece.part.rows) * row)
        side.uploaded.record(self.upload)
        self.compute.wait(side.uploaded)
        self.compute.wait(side.downloaded)  # until the last outputs are on the host, they must not be overwritten

    def _launch(self, side: Side, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Enqueue one run; the shapes of its outputs."""
        key = tuple(shapes.items())
        graph = side.graphs.get(key)
        if graph is not None:
            graph.launch(self.compute)
        elif not (self._graphs_left and side.runs[key] >= RUNS_BEFORE_GRAPH and self._run_and_capture(side, key)):
            side.runs[key] += 1
            number = self._sides.index(side) % len(self._contexts)
            if self._configured.get(number) != (side, key):
                self._configured.pop(number, None)
                self._configure(self._contexts[number], side, key)
                self._configured[number] = side, key
            self._execute(self._contexts[number])
        side.computed.record(self.compute)
        return self._shapes[key]

    def _run_and_capture(self, side: Side, key: Key) -> bool:
        """Run in a new context and keep what that launches as a graph; False where it did not run.

        A graph is valid as long as its context stays as it was captured: each has its own. All of a slot share the
        activation memory, since they run in one stream, one after the other. Whatever cannot be captured goes on
        being launched kernel by kernel.
        """
        ran = False
        try:
            context = self.plan.new_context(self.profile, self.compute)
            self._captured.append(context)
            self._configure(context, side, key)
            self._give_memory(context)
            self._execute(context)  # the first run after a change of shape makes what a capture must not make
            ran = True
            if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(self.compute.pointer):
                self._graphs_left = 0
                return ran
            side.graphs[key] = capture(self.compute, lambda: self._execute(context))
            self._graphs_left -= 1
        except BackendError:  # DeviceError too: for want of memory, or since something in it cannot be captured
            self._graphs_left = 0
        return ran

    def _configure(self, context: Any, side: Side, key: Key) -> None:
        outputs = self._set_shapes(context, dict(key))
        self._shapes.setdefault(key, outputs)
        if self._shrunk:
            self._give_memory(context)
        for name, memory in side.memory.items():
            if not context.set_tensor_address(name, memory.pointer):
                raise self.plan.failed(f"refuses the memory of {name} in")

    def _set_shapes(self, context: Any, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Set the input shapes; the shapes of the outputs."""
        plan = self.plan
        for name, shape in shapes.items():
            if not context.set_input_shape(name, tuple(shape)):
                raise plan.failed(f"refuses {name} {list(shape)} in")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise plan.failed(f"cannot infer the output shapes for {dict(shapes)} in") from error
        if missing:
            raise plan.failed(f"wants more to know of {', '.join(missing)} in")
        outputs = {t.name: tuple(int(size) for size in context.get_tensor_shape(t.name)) for t in plan.outputs}
        for name, shape in outputs.items():
            if any(size < 0 for size in shape):
                message = f"the shape of {name} of {plan.name} depends on its values: {list(shape)}"
                raise BackendError(message, hint="build from a graph whose shapes depend on shapes alone")
        return outputs

    def _give_memory(self, context: Any) -> None:
        """Give a context, whose shapes are set, its activation memory."""
        if self._shrunk:
            needed = int(context.update_device_memory_size_for_shapes())
            needed = needed or self.plan.activation_bytes(self.profile)  # 0: it cannot tell
            if self._activations is None or self._activations.nbytes < needed:
                self.compute.synchronize()
                if self._activations is not None:
                    self._activations.close()
                self._activations = None
                self._configured.clear()  # the other side's context has the address of what is freed here
                self._activations = DeviceMemory(self.plan.device, needed)
        assert self._activations is not None
        context.set_device_memory(self._activations.pointer, self._activations.nbytes)

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self.compute.pointer):
            raise self.plan.failed("failed while running")


class Results:
    """Where the outputs of a call go. Its methods are called by a slot, in this order."""

    def begin(self, slot: Slot) -> None:
        """The first part in this slot follows."""

    def take(self, slot: Slot, side: Side, work: Work, shapes: Mapping[str, Shape]) -> None:
        """A part was launched; `shapes` are those of its outputs, padding included."""
        raise NotImplementedError

    def collect(self, side: Side, work: Work) -> None:
        """The side is needed again, or all parts were launched."""

    def end(self, slot: Slot) -> None:
        """The last part in this slot was launched and collected."""


def _stage(side: Side, name: str, piece: Work, feed: npt.NDArray[Any]) -> PinnedMemory:
    pinned, rows = side.pinned(name), piece.part.rows
    view = pinned.view((piece.part.size, *feed.shape[1:]), feed.dtype)
    view[:rows] = feed[piece.start : piece.start + rows]
    view[rows:] = 0
    return pinned


def _bytes(tensors: Sequence[Tensor], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """How large each tensor is."""
    sizes = ((tensor.name, int(np.prod(shapes[tensor.name], dtype=np.int64)), tensor.dtype) for tensor in tensors)
    return {name: count * dtype.itemsize for name, count, dtype in sizes}


__all__ = ["Feed", "Results", "Side", "Slot", "Work"]
