"""Tokenizer directories as they are found on the hub, each read by us and by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from corpus import HAND_PICKED
from tokenizer_oracles import clip_vocabulary, huggingface_tokenizer, ids_by_transformers, make_tokenizer, spec_of
from tokenizers import AddedToken
from vocabulary_data import open_clip_merges

from clip_export.errors import CheckpointError, UnsupportedModelError
from clip_export.tokenizer import Tokenizer, huggingface_tokenizer_json

OWN_TOKENS = "a photo of <cat-toy> and SKS sks! <|endoftext|> the sksy !! <pad> [MASK] <Cat-Toy>"
TEXTS = [text for text in HAND_PICKED.values() if not any("\ud800" <= c <= "\udfff" for c in text)] + [OWN_TOKENS]


def write_legacy(directory: Path) -> None:
    """vocab.json and merges.txt, as OpenAI's checkpoints were first converted."""
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps(clip_vocabulary()), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *open_clip_merges()])
    (directory / "merges.txt").write_text(merges + "\n", encoding="utf-8")


def write_json(directory: Path, name: str, tree: object) -> None:
    (directory / name).write_text(json.dumps(tree), encoding="utf-8")


def legacy(directory: Path) -> None:
    write_legacy(directory)


def legacy_with_maps(directory: Path) -> None:
    write_legacy(directory)
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    start, end = ({"content": word, **token} for word in ("<|startoftext|>", "<|endoftext|>"))
    specials = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "<|endoftext|>"}
    write_json(directory, "special_tokens_map.json", specials)
    write_json(directory, "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})


def legacy_with_added_tokens(directory: Path) -> None:
    legacy_with_maps(directory)
    write_json(directory, "added_tokens.json", {"sks": 49409, "<cat-toy>": 49408})


def stable_diffusion_2(directory: Path) -> None:
    """Padding is the word "!", which makes it a special token."""
    write_legacy(directory)
    specials = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    write_json(directory, "special_tokens_map.json", specials | {"pad_token": "!"})
    config = {"pad_token": "!", "tokenizer_class": "CLIPTokenizer", "add_prefix_space": False}
    start = {"__type": "AddedToken", "content": "<|startoftext|>", "lstrip": False, "normalized": True}
    write_json(directory, "tokenizer_config.json", config | {"bos_token": start})


def saved_by_transformers(directory: Path) -> None:
    huggingface_tokenizer().save_pretrained(directory)


def with_padding_and_truncation(directory: Path) -> None:
    tokenizer = huggingface_tokenizer()
    tokenizer(["a", "a b"], padding="max_length", truncation=True, max_length=5)
    tokenizer.save_pretrained(directory)
    assert json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["truncation"] is not None


def with_own_tokens(directory: Path) -> None:
    tokenizer = huggingface_tokenizer()
    tokenizer.add_tokens(["<cat-toy>", "sks"])
    tokenizer.add_tokens([AddedToken("[MASK]", special=True, normalized=False, lstrip=True)], special_tokens=True)
    tokenizer.save_pretrained(directory)


def with_added_tokens_decoder(directory: Path) -> None:
    write_legacy(directory)
    token = {"lstrip": False, "rstrip": False, "single_word": False}
    decoder = {
        "49406": {"content": "<|startoftext|>", "normalized": True, "special": True, **token},
        "49407": {"content": "<|endoftext|>", "normalized": False, "special": True, **token},
        "49408": {"content": "sks", "normalized": True, "special": False, **token, "single_word": True},
    }
    config = {"added_tokens_decoder": decoder, "additional_special_tokens": ["<pad>"], "pad_token": "<|endoftext|>"}
    write_json(directory, "tokenizer_config.json", config | {"tokenizer_class": "CLIPTokenizer"})


def with_extra_special_tokens(directory: Path) -> None:
    huggingface_tokenizer(extra_special_tokens=["<cat-toy>"], mask_token="[MASK]").save_pretrained(directory)


def with_another_normalizer(directory: Path) -> None:
    """CLIPTokenizer ignores what tokenizer.json says of normalization."""
    saved_by_transformers(directory)
    tree = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    tree["normalizer"] = {"type": "NFKD"}
    write_json(directory, "tokenizer.json", tree)


def taken_as_it_stands(directory: Path) -> None:
    """A generic class takes tokenizer.json with its own normalization."""
    with_another_normalizer(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(directory, "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"})


KINDS = [
    legacy,
    legacy_with_maps,
    legacy_with_added_tokens,
    stable_diffusion_2,
    saved_by_transformers,
    with_padding_and_truncation,
    with_own_tokens,
    with_added_tokens_decoder,
    with_extra_special_tokens,
    with_another_normalizer,
    taken_as_it_stands,
]


def theirs(directory: Path) -> Any:
    package = oracles.transformers()
    generic = directory.name == taken_as_it_stands.__name__
    return (package.PreTrainedTokenizerFast if generic else package.CLIPTokenizer).from_pretrained(directory)


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_directory(write: Callable[[Path], None], tmp_path: Path) -> None:
    directory = tmp_path / write.__name__
    write(directory)
    original = theirs(directory)
    ids = ids_by_transformers(original)(TEXTS)
    pooled = {"first_end": (ids == 49407).argmax(axis=-1), "argmax": ids.argmax(axis=-1)}
    tokenizer_json = huggingface_tokenizer_json(directory)
    for pooling, eot_index in pooled.items():
        spec = spec_of("huggingface", pad_id=original.pad_token_id, pooling=pooling)
        ours = Tokenizer(spec, tokenizer_json)(TEXTS, truncate=True)
        differing = [TEXTS[row] for row in np.flatnonzero((ours.input_ids != ids).any(axis=1))]
        assert differing == []
        np.testing.assert_array_equal(ours.eot_index, eot_index)


def test_pooling_rules_differ_with_own_tokens(tmp_path: Path) -> None:
    with_own_tokens(tmp_path / "checkpoint")
    tokenizer_json = huggingface_tokenizer_json(tmp_path / "checkpoint")
    highest, first_end = (
        Tokenizer(spec_of("huggingface", pooling=pooling), tokenizer_json)(["a <cat-toy> here"]).eot_index[0]
        for pooling in ("argmax", "first_end")
    )
    assert (highest, first_end) == (2, 4)


def test_the_json_is_canonical(tmp_path: Path) -> None:
    """The same bytes from the same vocabulary, whichever files it came in and however often they are read."""
    legacy(tmp_path / "legacy")
    saved_by_transformers(tmp_path / "saved")
    first = huggingface_tokenizer_json(tmp_path / "legacy")
    assert first == huggingface_tokenizer_json(tmp_path / "legacy")
    tree = json.loads(huggingface_tokenizer_json(tmp_path / "saved"))
    assert (tree["padding"], tree["truncation"]) == (None, None)
    assert json.loads(first)["model"] == tree["model"]
    assert ": " not in first[:200]


def test_reading_again_what_was_frozen_changes_nothing(tmp_path: Path) -> None:
    with_own_tokens(tmp_path / "checkpoint")
    frozen = huggingface_tokenizer_json(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "tokenizer.json").write_text(frozen, encoding="utf-8")
    assert huggingface_tokenizer_json(tmp_path / "checkpoint") == frozen


def test_quick_way_is_taken_only_where_it_is_safe(tmp_path: Path) -> None:
    for write in (stable_diffusion_2, taken_as_it_stands):
        write(tmp_path / write.__name__)
        tokenizer = Tokenizer(spec_of("huggingface"), huggingface_tokenizer_json(tmp_path / write.__name__))
        assert tokenizer._plain is None
    assert make_tokenizer("huggingface")._plain is not None


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected tokenizer.json, or vocab.json and merges.txt"):
        huggingface_tokenizer_json(tmp_path)
    legacy(tmp_path / "half")
    (tmp_path / "half" / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer") as caught:
        huggingface_tokenizer_json(tmp_path / "half")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{", "not readable as JSON"),
        ("tokenizer.json", "[]", "expected an object, found list"),
        ("tokenizer.json", '{"added_tokens": []}', "do not fit together"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"vocab": {"a": 0}, "merges": ["b c"]}}', "not a tokenizer"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"vocab": {"a": 0}, "merges": ["b"]}}', "do not fit"),
        ("vocab.json", "{", "not readable as JSON"),
        ("merges.txt", b"\xff\xfe\x00", "not readable as text"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "do not fit together"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    legacy(tmp_path / "checkpoint")
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    (tmp_path / "checkpoint" / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as caught:
        huggingface_tokenizer_json(tmp_path / "checkpoint")
    assert caught.value.hint
    assert caught.value.__cause__ is not None or words.startswith("expected")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"tokenizer_class": "BertTokenizer"}, "found 'BertTokenizer'"),
        ({"padding_side": "left"}, "expected padding_side right, found 'left'"),
        ({"truncation_side": "left"}, "expected truncation_side right, found 'left'"),
    ],
)
def test_other_tokenizers(tmp_path: Path, config: dict[str, str], words: str) -> None:
    legacy(tmp_path / "checkpoint")
    write_json(tmp_path / "checkpoint", "tokenizer_config.json", config)
    with pytest.raises(UnsupportedModelError, match=words):
        huggingface_tokenizer_json(tmp_path / "checkpoint")


def test_another_model_type(tmp_path: Path) -> None:
    legacy(tmp_path / "checkpoint")
    tree = {"added_tokens": [], "model": {"type": "WordPiece", "vocab": {}}}
    write_json(tmp_path / "checkpoint", "tokenizer.json", tree)
    with pytest.raises(UnsupportedModelError, match="expected a BPE model, found WordPiece"):
        huggingface_tokenizer_json(tmp_path / "checkpoint")
