"""Where a graph goes on disk: one file, or a small one with its weights beside it. Knows nothing of CLIP."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from clip_export.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

# Above this size weights go beside the graph: a protobuf ends at 2 GiB, and a file of its own can be mapped.
EXTERNAL_DATA_BYTES = 64 * 2**20


def missing(*modules: str) -> list[str]:
    """Those of `modules`, which work on graphs, that are not installed here."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def save(model: ir.Model, path: Path) -> None:
    """Write `model` to `path`, with `path`.data beside it where its weights are large, and check what was written.

    Raises ExportError where it is not valid ONNX.
    """
    import onnx
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = f"{path.name}.data" if size > EXTERNAL_DATA_BYTES else None
    onnx_ir.save(model, path, external_data=external)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not valid ONNX: {error}") from error
