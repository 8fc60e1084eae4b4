"""Pairs through a model: embeddings of each picture and caption, and what they find beside a reference.

Pictures stay where they are: each model goes through the source once, a few pictures at a time, and keeps embeddings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from clip_export.cosine import unit_rows
from clip_export.encoder import Encoder, Floats
from clip_export.pair_sources import Chunk, Failure, PairSource, decoded
from clip_export.preprocess import Preprocessor
from clip_export.progress import Progress
from clip_export.ranking import RankComparison, compare_ranks
from clip_export.retrieval import Recall
from clip_export.spec import ModelSpec
from clip_export.verifying.zero_shot import ZeroShot, label_embeddings, name_pictures, zero_shot

__all__ = ["EmbeddedPairs", "Model", "Retrieval", "compare_pairs", "embed_pairs", "model_of", "read_pictures"]

_SHOWN = 12  # pictures and captions in the matrices of a report
_TEXTS = 1024  # encoded at once: a graph may give 77 hidden states for each

Texts = Callable[[Sequence[str]], Floats]


@dataclass(frozen=True, slots=True)
class Model:
    """What turns texts, and a chunk of decoded pictures, into embeddings float32 [n, dim] of whatever length."""

    texts: Texts
    pictures: Callable[[Chunk], Floats]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddedPairs:
    """Pairs with one model's embeddings, float32 [pairs, dim] of each side.

    By pair: the `names` and the digests (`pictures`) of its picture, and its `captions`. `named` has for every
    picture, in its order, the number of the label that it is nearest to; `truth` that of its own, by picture; both are
    empty where fewer than two labels are known. `failures` could not be decoded, and were left out.
    """

    names: Sequence[str]
    pictures: Sequence[str]
    captions: Sequence[str]
    image_embeddings: Floats
    text_embeddings: Floats
    labels: Sequence[str] = ()
    named: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    truth: Mapping[int, int] = field(default_factory=dict)
    failures: Sequence[Failure] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """What an engine finds among pairs beside its reference.

    `drop` and `allowed` are of R@1, in points, in both directions. One picture, or one caption, is never too many: with
    few pairs it is many points, so `allowed` is no less.

    `names` and `captions`, by number of the pair, are those of the pairs that the flips of `ranks` name, and of
    `shown`: the first pairs of different pictures, whose cosines by reference and engine are `cosines`, float64 [2, n,
    n], images down. `same` says that the engine is the reference itself.
    """

    source: str
    ranks: RankComparison
    zero_shot: ZeroShot | None
    drop: Recall
    allowed: Recall
    names: Mapping[int, str]
    captions: Mapping[int, str]
    shown: Sequence[int]
    cosines: np.ndarray = field(repr=False, compare=False)
    same: bool = False

    @property
    def passed(self) -> bool:
        """Whether R@1 falls by no more than is allowed."""
        return self.found_by_images and self.found_by_texts

    @property
    def found_by_images(self) -> bool:
        """Whether R@1 of image to text falls by no more than is allowed."""
        return self.drop.image_to_text <= self.allowed.image_to_text

    @property
    def found_by_texts(self) -> bool:
        """Whether R@1 of text to image falls by no more than is allowed."""
        return self.drop.text_to_image <= self.allowed.text_to_image

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; flips name pictures and captions beside the numbers of their pairs."""
        ranks = self.ranks.to_dict()
        for flip in ranks["flips"]:
            for role in ("query", "right", "reference_first", "engine_first", "overtook"):
                pair = flip[role]
                flip[role] = (
                    None
                    if pair is None
                    else {"pair": pair, "picture": self.names[pair]} | {"caption": self.captions[pair]}
                )
        judged = {"recall_drop": asdict(self.drop), "allowed_recall_drop": asdict(self.allowed), "passed": self.passed}
        shot = None if self.zero_shot is None else self.zero_shot.to_dict()
        return {"source": self.source, **ranks, "zero_shot": shot, **judged, "is_reference": self.same}


def model_of(encoder: Encoder) -> Model:
    """An engine behind an Encoder."""
    return Model(
        texts=lambda texts: encoder.encode_text(texts, truncate=True, normalize=False),
        pictures=lambda chunk: encoder.encode_pixels(chunk.pixels, normalize=False),
    )


def embed_pairs(
    source: PairSource, model: Model, spec: ModelSpec, *, skip_errors: bool, title: str, progress: Progress
) -> EmbeddedPairs:
    """Both sides of all pairs of `source` by `model`. Raises InputError as `decoded` does."""
    assert spec.preprocess is not None
    names, pictures, captions, of_pictures = list[str](), list[str](), list[str](), list[str]()
    failures: list[Failure] = []
    blocks, counts = list[Floats](), list[int]()
    attempt = Preprocessor(spec.preprocess).attempt
    for chunk in decoded(source, attempt, skip_errors=skip_errors, report=failures.append):
        blocks.append(model.pictures(chunk))
        for sample in chunk.samples:
            counts.append(len(sample.captions))
            of_pictures.append(sample.label)
            names += [sample.name] * len(sample.captions)
            pictures += [sample.picture] * len(sample.captions)
            captions += sample.captions
        progress(f"{title}: pairs", len(captions), 0)
    images = np.concatenate(blocks)
    labels = sorted(set(of_pictures) - {""})
    truth = {row: labels.index(label) for row, label in enumerate(of_pictures) if label} if len(labels) > 1 else {}
    return EmbeddedPairs(
        names=names,
        pictures=pictures,
        captions=captions,
        image_embeddings=np.repeat(images, counts, axis=0),
        text_embeddings=_texts(captions, model.texts),
        labels=labels,
        named=name_pictures(images, label_embeddings(labels, model.texts)) if truth else np.empty(0, np.int64),
        truth=truth,
        failures=failures,
    )


def compare_pairs(
    found: EmbeddedPairs, expected: EmbeddedPairs, spec: ModelSpec, *, source: str, scale: float, allowed: float
) -> Retrieval:
    """An engine's embeddings of pairs beside the reference's of the same.

    `scale` is exp(logit_scale), `allowed` the points by which R@1 may fall.
    """
    ranks = compare_ranks(
        expected.image_embeddings,
        expected.text_embeddings,
        found.image_embeddings,
        found.text_embeddings,
        captions=found.captions,
        pictures=found.pictures,
        scale=scale,
        bias=spec.logit_bias,
    )
    shot = None
    if found.truth:
        shot = zero_shot(expected.named, found.named, found.truth, labels=len(found.labels))
    flips = [(flip.query, flip.right, flip.reference_first, flip.engine_first, flip.overtook) for flip in ranks.flips]
    shown = sorted({picture: pair for pair, picture in reversed(list(enumerate(found.pictures)))}.values())[:_SHOWN]
    named = {pair for flip in flips for pair in flip if pair is not None} | set(shown)
    return Retrieval(
        source=source,
        ranks=ranks,
        zero_shot=shot,
        drop=_points(ranks.recall_difference(1)),
        allowed=Recall(
            image_to_text=max(allowed, 100 * _most(found.pictures) / ranks.pairs),
            text_to_image=max(allowed, 100 * _most(found.captions) / ranks.pairs),
        ),
        names={pair: found.names[pair] for pair in sorted(named)},
        captions={pair: found.captions[pair] for pair in sorted(named)},
        shown=shown,
        cosines=np.stack([_cosines(model, shown) for model in (expected, found)]),
        same=found is expected,
    )


def _points(difference: Recall) -> Recall:
    """How far recall falls, in points."""
    return Recall(
        image_to_text=round(-100 * difference.image_to_text, 6), text_to_image=round(-100 * difference.text_to_image, 6)
    )


def _most(names: Sequence[str]) -> int:
    """How often the most frequent of `names` is there."""
    return max(Counter(names).values())


def _cosines(model: EmbeddedPairs, shown: Sequence[int]) -> np.ndarray:
    rows = np.array(shown)
    return unit_rows(model.image_embeddings[rows]) @ unit_rows(model.text_embeddings[rows]).T


def read_pictures(source: PairSource, names: set[str]) -> dict[str, bytes]:
    """The files of the pictures called `names`: to be shown. Goes through the source once more."""
    found: dict[str, bytes] = {}
    if not names:
        return found
    for sample in source:
        if sample.name in names:
            found[sample.name] = sample.data
            if len(found) == len(names):
                break
    return found


def _texts(captions: Sequence[str], encode: Texts) -> Floats:
    """The embedding of each caption, float32 [captions, dim]; equal ones are encoded once."""
    numbers: dict[str, int] = {}
    rows = np.array([numbers.setdefault(caption, len(numbers)) for caption in captions])
    different = list(numbers)
    parts = [encode(different[start : start + _TEXTS]) for start in range(0, len(different), _TEXTS)]
    result: Floats = np.concatenate(parts)[rows]
    return result
