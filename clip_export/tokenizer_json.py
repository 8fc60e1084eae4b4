"""OpenAI CLIP's vocabulary as a JSON that the `tokenizers` library reads and a bundle carries.

It serves the dialects `openai` and `open_clip`. It holds the split into words and the merges; what comes before them
(`text_cleaning`) is Python's. Merges and character classes are package data (vocabulary/README.md says whence).
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
from importlib import resources
from typing import Any

from tokenizers import Tokenizer, models

from clip_export.errors import SpecError
from clip_export.spec import Dialect

__all__ = ["END_OF_WORD", "SPECIAL_WORDS", "canonical_json", "clip_tokenizer_json"]

SPECIAL_WORDS: dict[Dialect, tuple[str, str]] = {
    "openai": ("<|startoftext|>", "<|endoftext|>"),
    "open_clip": ("<start_of_text>", "<end_of_text>"),
}
"""What a text may contain literally to get CLIP's first and second special id."""

FIRST_SPECIAL_ID = 49406  # 2 * 256 byte symbols and 48,894 merges come before it
END_OF_WORD = "</w>"
CONTRACTIONS = r"'[sſ]|'t|'re|'ve|'m|'ll|'d"  # ſ: the one other character that IGNORECASE takes for a letter in these


def canonical_json(tree: dict[str, Any]) -> str:
    """A tokenizer as compact JSON, without padding and truncation: those are the spec's, not the file's."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tree["model"]["merges"]]
    if all(merge.count(" ") == 1 for merge in merges):  # else a symbol holds a space, and only the pairs can say so
        tree = tree | {"model": tree["model"] | {"merges": merges}}
    return json.dumps(tree | {"truncation": None, "padding": None}, ensure_ascii=False, separators=(",", ":"))


@functools.cache
def clip_tokenizer_json(dialect: Dialect = "openai") -> str:
    """OpenAI CLIP's vocabulary with the words of `dialect`, `openai` or `open_clip`; it takes cleaned text.

    It adds no start and end token. Raises SpecError for a dialect whose vocabulary is the checkpoint's.
    """
    if dialect not in SPECIAL_WORDS:
        message = f"dialect {dialect!r} has no vocabulary of its own, only {' and '.join(SPECIAL_WORDS)} have"
        raise SpecError(message, hint="read the checkpoint's with huggingface_tokenizer_json(directory)")
    merges = _merges()
    vocabulary = _vocabulary(merges)
    special_merges = _merge_special_words(SPECIAL_WORDS[dialect], vocabulary, merges)
    split = {"type": "Split", "pattern": {"Regex": _word_pattern(dialect)}, "behavior": "Removed", "invert": True}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tree: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": END_OF_WORD,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges + special_merges,
        },
    }
    return canonical_json(tree)


def _merges() -> list[tuple[str, str]]:
    packed = (resources.files("clip_export") / "vocabulary" / "merges.txt.gz").read_bytes()
    pairs = (line.split(" ") for line in gzip.decompress(packed).decode("utf-8").split("\n"))
    return [(left, right) for left, right in pairs]


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Symbol -> id in CLIP's order: the bytes, the bytes that end a word, the merges."""
    letters = _byte_letters()
    symbols = [*letters, *(letter + END_OF_WORD for letter in letters), *("".join(pair) for pair in merges)]
    return {symbol: index for index, symbol in enumerate(symbols)}


def _byte_letters() -> list[str]:
    """The printable stand-ins of the 256 bytes, in CLIP's order: first those that stand for themselves."""
    themselves = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in themselves] + [chr(256 + i) for i in range(256 - len(themselves))]


def _merge_special_words(
    words: tuple[str, str], vocabulary: dict[str, int], merges: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Extra merges that make each special word one symbol with its special id; `vocabulary` gets the symbols.

    The originals look such a word up before they merge. An added token would not do: it is found anywhere in a text,
    whereas "!<|endoftext|>" is three ordinary words to the originals. Every extra merge joins letters to punctuation,
    so no other word can use it: the symbols in between, numbered above the special ids, never come out.
    """
    for number, word in enumerate(words):
        vocabulary[word + END_OF_WORD] = FIRST_SPECIAL_ID + number
    core = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix=END_OF_WORD)
    )
    extra: list[tuple[str, str]] = []
    for word in words:
        for pair in _joining(core.encode(word).tokens):
            if pair not in extra:
                extra.append(pair)
                vocabulary.setdefault("".join(pair), len(vocabulary))
    return extra


def _joining(symbols: list[str]) -> list[tuple[str, str]]:
    """Merges that join `symbols` into one, from the first letters with the punctuation before them outwards."""
    first = next(i for i, symbol in enumerate(symbols) if symbol.isalpha())
    rightwards = list(itertools.accumulate(symbols[first - 1 :]))
    pairs = list(zip(rightwards, symbols[first:], strict=False))
    leftwards = list(
        itertools.accumulate(reversed(symbols[: first - 1]), lambda word, left: left + word, initial=rightwards[-1])
    )
    return pairs + list(zip(reversed(symbols[: first - 1]), leftwards, strict=False))


def _word_pattern(dialect: Dialect) -> str:
    text = (resources.files("clip_export") / "vocabulary" / "unicode_classes.json").read_text(encoding="utf-8")
    letters, numbers, separators = (_escaped(json.loads(text)[name]) for name in ("letters", "numbers", "separators"))
    # IGNORECASE again: with ſ it is one word to the originals, though not the special one.
    specials = "|".join(word.replace("s", "[sſ]").replace("|", r"\|") for word in SPECIAL_WORDS[dialect])
    return f"{specials}|{CONTRACTIONS}|[{letters}]+|[{numbers}]|[^{letters}{numbers}{separators}]+"


def _escaped(ranges: str) -> str:
    return "".join("-".join(rf"\x{{{code}}}" for code in span.split("-")) for span in ranges.split(" "))
