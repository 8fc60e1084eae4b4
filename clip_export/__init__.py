"""CLIP out of the notebook: checkpoints become engines that give the same embeddings, and prove it.

    bundle = clip_export.build("demo", "engines/demo")
    clip = clip_export.load("engines/demo")
    clip.similarity(["a.jpg", "b.jpg"], ["a red circle", "two blue squares"])

Names are loaded when they are first used, so that importing the package loads neither torch nor a backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clip_export import errors
from clip_export.errors import ClipExportError

if TYPE_CHECKING:
    from clip_export.backends.building import EngineOptions
    from clip_export.bundle import Bundle
    from clip_export.compilation import PlanOptions
    from clip_export.context import Context
    from clip_export.encoder import Encoder
    from clip_export.extension import extend
    from clip_export.headers import get_include
    from clip_export.pipeline import build, reference
    from clip_export.quantization import Quantization
    from clip_export.runtime import load
    from clip_export.verifying import IndexInputs, Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "ClipExportError",
    "Context",
    "Encoder",
    "EngineOptions",
    "IndexInputs",
    "PlanOptions",
    "Quantization",
    "Verification",
    "build",
    "errors",
    "extend",
    "get_include",
    "load",
    "reference",
    "verify",
]

# No module carries the name of a function here: importing it would hide the function.
_HOMES = {
    "Bundle": "bundle",
    "Context": "context.result",
    "Encoder": "encoder",
    "EngineOptions": "backends.building",
    "PlanOptions": "compilation",
    "Quantization": "quantization",
    "IndexInputs": "verifying",
    "Verification": "verifying",
    "build": "pipeline",
    "extend": "extension",
    "get_include": "headers",
    "load": "runtime",
    "reference": "pipeline",
    "verify": "verifying",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
