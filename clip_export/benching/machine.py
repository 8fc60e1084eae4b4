"""What the figures depend on besides the code: processor, libraries, threads. No names of hosts or users, no paths."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from clip_export import backends
from clip_export.errors import ClipExportError

_LIBRARIES = (
    *("clip-export", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", "transformers"),
    *("tensorrt", "tensorrt-rtx-cu13", "cuda-core"),
)


def describe(device: str) -> dict[str, Any]:
    """JSON-ready: the processor and how many of its cores this process may use, the GPU, and the libraries here."""
    facts = {"cpu": _processor(), "cpus": cpus(), "system": platform.system(), "python": platform.python_version()}
    return facts | {"gpu": _gpu(device), "versions": _versions()}


def cpus() -> int:
    """Those that this process may use, which in a container is not what there is."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(device: str) -> dict[str, Any] | None:
    if device == "cpu":
        return None
    try:
        gpu = backends.gpu(device)
    except ClipExportError as error:  # an engine runs on it all the same, without cuda-python
        return {"unknown": error.message}
    return {"name": gpu.name, "compute_capability": gpu.compute_capability, "driver": gpu.driver, "cuda": gpu.cuda}


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
