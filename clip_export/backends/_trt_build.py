"""Building one plan in a process of its own, from the side of whoever wants it.

A compiler works for minutes in native code, takes gigabytes and can take its process down. So it runs in a worker
(_trt_worker.py) that is killed at once when the caller stops, whether by Ctrl-C or by an exception out of `progress`.
The plan is written beside its place, and renamed when everything is known of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import clip_export.errors
from clip_export.backends._trt_library import Library, current_gpu
from clip_export.backends._trt_phases import STEPS
from clip_export.backends._trt_worker import encode
from clip_export.backends.building import BuildReport, BuildRequest, Target
from clip_export.errors import (
    ClipExportError,
    DeviceError,
    InputError,
    MissingDependencyError,
    OutputError,
    PlanBuildError,
    UnsupportedOperatorError,
)
from clip_export.output_file import hint_for, reason
from clip_export.progress import Progress, silent

HEARTBEAT = 0.2  # seconds between calls of `progress` while the compiler is silent: an exception from it ends the build
_LEVELS = range(6)
_KEPT_LINES = 40  # of what the worker printed, for the case that it dies

# The worker sees the modules that this process sees, wherever they were found; -P leaves its directory out of it.
_BOOTSTRAP = "import sys; sys.path[:] = sys.argv[1:]; from clip_export.backends._trt_worker import main; main()"


def build_plan(library: Library, request: BuildRequest, *, progress: Progress = silent) -> BuildReport:
    """Compile `request.graph` into `request.plan`, replacing what is there; nothing is left behind where that fails.

    Safe from several threads. `progress` is called several times a second from the thread that builds, in thousandths;
    an exception that it raises ends the build at once. Raises InputError for profiles or options outside the graph's or
    the compiler's limits, UnsupportedOperatorError, PlanBuildError, DeviceError without a GPU or with too little of its
    memory, OutputError where the plan cannot be written.
    """
    target = library.target(request.compute_capability)
    _check(library, request)
    part = request.plan.with_name(f".{request.plan.name}.{secrets.token_hex(4)}.part")
    try:
        with _Worker(encode(library.flavour.module, request, target, part)) as worker:
            fields = _outcome(worker, request, library.title, progress)
        _publish(part, request.plan)
    finally:
        part.unlink(missing_ok=True)
    return _report(library, target, fields)


class _Worker:
    """The running process. Leaving the block ends it, whatever it was doing."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._printed: deque[str] = deque(maxlen=_KEPT_LINES)
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> _Worker:
        pipe = subprocess.PIPE
        # A session of its own: the terminal sends Ctrl-C to us alone, and we end it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOTSTRAP, *sys.path],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            for read in (self._read_events, self._read_printed):
                self._threads.append(threading.Thread(target=read, daemon=True))
                self._threads[-1].start()
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # already dead: its end says why
                self._process.stdin.write(self._line + "\n")
                self._process.stdin.flush()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next event, or None at the end of all. Raises queue.Empty where none has come in `seconds`."""
        return self._events.get(timeout=seconds)

    def died(self) -> tuple[int, str]:
        """Its exit status (minus the signal that ended it) and the last it printed, after the end of all events."""
        status = self._process.wait()
        self._threads[1].join()
        return status, "".join(self._printed).strip()

    def _end(self) -> None:
        self._process.kill()  # does nothing to one that has ended
        self._process.wait()
        for thread in self._threads:
            with contextlib.suppress(RuntimeError):  # Ctrl-C came while it was being started: it cannot be joined
                thread.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()

    def _read_events(self) -> None:
        assert self._process.stdout is not None
        for line in _lines(self._process.stdout):
            with contextlib.suppress(ValueError):  # a line that a killed worker could not finish
                self._events.put(json.loads(line))
        self._events.put(None)

    def _read_printed(self) -> None:
        assert self._process.stderr is not None
        self._printed.extend(_lines(self._process.stderr))


def _lines(stream: IO[str]) -> Iterator[str]:
    with contextlib.suppress(ValueError):  # closed, where Ctrl-C came before its reader began
        yield from stream


def _outcome(worker: _Worker, request: BuildRequest, title: str, progress: Progress) -> dict[str, Any]:
    """The fields of the report, after passing the progress on; raises what the worker's errors stand for."""
    what, done = f"compiling {request.graph.name}", 0
    while True:
        progress(what, done, STEPS)
        try:
            event = worker.next(HEARTBEAT)
        except queue.Empty:
            continue
        if event is None:
            raise _death(*worker.died(), request.graph.name, title)
        if "error" in event:
            raise _error(event["error"], request.graph.name)
        if "report" in event:
            progress(what, STEPS, STEPS)
            report: dict[str, Any] = event["report"]
            return report
        done = event["step"]


def _error(described: dict[str, Any], graph: str) -> ClipExportError:
    kind, message, hint = described["kind"], described["message"], described["hint"]
    if kind == "MemoryError":
        return _no_memory(graph)
    if kind == UnsupportedOperatorError.__name__:
        return UnsupportedOperatorError(message, operators=tuple(described["operators"]), hint=hint)
    found = getattr(clip_export.errors, kind, PlanBuildError)  # a class of another module is at least a failed build
    made: ClipExportError = found(message, hint=hint)
    return made


def _death(status: int, printed: str, graph: str, title: str) -> Exception:
    if status == -getattr(signal, "SIGKILL", 9):
        return _no_memory(graph)
    if status < 0:
        said = f"; the last it said: {printed.splitlines()[-1][:200]}" if printed else ""
        message = f"{title} crashed while it compiled {graph} ({_signal_name(-status)}){said}"
        return PlanBuildError(message, hint="this is a fault of the compiler: try another release of it, or backend")
    if "MemoryError" in printed or "bad_alloc" in printed:
        return _no_memory(graph)
    return RuntimeError(f"the process that compiles {graph} ended with {status}:\n{printed}")


def _no_memory(graph: str) -> PlanBuildError:
    message = f"the process that compiled {graph} was killed: most likely this machine has too little memory for it"
    return PlanBuildError(message, hint="give fewer or smaller profiles, --jobs 1, or a smaller --workspace-mib")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _publish(part: Path, plan: Path) -> None:
    try:
        part.replace(plan)
        if sys.platform != "win32":  # there a directory cannot be opened
            directory = os.open(plan.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as error:
        raise OutputError(f"{plan} cannot be written: {reason(error)}", hint=hint_for(error)) from error


def _report(library: Library, target: Target, fields: dict[str, Any]) -> BuildReport:
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    facts: dict[str, Any] = {"gpu": target.gpu}
    if target.gpu is not None:
        # The plan is built: a GPU that has gone meanwhile costs no more than these two facts.
        with contextlib.suppress(DeviceError, MissingDependencyError):
            gpu = current_gpu()
            facts.update(driver=gpu.driver, cuda=gpu.cuda)
    return BuildReport(version=library.version, compute_capability=target.compute_capability, **{**lists, **facts})


def _check(library: Library, request: BuildRequest) -> None:
    """What can be said without reading the graph; the rest is said by the worker, before it compiles."""
    if not request.graph.is_file():
        raise InputError(f"there is no graph at {request.graph}", hint="check the path")
    if not request.plan.parent.is_dir():
        raise OutputError(f"there is no directory {request.plan.parent}", hint=f"mkdir -p {request.plan.parent}")
    level, workspace = request.optimization_level, request.workspace_mib
    if level is not None and level not in _LEVELS:
        raise InputError(f"expected an optimization level from 0 to 5, found {level}", hint="3 is the compiler's own")
    if workspace is not None and workspace < 1:
        raise InputError(
            f"expected a workspace of at least 1 MiB, found {workspace}", hint="leave --workspace-mib away"
        )
    if request.hardware_compatibility and library.builds_anywhere:
        hint = "its portable plan runs on sm_80 and later: --gpu portable"
        raise PlanBuildError(f"{library.title} has no levels of hardware compatibility", hint=hint)


__all__ = ["HEARTBEAT", "build_plan"]
