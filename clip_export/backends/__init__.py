"""ONNX in, arrays out: engines that know nothing of CLIP.

One file per backend; the file name is the registry. Each has `status()`, which says whether it works here and what
would make it work, and `open_engine(path, ...)`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from clip_export.errors import BackendError


class Engine(Protocol):
    """A graph that runs. Calling it is safe from several threads."""

    outputs: tuple[str, ...]

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by output name for arrays by input name; raises BackendError."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be called afterwards."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Whether a backend works on this machine. `reason` says what was found, `install` what would help."""

    name: str
    works: bool
    version: str | None
    reason: str
    install: str | None


class Backend(Protocol):
    """What a module of this package offers."""

    def status(self) -> Status:
        """Whether it works here."""
        ...

    def open_engine(self, path: Path, *, device: str, threads: int | None) -> Engine:
        """Open an ONNX file; raises BackendError or MissingDependencyError."""
        ...


def names() -> list[str]:
    """The backends that this version knows, best first where several work."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def status(name: str) -> Status:
    """Whether backend `name` works here. Raises BackendError for an unknown name."""
    return _module(name).status()


def choose(name: str | None = None) -> str:
    """`name` if it works here, or the first that does. Raises BackendError with the reasons of those that do not."""
    candidates = [status(candidate) for candidate in ([name] if name is not None else names())]
    for candidate in candidates:
        if candidate.works:
            return candidate.name
    reasons = "; ".join(f"{candidate.name}: {candidate.reason}" for candidate in candidates)
    installs = [candidate.install for candidate in candidates if candidate.install]
    raise BackendError(f"no backend works here ({reasons})", hint=" or ".join(installs) or "see clip-export doctor")


def open_engine(name: str, path: Path, *, device: str = "cpu", threads: int | None = None) -> Engine:
    """Open the graph at `path` with backend `name` on `device` (`cpu`, `cuda:0`). Raises BackendError."""
    return _module(name).open_engine(path, device=device, threads=threads)


def _module(name: str) -> Backend:
    if name not in names():
        raise BackendError(f"there is no backend {name!r}", hint=f"choose one of: {', '.join(names())}")
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


__all__ = ["Backend", "Engine", "Status", "choose", "names", "open_engine", "status"]
