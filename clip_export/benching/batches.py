"""What contestants are given: batches of golden pictures, and of texts as people write them or of a stated length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clip_export.bundle import Bundle
from clip_export.context_inputs import complete_feeds
from clip_export.errors import InputError
from clip_export.pairs import spread
from clip_export.prompts import prompts
from clip_export.runtime import front
from clip_export.spec import Tower
from clip_export.tokenizer import Tokenizer, Tokens

NATURAL = "natural"
MOST_BATCH = 4096
_MOST_NATURAL = 24  # tokens: four of five prompts have no more, and hardly a caption has


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch for one tower: `feeds` as its graph takes them, by input name.

    A text batch has `lengths`, "natural" or the tokens that each text has, and `tokens` at full context, which an
    Encoder trims by itself; `length` is that of `feeds`, padded to its longest text.
    """

    tower: Tower
    size: int
    feeds: Mapping[str, np.ndarray]
    lengths: str | None = None
    length: int | None = None
    tokens: Tokens | None = None

    @property
    def title(self) -> str:
        """As in "image" or "text, natural"."""
        return self.tower if self.lengths is None else f"{self.tower}, {self.lengths}"

    @property
    def key(self) -> str:
        """Tells it from every other batch of a benchmark."""
        return f"{self.title}, {self.size}"

    @property
    def axes(self) -> dict[str, int]:
        """The moving axes of the graph, by the names that it has for them."""
        return {"batch": self.size} | ({} if self.length is None else {"sequence": self.length})


def check(batches: Sequence[int], lengths: Sequence[str]) -> None:
    """Raise InputError for sizes that no batch has, or for no lengths."""
    if not batches or not all(1 <= size <= MOST_BATCH for size in batches):
        found = ", ".join(map(str, batches)) or "none"
        raise InputError(f"expected batch sizes from 1 to {MOST_BATCH}, found {found}", hint="--batch 1,8,64")
    if not lengths:
        raise InputError("expected lengths of texts, found none", hint=f"--lengths {NATURAL},77")


def make_batches(bundle: Bundle, sizes: Sequence[int], lengths: Sequence[str]) -> Iterator[Batch]:
    """Every batch of each tower of `bundle`: pictures at `sizes`, texts at `sizes` and `lengths`.

    A length is "natural" or a number of tokens, start and end included. Raises InputError for one that no text has.
    """
    tokenizer = None if bundle.spec.text is None else front(bundle.spec, bundle.tokenizer_json())[0]
    for tower in bundle.spec.towers:
        if tower == "image":
            yield from (_image(bundle, size) for size in sizes)
            continue
        assert tokenizer is not None
        for stated in lengths:
            yield from (_text(bundle, tokenizer, stated, size) for size in sizes)


def _image(bundle: Bundle, size: int) -> Batch:
    golden = bundle.golden().image
    assert golden is not None
    pixels = np.ascontiguousarray(golden.pixels[np.arange(size) % len(golden.pixels)])
    return Batch(tower="image", size=size, feeds={"pixels": pixels})


def _text(bundle: Bundle, tokenizer: Tokenizer, lengths: str, size: int) -> Batch:
    tokens = natural(tokenizer, size) if lengths == NATURAL else of_length(tokenizer, lengths, size)
    longest = int(tokens.eot_index.max()) + 1
    length = longest if bundle.graph("text").sequence_dynamic else int(tokens.input_ids.shape[1])
    ids = np.ascontiguousarray(tokens.input_ids[:, :length])
    feeds = {"input_ids": ids, "eot_index": tokens.eot_index}
    if bundle.spec.context is not None and bundle.spec.text is not None:
        feeds = complete_feeds(feeds, bundle.spec.text)
    return Batch(tower="text", size=size, feeds=feeds, lengths=lengths, length=length, tokens=tokens)


def natural(tokenizer: Tokenizer, size: int) -> Tokens:
    """The tokens of `size` built-in prompts, spread over those that are as long as captions are, in turn where few."""
    every = tokenizer(prompts(), truncate=True)
    short = np.flatnonzero(every.eot_index < _MOST_NATURAL)
    chosen = short[spread(len(short), size)] if size <= len(short) else short[np.arange(size) % len(short)]
    return Tokens(input_ids=every.input_ids[chosen], eot_index=every.eot_index[chosen])


def of_length(tokenizer: Tokenizer, length: str, size: int) -> Tokens:
    """`size` texts of exactly `length` tokens. Raises InputError for what is no length of a text."""
    context = tokenizer.spec.context_length
    if not length.isascii() or not length.isdigit() or not 2 <= int(length) <= context:
        raise InputError(
            f"expected {NATURAL} or a number of tokens from 2 to {context}, found {length!r}",
            hint=f"--lengths {NATURAL},{context}",
        )
    end = int(length) - 1
    whole = tokenizer([" ".join(prompts()[:64])], truncate=True)
    ids = np.full_like(whole.input_ids, tokenizer.spec.pad_id)
    ids[:, :end], ids[:, end] = whole.input_ids[:, :end], tokenizer.spec.end_id
    return Tokens(input_ids=ids.repeat(size, axis=0), eot_index=np.full(size, end, np.int32))
