"""May an engine's vectors be mixed with those of an existing index, or does the index have to be made again?

An index is given, and what the engine makes of the same inputs in the same order. Three questions are put to them:

- Is each new vector where its old one is? The cosine of the two.
- Does a search find the same? The ten nearest in the index, for the new vector and for the old one that it replaces.
  The input itself is left out: it would be found in any case.
- Are scores the same? The cosines to what the old vector found, for whoever cuts off at a score.

`LIMITS` is the one table of what is asked for. Searches are made for at most QUERIES inputs, spread evenly over all, in
the whole index, which may be a memory-mapped file: a block of it is read at a time.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from clip_export.cosine import unit_rows
from clip_export.errors import InputError
from clip_export.index_search import Neighbours, blocks, nearest, scores_of
from clip_export.pairs import spread
from clip_export.retrieval import TIE

__all__ = [
    "LEAST",
    "LIMITS",
    "NEIGHBOURS",
    "QUERIES",
    "IndexSafety",
    "Limit",
    "check_index",
    "compare_index",
    "open_index",
]

Floats: TypeAlias = npt.NDArray[np.floating]
Doubles: TypeAlias = npt.NDArray[np.float64]

NEIGHBOURS = 10
QUERIES = 2000
LEAST = 10 * NEIGHBOURS + 1  # of fewer, the nearest are a large part of all, and stay the same by chance
_UNIT = 1e-2  # lengths this near to 1 are those of normalized rows: float16 rounds them by less


@dataclass(frozen=True, slots=True)
class Limit:
    """The least that a figure may be; with `either_way` the most that it may be, whatever its sign. And why."""

    value: float
    what: str
    why: str
    either_way: bool = False

    def kept(self, figure: float) -> bool:
        """Whether `figure` is within. What is not a number is not."""
        return abs(figure) <= self.value if self.either_way else figure >= self.value


_HALF_A_DIGIT = "cut-offs are set to two digits, such as 0.28: what moves by half of the last one is on the other side"

# By the names of the fields that they are for.
LIMITS = {
    "own_cosine_p1": Limit(
        0.999,
        "cosine of a new vector to its old one, 1st percentile",
        "scores against the two differ by at most sqrt(2 - 2 cosine), 0.045, and in a random direction by 0.002",
    ),
    "neighbour_overlap": Limit(
        0.95,
        f"share of the {NEIGHBOURS} nearest that stay the same",
        "approximate indexes are commonly tuned to a recall of 0.95: the engine would cost more than the index itself",
    ),
    "first_agreement": Limit(
        0.98,
        "share of searches whose first result stays the same",
        "the first is what is shown or taken, and stands further apart from the rest than the tenth does",
    ),
    "shift_mean": Limit(0.001, "mean change of a score", "a cut-off would let through more everywhere, or less", True),
    "shift_p1": Limit(0.005, "change of a score, 1st percentile", _HALF_A_DIGIT, True),
    "shift_p99": Limit(0.005, "change of a score, 99th percentile", _HALF_A_DIGIT, True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSafety:
    """What `compare_index` found: float shares and cosines, all of them finite.

    `vectors` of `dim` are in the index; `queries` of them were searched for. `own_cosine_*` are of each new vector to
    its own old one, over all. `neighbour_overlap` and `first_agreement`, 0 to 1, compare what the new vectors find in
    the old index with what the old vectors find in it. `shift_*` are new scores minus old, of what the old ones found;
    `shift_max` is the largest either way. `misplaced` is the share of new vectors that are nearer than their own old
    one, by more than a tie, to another's: large where the order is not the same.
    `repeated` rows of the index are equal to an earlier one; `normalized` is False where lengths in the index were
    other than 1: cosines are what is compared.
    """

    vectors: int
    dim: int
    queries: int
    own_cosine_min: float
    own_cosine_p1: float
    own_cosine_mean: float
    neighbour_overlap: float
    first_agreement: float
    shift_mean: float
    shift_p1: float
    shift_p99: float
    shift_max: float
    misplaced: float
    repeated: int
    normalized: bool

    @property
    def missed(self) -> tuple[str, ...]:
        """What keeps its limit in `LIMITS` not, in words; empty where vectors may be mixed."""
        found = {name: getattr(self, name) for name in LIMITS}
        return tuple(
            f"{limit.what}: {found[name]:.4g}, expected {'within' if limit.either_way else 'at least'} {limit.value:g}"
            for name, limit in LIMITS.items()
            if not limit.kept(found[name])
        )

    @property
    def safe(self) -> bool:
        """Whether new vectors may be mixed with old ones."""
        return not self.missed

    @property
    def verdict(self) -> str:
        """A sentence or two: what to do, and why."""
        if self.safe:
            return (
                "Mix freely: new vectors may be added to this index and searched for in it. "
                f"{self.neighbour_overlap:.1%} of the {NEIGHBOURS} nearest stay the same, and scores change by "
                f"{round(self.shift_mean, 5) + 0.0:+.5f} on average."
            )
        if self.misplaced > 0.5:
            return (
                f"Not the same inputs: {self.misplaced:.0%} of the new vectors are nearer to another's old vector than "
                "to their own. Give the inputs of the index in its order; if they are, re-embed: another model made it."
            )
        return f"Re-embed: do not mix new vectors with those of this index. {'; '.join(self.missed)}."

    @property
    def notes(self) -> tuple[str, ...]:
        """What else a reader should know, in words."""
        notes = []
        if not self.normalized:
            notes.append(
                "the vectors of the index are not of length 1, and were normalized for this: an index that is searched "
                "by dot product takes new vectors of the same lengths only"
            )
        if self.repeated:
            notes.append(f"{self.repeated} of {self.vectors} vectors of the index are equal to an earlier one")
        if self.queries < self.vectors:
            notes.append(f"{self.queries} of {self.vectors} vectors, spread evenly, were searched for in all of them")
        return tuple(notes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the verdict and the limits."""
        limits = {name: limit.value for name, limit in LIMITS.items()}
        said = {"safe": self.safe, "verdict": self.verdict, "missed": list(self.missed), "notes": list(self.notes)}
        return asdict(self) | said | {"limits": limits}


def open_index(path: str | os.PathLike[str]) -> Floats:
    """The vectors of the .npy file at `path`, float [n, dim], memory-mapped and not read yet.

    Raises InputError for what is no array of floats of two dimensions, and for one of Python objects, which would run
    code when it is read.
    """
    name = os.fsdecode(path)
    try:
        with Path(path).open("rb") as file:
            start = file.read(len(np.lib.format.MAGIC_PREFIX))
        if start != np.lib.format.MAGIC_PREFIX:
            raise InputError(f"{name} is not a .npy file", hint="save the vectors with numpy.save(FILE, vectors)")
        index: Floats = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}", hint="check the path") from error
    except (ValueError, EOFError, SyntaxError, TypeError, OverflowError) as error:  # whatever is wrong with its header
        hint = "it is cut short or damaged, or holds Python objects: save a plain array of float32"
        raise InputError(f"{name} cannot be read: {error}", hint=hint) from error
    _check_array(index, name)
    return index


def compare_index(index: Floats, engine: Floats, *, queries: int = QUERIES, name: str = "the index") -> IndexSafety:
    """Compare `engine`, float [n, dim], with the vectors of an `index`, float [n, dim], made of the same inputs.

    float16 to float64, of any length; `index` is read in blocks, twice. Raises InputError, which calls the index
    `name`, for other counts or dimensions, for fewer than LEAST vectors, and for a row that is zero or not finite.
    """
    _check_shape(index, len(engine), engine.shape[1], name)
    own, normalized, repeated = _one_by_one(index, engine, name)
    asked = spread(len(index), queries)
    new, old = unit_rows(engine[asked]), unit_rows(np.asarray(index[asked]))
    found, expected = nearest(index, [new, old], asked, NEIGHBOURS)
    shift = scores_of(index, new, expected.rows) - expected.scores
    return IndexSafety(
        vectors=len(index),
        dim=index.shape[1],
        queries=len(asked),
        own_cosine_min=float(own.min()),
        own_cosine_p1=float(np.quantile(own, 0.01)),
        own_cosine_mean=float(own.mean()),
        neighbour_overlap=_overlap(index, old, found, expected, NEIGHBOURS),
        first_agreement=_overlap(index, old, found, expected, 1),
        shift_mean=float(shift.mean()),
        shift_p1=float(np.quantile(shift, 0.01)),
        shift_p99=float(np.quantile(shift, 0.99)),
        shift_max=float(np.abs(shift).max()),
        misplaced=float((found.scores[:, 0] > own[asked] + TIE).mean()),
        repeated=repeated,
        normalized=normalized,
    )


def check_index(index: Floats, count: int, dim: int, *, name: str = "the index") -> None:
    """Raise InputError for an index that cannot be compared with `count` vectors of `dim`; reads all of it, once."""
    _check_shape(index, count, dim, name)
    for part in blocks(len(index)):
        _lengths(np.asarray(index[part]), part.start, name)


def _check_shape(index: Floats, count: int, dim: int, name: str) -> None:
    _check_array(index, name)
    if index.shape[1] != dim:
        raise InputError(
            f"{name} has vectors of {index.shape[1]} dimensions, the engine gives {dim}",
            hint="another model made it: re-embed, or verify the bundle of that model",
        )
    if len(index) != count:
        raise InputError(
            f"{name} has {len(index)} vectors, and {count} inputs were given",
            hint="give the inputs of the index, all of them, in its order",
        )
    if count < LEAST:
        raise InputError(
            f"{name} has {count} vectors, expected at least {LEAST}: of fewer, the {NEIGHBOURS} nearest say nothing",
            hint="some thousand are a good number",
        )


def _overlap(index: Floats, old: Doubles, found: Neighbours, expected: Neighbours, k: int) -> float:
    """The share of the first k of `found` that are as near to the old vectors as the k-th that these found.

    By score and not by row: of equal vectors in the index, a search may give any.
    """
    kept = scores_of(index, old, found.rows[:, :k]) >= expected.scores[:, k - 1, None] - TIE
    return float(kept.mean())


def _one_by_one(index: Floats, engine: Floats, name: str) -> tuple[Doubles, bool, int]:
    """Cosines of the rows of both, [n]; whether the index is normalized; how many of its rows are repeated."""
    own = np.empty(len(index))
    normalized = True
    seen: set[int] = set()
    for part in blocks(len(index)):
        rows = np.asarray(index[part])
        lengths = _lengths(rows, part.start, name)
        _lengths(engine[part], part.start, "what the engine gave")
        own[part] = np.einsum("nd,nd->n", unit_rows(rows), unit_rows(engine[part]))
        normalized = normalized and bool((np.abs(lengths - 1) < _UNIT).all())
        # 8 bytes a row, whatever its dimensions: two rows of a million share them by accident once in 10^7 indexes.
        seen.update(hash(row.tobytes()) for row in rows + 0)  # + 0: -0.0 is 0.0
    return own, normalized, len(index) - len(seen)


def _lengths(rows: Floats, first: int, name: str) -> Doubles:
    """Of each row; raises InputError for the first that has none. `first` is the number of rows[0]."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide = rows.astype(np.float64)
        lengths: Doubles = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        row = rows[bad[0]]
        what = "is all zeros" if not row.any() else "holds NaN" if np.isnan(row).any() else "is not finite"
        raise InputError(
            f"{name}, row {first + bad[0]} (from 0): the vector {what}",
            hint="leave it out, with its input, or re-embed",
        )
    return lengths


def _check_array(index: Floats, name: str) -> None:
    if index.ndim != 2 or not index.shape[1] or index.dtype.kind != "f":
        raise InputError(
            f"{name} is an array of {index.dtype} {list(index.shape)}, expected floats [vectors, dim]",
            hint="save one row for each vector: numpy.save(FILE, vectors.astype('float32'))",
        )
