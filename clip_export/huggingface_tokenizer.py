"""The tokenizer of a Hugging Face checkpoint directory, put together as transformers puts it together."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from clip_export.errors import CheckpointError, UnsupportedModelError
from clip_export.tokenizer_json import END_OF_WORD, canonical_json

__all__ = ["HuggingfaceTokenizer", "huggingface_tokenizer", "huggingface_tokenizer_json", "is_clip_pipeline"]

HUGGINGFACE_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # its constant
)
CLIP_CLASSES = (None, "CLIPTokenizer", "CLIPTokenizerFast")
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # they take tokenizer.json as it stands
NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Built = TypeVar("Built")


class HuggingfaceTokenizer(NamedTuple):
    """A tokenizer in the format of the tokenizers library, and the ids of its start, end and padding token."""

    tokenizer_json: str
    start_id: int
    end_id: int
    pad_id: int


def huggingface_tokenizer_json(directory: Path) -> str:
    """The `tokenizer_json` of `huggingface_tokenizer`."""
    return huggingface_tokenizer(directory).tokenizer_json


def huggingface_tokenizer(directory: Path) -> HuggingfaceTokenizer:
    """The tokenizer that transformers makes of a checkpoint directory, compact and the same bytes each time.

    Reads tokenizer.json, or vocab.json and merges.txt, and the special and added tokens of tokenizer_config.json,
    special_tokens_map.json and added_tokens.json. As in transformers 5, CLIP's own normalization and word pattern are
    used whatever tokenizer.json says of them, unless tokenizer_config.json names a class that takes it as it stands.
    Raises CheckpointError for missing or malformed files, UnsupportedModelError for another kind of tokenizer.
    """
    config = _read(directory, "tokenizer_config.json") or {}
    saved = _read(directory, "tokenizer.json")
    _require_right_side(directory, config)
    tokenizer_class = config.get("tokenizer_class")
    if tokenizer_class not in (*CLIP_CLASSES, *PLAIN_CLASSES):
        message = f"{directory / 'tokenizer_config.json'}: expected CLIP's tokenizer, found {tokenizer_class!r}"
        raise UnsupportedModelError(message, hint="only checkpoints with CLIP's byte-pair tokenizer can be exported")
    as_it_stands = tokenizer_class in PLAIN_CLASSES and saved is not None
    try:
        added, named = _special_tokens(directory, config, saved)
        core = _core_as_saved(directory, saved) if as_it_stands else _clip_core(directory, saved, named)
        _add_tokens(core, added, named)
        start_id, end_id, pad_id = (_id(core, named, key) for key in ("bos_token", "eos_token", "pad_token"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"the tokenizer files in {directory} do not fit together: {type(error).__name__}: {error}"
        raise CheckpointError(message, hint="download the tokenizer files again, all from one revision") from error
    if not as_it_stands:
        # Start and end token around each text, and nothing else.
        ends = (str(named["eos_token"]), end_id), (str(named["bos_token"]), start_id)
        core.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return HuggingfaceTokenizer(canonical_json(json.loads(core.to_str())), start_id, end_id, pad_id)


def _core_as_saved(directory: Path, saved: dict[str, Any] | None) -> Tokenizer:
    return _from_library(directory / "tokenizer.json", lambda: Tokenizer.from_str(json.dumps(saved)))


def _clip_core(directory: Path, saved: dict[str, Any] | None, named: dict[str, AddedToken]) -> Tokenizer:
    vocabulary, merges = _vocabulary_and_merges(directory, saved)
    pairs = [(left, right) for left, right in (m.split(" ") if isinstance(m, str) else m for m in merges)]
    options = {"continuing_subword_prefix": "", "end_of_word_suffix": END_OF_WORD, "fuse_unk": False}
    unknown = str(named["unk_token"])
    return _clip_pipeline(
        _from_library(directory, lambda: models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, **options))
    )


def _from_library(path: Path, build: Callable[[], Built]) -> Built:
    try:
        return build()
    except Exception as error:  # the library raises nothing narrower
        message = f"{path}: not a tokenizer that the tokenizers package reads: {error}"
        raise CheckpointError(message, hint="download the tokenizer files again, all from one revision") from error


def _add_tokens(core: Tokenizer, added: list[AddedToken], named: dict[str, AddedToken]) -> None:
    """One after the other, as transformers does: a token that the vocabulary lacks gets the next free id."""
    contents = {str(token) for token in added}
    core.add_tokens([*added, *(token for token in named.values() if str(token) not in contents)])


def _id(core: Tokenizer, named: dict[str, AddedToken], key: str) -> int:
    if key not in named:
        raise ValueError(f"{key} is null, expected a token")
    index = core.token_to_id(str(named[key]))
    assert index is not None, "named tokens were added above"
    return int(index)


def _clip_pipeline(model: models.BPE) -> Tokenizer:
    core = Tokenizer(model)
    core.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(HUGGINGFACE_WORDS), behavior="removed", invert=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return core


@functools.cache
def _clip_stages() -> tuple[Any, Any]:
    tree = json.loads(_clip_pipeline(models.BPE()).to_str())
    return tree["normalizer"], tree["pre_tokenizer"]


def is_clip_pipeline(tree: dict[str, Any]) -> bool:
    """Whether a tokenizer JSON normalizes and splits as Hugging Face's CLIPTokenizer does."""
    return (tree.get("normalizer"), tree.get("pre_tokenizer")) == _clip_stages()


def _vocabulary_and_merges(directory: Path, saved: dict[str, Any] | None) -> tuple[dict[str, int], list[Any]]:
    if saved is None:
        vocabulary, merges = _read(directory, "vocab.json"), _read_merges(directory)
    else:
        if saved["model"].get("type", "BPE") != "BPE":
            message = f"{directory / 'tokenizer.json'}: expected a BPE model, found {saved['model']['type']}"
            raise UnsupportedModelError(message, hint="only CLIP's byte-pair tokenizer can be exported")
        vocabulary, merges = saved["model"]["vocab"], saved["model"]["merges"]
    if vocabulary is None or merges is None:
        message = f"{directory} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"
        raise CheckpointError(message, hint="copy the tokenizer files of the same checkpoint into the directory")
    return vocabulary, merges


def _special_tokens(
    directory: Path, config: dict[str, Any], saved: dict[str, Any] | None
) -> tuple[list[AddedToken], dict[str, AddedToken]]:
    """The added tokens by id, and the named ones by name, where transformers takes them from.

    A config with `added_tokens_decoder` is the whole truth; without it the older files are read one after the other.
    """
    named: dict[str, Any] = {"unk_token": "<|endoftext|>", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    named |= {"pad_token": "<|endoftext|>"} | {key: config[key] for key in NAMED_SPECIALS if key in config}
    extra = _as_list(config.get("extra_special_tokens") or config.get("additional_special_tokens"))
    by_id: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        by_id |= {int(index): _token(fields) for index, fields in config["added_tokens_decoder"].items()}
    else:
        legacy = _read(directory, "special_tokens_map.json") or {}
        named |= {key: legacy[key] for key in NAMED_SPECIALS if key in legacy}
        extra += _as_list(legacy.get("extra_special_tokens") or legacy.get("additional_special_tokens"))
        specials = {str(_token(token)) for token in (*filter(None, named.values()), *extra)}
        for content, index in (_read(directory, "added_tokens.json") or {}).items():
            special = content in specials
            by_id[index] = AddedToken(content, normalized=not special, special=special)
        by_id |= {fields["id"]: _token(fields) for fields in (saved or {}).get("added_tokens", [])}
    known = {str(token): token for token in by_id.values()}
    tokens = {name: known.get(str(_token(value)), _token(value)) for name, value in named.items() if value is not None}
    tokens |= {f"extra {i}": known.get(str(_token(value)), _token(value)) for i, value in enumerate(extra)}
    return [by_id[index] for index in sorted(by_id)], tokens


def _as_list(extra: Any) -> list[Any]:
    return list(extra.values()) if isinstance(extra, dict) else list(extra or [])


def _token(value: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    fields = {key: value[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in value}
    return AddedToken(value["content"], **{"special": True, **fields})


def _read(directory: Path, name: str) -> dict[str, Any] | None:
    path = directory / name
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{path} is not readable as JSON: {error}"
        raise CheckpointError(message, hint="download the file again") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(tree).__name__}", hint="download it again")
    return tree


def _read_merges(directory: Path) -> list[str] | None:
    path = directory / "merges.txt"
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as text: {error}", hint="download the file again") from error
    return [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]


def _require_right_side(directory: Path, config: dict[str, Any]) -> None:
    for key in ("padding_side", "truncation_side"):
        if (side := config.get(key, "right")) != "right":
            message = f"{directory / 'tokenizer_config.json'}: expected {key} right, found {side!r}"
            raise UnsupportedModelError(
                message, hint="CLIP pads and cuts on the right; correct the file if it is wrong"
            )
