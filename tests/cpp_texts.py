"""Generated texts that tokenizers go wrong on: all planes of Unicode, mixed scripts, odd spacing, markup, specials."""

from __future__ import annotations

import html.entities
import random
import sys
from collections.abc import Iterator

SPACES = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff"
WORDS = (
    "a",
    "the",
    "cat",
    "Photo",
    "it's",
    "WE'LL",
    "don't",
    "'s",
    "''d",
    "3.14",
    "1000",
    "naïve",
    "straße",
    "ΟΔΟΣ",
    "Σ",
)
SPECIALS = (
    "<|endoftext|>",
    "<|startoftext|>",
    "<start_of_text>",
    "<end_of_text>",
    "<|ENDOFTEXT|>",
    "<|ſtartoftext|>",
    "<|",
)
MARKS = "\u0301\u0327\u0345\u0334\u093c\u0f74\u302a\u1dce\U00016ff0\U0001d165\u05b0\u3099"
PIECES = (
    "\x1b[31m",
    "\x1b[",
    "&",
    "&amp;",
    "&amp",
    "&lt;",
    "&#39;",
    "&#x1F600;",
    "&#0;",
    "&notit;",
    "&EACUTE;",
    "&;",
    "&#;",
    "<b>",
    "</b>",
)
PUNCTUATION = "!?.,;:-_#@$%^*()[]{}'\"`~|\\/<>=+“”‘’«»…–—•°©®™"
BLOCKS = (
    *((0x20, 0x7F), (0xA0, 0x180), (0x180, 0x250), (0x370, 0x400), (0x400, 0x530), (0x530, 0x700), (0x900, 0xE00)),
    *((0xE00, 0x1100), (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2070), (0x2070, 0x2150), (0x2C00, 0x2E00)),
    *((0x3040, 0x3100), (0x4E00, 0x9FFF), (0xA640, 0xA800), (0xAC00, 0xD7A4), (0xF900, 0xFB50), (0xFF00, 0xFFF0)),
    *((0x10000, 0x11000), (0x11000, 0x12000), (0x1D400, 0x1D800), (0x1E000, 0x1F000), (0x1F300, 0x1FB00)),
)
ENTITIES = tuple(html.entities.html5)


def texts(count: int, seed: int) -> Iterator[str]:
    """`count` texts, the same for the same seed."""
    draw = random.Random(seed)
    kinds = (_anything, _one_block, _mixed, _words, _markup, _marks)
    for number in range(count):
        yield kinds[number % len(kinds)](draw)


def _anything(draw: random.Random) -> str:
    """Any code points at all."""
    return "".join(_code_point(draw, 0, sys.maxunicode) for _ in range(draw.randrange(24)))


def _one_block(draw: random.Random) -> str:
    """A text in one script, with spaces."""
    first, last = draw.choice(BLOCKS)
    return "".join(
        " " if draw.random() < 0.15 else _code_point(draw, first, last - 1) for _ in range(draw.randrange(1, 40))
    )


def _mixed(draw: random.Random) -> str:
    """Scripts, punctuation and spaces of all kinds, one after the other."""
    parts = []
    for _ in range(draw.randrange(1, 20)):
        first, last = draw.choice(BLOCKS)
        run = "".join(_code_point(draw, first, last - 1) for _ in range(draw.randrange(1, 4)))
        parts.append(draw.choice((run, run, draw.choice(PUNCTUATION) * draw.randrange(1, 3), draw.choice(SPACES))))
    return "".join(parts)


def _words(draw: random.Random) -> str:
    """Plain words, spaced as nobody would space them, some of them special."""
    parts = []
    for _ in range(draw.randrange(1, 16)):
        word = draw.choice(WORDS if draw.random() < 0.9 else SPECIALS)
        parts += [word, "".join(draw.choice(SPACES[:6]) for _ in range(draw.randrange(3)))]
        if draw.random() < 0.3:
            parts.append("".join(draw.choice(PUNCTUATION) for _ in range(draw.randrange(1, 5))))
    return "".join(parts)


def _markup(draw: random.Random) -> str:
    """References to characters, whole and broken, escape sequences of terminals, tags."""
    parts = []
    for _ in range(draw.randrange(1, 12)):
        entity = draw.choice(ENTITIES)
        number = draw.choice((draw.randrange(0x250), draw.randrange(0x120000)))
        references = (
            f"&{entity}",
            f"&{entity.upper()}",
            f"&{entity}x;",
            f"&#{number};",
            f"&#x{number:x}",
            f"&#{number}",
        )
        parts.append(draw.choice((draw.choice(PIECES), draw.choice(references), draw.choice(WORDS), " ")))
    return "".join(parts)


def _marks(draw: random.Random) -> str:
    """Letters under piles of marks, out of order; jamo; sigmas among what has case and what has not."""
    parts = []
    for _ in range(draw.randrange(1, 14)):
        base = draw.choice(
            ("a", "E", "ο", "Σ", "Σ", "İ", "ǅ", "ᄀ", "ᅡ", "ᆨ", "각", "가", "が", "\u0b47", ".", "'", " ", "5", "\xad")
        )
        pile = [
            _code_point(draw, 0x300, 0x36F) if draw.random() < 0.6 else draw.choice(MARKS)
            for _ in range(draw.randrange(4))
        ]
        parts += [base, *pile]
    return "".join(parts)


def _code_point(draw: random.Random, first: int, last: int) -> str:
    code = draw.randint(first, last)
    return chr(code) if not 0xD800 <= code <= 0xDFFF else "\ufffd"
