"""The proof that a graph does what its tower does, on sizes that it was not traced with.

`prove_cases` runs the torch tower, `prove` runs the engine of the exported graph on the same feeds. They are two steps
so that the tower can be freed before the engine is opened: the two never share memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clip_export.errors import ExportError
from clip_export.graph.export import GraphShape, example_feeds

if TYPE_CHECKING:
    from torch import nn

Arrays = Mapping[str, np.ndarray]

BATCHES = (1, 2, 3, 7)

# Largest difference over the largest value of the same output: float32 on both sides, sums in another order.
TOLERANCES = {"embedding": 1e-5, "pooled": 1e-5, "hidden_states": 1e-4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Feeds by input name, and what the tower gives for them by output name."""

    title: str
    feeds: Arrays
    expected: Arrays


def run_tower(module: nn.Module, outputs: Iterable[str], feeds: Arrays) -> dict[str, np.ndarray]:
    """The torch tower on `feeds`: float32 arrays by output name."""
    import torch

    with torch.inference_mode():
        results = module(*(torch.from_numpy(np.ascontiguousarray(array)) for array in feeds.values()))
    return {name: result.numpy() for name, result in zip(outputs, results, strict=True)}


def prove_cases(module: nn.Module, shape: GraphShape) -> list[Case]:
    """The tower's answers at batch 1, 2, 3, 7, and for text at lengths from 2 to the whole context.

    Raises ExportError where the tower itself gives a constant, zero or non-finite output, or where a causal text tower
    sees a token after the end.
    """
    cases = [_case(module, shape, batch, length) for batch, length in _sizes(shape)]
    for case in cases:
        _require_sane(case.expected, f"the {shape.tower} tower, {case.title}")
    if shape.sequence_dynamic:
        _require_blind_to_padding(module, shape)
    return cases


def prove(engine: Callable[[Arrays], Arrays], tower: str, cases: Iterable[Case]) -> dict[str, float]:
    """Run `engine` on all cases. Returns case and output -> relative difference; raises ExportError above tolerance."""
    differences: dict[str, float] = {}
    for case in cases:
        found = engine(case.feeds)
        _require_sane(found, f"the {tower} engine, {case.title}")
        for name, expected in case.expected.items():
            difference = relative_difference(found[name], expected)
            differences[f"{case.title}: {name}"] = difference
            if not difference <= TOLERANCES[name]:
                raise ExportError(
                    f"{tower} {name} at {case.title}: the exported graph differs from the tower by {difference:.2e} "
                    f"of its largest value, expected at most {TOLERANCES[name]:.0e}",
                    hint="this is a bug of the export, not of the checkpoint; please report it with the architecture",
                )
    return differences


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value expected; inf where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    scale = max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(found.astype(np.float64) - expected).max()) / scale


def _sizes(shape: GraphShape) -> list[tuple[int, int]]:
    """(batch, sequence) of each case; the sequence is unused for images."""
    length = shape.input[0]
    if not shape.sequence_dynamic:
        return [(batch, length) for batch in BATCHES]
    return [
        *((batch, length) for batch in BATCHES),
        *((3, n) for n in sorted({2, 3, length // 2, length - 1}) if n > 1),
    ]


def _case(module: nn.Module, shape: GraphShape, batch: int, length: int) -> Case:
    feeds = example_feeds(shape, batch=batch, sequence=length, seed=1000 * batch + length)
    title = f"batch {batch}"
    if shape.tower == "text":
        # Ends at different positions in one batch, the first and the last possible among them.
        feeds["eot_index"] = np.linspace(length - 1, 1, num=batch).astype(np.int32)
        title += f", {length} tokens"
    return Case(title=title, feeds=feeds, expected=run_tower(module, shape.outputs, feeds))


def _require_sane(outputs: Arrays, where: str) -> None:
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise ExportError(
                f"{where}: {name} has values that are not finite",
                hint="the checkpoint may be damaged, or saved after a training run that diverged",
            )
        rows = array.reshape(len(array), -1)
        if not (rows.std(axis=1) > 0).all():
            raise ExportError(f"{where}: {name} is constant", hint="the checkpoint's weights may be all zero")
        if len(rows) > 1 and not (np.abs(rows[1:] - rows[:1]).max(axis=1) > 0).all():
            raise ExportError(
                f"{where}: {name} is the same for different inputs", hint="the checkpoint's weights may be all zero"
            )


def _require_blind_to_padding(module: nn.Module, shape: GraphShape) -> None:
    """Trimming to the end token is exact only if no token after it can change what is pooled."""
    feeds = example_feeds(shape, batch=2, seed=7)
    end = np.array([3, shape.input[0] // 2], dtype=np.int32)
    changed = feeds["input_ids"].copy()
    for row, index in enumerate(end):
        changed[row, index + 1 :] = 0
    pooled = [name for name in shape.outputs if name != "hidden_states"]
    first, second = (
        run_tower(module, shape.outputs, {"input_ids": ids, "eot_index": end}) for ids in (feeds["input_ids"], changed)
    )
    for name in pooled:
        difference = relative_difference(second[name], first[name])
        if difference > TOLERANCES[name]:
            raise ExportError(f"text {name} changes by {difference:.2e} with a token after the end: it is not causal")
