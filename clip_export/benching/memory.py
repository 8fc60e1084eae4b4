"""The memory that this process has taken, on the host and on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

from clip_export import backends
from clip_export.errors import ClipExportError

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int | None:
    """What this process holds in memory now; None where the system does not tell."""
    return _from_status("VmRSS")


def peak_bytes() -> int | None:
    """The most that it ever held; None where the system does not tell.

    On Linux that is VmHWM. getrusage's ru_maxrss is no use there: a child begins with the peak of its parent, for exec
    carries it over, so that whatever a large process starts seems to be large.
    """
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return _from_status("VmHWM")


def device_bytes(device: str) -> int | None:
    """What is taken of a GPU's memory, by whomever; None for a CPU, or where the driver does not tell."""
    if device == "cpu":
        return None
    try:
        gpu = backends.gpu(device)
    except ClipExportError:  # the engine that runs there needs no cuda-python, which this does
        return None
    return None if gpu.free_bytes is None else gpu.total_bytes - gpu.free_bytes


def _from_status(name: str) -> int | None:
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024  # given in kB, which are KiB
    return None
