"""Hugging Face's tokenizer files -> TokenizerSpec and the tokenizer's JSON."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from clip_export.checkpoints import Options
from clip_export.checkpoints._clip import VOCAB_SIZE, clip_tokenizer
from clip_export.errors import AmbiguousCheckpointError, CheckpointError
from clip_export.spec import Pooling, TextSpec, TokenizerSpec

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
# Stable Diffusion's layout: text_encoder/ beside tokenizer/, text_encoder_2/ beside tokenizer_2/.
_TEXT_ENCODER = re.compile(r"text_encoder(_\d+)?")


def tokenizer_spec(
    directory: Path, text: TextSpec, end_id: int | None, options: Options
) -> tuple[TokenizerSpec, str, list[Path]]:
    """The tokenizer, its JSON, and the files that it came from.

    `end_id` is the id at whose first occurrence the tower pools, None where it pools at argmax(ids).
    Raises AmbiguousCheckpointError without tokenizer files, unless `options.tokenizer_dialect` states CLIP's own
    vocabulary and the text tower embeds as many ids; CheckpointError if tokenizer and tower do not fit.
    """
    pooling: Pooling = "argmax" if end_id is None else "first_end"
    folder = _tokenizer_folder(directory)
    files: list[Path] = []
    if folder is not None and options.tokenizer_dialect in (None, "huggingface"):
        spec, tokenizer_json = _own_tokenizer(folder, text, pooling)
        files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    else:
        dialect = options.tokenizer_dialect
        if dialect is None or (folder is None and text.vocab_size != VOCAB_SIZE):
            raise _no_tokenizer(text, context=options.context)
        spec, tokenizer_json = clip_tokenizer(text, dialect, pooling)
    if end_id is not None and spec.end_id != end_id:
        raise CheckpointError(
            f"the tokenizer ends texts with id {spec.end_id}, text_config.eos_token_id pools at id {end_id}",
            hint="the tokenizer files may be of another checkpoint",
        )
    return spec, tokenizer_json, files


def _tokenizer_folder(directory: Path) -> Path | None:
    """Where the tokenizer files are: in the checkpoint, or where diffusers puts those of its text encoders."""
    folders = [directory]
    path = Path(os.path.abspath(directory))  # noqa: PTH100  (a link called text_encoder has its tokenizer beside it)
    if match := _TEXT_ENCODER.fullmatch(path.name):
        folders.append(path.parent / f"tokenizer{match[1] or ''}")
    return next((f for f in folders if (f / "tokenizer.json").is_file() or (f / "vocab.json").is_file()), None)


def _no_tokenizer(text: TextSpec, *, context: bool) -> AmbiguousCheckpointError:
    copy = (
        "copy the tokenizer files of the original beside the weights: tokenizer.json, or vocab.json and merges.txt, "
        "with tokenizer_config.json and special_tokens_map.json"
    )
    if text.vocab_size != VOCAB_SIZE:
        return AmbiguousCheckpointError(
            f"no tokenizer files in the checkpoint, and its text tower embeds {text.vocab_size} ids, "
            f"not the {VOCAB_SIZE} of CLIP's own vocabulary",
            hint=copy,
        )
    if context:
        return AmbiguousCheckpointError(
            "no tokenizer files in the checkpoint, and none in tokenizer/ or tokenizer_2/ beside its text encoder",
            hint=f"{copy}; or, for CLIP's own vocabulary, state --tokenizer-dialect huggingface: it is padded as the "
            "model's family is",
        )
    return AmbiguousCheckpointError(
        "no tokenizer files in the checkpoint: its tokenizer, and what it pads texts with, are not known",
        hint=f"{copy}; or, for CLIP's own vocabulary, state --tokenizer-dialect: huggingface pads with the end token, "
        "openai and open_clip with 0",
    )


def _own_tokenizer(directory: Path, text: TextSpec, pooling: Pooling) -> tuple[TokenizerSpec, str]:
    from clip_export.huggingface_tokenizer import huggingface_tokenizer
    from clip_export.tokenizer import default_truncate

    found = huggingface_tokenizer(directory)
    if (highest := _highest_id(found.tokenizer_json)) >= text.vocab_size:
        raise CheckpointError(
            f"the tokenizer gives ids up to {highest}, the text tower embeds only {text.vocab_size}",
            hint="the tokenizer files may be of another checkpoint",
        )
    spec = TokenizerSpec(
        dialect="huggingface",
        context_length=text.context_length,
        start_id=found.start_id,
        end_id=found.end_id,
        pad_id=found.pad_id,
        pooling=pooling,
        truncate=default_truncate("huggingface"),
    )
    return spec, found.tokenizer_json


def _highest_id(tokenizer_json: str) -> int:
    tree = json.loads(tokenizer_json)
    ids: list[int] = [*tree["model"]["vocab"].values(), *(token["id"] for token in tree.get("added_tokens", []))]
    return max(ids)
