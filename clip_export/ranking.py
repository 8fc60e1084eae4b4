"""Do pairs still find each other? Recall, loss and rank flips of an engine beside those of its reference.

What is searched is each picture and each caption once, however many pairs it is in: an answer that is given twice would
take two places. Any caption of a picture is right for it, and any picture of a caption. Recall is the mean over pairs.
Where every picture has as many captions as the next (five in COCO and in Flickr30k) this is the figure that papers
state: 5,000 pictures against 25,000 captions.

    ranks = compare_ranks(ref_images, ref_texts, new_images, new_texts, captions=captions, pictures=files, scale=100.0)
    ranks.reference.recall[1].image_to_text, ranks.recall_difference(1).image_to_text, ranks.flips[0]

`similarity_tiles` says how ties and what is not a number are counted, and why this fits in memory.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from clip_export.contrastive import Loss, SigmoidLoss, SoftmaxLoss
from clip_export.retrieval import TIE, Recall
from clip_export.similarity_tiles import Found, Measured, Rows, cosines, measure

__all__ = ["RECALL_AT", "Direction", "Flip", "ModelRanks", "RankComparison", "compare_ranks"]

Floats: TypeAlias = npt.NDArray[np.floating]
Ints: TypeAlias = npt.NDArray[np.int64]
Direction: TypeAlias = Literal["image to text", "text to image"]

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRanks:
    """One model on the pairs: recall at each of RECALL_AT, and the contrastive loss; NaN where a row has no length."""

    recall: dict[int, Recall]
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """A query whose right answer changed its rank. All but the ranks are numbers of pairs: the first that holds it.

    `right` is the right answer that is nearest by the reference. `overtook` is, of the wrong candidates that were
    behind the right answer and are not any more, the one that is nearest by the engine; None where there is none, as
    for a rank that rose. The firsts are what comes first; None where nothing is found.
    """

    direction: Direction
    query: int
    right: int
    reference_rank: int
    engine_rank: int
    reference_first: int | None
    engine_first: int | None
    overtook: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankComparison:
    """What `compare_ranks` found. `pairs` were given, of so many different `pictures` and `captions`.

    `agreement` is the share of pairs, 0 to 1, for which the engine finds first what the reference finds first.
    `flips` are the largest, in both directions.
    """

    pairs: int
    pictures: int
    captions: int
    reference: ModelRanks
    engine: ModelRanks
    agreement: Recall
    flips: tuple[Flip, ...]

    @property
    def loss_difference(self) -> float:
        """Engine minus reference."""
        return self.engine.loss - self.reference.loss

    def recall_difference(self, k: int) -> Recall:
        """Engine minus reference, at one of RECALL_AT: -1 to 1, below 0 where the engine finds less."""
        found, expected = self.engine.recall[k], self.reference.recall[k]
        return Recall(
            image_to_text=found.image_to_text - expected.image_to_text,
            text_to_image=found.text_to_image - expected.text_to_image,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a loss that is not a number is None."""
        models = {"reference": self.reference, "engine": self.engine}
        recall = {
            str(k): {name: _recall(model.recall[k]) for name, model in models.items()}
            | {"difference": _recall(self.recall_difference(k))}
            for k in RECALL_AT
        }
        losses = {name: _number(model.loss) for name, model in models.items()}
        return {
            "pairs": self.pairs,
            "pictures": self.pictures,
            "captions": self.captions,
            "recall": recall,
            "loss": losses | {"difference": _number(self.loss_difference)},
            "agreement": _recall(self.agreement),
            "flips": [{name: getattr(flip, name) for name in Flip.__slots__} for flip in self.flips],
        }


def compare_ranks(
    reference_images: Floats,
    reference_texts: Floats,
    engine_images: Floats,
    engine_texts: Floats,
    *,
    captions: Sequence[Hashable],
    pictures: Sequence[Hashable],
    scale: float,
    bias: float | None = None,
    flips: int = 12,
) -> RankComparison:
    """Compare an engine with its reference on pairs.

    Embeddings are float [pairs, dim], of whatever length; row i of all four belongs to pair i, whose text is
    `captions[i]` and whose image is told by `pictures[i]`. Of several rows of one caption or picture the first is
    taken; it finds nothing where any of them is zero or not finite. `scale` multiplies the cosine, exp(logit_scale) of
    the spec; with a `bias` the loss is SigLIP's, without one CLIP's. `flips` is how many are given.
    Raises ValueError for other shapes and for no pairs.
    """
    sides = (reference_images, reference_texts), (engine_images, engine_texts)
    _check([array for side in sides for array in side], captions, pictures)
    pairs = _Pairs.of(pictures, captions)
    models = [_Model.of(images, texts, pairs, scale, bias) for images, texts in sides]
    reference, engine = (model.measured for model in models)
    return RankComparison(
        pairs=len(captions),
        pictures=len(pairs.pictures),
        captions=len(pairs.captions),
        reference=_summary(reference, pairs),
        engine=_summary(engine, pairs),
        agreement=Recall(
            image_to_text=_agreement(models[0].images, models[0].texts, reference.images, engine.images, pairs.picture),
            text_to_image=_agreement(models[0].texts, models[0].images, reference.texts, engine.texts, pairs.caption),
        ),
        flips=_flips(models[0], models[1], pairs, flips),
    )


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Pairs by number. `picture` and `caption`, int64 [pairs], number the different ones, `pictures` and `captions`
    are the pairs in which these are first. `right`, int64 [different pairs, 2], is sorted; `times`: how often each is.
    """

    picture: Ints
    caption: Ints
    pictures: Ints
    captions: Ints
    right: Ints
    times: Ints

    @classmethod
    def of(cls, pictures: Sequence[Hashable], captions: Sequence[Hashable]) -> _Pairs:
        (first_pictures, picture), (first_captions, caption) = _numbered(pictures), _numbered(captions)
        right, times = np.unique(np.stack([picture, caption], axis=1), axis=0, return_counts=True)
        return cls(picture, caption, first_pictures, first_captions, right, times)


@dataclass(frozen=True, slots=True)
class _Model:
    images: Rows
    texts: Rows
    measured: Measured

    @classmethod
    def of(cls, images: Floats, texts: Floats, pairs: _Pairs, scale: float, bias: float | None) -> _Model:
        loss: Loss = SoftmaxLoss(scale, pairs.right, pairs.times)
        if bias is not None:
            loss = SigmoidLoss(scale, bias, pairs.right, pairs.times)
        different = Rows.of(images, pairs.picture), Rows.of(texts, pairs.caption)
        return cls(*different, measure(*different, pairs.right, loss))


def _summary(measured: Measured, pairs: _Pairs) -> ModelRanks:
    by_image, by_text = measured.images.ranks[pairs.picture], measured.texts.ranks[pairs.caption]
    # A rank beyond the last is that of a query that finds nothing, for every k.
    within = [(k, min(k, len(pairs.captions)), min(k, len(pairs.pictures))) for k in RECALL_AT]
    recall = {
        k: Recall(image_to_text=float((by_image <= texts).mean()), text_to_image=float((by_text <= images).mean()))
        for k, texts, images in within
    }
    return ModelRanks(recall=recall, loss=measured.loss)


def _agreement(queries: Rows, candidates: Rows, expected: Found, found: Found, of_pairs: Ints) -> float:
    """The share of pairs for which `found` is first what is `expected`, or as near by the reference."""
    both = np.flatnonzero((found.first >= 0) & (expected.first >= 0))
    new, old = (cosines(queries, candidates, both, side.first[both]) for side in (found, expected))
    same = np.zeros(len(found.first), np.bool_)
    same[both] = (found.first[both] == expected.first[both]) | (new >= old - TIE)
    return float(same[of_pairs].mean())


def _flips(reference: _Model, engine: _Model, pairs: _Pairs, most: int) -> tuple[Flip, ...]:
    """The largest, by the ratio of the ranks: from 1 to 20 is more than from 50,000 to 60,000."""
    right, old, new = pairs.right, reference.measured, engine.measured
    both = [
        _Flips("image to text", (reference.images, reference.texts), (engine.images, engine.texts), old.images,
               new.images, right, pairs.pictures, pairs.captions),
        _Flips("text to image", (reference.texts, reference.images), (engine.texts, engine.images), old.texts,
               new.texts, right[:, ::-1], pairs.captions, pairs.pictures),
    ]  # fmt: skip
    largest = sorted((-size, direction, query) for direction, side in enumerate(both) for size, query in side.sizes())
    return tuple(both[direction].flip(query) for _, direction, query in largest[:most])


@dataclass(frozen=True, slots=True)
class _Flips:
    """Flips of one direction. `reference` and `engine` are (queries, candidates); `right` int64 [n, 2] the same."""

    direction: Direction
    reference: tuple[Rows, Rows]
    engine: tuple[Rows, Rows]
    old: Found
    new: Found
    right: Ints
    query_pairs: Ints
    candidate_pairs: Ints

    def sizes(self) -> list[tuple[float, int]]:
        """Of each query that moved."""
        ratios = np.abs(np.log(self.new.ranks / self.old.ranks))
        return [(float(ratios[query]), int(query)) for query in np.flatnonzero(ratios)]

    def flip(self, query: int) -> Flip:
        right = self.right[self.right[:, 0] == query, 1]
        before, after = (_against_all(*side, query) for side in (self.reference, self.engine))
        best = int(right[np.argmax(before[right])])
        overtook = ~(after < after[right].max() - TIE) & (before < before[best] - TIE)
        overtook[right] = False
        nearest = np.flatnonzero(overtook)
        return Flip(
            direction=self.direction,
            query=int(self.query_pairs[query]),
            right=int(self.candidate_pairs[best]),
            reference_rank=int(self.old.ranks[query]),
            engine_rank=int(self.new.ranks[query]),
            reference_first=self._pair(self.old.first[query]),
            engine_first=self._pair(self.new.first[query]),
            overtook=self._pair(nearest[np.argmax(after[nearest])]) if len(nearest) else None,
        )

    def _pair(self, candidate: int) -> int | None:
        return None if candidate < 0 else int(self.candidate_pairs[candidate])


def _against_all(queries: Rows, candidates: Rows, query: int) -> npt.NDArray[np.float64]:
    count = len(candidates)
    return cosines(queries, candidates, np.full(count, query), np.arange(count))


def _numbered(names: Sequence[Hashable]) -> tuple[Ints, Ints]:
    """Where each different name is first, and the number of each name among these."""
    numbers: dict[Hashable, int] = {}
    of_names = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
    return np.unique(of_names, return_index=True)[1].astype(np.int64), of_names


def _check(arrays: Sequence[Floats], captions: Sequence[Hashable], pictures: Sequence[Hashable]) -> None:
    counts = [*map(len, arrays), len(captions), len(pictures)]
    if len(set(counts)) != 1 or not counts[0]:
        names = "images and texts of the reference, of the engine, captions and pictures"
        raise ValueError(f"expected one of each for each pair and at least 1, found {counts} {names}")
    shapes = [array.shape for array in arrays]
    if any(len(shape) != 2 for shape in shapes) or shapes[0] != shapes[1] or shapes[2] != shapes[3]:
        raise ValueError(f"embeddings of shapes {shapes}, expected [pairs, dim], of one dim for each model")


def _recall(recall: Recall) -> dict[str, float]:
    return {"image_to_text": recall.image_to_text, "text_to_image": recall.text_to_image}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
