"""Stable Diffusion: the text encoders inside a single file, or a pipeline's folder as diffusers lays it out.

| in the file | is | of |
|---|---|---|
| cond_stage_model.transformer.* | CLIP-L in Hugging Face's names | Stable Diffusion 1 |
| cond_stage_model.model.* | OpenCLIP-H in OpenAI's names | Stable Diffusion 2 |
| conditioner.embedders.0.transformer.*, .1.model.* | CLIP-L and OpenCLIP-bigG | SDXL |
| conditioner.embedders.0.model.* | OpenCLIP-bigG | SDXL's refiner |
| text_encoders.clip_l.transformer.*, .clip_g.transformer.* | the same two, both in Hugging Face's names | SD 3 |

The rest of such a file (UNet, VAE, their EMA) is passed over without being read. A folder has model_index.json, and is
read encoder by encoder as `huggingface` reads one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from clip_export.checkpoints import Checkpoint, Options, Source, huggingface, openai
from clip_export.checkpoints._clip import VOCAB_SIZE, clip_tokenizer
from clip_export.checkpoints._files import base_name, read_json, source
from clip_export.checkpoints._huggingface_tokenizer import TOKENIZER_FILES
from clip_export.checkpoints._no_text_encoder import LORA, held_in, no_text_encoder
from clip_export.checkpoints._openai_layout import text_recipes as openai_text_recipes
from clip_export.checkpoints._tensors import StoredTensor, read_safetensors, read_state_dict
from clip_export.checkpoints._weights import Recipe, Weights, bind
from clip_export.errors import CheckpointError, UnsupportedModelError, WeightsError
from clip_export.spec import (
    Activation,
    ContextSpec,
    Family,
    ModelSpec,
    TextSpec,
    TokenizerSpec,
    TransformerSpec,
    weight_shapes,
)

MODEL_INDEX = "model_index.json"
EXPECTS = f"a Stable Diffusion .safetensors or .ckpt, or a diffusers folder with {MODEL_INDEX}; both with --context"

_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_DIGITS = 9  # of a block's number; longer ones are not even made numbers of
_HEAD_WIDTH = 64  # of every text encoder in the table
_SD2_BLOCKS_LEFT_OUT = 1  # diffusers' converter drops the last of 24, which Stable Diffusion 2 has no use for

_ABSENT: dict[Family, str] = {
    "sd3": "Stable Diffusion 3 has both; a model with one of them beside T5, such as Flux, is not supported"
}
_ZEROED: tuple[Family, ...] = ("sdxl", "sdxl_refiner")  # diffusers gives zeros where no negative prompt is given


class _Encoder(NamedTuple):
    """One text encoder of a single file: where its weights are, and what the file does not say of it."""

    prefix: str
    openai_names: bool
    activation: Activation
    pads_with_end: bool


_L = ("quick_gelu", True)
_H = ("gelu", False)  # bigG pads with 0 as H does


def _encoder(prefix: str, facts: tuple[Any, bool]) -> _Encoder:
    return _Encoder(prefix, prefix.endswith("model."), *facts)


# A key that gives the layout away, the family, its encoders. The first that is found decides.
_SINGLE_FILES: tuple[tuple[re.Pattern[str], Family, tuple[_Encoder, ...]], ...] = (
    (
        re.compile(r"conditioner\.embedders\.1\.model\."),
        "sdxl",
        (_encoder("conditioner.embedders.0.transformer.", _L), _encoder("conditioner.embedders.1.model.", _H)),
    ),
    (
        re.compile(r"conditioner\.embedders\.0\.model\."),
        "sdxl_refiner",
        (_encoder("conditioner.embedders.0.model.", _H),),
    ),
    (
        re.compile(r"text_encoders\.clip_[lg]\.transformer\."),
        "sd3",
        (_encoder("text_encoders.clip_l.transformer.", _L), _encoder("text_encoders.clip_g.transformer.", _H)),
    ),
    (re.compile(r"cond_stage_model\.transformer\."), "sd1", (_encoder("cond_stage_model.transformer.", _L),)),
    (re.compile(r"cond_stage_model\.model\."), "sd2", (_encoder("cond_stage_model.model.", _H),)),
)
# A whole CLIP in OpenAI's names. unCLIP of Stable Diffusion 2 has one of its own, elsewhere.
_OPENAI_CLIP = re.compile(r"(module\.)?visual\.conv1\.weight")
# Carries no information here: positions 0, 1, 2, …, the causal mask, and a scale that only similarities need.
_IGNORED = re.compile(r"(.*\.)?(position_ids|attn_mask|logit_scale)")

# How the names of diffusers' classes begin; the longer ones first.
_PIPELINES: dict[str, tuple[Family, tuple[str, ...]]] = {
    "StableDiffusionXL": ("sdxl", ("text_encoder", "text_encoder_2")),
    "StableDiffusion3": ("sd3", ("text_encoder", "text_encoder_2")),
    "StableDiffusion": ("sd1", ("text_encoder",)),
    "LatentConsistencyModel": ("sd1", ("text_encoder",)),
}


def claims(checkpoint: str | Path) -> bool:
    """A folder with model_index.json; of files, `read` of the package asks `is_single_file`, and only for Context."""
    return isinstance(checkpoint, Path) and checkpoint.is_dir() and (checkpoint / MODEL_INDEX).is_file()


def is_single_file(checkpoint: str | Path) -> bool:
    """A weights file that no config beside it says to be of another format."""
    if not isinstance(checkpoint, Path) or not checkpoint.is_file() or checkpoint.suffix.lower() not in _SUFFIXES:
        return False
    from clip_export.checkpoints import open_clip
    from clip_export.checkpoints._torchscript import is_archive

    if is_archive(checkpoint):  # OpenAI's
        return False
    return not huggingface.claims(checkpoint) and not open_clip.claims(checkpoint)


def read(checkpoint: str | Path, options: Options) -> Checkpoint:
    """Read a pipeline's folder or a single file, for Context: see `Options.context`."""
    path = Path(checkpoint)
    if not options.context:
        raise CheckpointError(
            f"{base_name(path)} is a whole diffusion pipeline, whose text encoders give Context",
            hint=f"add --context; or name one encoder: {path / 'text_encoder'}",
        )
    return _read_folder(path, options) if path.is_dir() else _read_file(path, options)


def of_clip(found: Checkpoint) -> Checkpoint:
    """A checkpoint that another format has read, with its text tower to give Context: as Stable Diffusion 1 takes it.

    A tower as diffusers keeps that of Stable Diffusion 2, 23 blocks 1024 wide with GELU, is taken as that. Of a whole
    CLIP the text tower is left.
    """
    text = found.spec.text
    if text is None:
        held = " and ".join(found.spec.towers)
        raise CheckpointError(f"{found.source.name} has no text tower, only {held}", hint="Context comes from texts")
    if not text.causal:
        raise UnsupportedModelError(
            "the text tower is not causal, and diffusion models take Context from causal towers",
            hint="leave out --context for embeddings",
        )
    shape = text.transformer
    second = (shape.width, shape.layers, shape.activation) == (1024, 23, "gelu")
    context = ContextSpec(family="sd2", missing_blocks=_SD2_BLOCKS_LEFT_OUT) if second else ContextSpec(family="clip")
    spec = dataclasses.replace(found.spec.select(("text",)), context=context)
    return _padded(dataclasses.replace(found, spec=spec), with_end=not second)


def _padded(found: Checkpoint, *, with_end: bool) -> Checkpoint:
    """Padded as the tools pad, unless tokenizer files say how: Context has all positions, those of the padding too."""
    tokenizer = found.spec.tokenizer
    assert tokenizer is not None
    if any(Path(name).name in TOKENIZER_FILES for name in found.source.sha256):
        return found
    tokenizer = dataclasses.replace(tokenizer, pad_id=tokenizer.end_id if with_end else 0)
    return dataclasses.replace(found, spec=dataclasses.replace(found.spec, tokenizer=tokenizer))


def _read_folder(path: Path, options: Options) -> Checkpoint:
    index = read_json(path / MODEL_INDEX)
    family, names = _pipeline(index)
    present = [name for name in names if index.get(name) not in (None, [None, None])]
    if not present:
        raise CheckpointError(
            f"{MODEL_INDEX} names no {' and no '.join(names)}, so there is nothing that encodes a prompt",
            hint="name a pipeline with its text encoders",
        )
    if family == "sdxl" and present == ["text_encoder_2"]:
        family = "sdxl_refiner"
    elif len(present) < len(names):
        missing = ", ".join(sorted(set(names) - set(present)))
        raise CheckpointError(
            f"{MODEL_INDEX} says {family}, and names no {missing}", hint="the download may be partial"
        )
    encoders = [_folder_encoder(path / name, options) for name in present]
    text = encoders[0].spec.text
    assert text is not None
    missing_blocks = 0
    if family == "sd1" and text.transformer.activation == "gelu":
        family, missing_blocks = "sd2", _SD2_BLOCKS_LEFT_OUT
    first = family in ("sd1", "sdxl", "sd3")  # begins with CLIP-L, which is padded with the end token
    encoders = [_padded(one, with_end=first and number == 0) for number, one in enumerate(encoders)]
    zero = bool(index.get("force_zeros_for_empty_prompt", family in _ZEROED))
    made = source("stable_diffusion", base_name(path), path, [path / MODEL_INDEX])
    for name, encoder in zip(present, encoders, strict=True):
        made.sha256.update((f"{name}/{file}", sha) for file, sha in encoder.source.sha256.items())
    return _joined(encoders, ContextSpec(family=family, missing_blocks=missing_blocks, zero_negative=zero), made)


def _pipeline(index: Mapping[str, Any]) -> tuple[Family, tuple[str, ...]]:
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{MODEL_INDEX}: expected _class_name, the name of a pipeline, found {name!r}", hint="fetch the file again"
        )
    for start, found in _PIPELINES.items():
        if name.startswith(start):
            return found
    raise UnsupportedModelError(
        f"{MODEL_INDEX}: found a {name}; supported are Stable Diffusion 1, 2 and XL, and the CLIPs of 3",
        hint="its text encoder alone may build: name its folder, such as text_encoder",
    )


def _folder_encoder(path: Path, options: Options) -> Checkpoint:
    if not path.is_dir() or not huggingface.claims(path):
        raise CheckpointError(
            f"{path.parent.name}: expected the text encoder {path.name}/ with config.json and weights, found none",
            hint="the download may be partial",
        )
    return huggingface.read(path, options)


def _joined(encoders: list[Checkpoint], context: ContextSpec, made: Source) -> Checkpoint:
    """The first encoder with its second, both with what the family says of them."""
    parts = [
        dataclasses.replace(
            one,
            spec=dataclasses.replace(one.spec, context=dataclasses.replace(context, second=number < len(encoders) - 1)),
            source=made,
        )
        for number, one in enumerate(encoders)
    ]
    return parts[0] if len(parts) == 1 else dataclasses.replace(parts[0], second=parts[1])


def _read_file(path: Path, options: Options) -> Checkpoint:
    stored = read_safetensors(path) if path.suffix.lower() == ".safetensors" else read_state_dict(path)
    if LORA in held_in(stored):  # with the names of the text encoder that it changes
        raise no_text_encoder(path, stored)
    found = next(
        ((family, parts) for key, family, parts in _SINGLE_FILES if any(map(key.match, stored))),
        None,
    )
    if found is None and any(map(_OPENAI_CLIP.fullmatch, stored)):
        return of_clip(openai.read(path, dataclasses.replace(options, towers=options.towers or ("text",))))
    if found is None:
        raise no_text_encoder(path, stored)
    family, parts = found
    absent = [part.prefix for part in parts if not any(key.startswith(part.prefix) for key in stored)]
    if absent:
        raise WeightsError(
            f"{path.name} is laid out as {family}, and has no weights under {', '.join(absent)}",
            hint=_ABSENT.get(family, "one of its text encoders was left out when it was saved"),
        )
    made = source("stable_diffusion", base_name(path), path.parent, [path])
    encoders = [_file_encoder(part, stored, options, made) for part in parts]
    return _joined(encoders, ContextSpec(family=family, zero_negative=family in _ZEROED), made)


def _file_encoder(part: _Encoder, stored: Mapping[str, StoredTensor], options: Options, made: Source) -> Checkpoint:
    own = {key: tensor for key, tensor in stored.items() if key.startswith(part.prefix)}
    text, recipes = (_openai_text if part.openai_names else _huggingface_text)(part, own, options)
    tokenizer, tokenizer_json = _tokenizer(part, text, options)
    spec = ModelSpec(text=text, image=None, tokenizer=tokenizer, preprocess=None)
    weights: Weights = bind(own, recipes, weight_shapes(spec), ignored=lambda key: _IGNORED.fullmatch(key) is not None)
    return Checkpoint(spec=spec, weights=weights, tokenizer_json=tokenizer_json, source=made)


def _tokenizer(part: _Encoder, text: TextSpec, options: Options) -> tuple[TokenizerSpec, str]:
    """CLIP's own vocabulary, as every tool has it for these files; argmax is what their configs say (end token 2)."""
    if text.vocab_size != VOCAB_SIZE:
        raise UnsupportedModelError(
            f"{part.prefix} embeds {text.vocab_size} ids, expected the {VOCAB_SIZE} of CLIP's own vocabulary",
            hint="name the diffusers folder of this model, which has its tokenizer",
        )
    tokenizer, tokenizer_json = clip_tokenizer(text, options.tokenizer_dialect or "huggingface", "argmax")
    pad = tokenizer.end_id if part.pads_with_end else 0
    return dataclasses.replace(tokenizer, pad_id=pad), tokenizer_json


def _huggingface_text(
    part: _Encoder, stored: Mapping[str, StoredTensor], options: Options
) -> tuple[TextSpec, dict[str, Recipe]]:
    bare = f"{part.prefix}embeddings.position_embedding.weight"
    prefix = part.prefix if bare in stored else f"{part.prefix}text_model."  # without it before transformers 4.14
    context_length, width = _shape(stored, f"{prefix}embeddings.position_embedding.weight")
    vocab_size, _ = _shape(stored, f"{prefix}embeddings.token_embedding.weight")
    mlp_width, _ = _shape(stored, f"{prefix}encoder.layers.0.mlp.fc1.weight")
    layers = _layers(stored, f"{prefix}encoder.layers.")
    projection = f"{part.prefix}text_projection.weight"
    text = _text(part, options, width=width, layers=layers, mlp_width=mlp_width, vocab_size=vocab_size)
    embedding_dim = _shape(stored, projection)[0] if projection in stored else None
    text = dataclasses.replace(text, context_length=context_length, embedding_dim=embedding_dim)
    recipes = huggingface.text_recipes(prefix, layers)
    recipes["text.projection.weight"] = Recipe((projection,))
    return text, recipes


def _openai_text(
    part: _Encoder, stored: Mapping[str, StoredTensor], options: Options
) -> tuple[TextSpec, dict[str, Recipe]]:
    context_length, width = _shape(stored, f"{part.prefix}positional_embedding")
    vocab_size, _ = _shape(stored, f"{part.prefix}token_embedding.weight")
    mlp_width, _ = _shape(stored, f"{part.prefix}transformer.resblocks.0.mlp.c_fc.weight")
    layers = _layers(stored, f"{part.prefix}transformer.resblocks.")
    text = _text(part, options, width=width, layers=layers, mlp_width=mlp_width, vocab_size=vocab_size)
    linear, matrix = f"{part.prefix}text_projection.weight", f"{part.prefix}text_projection"
    embedding_dim = None
    if linear in stored:
        embedding_dim = _shape(stored, linear)[0]
    elif matrix in stored:
        embedding_dim = _shape(stored, matrix)[1]
    text = dataclasses.replace(text, context_length=context_length, embedding_dim=embedding_dim)
    recipes = openai_text_recipes(part.prefix, layers)
    if linear in stored:  # some tools save it as a Linear's weight
        recipes["text.projection.weight"] = Recipe((linear,))
    return text, recipes


def _text(part: _Encoder, options: Options, *, width: int, layers: int, mlp_width: int, vocab_size: int) -> TextSpec:
    if width % _HEAD_WIDTH:
        raise UnsupportedModelError(f"{part.prefix} is {width} wide, expected a multiple of {_HEAD_WIDTH}")
    return TextSpec(
        transformer=TransformerSpec(
            width=width,
            layers=layers,
            heads=width // _HEAD_WIDTH,
            mlp_width=mlp_width,
            activation=options.activation or part.activation,
        ),
        vocab_size=vocab_size,
        context_length=77,
        embedding_dim=None,
    )


def _shape(stored: Mapping[str, StoredTensor], key: str) -> tuple[int, int]:
    """The shape of a matrix that the architecture is derived from. Raises WeightsError without it."""
    if key not in stored:
        raise WeightsError(f"1 missing: {key}", hint="the file may hold only a part of the text encoder")
    shape = stored[key].shape
    if len(shape) != 2 or min(shape) < 1:
        raise WeightsError(f"1 misshapen: {key} is {list(shape)}, expected 2 axes of at least 1")
    return shape[0], shape[1]


def _layers(stored: Mapping[str, StoredTensor], prefix: str) -> int:
    """How many blocks there are under `prefix`; a gap among them shows as missing weights.

    Raises WeightsError for a block with a higher number than there are weights, which would be gaps without end.
    """
    pattern = re.compile(re.escape(prefix) + r"([0-9]+)\.")
    numbers = {match[1] for key in stored if (match := pattern.match(key))}
    if far := [number for number in numbers if len(number) > _DIGITS or int(number) >= len(stored)]:
        raise WeightsError(f"1 unexpected: block {far[0]:.20} under {prefix}, with {len(stored)} weights in all")
    return max(map(int, numbers), default=-1) + 1
