"""Tower -> ONNX. The one place that knows the opset and the names of tensors and axes.

| tower | inputs | outputs |
|---|---|---|
| text | input_ids int32 [batch, sequence], eot_index int32 [batch] | float32, those asked for |
| text, for Context | the same, and layer, attention_mask and inputs_embeds (context_inputs.py) | all, and raw_states |
| image | pixels uint8 [batch, 3, height, width] | float32, those asked for |
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_export.context_inputs import CONTEXT_INPUTS
from clip_export.errors import ExportError
from clip_export.graph.files import save
from clip_export.graph.optimize import optimize
from clip_export.spec import Shape, Tower

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

OPSET = 23  # the first with Attention as one operator
INPUTS: dict[Tower, tuple[str, ...]] = {"text": ("input_ids", "eot_index"), "image": ("pixels",)}

_OPERATORS = {
    *("Add", "Attention", "Cast", "Concat", "Conv", "Div", "Expand", "Gather", "GatherElements", "Gelu"),
    *("LayerNormalization", "MatMul", "Mul", "Reshape", "Shape", "Sigmoid", "Slice", "Split", "Squeeze", "Sub"),
    *("Transpose", "Unsqueeze"),
}
# What chooses a layer, hides positions and puts vectors in the place of tokens.
_CONTEXT_OPERATORS = {"And", "Equal", "GreaterOrEqual", "LessOrEqual", "Not", "Range", "Where"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphShape:
    """What the graph of a tower has to look like, whichever checkpoint it came from.

    `input` is the shape of input_ids or pixels without the batch; `layers` counts blocks; `sequence_dynamic` says
    whether a text batch may be shorter than the context, which is exact for causal towers only. `context_width` is the
    tower's width where it is a text tower that gives Context, else None.
    """

    tower: Tower
    input: Shape
    layers: int
    outputs: tuple[str, ...]
    sequence_dynamic: bool
    context_width: int | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the graph's inputs, in order."""
        return INPUTS[self.tower] if self.context_width is None else CONTEXT_INPUTS

    @property
    def layer_norms(self) -> int:
        """Two in each block, one after text, one before an image; an image's last one only where it is pooled.

        A text graph that gives Context has one for the layer that is chosen and one for what is pooled.
        """
        pooled = bool({"pooled", "embedding"} & set(self.outputs))
        if self.tower == "text":
            return 2 * self.layers + (1 if self.context_width is None else 2)
        return 2 * self.layers + 1 + pooled


def export(module: nn.Module, shape: GraphShape, path: Path) -> None:
    """Trace `module` to ONNX at `path`, with `path`.data beside it where the weights are large.

    Raises ExportError where the graph is not the one that the architecture must give.
    """
    model = _trace(module, shape)
    optimize(model, inputs=shape.inputs, outputs=shape.outputs)
    model.graph.name = shape.tower
    model.producer_name, model.producer_version, model.doc_string = "clip-export", None, None
    _check(model, shape)
    save(model, path)


def example_feeds(
    shape: GraphShape, *, batch: int, sequence: int | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Inputs of the right shapes and dtypes, random from `seed`; text ends at the last position of `sequence`."""
    rng = np.random.default_rng(seed)
    if shape.tower == "image":
        return {"pixels": rng.integers(0, 256, (batch, *shape.input), dtype=np.uint8)}
    length = sequence or shape.input[0]
    # Small ids exist in every vocabulary; zero is left out, it pads.
    input_ids = rng.integers(1, 50, (batch, length), dtype=np.int32)
    feeds: dict[str, np.ndarray] = {"input_ids": input_ids, "eot_index": np.full(batch, length - 1, dtype=np.int32)}
    if shape.context_width is not None:
        feeds["layer"] = rng.integers(0, shape.layers + 1, batch, dtype=np.int32)
        feeds["attention_mask"] = np.ones((batch, length), dtype=np.int32)
        feeds["inputs_embeds"] = rng.standard_normal((batch, length, shape.context_width), dtype=np.float32)
    return feeds


def _trace(module: nn.Module, shape: GraphShape) -> ir.Model:
    import torch
    from torch.export import Dim

    # Sizes that are neither 0, 1 nor the context, so that tracing cannot take a dynamic axis for a constant.
    feeds = example_feeds(shape, batch=3, sequence=5 if shape.sequence_dynamic else None)
    batch = Dim("batch")
    axes: dict[str, dict[int, Dim]] = {name: {0: batch} for name in feeds}
    if shape.sequence_dynamic:
        sequence = Dim("sequence", min=1, max=shape.input[0])
        for name, array in feeds.items():
            if shape.tower == "text" and array.ndim > 1:
                axes[name][1] = sequence
    with _quiet_exporter(), torch.inference_mode():
        program = torch.onnx.export(
            module,
            tuple(torch.from_numpy(array) for array in feeds.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(feeds),
            dynamic_shapes=axes,
            verbose=False,
        )
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter prints its progress and warns about its own internals; neither is news to a user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _check(model: ir.Model, shape: GraphShape) -> None:
    """Raise ExportError unless the graph has the operators, inputs and dynamic axes that `shape` asks for."""
    counts = Counter(node.op_type for node in model.graph)
    expected = {"Attention": shape.layers, "LayerNormalization": shape.layer_norms}
    for operator, number in expected.items():
        if counts[operator] != number:
            raise ExportError(f"the {shape.tower} graph has {counts[operator]} {operator} nodes, expected {number}")
    known = _OPERATORS if shape.context_width is None else _OPERATORS | _CONTEXT_OPERATORS
    leftovers = sorted(counts.keys() - known)
    if leftovers:
        raise ExportError(f"the {shape.tower} graph has operators that no pass knows: {', '.join(leftovers)}")
    sequence = "sequence" if shape.sequence_dynamic else shape.input[0]
    axes = [["batch", sequence], ["batch"]]
    if shape.context_width is not None:
        axes += [["batch"], ["batch", sequence], ["batch", sequence, shape.context_width]]
    wanted = axes if shape.tower == "text" else [["batch", *shape.input]]
    found = [_axis_names(value.shape) for value in model.graph.inputs]
    if found != wanted:
        raise ExportError(f"the {shape.tower} graph takes {found}, expected {wanted}: an axis was specialised")


def _axis_names(shape: ir.Shape | None) -> list[int | str | None]:
    return [dim if isinstance(dim, int) else dim.value for dim in shape or ()]
