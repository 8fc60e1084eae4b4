"""The proof that a graph does what its tower does, on sizes that it was not traced with.

The torch tower runs once, on the golden samples in one batch and at full length. The engine of the exported graph has
to give the same for parts of them, at other batch sizes and lengths. So the tower can be freed before the engine is
opened, and the two never share memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clip_export.errors import ExportError
from clip_export.graph.export import GraphShape

if TYPE_CHECKING:
    from torch import nn

Arrays = Mapping[str, np.ndarray]

BATCHES = (1, 2, 3, 7)

# Largest difference over the largest value of the same output: float32 on both sides, sums in another order.
TOLERANCES = {"embedding": 1e-5, "pooled": 1e-5, "hidden_states": 1e-4, "raw_states": 1e-4}
_STATES = ("hidden_states", "raw_states")  # one a token: what is fed less of gives less


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


def cases(shape: GraphShape, feeds: Arrays, expected: Arrays) -> list[Case]:
    """What to ask of the engine: parts of `feeds`, for which the tower gives the same parts of `expected`.

    Batches of 1, 2, 3 and 7. Where a text batch may be trimmed, also lengths from the shortest to one below the
    context, and once with other tokens after the end. Raises ExportError where `expected` is constant, zero or not
    finite.
    """
    require_sane(expected, f"the {shape.tower} tower")
    count = len(next(iter(feeds.values())))
    made = [_part(f"batch {n}", feeds, expected, np.arange(min(n, count))) for n in BATCHES]
    return made + _text_cases(shape, feeds, expected) if shape.sequence_dynamic else made


def prove(engine: Callable[[Arrays], Arrays], tower: str, questions: Iterable[Case]) -> dict[str, float]:
    """Run `engine` on all cases. Returns case and output -> relative difference; raises ExportError above tolerance."""
    differences: dict[str, float] = {}
    for case in questions:
        found = engine(case.feeds)
        require_sane(found, f"the {tower} engine, {case.title}")
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


def require_sane(outputs: Arrays, where: str) -> None:
    """Raise ExportError for an output that is not finite, is constant, or is the same for every input."""
    for name, array in outputs.items():
        rows = array.reshape(len(array), -1)
        if not np.isfinite(rows).all():
            raise ExportError(
                f"{where}: {name} has values that are not finite",
                hint="the checkpoint may be damaged, or saved after a training run that diverged",
            )
        if not (rows.std(axis=1) > 0).all():
            raise ExportError(f"{where}: {name} is constant", hint="the checkpoint's weights may be all zero")
        if len(rows) > 1 and (rows == rows[:1]).all():
            raise ExportError(
                f"{where}: {name} is the same for every input", hint="the checkpoint's weights may be all zero"
            )


def context_feeds(feeds: Arrays) -> dict[str, np.ndarray]:
    """`feeds` of a text graph that gives Context with what golden samples leave out: hidden positions, and vectors.

    A start token is always visible, so that no position sees nothing.
    """
    rng = np.random.default_rng(0)
    ids, mask, vectors = (feeds[name].copy() for name in ("input_ids", "attention_mask", "inputs_embeds"))
    mask[:, 1:] = rng.random(mask[:, 1:].shape) > 0.3
    replaced = rng.random(ids.shape) > 0.7
    ids[replaced] = -1
    vectors[replaced] = 0.05 * rng.standard_normal((int(replaced.sum()), vectors.shape[2]))
    return {**feeds, "input_ids": ids, "attention_mask": mask, "inputs_embeds": vectors}


def _text_cases(shape: GraphShape, feeds: Arrays, expected: Arrays) -> list[Case]:
    context_length, end = shape.input[0], feeds["eot_index"]
    made = []
    for length in sorted({2, 3, context_length // 4, context_length // 2, context_length - 1}):
        rows = np.flatnonzero(end < length)
        if len(rows):
            part = _part(f"{length} tokens", feeds, expected, rows)
            cut = {name: array[:, :length] if name in _STATES else array for name, array in part.expected.items()}
            trimmed = {name: array[:, :length] if array.ndim > 1 else array for name, array in part.feeds.items()}
            made.append(Case(title=part.title, feeds=trimmed, expected=cut))
    # Trimming is exact only if no token after the end can change what is pooled.
    after = np.arange(context_length) > end[:, None]
    changed = np.where(after, (feeds["input_ids"] + 1) % 7, feeds["input_ids"]).astype(np.int32)
    pooled = {name: array for name, array in expected.items() if name not in _STATES}
    return [*made, Case(title="other tokens after the end", feeds={**feeds, "input_ids": changed}, expected=pooled)]


def _part(title: str, feeds: Arrays, expected: Arrays, rows: np.ndarray) -> Case:
    return Case(
        title=title,
        feeds={name: array[rows] for name, array in feeds.items()},
        expected={name: array[rows] for name, array in expected.items()},
    )
