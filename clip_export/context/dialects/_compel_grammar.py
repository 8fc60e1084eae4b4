"""Compel's language of prompts, as compel/prompt_parser.py has it (2.5): what is weighted, joined and blended.

    word+  word--  (some words)1.3  "some words"+  (some words).attend(0.8)      weights; they nest and multiply
    ("one prompt", "another").and(1, 0.5)                                        one after the other
    ("one prompt", "another").blend(0.7, 0.3)                                    a mean of both

The original is a grammar of pyparsing, in which the first alternative that matches is taken and nothing is tried again;
so it is here. What a bracket begins is asked for by several alternatives, and remembered: otherwise each bracket that
is never closed would double the time. .swap() and withLora() ask for more than a Context, and are refused by name.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from clip_export.context.dialects._brackets import require_shallow
from clip_export.errors import InputError

__all__ = ["Blend", "Flat", "Joined", "parse"]

_PLUS, _MINUS = 1.1, 0.9
_MOST_SIGNS = 7000  # more of them are no float any more; float32, which a weight has to fit into, has ended long before
_DEEPEST = 64  # brackets in brackets
_REMEMBERED = 4096  # places of a text
_SYNTAX = '()",.+-='
_BLANK = " \n\t\r"  # what may stand between two things
_REAL = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+)|-?\d+")
_QUOTED = re.compile(r'"((?:(?:\\")|[^"\n\r])*)"')
_KEYWORD = re.compile(r"[A-Za-z0-9_-]+")
_LORA = re.compile(r"(?:useLora|withLora)\s*\(\s*[\w-]+\s*(?:,\s*[\d.+-]+\s*)?\)")
_ESCAPES = tuple(f"\\{symbol}" for symbol in _SYNTAX)
_WHITESPACE_ESCAPES = {"\\t": "\t", "\\n": "\n", "\\f": "\f", "\\r": "\r"}
_HINT = "see compel's documentation of its syntax; a backslash makes a bracket text"

Flat: TypeAlias = tuple[tuple[str, float], ...]  # fragments of text and their weights


@dataclass(frozen=True, slots=True)
class Blend:
    """A mean of several prompts, by weights that are made to add up to 1 where `normalized`."""

    prompts: tuple[Flat, ...]
    weights: tuple[float, ...]
    normalized: bool


@dataclass(frozen=True, slots=True)
class Joined:
    """Prompts one after the other, each with a weight against the empty prompt."""

    prompts: tuple[Flat | Blend, ...]
    weights: tuple[float, ...]


# A piece of text with the weights of what is around it, the outermost first.
Piece: TypeAlias = tuple[str, tuple[float, ...]]
Found: TypeAlias = tuple[list[Piece], int] | None  # what was read, and where it ended; None where it does not match


def parse(prompt: str) -> Joined:
    """Read `prompt`. Raises InputError where compel raises, and for what asks for more than a Context."""
    joined = _parsed(prompt)
    every = [flat for part in joined.prompts for flat in (part.prompts if isinstance(part, Blend) else (part,))]
    if not every or not all(every):
        raise InputError(f"compel finds no text in a part of the prompt {prompt!r}", hint='"" in it is an empty one')
    return joined


def _parsed(prompt: str) -> Joined:
    require_shallow(prompt, _DEEPEST)
    prompt = re.sub(r",(\S)", r", \1", prompt)
    if not prompt.strip():
        return Joined(((("", 1.0),),), (1.0,))
    text = prompt.expandtabs()
    joined = _conjunction(text)
    if joined is not None:
        return joined
    blend = _blend(text)
    if blend is not None:
        mixed, end = blend
        if text[_after_blank(text, end) :]:
            raise InputError(f"compel reads nothing behind .blend(), found {text[end:].strip()!r}", hint=_HINT)
        return Joined((mixed,), (1.0,))
    pieces, end = _prompt(text, 0)
    if _after_blank(text, end) < len(text):
        raise InputError(f"compel cannot read this prompt from {text[end:]!r} on", hint=_HINT)
    return Joined((_fused(pieces),), (1.0,))


def _fused(pieces: list[Piece]) -> Flat:
    """Neighbours of the same weight as one text with a space between, as a grammar that skips blanks leaves it."""
    fused: list[tuple[str, float]] = []
    for text, factors in pieces:
        weight = 1.0
        for factor in factors:
            weight *= factor
        if fused and fused[-1][1] == weight:
            fused[-1] = f"{fused[-1][0]} {text}", weight
        else:
            fused.append((text, weight))
    return tuple(fused)


def _conjunction(text: str) -> Joined | None:
    found = _operated(text, (".and", ".add"))
    if found is None:
        return None
    prompts, options, _ = found  # what stands behind it is not read
    weights = _weights(options, len(prompts), ".and()")
    kept = [(prompt, weight) for prompt, weight in zip(prompts, weights, strict=True) if prompt]
    return Joined(tuple(prompt for prompt, _ in kept), tuple(weight for _, weight in kept))


def _blend(text: str) -> tuple[Blend, int] | None:
    found = _operated(text, (".blend",))
    if found is None:
        return None
    prompts, options, end = found
    normalized = not options or options[-1] != "no_normalize"
    weights = _weights(options if normalized else options[:-1], len(prompts), ".blend()")
    return Blend(tuple(prompts), weights, normalized), end


def _operated(text: str, operators: tuple[str, ...]) -> tuple[list[Flat], list[str], int] | None:
    """( prompts, … ).operator( options, … ) at the beginning of `text`."""
    place = _literal(text, 0, "(")
    prompts: list[Flat] = []
    while place is not None:
        found = _target(text, place) or _quoted(text, place, _whole_prompt)
        if found is None:
            break
        prompts.append(_fused(found[0]))
        following = _literal(text, found[1], ",")
        if following is None:
            place = found[1]
            break
        place = following
    if place is None or not prompts:
        return None
    place = _literal(text, place, ")")
    for operator in operators:
        behind = None if place is None else _literal(text, place, operator)
        opened = None if behind is None else _literal(text, behind, "(")
        if opened is not None:
            options, end = _options(text, opened)
            closed = _literal(text, end, ")")
            return None if closed is None else (prompts, options, closed)
    return None


def _options(text: str, place: int) -> tuple[list[str], int]:
    """Weights and flags with commas; of key=value, the key."""
    options: list[str] = []
    end = place
    while True:
        start = _after_blank(text, place)
        match = re.compile(rf"({_KEYWORD.pattern})\s*=\s*(?:{_REAL.pattern}|{_KEYWORD.pattern})").match(text, start)
        found = match[1] if match else None
        match = match or _REAL.match(text, start) or _KEYWORD.match(text, start)
        if match is None:
            return options, end
        options.append(found or match[0])
        end = match.end()
        following = _literal(text, end, ",")
        if following is None:
            return options, end
        place = following


def _weights(options: list[str], count: int, where: str) -> tuple[float, ...]:
    try:
        weights = tuple(float(option) for option in options) or (1.0,) * count
    except ValueError as error:
        raise InputError(f"expected weights in {where}, found {', '.join(options)}", hint=_HINT) from error
    if len(weights) != count:
        raise InputError(f"expected a weight for each of {count} prompts in {where}, found {len(weights)}", hint=_HINT)
    return weights


def _prompt(text: str, place: int) -> tuple[list[Piece], int]:
    """A whole prompt: whatever is no syntax is a word, brackets and all."""
    pieces: list[Piece] = []
    while (start := _after_blank(text, place)) < len(text):
        found = (
            _attention(text, start) or _quoted(text, start) or _parenthesized(text, start) or _free_word(text, start)
        )
        if found is None:
            break
        pieces += found[0]
        place = found[1]
    return pieces, place


def _whole_prompt(text: str) -> list[Piece] | None:
    pieces, end = _prompt(text, 0)
    return pieces if _after_blank(text, end) == len(text) else None


@functools.lru_cache(_REMEMBERED)
def _fragment(text: str, place: int) -> tuple[list[Piece], int]:
    """What may stand in brackets or quotes: syntax, words without any, commas and points."""
    pieces: list[Piece] = []
    while True:
        start = _after_blank(text, place)
        found = _attention(text, start) or _parenthesized(text, start) or _quoted(text, start) or _word(text, start)
        if found is None and text[start : start + 1] in (",", "."):
            found = [(text[start], ())], start + 1
        if found is None:
            return pieces, place
        pieces += found[0]
        place = found[1]


def _whole_fragment(text: str) -> list[Piece] | None:
    pieces, end = _fragment(text, 0)
    return pieces if _after_blank(text, end) == len(text) else None


@functools.lru_cache(_REMEMBERED)
def _attention(text: str, place: int) -> Found:
    """A target with its weight."""
    if lora := _LORA.match(text, place):
        raise InputError(f"{lora[0]} asks for a LoRA, not for a Context", hint="merge it into the checkpoint")
    target = _target(text, place)
    if target is None:
        return None
    pieces, end = target
    swap = _literal(text, end, ".swap")
    if swap is not None and _literal(text, swap, "(") is not None:
        raise InputError(".swap() in the prompt changes attention maps, not the Context", hint="leave it out")
    attend = _literal(text, end, ".attend")
    opened = None if attend is None else _literal(text, attend, "(")
    if opened is not None:
        weight = _operator(text, _after_blank(text, opened), numbers=True)
        closed = None if weight is None else _literal(text, weight[1], ")")
        if weight is not None and closed is not None:
            return _scaled(pieces, weight[0]), closed
    # A bare word takes + and - alone: a number would be the end of it.
    weight = _operator(text, end, numbers=text[_after_blank(text, place)] in '("')
    return None if weight is None else (_scaled(pieces, weight[0]), weight[1])


def _operator(text: str, place: int, *, numbers: bool) -> tuple[float, int] | None:
    """+, --, or a number, and where it ends."""
    for symbol, base in (("+", _PLUS), ("-", _MINUS)):
        count = len(text[place:]) - len(text[place:].lstrip(symbol))
        if count:
            return pow(base, min(count, _MOST_SIGNS)), place + count
    match = _REAL.match(text, place) if numbers else None
    return None if match is None else (float(match[0]), match.end())


def _scaled(pieces: list[Piece], weight: float) -> list[Piece]:
    return [(text, (weight, *factors)) for text, factors in pieces]


def _target(text: str, place: int) -> Found:
    return _quoted(text, place) or _parenthesized(text, place) or _word(text, place)


@functools.lru_cache(_REMEMBERED)
def _parenthesized(text: str, place: int) -> Found:
    opened = _literal(text, place, "(")
    if opened is None:
        return None
    pieces, end = _fragment(text, opened)
    closed = _literal(text, end, ")")
    return None if closed is None else (pieces, closed)


def _quoted(text: str, place: int, read: Callable[[str], list[Piece] | None] = _whole_fragment) -> Found:
    match = _QUOTED.match(text, _after_blank(text, place))
    if match is None:
        return None
    inner = match[1]
    for escape, blank in _WHITESPACE_ESCAPES.items():
        inner = inner.replace(escape, blank)
    inner = inner.replace('\\"', '"')
    pieces: list[Piece] | None = [("", ())]
    if inner.strip():
        pieces = read(inner.replace('"', '\\"').expandtabs())
    return None if pieces is None else (pieces, match.end())


def _word(text: str, place: int) -> Found:
    """A word without syntax: escapes are in it, and a sign that more of the word follows."""
    start = end = _after_blank(text, place)
    while end < len(text):
        if text[end : end + 2] in _ESCAPES:
            end += 2
        elif text[end] in "+-":
            following = text[end + 1 : end + 2]
            if not following or following in _BLANK or following in _SYNTAX:
                break
            end += 1
        elif text[end] in string.whitespace or text[end] in _SYNTAX:
            break
        else:
            end += 1
    return ([(_unescaped(text[start:end]), ())], end) if end > start else None


def _free_word(text: str, place: int) -> Found:
    match = re.compile(rf"[^{re.escape(string.whitespace)}]+").match(text, place)
    return None if match is None else ([(_unescaped(match[0]), ())], match.end())


def _unescaped(text: str) -> str:
    for _ in range(2):  # once where it is read, once where weights are multiplied
        for escape in ("\\(", "\\)", '\\"'):
            text = text.replace(escape, escape[1])
    return text


def _literal(text: str, place: int, literal: str) -> int | None:
    """Where `literal` ends, if it is the next thing; blanks before it do not count."""
    start = _after_blank(text, place)
    return start + len(literal) if text.startswith(literal, start) else None


def _after_blank(text: str, place: int) -> int:
    while place < len(text) and text[place] in _BLANK:
        place += 1
    return place
