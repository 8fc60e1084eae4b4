"""What CLIP fixed and everyone copied: its vocabulary and the statistics of its training pictures."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from clip_export.errors import CheckpointError
from clip_export.spec import Dialect, Pooling, TextSpec, TokenizerSpec

VOCAB_SIZE = 49408
START_ID = VOCAB_SIZE - 2
END_ID = VOCAB_SIZE - 1
_BYTE_SYMBOLS = 512  # each byte, alone and at the end of a word; the merges make the ids from here to START_ID

# Per RGB channel on the 0..1 scale; openai/CLIP, clip/clip.py, _transform.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def clip_tokenizer(text: TextSpec, dialect: Dialect, pooling: Pooling) -> tuple[TokenizerSpec, str]:
    """CLIP's own vocabulary in a dialect: OpenAI and open_clip pad with 0, Hugging Face with the end token.

    Raises CheckpointError if the text tower embeds fewer ids than the vocabulary has.
    """
    from clip_export.tokenizer import clip_tokenizer_json, default_truncate

    if text.vocab_size < VOCAB_SIZE:
        raise CheckpointError(
            f"CLIP's own tokenizer gives ids up to {END_ID}, the text tower embeds only {text.vocab_size}",
            hint="the checkpoint needs the tokenizer files that it was trained with",
        )
    spec = TokenizerSpec(
        dialect=dialect,
        context_length=text.context_length,
        start_id=START_ID,
        end_id=END_ID,
        pad_id=END_ID if dialect == "huggingface" else 0,
        pooling=pooling,
        truncate=default_truncate(dialect),
    )
    return spec, _in_huggingface_form() if dialect == "huggingface" else clip_tokenizer_json(dialect)


def _in_huggingface_form() -> str:
    """CLIP's vocabulary as the vocab.json and merges.txt that Hugging Face distributes it in, read as those are."""
    from clip_export.tokenizer import clip_tokenizer_json, huggingface_tokenizer_json

    # The openai dialect has helper merges for its special words behind CLIP's own: they are left out.
    bpe = json.loads(clip_tokenizer_json("openai"))["model"]
    vocabulary = {symbol: index for symbol, index in bpe["vocab"].items() if index < START_ID}
    vocabulary |= {"<|startoftext|>": START_ID, "<|endoftext|>": END_ID}
    merges = bpe["merges"][: START_ID - _BYTE_SYMBOLS]
    with tempfile.TemporaryDirectory(prefix="clip-export-") as folder:
        directory = Path(folder)
        (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
        return huggingface_tokenizer_json(directory)
