"""The three original tokenizers behind one call each: texts -> ids [n, context_length], as the originals give them."""

from __future__ import annotations

import functools
import gzip
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
from vocabulary_data import VOCABULARY, open_clip_merges

from clip_export.spec import Dialect, Pooling, TokenizerSpec
from clip_export.tokenizer import Tokenizer, clip_tokenizer_json, default_truncate, huggingface_tokenizer_json

CONTEXT = 77
DIALECTS: tuple[Dialect, ...] = ("openai", "open_clip", "huggingface")


def spec_of(dialect: Dialect, **changes: Any) -> TokenizerSpec:
    """CLIP's spec in a dialect."""
    pooling: Pooling = "first_end" if dialect == "huggingface" else "argmax"
    fields: dict[str, Any] = {
        "dialect": dialect,
        "context_length": CONTEXT,
        "start_id": 49406,
        "end_id": 49407,
        "pad_id": 49407 if dialect == "huggingface" else 0,
        "pooling": pooling,
        "truncate": default_truncate(dialect),
    }
    return TokenizerSpec(**(fields | changes))


def clip_vocabulary() -> dict[str, int]:
    """CLIP's token -> id, as OpenAI's own SimpleTokenizer numbers it."""
    return dict(oracles.openai_clip().clip._tokenizer.encoder)


def huggingface_tokenizer(**options: Any) -> Any:
    """transformers' CLIPTokenizer with CLIP's vocabulary."""
    merges = [tuple(line.split()) for line in open_clip_merges()]
    return oracles.transformers().CLIPTokenizer(
        vocab=clip_vocabulary(), merges=merges, model_max_length=CONTEXT, **options
    )


def make_tokenizer(dialect: Dialect, **changes: Any) -> Tokenizer:
    """Ours, with CLIP's vocabulary."""
    tokenizer_json = huggingface_json() if dialect == "huggingface" else clip_tokenizer_json(dialect)
    return Tokenizer(spec_of(dialect, **changes), tokenizer_json)


@functools.cache
def huggingface_json() -> str:
    """What we read from the files that transformers writes."""
    with tempfile.TemporaryDirectory() as directory:
        huggingface_tokenizer().save_pretrained(directory)
        return huggingface_tokenizer_json(Path(directory))


Original = Callable[[Sequence[str]], np.ndarray]


@functools.cache
def original(dialect: Dialect, context_length: int = CONTEXT) -> Original:
    """The original, cutting what is too long."""
    if dialect == "openai":
        tokenize = oracles.openai_clip().tokenize
        return lambda texts: tokenize(list(texts), context_length=context_length, truncate=True).numpy()
    if dialect == "open_clip":
        tokenize = oracles.open_clip().tokenize
        return lambda texts: tokenize(list(texts), context_length=context_length).numpy()
    return ids_by_transformers(huggingface_tokenizer(), context_length)


def ids_by_transformers(tokenizer: Any, context_length: int = CONTEXT) -> Original:
    """A transformers tokenizer called as its documentation calls it for CLIP."""

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        options = {"padding": "max_length", "truncation": True, "max_length": context_length}
        return np.array(tokenizer(list(texts), **options)["input_ids"])

    return tokenize


def frozen_merges() -> list[str]:
    """The package's merges."""
    return gzip.decompress((VOCABULARY / "merges.txt.gz").read_bytes()).decode("utf-8").split("\n")


def frozen_classes() -> dict[str, str]:
    """The package's character classes."""
    return dict(json.loads((VOCABULARY / "unicode_classes.json").read_text(encoding="utf-8")))
