"""The quick way for plain texts (`text_cleaning.is_plain`): words split in Python, their ids remembered.

Captions repeat their words, so a table of words saves most of the work: only words that are new go through the
byte-pair core, natively and all at once. The ids are those of the long way, because a word alone is split and merged
as the same word within a text; tests/test_tokenizer_property.py holds the two ways against each other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer as Core

__all__ = ["PlainTextEncoder", "flatten"]

WORD = re.compile(r"[a-z]+|'(?:[stmd]|re|ve|ll)|[0-9]|[^ a-z0-9\n]+|\n")
"""CLIP's word pattern on lower-case printable ASCII. The line feed, which plain texts lack, stands between texts."""

REMEMBERED_WORDS = 1 << 16  # a few MiB; the table starts anew when it is full
BETWEEN_TEXTS = -1


class PlainTextEncoder:
    """Plain texts -> ids without start and end. May be shared by threads."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._ids = _no_words()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after the other, int32 [total], and how many each has, int64 [n]."""
        words = WORD.findall("\n".join(texts).lower())
        ids = self._ids_of(words)
        flat = np.fromiter(itertools.chain.from_iterable(map(ids.__getitem__, words)), np.int32)
        between = np.flatnonzero(flat == BETWEEN_TEXTS)
        edges = np.concatenate([[-1], between, [len(flat)]])
        return np.delete(flat, between), np.diff(edges) - 1

    def _ids_of(self, words: list[str]) -> dict[str, Sequence[int]]:
        """A table with at least these words. Threads may each replace it: every table is right, and none is cut."""
        ids = self._ids
        distinct = set(words)
        if len(ids) + len(distinct) > REMEMBERED_WORDS:
            self._ids = ids = _no_words()
        unseen = [word for word in distinct if word not in ids]
        if unseen:
            encodings = self._core.encode_batch_fast(unseen, add_special_tokens=False)
            ids.update((word, tuple(encoding.ids)) for word, encoding in zip(unseen, encodings, strict=True))
        return ids


def _no_words() -> dict[str, Sequence[int]]:
    return {"\n": (BETWEEN_TEXTS,)}


def flatten(lists: Iterable[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids as one array, int32 [total], and the length of each, int64 [n]."""
    rows = list(lists)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths
