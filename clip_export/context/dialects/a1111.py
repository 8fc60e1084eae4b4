"""AUTOMATIC1111's stable-diffusion-webui: the rules of modules/prompt_parser.py, sd_hijack_clip.py and sd_emphasis.py.

(word) multiplies the weight by 1.1, [word] divides it by 1.1, (word:1.3) multiplies it by 1.3; all of them nest, and
one that is never closed reaches to the end. A backslash makes the next bracket text. The states of a token are
multiplied by its weight, then those of the whole chunk by what restores their mean (emphasis "Original", the default).
BREAK ends a chunk. Text of more than 75 tokens goes on in the next chunk, from the last comma if that is within 20
tokens. What stands behind a # is a comment up to the end of its line (modules/processing_scripts/comments.py; the
setting enable_prompt_comments, which is on).

What changes with the sampling step, [a:b:0.5] and [a|b], what combines several Contexts, AND, and extra networks,
<lora:name:1>, is no Context by itself, and is refused by name. In a negative prompt the webui looks for neither of the
last two: there they are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from clip_export.context.result import Floats
from clip_export.context.units import Prepared, Row, Token, Unit
from clip_export.errors import InputError
from clip_export.spec import ContextSpec

__all__ = ["parse", "prepare", "zeros"]

Part: TypeAlias = tuple[str, float]
Weighted: TypeAlias = tuple[Token, float]

_COMMENT = re.compile(r"\n?#[^\n]*\n?")
_FACTORS = {"(": 1.1, "[": 1 / 1.1}
_BACKTRACK = 20  # tokens: the default of the setting comma_padding_backtrack
_BREAK: Part = ("BREAK", -1.0)
# Escapes, brackets, a weight with its closing parenthesis, text, and a colon that begins no weight. Blanks around a
# weight are part of it.
_LEXER = re.compile(
    r"""(?P<escape>\\[()\[\]\\]|\\) | (?P<open>[(\[]) | :\s*(?P<weight>[+-]?[.\d]+)\s*\) """
    r"""| (?P<close>[)\]]) | (?P<text>[^\\()\[\]:]+ | :)""",
    re.VERBOSE,
)
# What makes square brackets a schedule: a number as lark's grammars have it, with blanks around it.
_STEP = re.compile(r".*:\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*", re.DOTALL)


def prepare(prompt: str, unit: Unit, *, negative: bool = False) -> Prepared:
    """Chunks of 75 tokens, each weighted by itself."""
    prompt = _COMMENT.sub("\n", prompt)
    _require_one_context(prompt, negative=negative)
    if unit.context.family == "sd3":
        raise InputError("a1111 has no rules for SD 3 here", hint="use diffusers or comfyui")
    chunks = list(_chunks(parse(prompt), unit))
    rows = tuple(_row([token for token, _ in chunk], unit) for chunk in chunks)
    weights = [unit.weights([weight for _, weight in chunk]) for chunk in chunks]

    def combine(states: Sequence[Floats]) -> Floats:
        return np.concatenate([_weighted(*pair) for pair in zip(states, weights, strict=True)])

    return Prepared(rows=rows, combine=combine, pooled=rows[0], chunks=len(rows))


def zeros(negatives: Sequence[str | None], context: ContextSpec) -> list[bool]:
    """Zeros for SDXL where a negative prompt is empty (modules/sd_models_xl.py, get_learned_conditioning).

    That asks whether all of its batch are, and is called for one prompt at a time (prompt_parser.py).
    """
    return [context.family in ("sdxl", "sdxl_refiner") and not negative for negative in negatives]


def parse(prompt: str) -> list[Part]:
    """Text and weight of each part; BREAK with the weight -1 is none but the word itself.

    Raises InputError for a weight of digits and points that is no number.
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def scale(first: int, factor: float) -> None:
        weights[first:] = [weight * factor for weight in weights[first:]]

    for match in _LEXER.finditer(prompt):
        token, kind = match[0], match.lastgroup
        bracket = "[" if token == "]" else "("
        if kind == "escape":
            texts.append(token[1:])
            weights.append(1.0)
        elif kind == "open":
            opened[token].append(len(texts))
        elif kind in ("weight", "close") and opened[bracket]:
            stated = match["weight"]
            scale(opened[bracket].pop(), _FACTORS[bracket] if stated is None else _weight(stated))
        else:
            for text, weight in _broken(token):
                texts.append(text)
                weights.append(weight)
    for bracket, factor in _FACTORS.items():
        for first in opened[bracket]:
            scale(first, factor)
    return _merged(list(zip(texts, weights, strict=True)))


def _broken(text: str) -> Iterator[Part]:
    first, *others = re.split(r"\s*\bBREAK\b\s*", text)
    yield first, 1.0
    for other in others:
        yield _BREAK
        yield other, 1.0


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"expected a weight in the prompt, found {text!r}", hint="such as (word:1.2)") from error


def _merged(parts: Sequence[Part]) -> list[Part]:
    """Neighbours of the same weight as one, since a word may reach over both."""
    merged: list[Part] = []
    for text, weight in parts:
        if merged and merged[-1][1] == weight:
            merged[-1] = merged[-1][0] + text, weight
        else:
            merged.append((text, weight))
    return merged or [("", 1.0)]


def _require_one_context(prompt: str, *, negative: bool) -> None:
    """Raise InputError for what is more than one Context, naming it."""
    if not negative and re.search(r"\bAND\b", prompt):  # nothing escapes these two
        raise InputError("AND in the prompt asks for several Contexts at once", hint="ask for each by itself")
    if not negative and (network := re.search(r"<\w+:[^>]+>", prompt)):
        raise InputError(f"{network[0]} asks for an extra network, not for a Context", hint="leave it out")
    plain = re.sub(r"\\.", "  ", prompt)
    for inner in _innermost(plain):
        if "|" in inner:
            raise InputError(
                f"[{inner}] changes with each step, so it is no one Context", hint="ask for each by itself"
            )
        if _STEP.fullmatch(inner):
            raise InputError(f"[{inner}] changes at a step, so it is no one Context", hint="ask for each by itself")


def _innermost(text: str) -> Iterator[str]:
    """What stands in each pair of square brackets, with inner brackets taken out."""
    while match := re.search(r"\[([^\[\]]*)\]", text):
        yield re.sub(r"\([^()]*\)", "", match[1])
        text = text[: match.start()] + " " + text[match.end() :]


def _chunks(parts: Sequence[Part], unit: Unit) -> Iterator[list[Weighted]]:
    """The tokens of each chunk; there is always one."""
    comma = unit.a1111_ids(",")[0]
    chunk: list[Weighted] = []
    last_comma, yielded = -1, False
    for text, weight in parts:
        if (text, weight) == _BREAK:
            yield chunk
            chunk, last_comma, yielded = [], -1, True
            continue
        for group in _groups(unit.a1111_ids(text), unit):
            full = len(chunk) + len(group) > unit.room
            if group == [comma]:
                last_comma = len(chunk)
            elif len(chunk) == unit.room and 0 <= len(chunk) - last_comma <= _BACKTRACK and last_comma >= 0:
                yield chunk[: last_comma + 1]
                chunk, last_comma, yielded = chunk[last_comma + 1 :], -1, True
                full = len(chunk) + len(group) > unit.room
            if full:
                yield chunk
                chunk, last_comma, yielded = [], -1, True
            chunk = [*chunk, *((token, weight) for token in group)]
    if chunk or not yielded:
        yield chunk


def _groups(ids: Sequence[int], unit: Unit) -> Iterator[list[Token]]:
    """Tokens one by one, and the vectors of an embedding, where the tokens of its name stand, together."""
    names = sorted(((unit.a1111_ids(name), vectors) for name, vectors in unit.embeddings.items()), key=_longest_first)
    place = 0
    while place < len(ids):
        for name, vectors in names:
            if name and ids[place : place + len(name)] == name:
                yield list(vectors)
                place += len(name)
                break
        else:
            yield [ids[place]]
            place += 1


def _longest_first(item: tuple[list[int], Sequence[Token]]) -> int:
    return -len(item[0])


def _row(tokens: Sequence[Token], unit: Unit) -> Row:
    spec = unit.tokenizer
    filled = [spec.start_id, *tokens, spec.end_id]
    return unit.row([*filled, *[spec.pad_id] * (spec.context_length - len(filled))])


def _weighted(states: Floats, weights: Floats) -> Floats:
    if (weights == 1).all():
        return states
    weighted = states * weights[:, None]
    # In float64: a mean is the small rest of large numbers, and the quotient of two of them scales everything.
    factor = states.mean(dtype=np.float64) / weighted.mean(dtype=np.float64)
    return (weighted * np.float32(factor)).astype(np.float32)
