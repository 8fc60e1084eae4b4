"""Hugging Face's tokenizer files -> TokenizerSpec and the tokenizer's JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from clip_export.checkpoints import Options
from clip_export.checkpoints._clip import VOCAB_SIZE, clip_tokenizer
from clip_export.checkpoints._files import read_json
from clip_export.errors import AmbiguousCheckpointError, CheckpointError
from clip_export.spec import Pooling, TextSpec, TokenizerSpec

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
)


def tokenizer_spec(
    directory: Path, text: TextSpec, end_id: int | None, options: Options
) -> tuple[TokenizerSpec, str, list[Path]]:
    """The tokenizer, its JSON, and the files that it came from.

    `end_id` is the id at whose first occurrence the tower pools, None where it pools at argmax(ids).
    Without tokenizer files CLIP's own vocabulary is taken if it has the size that the text tower embeds.
    Raises AmbiguousCheckpointError if not, and CheckpointError if tokenizer and tower do not fit.
    """
    dialect = options.tokenizer_dialect or "huggingface"
    pooling: Pooling = "argmax" if end_id is None else "first_end"
    has_files = (directory / "tokenizer.json").is_file() or (directory / "vocab.json").is_file()
    if dialect != "huggingface" or not has_files:
        if text.vocab_size != VOCAB_SIZE and not has_files:
            raise AmbiguousCheckpointError(
                f"no tokenizer files in the checkpoint, and its text tower embeds {text.vocab_size} ids, "
                f"not the {VOCAB_SIZE} of CLIP's own vocabulary",
                hint="copy the tokenizer files of the original into the directory: tokenizer.json, or vocab.json and "
                "merges.txt, with tokenizer_config.json",
            )
        spec, tokenizer_json = clip_tokenizer(text, dialect, pooling)
        files: list[Path] = []
    else:
        spec, tokenizer_json = _own_tokenizer(directory, text, pooling)
        files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if end_id is not None and spec.end_id != end_id:
        raise CheckpointError(
            f"the tokenizer ends texts with id {spec.end_id}, text_config.eos_token_id pools at id {end_id}",
            hint="the tokenizer files may be of another checkpoint",
        )
    return spec, tokenizer_json, files


def _own_tokenizer(directory: Path, text: TextSpec, pooling: Pooling) -> tuple[TokenizerSpec, str]:
    from clip_export.tokenizer import default_truncate, huggingface_tokenizer_json

    tokenizer_json = huggingface_tokenizer_json(directory)
    ids = _ids(tokenizer_json)
    if (highest := max(ids.values())) >= text.vocab_size:
        raise CheckpointError(
            f"the tokenizer gives ids up to {highest}, the text tower embeds only {text.vocab_size}",
            hint="the tokenizer files may be of another checkpoint",
        )
    named = _special_tokens(directory)
    spec = TokenizerSpec(
        dialect="huggingface",
        context_length=text.context_length,
        start_id=_special_id(named, ids, "bos_token"),
        end_id=_special_id(named, ids, "eos_token"),
        pad_id=_special_id(named, ids, "pad_token"),
        pooling=pooling,
        truncate=default_truncate("huggingface"),
    )
    return spec, tokenizer_json


def _ids(tokenizer_json: str) -> dict[str, int]:
    """Every token of a tokenizer with its id; added tokens win over the vocabulary, as in the tokenizers library."""
    tree = json.loads(tokenizer_json)
    added = {token["content"]: token["id"] for token in tree.get("added_tokens", [])}
    return {**tree["model"]["vocab"], **added}


def _special_tokens(directory: Path) -> dict[str, str]:
    """bos_token, eos_token and pad_token by name, in the order in which transformers looks for them.

    special_tokens_map.json is the older file. It overrides tokenizer_config.json unless that is new enough to hold
    `added_tokens_decoder` (transformers, PreTrainedTokenizerBase._from_pretrained): SD 2's pad_token "!" stands there.
    """
    path, legacy = directory / TOKENIZER_CONFIG, directory / SPECIAL_TOKENS
    named = read_json(path) if path.is_file() else {}
    if legacy.is_file() and "added_tokens_decoder" not in named:
        named = named | read_json(legacy)
    defaults = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return {key: _content(named.get(key), key) or default for key, default in defaults.items()}


def _content(token: object, key: str) -> str | None:
    """A special token's text: tokens are written as strings or as objects."""
    content = token.get("content") if isinstance(token, Mapping) else token
    if content is not None and not isinstance(content, str):
        raise CheckpointError(f"tokenizer files: {key}: expected a string, found {content!r}")
    return content


def _special_id(named: Mapping[str, str], ids: Mapping[str, int], key: str) -> int:
    if named[key] not in ids:
        raise CheckpointError(
            f"the {key} {named[key]!r} is not in the tokenizer's vocabulary",
            hint="the tokenizer files may be of different checkpoints",
        )
    return ids[named[key]]
