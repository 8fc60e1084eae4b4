"""Texts -> token ids, each dialect equal id by id to its original.

    tokenizer = Tokenizer(spec, clip_tokenizer_json("openai"))
    tokens = tokenizer(["a red circle"])          # tokens.input_ids int32 [1, 77], tokens.eot_index int32 [1]

A dialect is what the original does to a text: `openai` is clip.tokenize, `open_clip` is open_clip.tokenize, and
`huggingface` is transformers' CLIPTokenizer with the checkpoint's own vocabulary. docs/tokenizer.md tells them apart.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer as Core

from clip_export.errors import SpecError, TextError
from clip_export.huggingface_tokenizer import huggingface_tokenizer_json, is_clip_pipeline
from clip_export.plain_text import PlainTextEncoder, flatten
from clip_export.spec import Dialect, TokenizerSpec
from clip_export.text_cleaning import CLEANERS, is_plain
from clip_export.tokenizer_json import SPECIAL_WORDS, clip_tokenizer_json

__all__ = [
    "Tokenizer",
    "Tokens",
    "clip_tokenizer_json",
    "default_truncate",
    "dialect_versions",
    "huggingface_tokenizer_json",
]

Encode = Callable[[list[str], list[int]], tuple[np.ndarray, np.ndarray]]

BLOCK = 1 << 14  # texts at a time: bounds the memory for words and ids of a large batch


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Token ids of n texts.

    `input_ids`: int32 [n, context_length], padded as the dialect pads.
    `eot_index`: int32 [n], the position whose hidden state is pooled, by the spec's rule.
    """

    input_ids: np.ndarray
    eot_index: np.ndarray


def default_truncate(dialect: Dialect) -> bool:
    """Whether the original cuts a text that is too long when nobody asks: open_clip does.

    OpenAI's raises. Hugging Face's returns more ids than the model has positions, and the model raises.
    """
    return dialect == "open_clip"


def dialect_versions() -> dict[str, str]:
    """Versions of what ids depend on beside the tokenizer JSON: name -> version, for a bundle's manifest.

    ftfy repairs text; Python has the tables for lower case, for NFC (its Unicode version) and for HTML's entities.
    """
    return {
        "ftfy": metadata.version("ftfy"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "tokenizers": metadata.version("tokenizers"),
        "unicode": unicodedata.unidata_version,
    }


class Tokenizer:
    """Texts -> `Tokens`, by the rules of `spec`. May be shared by threads; large batches use all cores.

    `tokenizer_json` comes from `clip_tokenizer_json` or `huggingface_tokenizer_json`, or from a bundle. Raises
    SpecError where it cannot be read, or does not have the start and end ids of `spec`.
    """

    def __init__(self, spec: TokenizerSpec, tokenizer_json: str) -> None:
        _be_quiet_when_forked()
        self.spec = spec
        self._clean = CLEANERS[spec.dialect]
        tree = _parsed(tokenizer_json)
        self._core = _core(tokenizer_json)
        self._core.no_padding()
        self._core.no_truncation()
        self._require_ends()
        self._plain = PlainTextEncoder(self._core) if self._has_plain_texts(tree) else None

    def __call__(self, texts: Sequence[str], *, truncate: bool | None = None) -> Tokens:
        """Tokenize `texts`; `truncate` overrides the spec's default for texts that do not fit.

        A cut text keeps its first context_length - 1 tokens and the end token, as in the originals. Raises TextError,
        naming the index, for what is not a str, cannot be encoded, or is too long and not to be cut.
        """
        batch = _checked(texts)
        input_ids = np.full((len(batch), self.spec.context_length), self.spec.pad_id, np.int32)
        lengths = np.zeros(len(batch), np.int64)
        for start in range(0, len(batch), BLOCK):
            for rows, encode in self._ways(batch, range(start, min(start + BLOCK, len(batch)))):
                flat, lengths[rows] = encode([batch[row] for row in rows], rows)
                input_ids[rows] = self._framed(flat, lengths[rows])
        if not (self.spec.truncate if truncate is None else truncate):
            self._require_fit(lengths + 2)
        return Tokens(input_ids, self._eot_index(input_ids))

    def ids(self, text: str) -> list[int]:
        """The ids of one text as they come: without start and end, not cut, not padded. Raises TextError."""
        flat, _ = self._encode(_checked([text]), [0])
        return [int(index) for index in flat]

    def word(self, index: int) -> str:
        """What the vocabulary has for an id, "" where it has nothing."""
        return self._core.id_to_token(index) or ""

    def tokens(self, text: str) -> list[str]:
        """The vocabulary's own words for the tokens of one text, start and end included, not cut and not padded.

        `</w>` ends a word; a character beyond ASCII shows as the stand-ins of its bytes.
        """
        flat, _ = self._encode(_checked([text]), [0])
        names = [self._core.id_to_token(int(index)) or "" for index in (self.spec.start_id, *flat, self.spec.end_id)]
        specials = {word + "</w>": word for word in SPECIAL_WORDS.get(self.spec.dialect, ())}
        return [specials.get(name, name) for name in names]

    def _ways(self, batch: list[str], rows: range) -> Iterator[tuple[list[int], Encode]]:
        """The rows that take the quick way and those that take the long one, each with its encoder; no empty ones."""
        quick = [row for row in rows if is_plain(batch[row])] if self._plain is not None else []
        chosen = set(quick)
        long = [row for row in rows if row not in chosen] if len(quick) < len(rows) else []
        if quick:
            yield quick, self._encode_plain
        if long:
            yield long, self._encode

    def _encode_plain(self, texts: list[str], _rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        assert self._plain is not None
        return self._plain.encode(texts)

    def _encode(self, texts: list[str], rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids without start and end, int32 [total], and the number of each, int64 [n]; `rows` name texts in errors."""
        cleaned = [self._cleaned(text, row) for text, row in zip(texts, rows, strict=True)]
        encodings = self._core.encode_batch_fast(cleaned, add_special_tokens=False)
        return flatten(encoding.ids for encoding in encodings)

    def _cleaned(self, text: str, row: int) -> str:
        try:
            cleaned = self._clean(text)
            cleaned.encode("utf-8")
        except ValueError as error:  # a lone surrogate; or a character reference of more digits than Python's int takes
            message = f"text {row} cannot be encoded: {error}"
            raise TextError(message, hint="decode its bytes with errors='replace', or remove the text") from error
        return cleaned

    def _framed(self, flat: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Start, ids, end, padding: int32 [n, context_length]. What does not fit before the end is left out."""
        context = self.spec.context_length
        kept = np.minimum(lengths, context - 2)
        framed = np.full((len(lengths), context), self.spec.pad_id, np.int32)
        framed[:, 0] = self.spec.start_id
        rank = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        position = np.arange(context - 2)
        framed[:, 1:-1][position < kept[:, None]] = flat[rank < context - 2]
        framed[np.arange(len(lengths)), kept + 1] = self.spec.end_id
        return framed

    def _eot_index(self, input_ids: np.ndarray) -> np.ndarray:
        scores = input_ids if self.spec.pooling == "argmax" else input_ids == self.spec.end_id
        index: np.ndarray = scores.argmax(axis=1)
        return index.astype(np.int32)

    def _require_fit(self, lengths: np.ndarray) -> None:
        context = self.spec.context_length
        too_long = np.flatnonzero(lengths > context)
        if len(too_long) == 0:
            return
        first = too_long[0]
        more = f" (and {len(too_long) - 1} more are too long)" if len(too_long) > 1 else ""
        message = f"text {first} has {lengths[first]} tokens with start and end, the context holds {context}{more}"
        raise TextError(message, hint="shorten it, or pass truncate=True to keep its beginning")

    def _require_ends(self) -> None:
        """That the JSON's start and end are the spec's, so that ids can be framed and cut without it."""
        words = SPECIAL_WORDS.get(self.spec.dialect)
        if words is None:
            found = self._core.encode("").ids
        else:
            found = [index for word in words for index in self._core.encode(word).ids]
        expected = [self.spec.start_id, self.spec.end_id]
        if found != expected:
            message = f"expected start and end ids {expected} in dialect {self.spec.dialect}, the tokenizer has {found}"
            raise SpecError(message, hint="use the tokenizer.json that was made for this dialect and checkpoint")

    def _has_plain_texts(self, tree: dict[str, Any]) -> bool:
        """Whether a plain text is split as the plain way splits it, and no added token can occur in one."""
        added = [token["content"] for token in tree.get("added_tokens", [])]
        known = self.spec.dialect in SPECIAL_WORDS or is_clip_pipeline(tree)
        return known and all("<" in content for content in added)


def _parsed(tokenizer_json: str) -> dict[str, Any]:
    try:
        tree = json.loads(tokenizer_json)
    except ValueError as error:
        raise _unreadable(error) from error
    if not isinstance(tree, dict):
        raise _unreadable(f"expected an object, found {type(tree).__name__}")
    return tree


def _core(tokenizer_json: str) -> Core:
    try:
        return Core.from_str(tokenizer_json)
    except Exception as error:  # the library raises nothing narrower
        raise _unreadable(error) from error


def _unreadable(cause: object) -> SpecError:
    message = f"the tokenizer JSON cannot be read by tokenizers {metadata.version('tokenizers')}: {cause}"
    return SpecError(message, hint="build the bundle again, or upgrade the tokenizers package")


def _checked(texts: object) -> list[str]:
    if isinstance(texts, (str, bytes)):
        message = f"expected a list of texts, found one {type(texts).__name__}"
        raise TextError(message, hint="put it into a list: [text]")
    try:
        batch = list(cast("Sequence[object]", texts))
    except TypeError as error:
        message = f"expected a list of texts, found {type(texts).__name__}"
        raise TextError(message, hint='pass a list of str, as in ["a red circle"]') from error
    for index, text in enumerate(batch):
        if not isinstance(text, str):
            message = f"text {index} is not a str but {type(text).__name__}"
            raise TextError(message, hint="decode bytes, and leave out or replace missing values")
    return cast("list[str]", batch)


@functools.cache
def _be_quiet_when_forked() -> None:
    """Keep `tokenizers` from printing a warning into every child of a process that has tokenized.

    Its threads do not survive a fork, so the child has to work without them. Saying so before the fork, by the
    variable that the library reads, is the way it offers; the parent and its choice stay as they were.
    """
    variable = "TOKENIZERS_PARALLELISM"
    unset: list[bool] = []

    def before() -> None:
        unset.append(variable not in os.environ)
        if unset[-1]:
            os.environ[variable] = "false"

    def after_in_parent() -> None:
        if unset.pop():
            os.environ.pop(variable, None)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=after_in_parent)
