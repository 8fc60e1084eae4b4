"""The matrix of similarities of images and texts, tile by tile: ranks, who comes first, and the contrastive loss.

100,000 x 100,000 similarities take 40 GB in float32. Here a tile of 2,048 x 2,048 exists at a time, and every tile is
multiplied once for all that is asked of it.

Tiles are float32, which is several times as fast as float64; ranks are nevertheless those of float64. For rows of
length 1 the rounding of a float32 product has a bound (Higham, *Accuracy and Stability of Numerical Algorithms*, 3.1),
about (dim + 2) 2^-24: 3e-5 for 512 dimensions. Candidates further than that from the right answer are on the side on
which float32 puts them. The few that are nearer are multiplied again, in float64; where they are many, as those of a
model that maps everything onto one point, the whole tile is.

Ties and what is not a number count against the model, as in `retrieval`: a wrong candidate that is as near as the right
one comes before it, and so does one that is zero or not finite; a row that is zero or not finite finds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from clip_export.contrastive import Loss
from clip_export.retrieval import TIE

__all__ = ["Found", "Measured", "Rows", "cosines", "measure"]

Floats: TypeAlias = npt.NDArray[np.floating]
Singles: TypeAlias = npt.NDArray[np.float32]
Doubles: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Masks: TypeAlias = npt.NDArray[np.bool_]

_TILE = 2048
# A pair multiplied by itself costs about as much as this many of a whole float64 tile.
_PAIR_COST = 32
_AT_ONCE = 4096  # pairs multiplied by themselves at once: 32 MiB of float64 for 512 dimensions


@dataclass(frozen=True, slots=True)
class Rows:
    """Embeddings of different inputs: row places[i] of `values`, float [rows, dim], is that of input i.

    `scales` are what makes their length 1, float64 [n]: NaN for one that is zero or not finite.
    """

    values: Floats
    places: Ints
    scales: Doubles

    @classmethod
    def of(cls, values: Floats, numbers: Ints) -> Rows:
        """Row i of `values` is of the input numbers[i], 0 to n, in the order in which they are first.

        The first row of each is taken; the input has no length where any of its rows has none.
        """
        lengths = np.empty(len(values))
        with np.errstate(invalid="ignore", over="ignore"):
            for part in _parts(len(values)):
                wide = values[part].astype(np.float64)
                lengths[part] = np.sqrt(np.einsum("nd,nd->n", wide, wide))
        bad = ~(np.isfinite(lengths) & (lengths > 0))
        places = np.unique(numbers, return_index=True)[1]
        scales = 1 / np.where(bad, 1, lengths)[places]
        scales[numbers[bad]] = np.nan
        return cls(values, places, scales)

    def __len__(self) -> int:
        return len(self.places)

    def unit(self, which: slice | Ints) -> Doubles:
        """Those inputs at length 1, float64; NaN throughout where there is none."""
        wide: Doubles = self.values[self.places[which]].astype(np.float64)
        scales = self.scales[which]
        with np.errstate(invalid="ignore"):
            wide *= scales[:, None]
        wide[np.isnan(scales)] = np.nan
        return wide

    def singles(self) -> Singles:
        """All of them at length 1, in float32."""
        result = np.empty((len(self), self.values.shape[1]), np.float32)
        for part in _parts(len(self)):
            result[part] = self.unit(part)
        return result


@dataclass(frozen=True, slots=True)
class Found:
    """Of each query: the rank of its best right answer, int64 from 1; and which candidate comes first, int64.

    n + 1 is the rank of one that finds nothing among n. Of those that are equally near in float32, any may be first.
    """

    ranks: Ints
    first: Ints


@dataclass(frozen=True, slots=True)
class Measured:
    """What the matrix says of images as queries and of texts as queries, and the loss; NaN where a row has none."""

    images: Found
    texts: Found
    loss: float


def cosines(images: Rows, texts: Rows, image: Ints, text: Ints) -> Doubles:
    """In float64, of image[i] and text[i]: [n]."""
    result = np.empty(len(image))
    for part in _parts(len(image), _AT_ONCE):
        result[part] = np.einsum("nd,nd->n", images.unit(image[part]), texts.unit(text[part]))
    return result


def measure(images: Rows, texts: Rows, right: Ints, loss: Loss) -> Measured:
    """One pass over all images and texts, each of them there once.

    `right` is int64 [pairs, 2]: which image and which text belong together, each pair once, sorted by image. Every
    image and every text has a pair.
    """
    by_pair = cosines(images, texts, right[:, 0], right[:, 1])
    by_image = _Side(images, texts, right[:, 0], by_pair)
    by_text = _Side(texts, images, right[:, 1], by_pair)
    own = np.empty(len(right), np.float32)
    left, above = images.singles(), texts.singles()
    for rows in _parts(len(left)):
        first, last = np.searchsorted(right[:, 0], (rows.start, rows.stop))
        for columns in _parts(len(above)):
            tile = left[rows] @ above[columns].T
            pairs = first + np.flatnonzero(_within(right[first:last, 1], columns))
            inside = tuple((right[pairs] - (rows.start, columns.start)).T)
            own[pairs] = tile[inside]
            loss.add(tile, rows, columns)
            by_image.see_first(tile, rows, columns)
            by_text.see_first(tile.T, columns, rows)
            tile[inside] = -np.inf  # right answers are ahead of nobody
            exact = _Exact(images, texts, rows, columns, inside)
            by_image.count(tile, rows, exact)
            by_text.count(tile.T, columns, exact.turned())
    return Measured(by_image.result(), by_text.result(), loss.mean(own))


class _Side:
    """What the queries of one side have seen so far of the candidates of the other."""

    def __init__(self, queries: Rows, candidates: Rows, owners: Ints, by_pair: Doubles) -> None:
        count, dim = len(queries), queries.values.shape[1]
        self._candidates = candidates
        self._ahead = np.zeros(count, np.int64)
        self._best = np.full(count, -np.inf, np.float32)
        self._first = np.full(count, -1, np.int64)
        best_right = np.full(count, -np.inf)
        with np.errstate(invalid="ignore"):
            np.maximum.at(best_right, owners, by_pair)  # NaN wins
        self._least = best_right - TIE  # a candidate that is not behind this is ahead
        # Of the product, and 2 more for the rounding of the rows to float32, 1 for that of the bounds.
        margin = (dim + 4) * 2.0**-24
        self._low, self._high = ((self._least + way * margin).astype(np.float32) for way in (-1, 1))

    def see_first(self, tile: Singles, queries: slice, candidates: slice) -> None:
        """Looks for the first candidate of each query. Its index is sought only where it is a better one."""
        best = np.fmax.reduce(tile, axis=1)
        better = np.flatnonzero(best > self._best[queries])
        self._best[queries][better] = best[better]
        self._first[queries][better] = candidates.start + (tile[better] == best[better, None]).argmax(axis=1)

    def count(self, tile: Singles, queries: slice, exact: _Exact) -> None:
        """Counts the candidates that are not behind the right answer."""
        low, high = self._low[queries, None], self._high[queries, None]
        behind, perhaps = _count(tile < low), _count(tile < high)  # NaN is never behind
        unclear = np.flatnonzero(behind != perhaps)
        least = self._least[queries]
        if int((perhaps - behind).sum()) * _PAIR_COST > tile.size:
            behind = _count(exact.tile() < least[:, None])
        elif len(unclear):
            near = tile[unclear]
            row, column = np.nonzero(~(near < low[unclear]) & (near < high[unclear]))
            row = unclear[row]
            behind += np.bincount(row[exact.pairs(row, column) < least[row]], minlength=len(behind))
        self._ahead[queries] += tile.shape[1] - behind

    def result(self) -> Found:
        ranks, first = 1 + self._ahead, self._first
        broken = np.flatnonzero(np.isnan(self._candidates.scales))
        if len(broken):
            first = np.where(first < 0, first, broken[0])
        lost = np.isnan(self._least)
        return Found(ranks=np.where(lost, len(self._candidates) + 1, ranks), first=first)


@dataclass(frozen=True, slots=True)
class _Exact:
    """The same tile in float64, all of it or some pairs. `inside` are the right answers in it."""

    queries: Rows
    candidates: Rows
    rows: slice
    columns: slice
    inside: tuple[Ints, ...]

    def turned(self) -> _Exact:
        return _Exact(self.candidates, self.queries, self.columns, self.rows, self.inside[::-1])

    def tile(self) -> Doubles:
        result: Doubles = self.queries.unit(self.rows) @ self.candidates.unit(self.columns).T
        result[self.inside] = -np.inf
        return result

    def pairs(self, row: Ints, column: Ints) -> Doubles:
        """Of places in the tile that are no right answers, [n]."""
        return cosines(self.queries, self.candidates, self.rows.start + row, self.columns.start + column)


def _within(places: Ints, part: slice) -> Masks:
    inside: Masks = (places >= part.start) & (places < part.stop)
    return inside


def _count(mask: Masks) -> Ints:
    """True ones of each row."""
    counts: Ints = np.count_nonzero(mask, axis=1)
    return counts


def _parts(count: int, size: int | None = None) -> Iterator[slice]:
    """The numbers 0 to `count` in slices of `size`, by default a tile's."""
    step = size or _TILE
    yield from (slice(start, min(start + step, count)) for start in range(0, count, step))
