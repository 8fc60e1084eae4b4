"""One text encoder as a dialect sees it: ids of words, vectors of textual inversion, and rows for its engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from clip_export.context.result import Floats
from clip_export.errors import InputError
from clip_export.spec import ContextSpec, TextSpec, TokenizerSpec

__all__ = ["Prepared", "Row", "Token", "Unit", "Vector", "finite"]

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, eq=False)
class Vector:
    """One vector of textual inversion. `id` is that which diffusers would have added it to the vocabulary under."""

    values: Floats
    id: int


Token: TypeAlias = int | Vector


@dataclass(frozen=True, slots=True)
class Row:
    """What an engine is given at once: a context of tokens, framed and padded, and the position that is pooled.

    `hidden` are positions that those after them do not see. Equal rows have equal results.
    """

    tokens: tuple[Token, ...]
    end: int
    hidden: frozenset[int] = frozenset()


Combine: TypeAlias = Callable[[Sequence[Floats]], Floats]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt for one encoder: `rows`, what to make of their states [77, width], and the row that is pooled.

    `combine` gives [77 * chunks, width].
    """

    rows: tuple[Row, ...]
    combine: Combine
    pooled: Row
    chunks: int = 1


@dataclass(frozen=True, slots=True)
class Unit:
    """One text encoder. `number` is 0 or 1; `embeddings` are those of textual inversion that have vectors for it.

    `ids` gives those of a text without start and end; `a1111_ids` as AUTOMATIC1111 has them; `word` what an id spells.
    """

    number: int
    text: TextSpec
    tokenizer: TokenizerSpec
    context: ContextSpec
    ids: Callable[[str], list[int]]
    a1111_ids: Callable[[str], list[int]]
    word: Callable[[int], str]
    embeddings: Mapping[str, Sequence[Vector]] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """How many tokens fit between start and end."""
        return self.text.context_length - 2

    def framed(self, tokens: Sequence[Token], hidden: frozenset[int] = frozenset()) -> Row:
        """Start, `tokens`, end, padding; pooled as the checkpoint's own config says."""
        spec = self.tokenizer
        filled = [spec.start_id, *tokens, spec.end_id]
        filled += [spec.pad_id] * (spec.context_length - len(filled))
        return Row(tuple(filled), self._pooled_at(filled), hidden)

    def weights(self, weights: Sequence[float]) -> Floats:
        """float32 [77]: those of the tokens behind the start, and 1 elsewhere.

        Raises InputError for one that float32 cannot hold.
        """
        spread = np.ones(self.text.context_length, np.float32)
        spread[1 : 1 + len(weights)] = [finite(weight) for weight in weights]
        return spread

    def row(self, tokens: Sequence[Token]) -> Row:
        """A whole context of `tokens`, pooled at the first end token."""
        return Row(tuple(tokens), list(tokens).index(self.tokenizer.end_id))

    @property
    def empty(self) -> Row:
        """The empty prompt."""
        return self.framed(())

    def _pooled_at(self, tokens: Sequence[Token]) -> int:
        ids = [token.id if isinstance(token, Vector) else token for token in tokens]
        return int(np.argmax(ids)) if self.tokenizer.pooling == "argmax" else ids.index(self.tokenizer.end_id)


def finite(weight: float) -> float:
    """`weight`, if it is a number that float32 can hold. Raises InputError otherwise."""
    if not abs(weight) <= _LARGEST:  # NaN is not either
        raise InputError(
            f"expected a finite weight in the prompt, found {weight:g}", hint="weights are small numbers, such as 1.2"
        )
    return weight
