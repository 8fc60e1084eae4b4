"""Compel 2.5, as its wrappers for diffusers use it (compel/embeddings_provider.py; CompelForSD, CompelForSDXL).

A weight above 1 moves the states of its tokens away from the empty prompt's: empty + w * (states - empty). One below 1
does that too, and blends the result with that of the same prompt with the fragment hidden from attention, the more the
lower it is: by tan((1 - w) * pi / 2). Longer texts are split behind the last full stop that fits, else behind a comma,
else a word. The pooled embedding is that of the prompt as it is written, syntax and all, cut to one context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from clip_export.context.dialects import _compel_grammar as grammar
from clip_export.context.dialects import diffusers
from clip_export.context.result import Floats
from clip_export.context.units import Prepared, Row, Token, Unit, finite
from clip_export.errors import InputError
from clip_export.spec import ContextSpec

__all__ = ["prepare", "zeros"]

_LEAST = 1e-5  # compel's epsilon: the tangent of a right angle is infinite
_SENTENCE = (".</w>",)
_PHRASE = (".</w>", ",</w>", ";</w>", ":</w>")

Made: TypeAlias = Callable[[Sequence[Floats]], Floats]


@dataclass(slots=True)
class _Rows:
    """The rows that a prompt needs, each once, by number."""

    unit: Unit
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> int:
        if row not in self.rows:
            self.rows.append(row)
        return self.rows.index(row)


def prepare(prompt: str, unit: Unit, *, negative: bool = False) -> Prepared:
    """The rows of the prompt, of those with a fragment hidden, and of the empty prompt where it is needed."""
    if unit.context.family == "sd3":
        raise InputError("compel has no rules for SD 3", hint="use diffusers or comfyui")
    joined, rows = grammar.parse(prompt), _Rows(unit)
    parts = [_part(part, rows) for part in joined.prompts]
    weights = [finite(weight) for weight in joined.weights]
    empty = rows.add(unit.empty) if any(weight != 1 for weight in weights) else 0

    def combine(states: Sequence[Floats]) -> Floats:
        found = [make(states) for make, _ in parts]
        moved = [
            one if weight == 1 else _moved(one, np.tile(states[empty], (len(one) // len(states[empty]), 1)), weight)
            for one, weight in zip(found, weights, strict=True)
        ]
        return np.concatenate(moved)

    chunks = sum(count for _, count in parts)
    pooled = unit.framed(diffusers.tokens(prompt, unit)[: unit.room])
    return Prepared(rows=tuple(rows.rows), combine=combine, pooled=pooled, chunks=chunks)


def zeros(negatives: Sequence[str | None], _context: ContextSpec) -> list[bool]:
    """Never: an empty prompt is encoded as any other."""
    return [False] * len(negatives)


def _part(part: grammar.Flat | grammar.Blend, rows: _Rows) -> tuple[Made, int]:
    """How to make the states of a prompt, or a mean of several, and how many chunks they are."""
    if not isinstance(part, grammar.Blend):
        return _flat(part, rows)
    parts = [_flat(prompt, rows) for prompt in part.prompts]
    chunks = max(count for _, count in parts)
    empty = rows.add(rows.unit.empty) if len({count for _, count in parts}) > 1 else 0
    weights = np.array([finite(weight) for weight in part.weights], np.float32)
    if part.normalized:
        if weights.sum() == 0:
            message = "the weights of .blend() add up to 0, so that nothing makes them add up to 1"
            raise InputError(message, hint="write no_normalize behind them, or other weights")
        weights = weights / weights.sum()

    def make(states: Sequence[Floats]) -> Floats:
        found = [
            np.concatenate([one(states), *[states[empty]] * (chunks - count)]) if count < chunks else one(states)
            for one, count in parts
        ]
        return _sum(found, weights)

    return make, chunks


def _flat(fragments: grammar.Flat, rows: _Rows) -> tuple[Made, int]:
    """One prompt of weighted fragments."""
    unit = rows.unit
    tokens = [diffusers.tokens(text, unit) for text, _ in fragments]
    chunks = _split([token for part in tokens for token in part], unit)
    spread = [finite(weight) for part, (_, weight) in zip(tokens, fragments, strict=True) for _ in part]
    places = _places(chunks, unit)
    weights = np.ones(len(chunks) * unit.text.context_length, np.float32)
    weights[places] = spread
    variants, shares, first = [[rows.add(unit.framed(chunk)) for chunk in chunks]], [1.0], 0
    for part, (_, weight) in zip(tokens, fragments, strict=True):
        if weight < 1 and part:
            hidden = range(places[first], places[first + len(part) - 1] + 1)
            variants.append([rows.add(row) for row in _hiding(chunks, hidden, unit)])
            shares.append(math.tan((1.0 - max(_LEAST, weight)) * math.pi / 2))
        first += len(part)
    empty = rows.add(unit.empty) if (weights != 1).any() else 0
    lerp = np.array(shares, np.float32)
    lerp = lerp / lerp.sum()

    def make(states: Sequence[Floats]) -> Floats:
        whole = [np.concatenate([states[number] for number in variant]) for variant in variants]
        if (weights != 1).any():
            base = np.tile(states[empty], (len(chunks), 1))
            whole = [np.where(weights[:, None] == 1, one, _moved(one, base, weights[:, None])) for one in whole]
        return _sum(whole, lerp)

    return make, len(chunks)


def _moved(states: Floats, empty: Floats, weight: float | Floats) -> Floats:
    return (empty + (states - empty) * weight).astype(np.float32)


def _sum(parts: Sequence[Floats], shares: Floats) -> Floats:
    total: Floats = np.sum([one * share for one, share in zip(parts, shares, strict=True)], axis=0, dtype=np.float32)
    return total


def _split(tokens: Sequence[Token], unit: Unit) -> list[list[Token]]:
    """Chunks that fit, each but the last ending where a sentence does, or a phrase, or a word; there is always one."""
    rest, chunks = list(tokens), []
    while len(rest) > unit.room:
        words = [unit.word(token) if isinstance(token, int) else "</w>" for token in rest[: unit.room]]
        end = _last(words, lambda word: word in _SENTENCE) or _last(words, lambda word: word in _PHRASE)
        end = end or _last(words, lambda word: word.endswith("</w>")) or unit.room
        chunks.append(rest[:end])
        rest = rest[end:]
    return [*chunks, rest] if rest or not chunks else chunks


def _last(words: Sequence[str], ends: Callable[[str], bool]) -> int | None:
    """How many words there are up to the last that ends something."""
    return next((place + 1 for place in reversed(range(len(words))) if ends(words[place])), None)


def _places(chunks: Sequence[Sequence[Token]], unit: Unit) -> list[int]:
    """Where each token stands when the chunks are framed and put one after the other."""
    length = unit.text.context_length
    return [number * length + 1 + place for number, chunk in enumerate(chunks) for place in range(len(chunk))]


def _hiding(chunks: Sequence[Sequence[Token]], hidden: range, unit: Unit) -> list[Row]:
    """The chunks with the positions `hidden`, counted over all of them, out of sight; never the ends of a chunk."""
    length = unit.text.context_length
    rows = []
    for number, chunk in enumerate(chunks):
        inside = frozenset(place for place in range(1, length - 1) if number * length + place in hidden)
        rows.append(unit.framed(chunk, inside))
    return rows
