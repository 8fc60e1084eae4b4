"""Exact search for the nearest rows of a large index that is read once, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from clip_export.cosine import unit_rows

__all__ = ["Neighbours", "blocks", "nearest", "scores_of"]

Floats: TypeAlias = npt.NDArray[np.floating]
Doubles: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

_BLOCK = 4096  # rows of the index at once: 16 MiB of float64 for 512 dimensions, and as many scores for each query
_FEW = 1024  # queries whose found rows are gathered at once


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The nearest rows of each query, int64 [queries, k], nearest first, and their cosines, float64 [queries, k]."""

    rows: Ints
    scores: Doubles


def nearest(index: Floats, queries: Sequence[Doubles], own: Ints, k: int) -> list[Neighbours]:
    """The `k` nearest rows of `index`, float [n, dim], for each array of `queries`, float64 [m, dim] of length 1.

    Row own[i] of the index is left out for query i. The index is read once for all arrays. n has to be above k.
    """
    found = [Neighbours(np.full((len(own), 0), -1), np.empty((len(own), 0))) for _ in queries]
    for part in blocks(len(index)):
        candidates = unit_rows(np.asarray(index[part])).T
        mine = np.flatnonzero((own >= part.start) & (own < part.stop))
        for number, rows in enumerate(queries):
            scores = rows @ candidates
            scores[mine, own[mine] - part.start] = -np.inf
            found[number] = _merged(found[number], scores, part.start, k)
    return found


def scores_of(index: Floats, queries: Doubles, rows: Ints) -> Doubles:
    """The cosines of each query, float64 [m, dim] of length 1, to its own rows of the index, int64 [m, k]: [m, k]."""
    scores = np.empty(rows.shape)
    for part in blocks(len(rows), _FEW):
        shape = (*rows[part].shape, index.shape[1])
        candidates = unit_rows(np.asarray(index[rows[part].reshape(-1)])).reshape(shape)
        scores[part] = np.einsum("md,mkd->mk", queries[part], candidates)
    return scores


def blocks(count: int, size: int = 0) -> Iterator[slice]:
    """The numbers 0 to `count` in slices of `size`, by default _BLOCK."""
    step = size or _BLOCK
    yield from (slice(start, min(start + step, count)) for start in range(0, count, step))


def _merged(found: Neighbours, scores: Doubles, first: int, k: int) -> Neighbours:
    """The k best of what was found and of a block of `scores`, float64 [queries, n], of the rows from `first`."""
    rows = np.broadcast_to(np.arange(first, first + scores.shape[1]), scores.shape)
    if scores.shape[1] > k:  # a partition first: it is linear, and few are sorted
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        rows, scores = np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)
    rows, scores = np.hstack([found.rows, rows]), np.hstack([found.scores, scores])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Neighbours(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1))
