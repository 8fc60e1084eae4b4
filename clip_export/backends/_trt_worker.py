"""The process that builds one plan: a request on standard input, events on standard output.

    python -m clip_export.backends._trt_worker

The request is one line of JSON. Every event is one line too: {"step": n}, and at the end either {"report": {...}} or
{"error": {"kind", "message", "hint", "operators"}}, `kind` being a class of clip_export.errors. What native code prints
goes to standard error. Standard input stays open as long as the parent lives: when it ends, so does this process, even
in the middle of a compilation.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

from clip_export.backends._trt_compile import Compilation, write_durably
from clip_export.backends._trt_library import FLAVOURS, load
from clip_export.backends._trt_phases import STEPS
from clip_export.backends.building import BuildRequest, ShapeRange, Target
from clip_export.errors import ClipExportError, OutputError
from clip_export.output_file import hint_for, reason


def encode(module: str, request: BuildRequest, target: Target, part: Path) -> str:
    """The line for standard input: build `request` for `target` with `module`, and write the plan at `part`."""
    plain = replace(request, plan=part, profiles=tuple(dict(ranges) for ranges in request.profiles))
    return json.dumps({"module": module, "request": asdict(plain), "target": asdict(target)}, default=os.fspath)


def decode(line: str) -> tuple[str, BuildRequest, Target]:
    """What `encode` has put into a line; the request's `plan` is where to write it."""
    content = json.loads(line)
    fields: dict[str, Any] = content["request"]
    fields["graph"], fields["plan"] = Path(fields["graph"]), Path(fields["plan"])
    fields["timing_cache"] = None if fields["timing_cache"] is None else Path(fields["timing_cache"])
    fields["profiles"] = tuple(
        {name: ShapeRange(**{end: tuple(shape) for end, shape in shapes.items()}) for name, shapes in ranges.items()}
        for ranges in fields["profiles"]
    )
    return content["module"], BuildRequest(**fields), Target(**content["target"])


class Events:
    """The way back to the parent. Safe from several threads."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock, self._last = stream, threading.Lock(), -1

    def step(self, done: int) -> None:
        """How many of STEPS are done; a repetition is not sent."""
        if done != self._last:
            self._last = done
            self.send(step=done)

    def send(self, **event: Any) -> None:
        """One line of JSON."""
        with self._lock:
            self._stream.write(json.dumps(event) + "\n")
            self._stream.flush()


def build(line: str, events: Events) -> dict[str, Any]:
    """Build what the line asks for; the fields of a BuildReport. Raises ClipExportError."""
    module, request, target = decode(line)
    library = load(FLAVOURS[module])
    started = time.perf_counter()
    compilation = Compilation(library, request, target, events.step)
    compilation.parse()
    host_memory = compilation.compile()
    try:
        write_durably(request.plan, host_memory)
    except OSError as error:
        name = request.plan.parent  # the name of the part is nothing to a user
        raise OutputError(f"the plan cannot be written into {name}: {reason(error)}", hint=hint_for(error)) from error
    found = compilation.examine(host_memory)
    seconds = time.perf_counter() - started
    events.step(STEPS)
    return {"seconds": seconds, "plan_bytes": host_memory.nbytes, "peak_memory_mib": peak_memory_mib(), **found}


def peak_memory_mib() -> int:
    """The most memory that this process has had; 0 where the system does not tell."""
    try:
        # getrusage is no use: a child begins with its parent's peak, and a parent may have held a whole checkpoint.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return _peak_of_usage()
    found = [int(row.split()[1]) for row in status.splitlines() if row.startswith("VmHWM:")]
    return found[0] // 1024 if found else _peak_of_usage()


def main() -> NoReturn:
    """Run one request and end: with 0 when its outcome, whatever it is, has been sent."""
    events = Events(_claim_stdout())
    line = sys.stdin.readline()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        events.send(report=build(line, events))
    except ClipExportError as error:
        events.send(error=_described(error))
    except MemoryError:
        events.send(error={"kind": "MemoryError", "message": "out of memory", "hint": None, "operators": []})
    sys.stderr.flush()
    os._exit(0)  # the outcome is out: taking a compiler apart piece by piece gains nothing, and may crash


def _described(error: ClipExportError) -> dict[str, Any]:
    operators = getattr(error, "operators", ())
    return {"kind": type(error).__name__, "message": error.message, "hint": error.hint, "operators": list(operators)}


def _claim_stdout() -> TextIO:
    """Standard output for events alone: whatever else writes there, native code too, writes to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    return stream


def _die_with_parent() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held for as long as this waits
        pass
    os._exit(1)


def _peak_of_usage() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1024 * 1024 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit)


if __name__ == "__main__":
    main()
