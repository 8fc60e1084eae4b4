"""The half graph that keeps a contract: converted, simulated, and where it falls short with more of it in fp32.

Ranges say what half cannot hold. They cannot say how much a network makes of ordinary rounding: attention between near
equals may turn the last bit of an early tensor into another answer. That shows only in what comes out, so it is asked
there. First the sums that run through all blocks are kept, which costs next to nothing: every product stays half. Then
whole blocks from the first on, twice as many each time, since what they lose is what all others amplify.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_export import backends
from clip_export.cosine import cosines
from clip_export.precision._operators import is_constant
from clip_export.precision.half import HalfReport, convert
from clip_export.precision.ranges import Feeds, Ranges
from clip_export.precision.simulate import simulate
from clip_export.progress import Progress, silent

if TYPE_CHECKING:
    import onnx_ir as ir

_ENGINE = "onnxruntime"


def refine(
    source: Path,
    target: Path,
    *,
    precision: str,
    ranges: Ranges,
    feeds: Sequence[Feeds],
    required: float,
    keep: Sequence[str] = (),
    everything: bool = False,
    progress: Progress = silent,
) -> HalfReport:
    """As `half.convert`, with as much in fp32 as it takes for a min cosine of `required` on `feeds`.

    The cosine is that of the simulated half graph to the fp32 one, over all rows of all outputs; the report says it
    (`agreement`) and what was kept for it (`refined`: nodes and scopes). With `everything` products are half whatever
    happens. Where nothing reaches `required`, the last graph stays: whether that is an error is the caller's to say.
    Raises as `half.convert`.
    """
    expected = _run(source, feeds)
    for kept, last in _attempts(source, products=not everything):
        progress(f"convert {source.stem} to {precision}" + (f", {len(kept)} parts in fp32" if kept else ""), 0, 0)
        scopes = (*keep, *kept)
        report = convert(source, target, precision=precision, ranges=ranges, keep=scopes, everything=everything)
        found = _agreement(target, feeds, expected)
        if found >= required or last:
            return dataclasses.replace(report, agreement=found, refined=kept)
    raise AssertionError("the last attempt is an answer")


def _attempts(source: Path, *, products: bool) -> Iterator[tuple[tuple[str, ...], bool]]:
    """What to keep in fp32 besides what has to be, more each time, and whether it is the last that can be tried."""
    import onnx_ir

    model: ir.Model = onnx_ir.load(source)
    stream, blocks = tuple(_stream(model)), tuple(_blocks(model))
    yield (), False
    yield stream, not products or not blocks
    kept = 1
    while products and blocks:
        yield (*stream, *blocks[:kept]), kept >= len(blocks)
        kept *= 2


def agreement(half: Path, source: Path, feeds: Sequence[Feeds]) -> float:
    """The min cosine of what the half graph computes, simulated, to the fp32 graph `source`, over rows and outputs."""
    return _agreement(half, feeds, _run(source, feeds))


def _agreement(half: Path, feeds: Sequence[Feeds], expected: Sequence[np.ndarray]) -> float:
    with _simulation(half) as path:
        found = _run(path, feeds)
    return min(min_cosine(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def min_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """The smallest cosine between rows of the last axis; -1 where something is not finite, or a row is zero."""
    return float(np.nan_to_num(cosines(found, expected), nan=-1.0).min())  # a number: it is ordered, and is in reports


@contextmanager
def _simulation(half: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="clip-export-") as work:
        path = Path(work) / half.name
        simulate(half, path)
        yield path


def _run(path: Path, feeds: Sequence[Feeds]) -> list[np.ndarray]:
    """The rows of all outputs of the graph at `path`, batch after batch."""
    engine = backends.open_engine(_ENGINE, path)
    try:
        return [array for batch in feeds for array in engine(batch).values()]
    finally:
        engine.close()


def _stream(model: ir.Model) -> Iterator[str]:
    """The sums of two computed tensors: what each block adds to what came before it."""
    for node in model.graph:
        if node.op_type == "Add" and not any(value is None or is_constant(value) for value in node.inputs):
            yield str(node.name)


def _blocks(model: ir.Model) -> list[str]:
    """The numbered scopes of the graph in the order of their computation: blocks.0, blocks.1, …"""
    scopes = [str(node.name).split("/")[0].split(".") for node in model.graph]
    return list(dict.fromkeys(".".join(scope[:2]) for scope in scopes if len(scope) > 1 and scope[1].isdigit()))
