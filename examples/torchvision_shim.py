"""Importing this makes `import torchvision` work beside a torch that its compiled operators were not built for.

transformers and open_clip import torchvision for pictures only, yet that import fails when the compiled operators
cannot be loaded. Declaring two of them, which nothing here calls, is enough. Does nothing where torchvision works or is
not installed.
"""

from __future__ import annotations

import contextlib
import sys

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
LIBRARIES: list[torch.library.Library] = []  # a library's operators live only as long as it does


def declare_missing_operators() -> None:
    """Try the import; where an operator is missing, declare it and forget the half-made import."""
    try:
        with contextlib.suppress(ModuleNotFoundError):
            import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            library.define(schema)
        LIBRARIES.append(library)


declare_missing_operators()
