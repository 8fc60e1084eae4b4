"""ComfyUI: the rules of comfy/sd1_clip.py (Comfy-Org/ComfyUI), read at commit 4bd7a4004ab8.

(word) weighs 1.1, ((word)) 1.21, (word:1.3) is 1.3 whatever is around it; \\( and \\) are parentheses of the text.
A weight w moves the states of its tokens along the line from the empty prompt's: empty + w * (states - empty). What
does not fit into a context goes on in the next one; a segment, the text between two changes of weight, is cut only if
it has 8 tokens or more. `embedding:name` puts vectors there; a name that is not given is left out, with a warning.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from clip_export.context.dialects._brackets import require_shallow
from clip_export.context.result import Floats
from clip_export.context.units import Prepared, Row, Token, Unit
from clip_export.errors import InputError
from clip_export.spec import ContextSpec

__all__ = ["parse", "prepare", "zeros"]

Weighted: TypeAlias = tuple[Token, float]

_PLUS = 1.1
_WHOLE_BELOW = 8  # segments of fewer tokens are not cut
_DEEPEST = 900  # parentheses in parentheses: near where ComfyUI's own recursion ends
_OPEN, _CLOSE = "\x00\x02", "\x00\x01"  # what stands for an escaped parenthesis until it is tokenized
_EMBEDDING = "embedding:"


def prepare(prompt: str, unit: Unit, *, negative: bool = False) -> Prepared:
    """Chunks of 75 tokens, and the empty prompt where a weight is not 1."""
    segments = [segment for text, weight in parse(prompt) for segment in _segments(text, weight, unit)]
    chunks = list(_chunks(segments, unit))
    rows = [_row(chunk, unit) for chunk in chunks]
    weights = [unit.weights([weight for _, weight in chunk]) for chunk in chunks]
    if all(weight == 1.0 for chunk in chunks for _, weight in chunk):
        return Prepared(rows=tuple(rows), combine=np.concatenate, pooled=rows[0], chunks=len(rows))

    def combine(states: Sequence[Floats]) -> Floats:
        *found, empty = states
        return np.concatenate([_weighted(*pair, empty) for pair in zip(found, weights, strict=True)])

    return Prepared(rows=(*rows, _row([], unit)), combine=combine, pooled=rows[0], chunks=len(rows))


def zeros(negatives: Sequence[str | None], _context: ContextSpec) -> list[bool]:
    """Never: an empty prompt is encoded as any other."""
    return [False] * len(negatives)


def parse(prompt: str) -> list[tuple[str, float]]:
    """Text and weight of each segment, in order; escaped parentheses are still escaped, in a way of our own."""
    text = prompt.replace("\\)", _CLOSE).replace("\\(", _OPEN)
    require_shallow(text, _DEEPEST)
    return list(_parsed(text, 1.0))


def _weighted(states: Floats, weights: Floats, empty: Floats) -> Floats:
    moved = (states - empty) * weights[:, None] + empty
    return np.where(weights[:, None] == 1.0, states, moved).astype(np.float32)


def _parsed(text: str, weight: float) -> Iterator[tuple[str, float]]:
    levels = [(_groups(text), weight)]
    while levels:
        groups, weight = levels[-1]
        group = next(groups, None)
        if group is None:
            levels.pop()
        elif len(group) < 2 or group[0] != "(" or group[-1] != ")":
            yield group, weight
        else:
            inner = group[1:-1]
            head, colon, number = inner.rpartition(":")
            stated = _number(number) if colon and head else None
            levels.append((_groups(inner), weight * _PLUS) if stated is None else (_groups(head), stated))


def _number(text: str) -> float | None:
    """A weight, or None for text after a colon, which stays text."""
    try:
        value = float(text)
    except ValueError:
        return None
    if not math.isfinite(value):
        raise InputError(f"expected a finite weight in the prompt, found {text.strip()!r}", hint="such as (word:1.2)")
    return value


def _groups(text: str) -> Iterator[str]:
    """The text outside of parentheses and each outermost pair with what is in it, in order; never an empty one.

    As ComfyUI counts: a closing parenthesis too many makes the level negative, so that the next opening one is text;
    what is still open at the end is one piece with its parenthesis.
    """
    start, level = 0, 0
    for match in re.finditer(r"[()]", text):
        if match[0] == "(":
            if level == 0 and match.start() > start:
                yield text[start : match.start()]
                start = match.start()
            level += 1
        else:
            level -= 1
            if level == 0:
                yield text[start : match.end()]
                start = match.end()
    if start < len(text):
        yield text[start:]


def _segments(text: str, weight: float, unit: Unit) -> Iterator[list[Weighted]]:
    """The tokens of one segment; an embedding, and the text behind it, are segments of their own."""
    plain = text.replace(_CLOSE, ")").replace(_OPEN, "(")
    first, *named = re.split(rf"(?<=[ \n]){_EMBEDDING}", plain)
    for piece in (first, *(_EMBEDDING + rest for rest in named)):
        word = piece
        if piece.startswith(_EMBEDDING):
            vectors, word = _embedding(piece[len(_EMBEDDING) :].strip("\n"), unit)
            if vectors is not None:
                yield [(vector, weight) for vector in vectors]
        if word:
            yield [(token, weight) for token in unit.ids(word)]


def _embedding(rest: str, unit: Unit) -> tuple[Sequence[Token] | None, str]:
    """The vectors that are named at the beginning of `rest`, and the text behind the name."""
    words = rest.split()
    if not words:
        raise InputError(f"expected a name after {_EMBEDDING!r} in the prompt, found none", hint=_known(unit))
    name, leftover = words[0], " ".join(words[1:])
    if cut := re.search(r"[<\[]", name):
        name, leftover = name[: cut.start()], name[cut.start() :] + (f" {leftover}" if leftover else "")
    if name in unit.embeddings:
        return unit.embeddings[name], leftover
    bare = name.strip(",")
    behind = f"{name[len(bare) :]} {leftover}" if len(bare) < len(name) else leftover
    if bare not in unit.embeddings:
        warnings.warn(f"no embedding is called {bare!r}, and ComfyUI leaves it out; {_known(unit)}", stacklevel=2)
    return unit.embeddings.get(bare), behind


def _known(unit: Unit) -> str:
    return f"given are: {', '.join(unit.embeddings) or 'none'}"


def _chunks(segments: Sequence[list[Weighted]], unit: Unit) -> Iterator[list[Weighted]]:
    """Segments packed into contexts; there is always one, and one is begun for every segment that does not fit."""
    chunk: list[Weighted] = []
    for segment in segments:
        rest, whole = segment, len(segment) < _WHOLE_BELOW
        while len(rest) > unit.room - len(chunk):
            if not whole:
                free = unit.room - len(chunk)
                chunk, rest = [*chunk, *rest[:free]], rest[free:]
            yield chunk
            chunk = []
        chunk = [*chunk, *rest]
    yield chunk


def _row(chunk: Sequence[Weighted], unit: Unit) -> Row:
    spec = unit.tokenizer
    tokens = [spec.start_id, *(token for token, _ in chunk), spec.end_id]
    return unit.row([*tokens, *[spec.pad_id] * (spec.context_length - len(tokens))])
