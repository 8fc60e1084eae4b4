"""How well embeddings find each other: recall of image and text pairs, and whether neighbours stay what they were.

Similarity is the cosine, taken in float64 so that equal rows are equally near whatever the order of summation. It is
computed block by block: 100,000 rows against 100,000 take 40 GB as one matrix in float32, and 128 MiB here beside the
rows themselves (in float64, once).

Ties and what is not a number count against the model. The field's scripts sort similarities and look where the right
one lands (open_clip's `get_clip_metrics`), which leaves a tie to the sort: a model that maps everything onto one point
could score anything. Here a wrong candidate that is as near as the right one comes before it. A row that is zero or not
finite finds nothing; as a candidate it comes before all others, where `torch.topk` puts NaN.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Recall", "pair_ranks", "recall_at", "top1_agreement"]

Floats: TypeAlias = npt.NDArray[np.floating]
Doubles: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Masks: TypeAlias = npt.NDArray[np.bool_]

_BLOCK = 2**24  # similarities held at once: 128 MiB of float64
# Cosines nearer than this are ties: rounding in float64 moves equal ones apart by less, and a step of float32 in a
# row moves its cosines by about 1e-8.
TIE = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Shares of rows, 0 to 1, for which a right answer is among the k nearest."""

    image_to_text: float
    text_to_image: float


def recall_at(
    images: Floats,
    texts: Floats,
    k: int = 1,
    *,
    labels: Sequence[Hashable] | None = None,
    pictures: Sequence[Hashable] | None = None,
) -> Recall:
    """Recall at `k` of pairs, both ways. Arguments as those of `pair_ranks`, which serves several k at once."""
    if k < 1:
        raise ValueError(f"recall at {k}, expected at least 1")
    by_image, by_text = pair_ranks(images, texts, labels=labels, pictures=pictures)
    least = min(k, len(by_image))  # a rank beyond the last is that of a row that finds nothing, for every k
    return Recall(image_to_text=float((by_image <= least).mean()), text_to_image=float((by_text <= least).mean()))


def pair_ranks(
    images: Floats,
    texts: Floats,
    *,
    labels: Sequence[Hashable] | None = None,
    pictures: Sequence[Hashable] | None = None,
) -> tuple[Ints, Ints]:
    """Where the best right answer of each row stands: of each image among the texts, and the other way; from 1.

    `images` and `texts` are float [n, dim], row i of one belongs to row i of the other. Rows with equal `labels` (the
    captions, say) hold the same text, rows with equal `pictures` (the files) the same image; each is right for the
    others. The ranks are int64 [n]; n + 1 is that of a row that finds nothing. Raises ValueError for other shapes.
    """
    _check_shapes(images, texts)
    count = len(images)
    if len(texts) != count or not count:
        raise ValueError(f"{count} images and {len(texts)} texts, expected as many of both, and at least 1")
    same = [_codes(names, count) for names in (labels, pictures) if names is not None]
    candidates = _unit(texts)
    by_image, by_text = (right[:, None] - TIE for right in _best_right(images, candidates, same))
    image_ranks, text_ranks = np.ones(count, np.int64), np.ones(count, np.int64)
    for rows in _blocks(count, count):
        cosine = _unit(images[rows]) @ candidates.T
        wrong = _wrong(rows, count, same)
        # Not "at least as near", which would let a candidate that is not a number pass.
        image_ranks[rows] += (~(cosine < by_image[rows]) & wrong).sum(axis=1)
        text_ranks += (~(cosine < by_text.T) & wrong).sum(axis=0)
    image_ranks[np.isnan(by_image[:, 0])] = count + 1
    text_ranks[np.isnan(by_text[:, 0])] = count + 1
    return image_ranks, text_ranks


def top1_agreement(found: Floats, expected: Floats, others: Floats) -> float:
    """The share of rows, 0 to 1, whose nearest of `others` [m, dim] is the same for `found` and `expected` [n, dim].

    Where several are equally near, all that are nearest to the row found have to be nearest to the one expected: so a
    tie that was there before is no loss, and a new one is. Raises ValueError for other shapes.
    """
    _check_shapes(found, expected, others)
    if len(found) != len(expected) or not len(found) or not len(others):
        raise ValueError(
            f"{len(found)} rows, {len(expected)} expected and {len(others)} others: expected as many of the first two, "
            "and at least 1 of each"
        )
    candidates = _unit(others)
    agree = 0
    for rows in _blocks(len(found), 2 * len(others)):
        new, old = (_nearest(_unit(array[rows]) @ candidates.T) for array in (found, expected))
        agree += int((new.any(axis=1) & ~(new & ~old).any(axis=1)).sum())
    return agree / len(found)


def _nearest(cosine: Doubles) -> Masks:
    """Which of each row's candidates are nearest, ties included; none where one of them is not a number."""
    nearest: Masks = cosine >= cosine.max(axis=1, keepdims=True) - TIE
    return nearest


def _best_right(images: Floats, candidates: Doubles, same: Sequence[Ints]) -> tuple[Doubles, Doubles]:
    """The cosine of each row's best right answer, [n] for images and [n] for texts; NaN where any of them is NaN."""
    by_image = np.concatenate(
        [np.einsum("nd,nd->n", _unit(images[rows]), candidates[rows]) for rows in _blocks(*candidates.shape)]
    )
    by_text = by_image.copy()
    for codes in same:
        for group in _groups(codes):
            texts = candidates[group]
            for rows in _blocks(len(group), len(group)):
                cosine = _unit(images[group[rows]]) @ texts.T
                by_image[group[rows]] = np.maximum(by_image[group[rows]], cosine.max(axis=1))
                by_text[group] = np.maximum(by_text[group], cosine.max(axis=0))
    return by_image, by_text


def _wrong(rows: slice, count: int, same: Sequence[Ints]) -> Masks:
    """Which of all `count` candidates are wrong for `rows`: bool [rows, count]."""
    wrong: Masks = np.arange(rows.start, rows.stop)[:, None] != np.arange(count)
    for codes in same:
        wrong &= codes[rows, None] != codes
    return wrong


def _codes(names: Sequence[Hashable], count: int) -> Ints:
    """A number for each name, the same for the same."""
    if len(names) != count:
        raise ValueError(f"{len(names)} labels for {count} pairs, expected one for each")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def _groups(codes: Ints) -> Iterator[Ints]:
    """The rows of each code that more than one row has."""
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order])) + 1
    yield from (group for group in np.split(order, starts) if len(group) > 1)


def _unit(rows: Floats) -> Doubles:
    """The rows in float64 at length 1, [n, dim]; NaN for one that is zero or not finite."""
    wide: Doubles = np.array(rows, np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        wide /= np.sqrt(np.einsum("nd,nd->n", wide, wide))[:, None]
    wide[~np.isfinite(wide).all(axis=1)] = np.nan  # all of it: a sum of zeros would pass for a cosine
    return wide


def _blocks(count: int, width: int) -> Iterator[slice]:
    """The rows 0 to `count` in slices of at most _BLOCK / `width`."""
    size = max(1, _BLOCK // max(width, 1))
    yield from (slice(start, min(start + size, count)) for start in range(0, count, size))


def _check_shapes(*arrays: Floats) -> None:
    shapes = [array.shape for array in arrays]
    if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"embeddings of shapes {shapes}, expected [rows, dim] of one dim")
