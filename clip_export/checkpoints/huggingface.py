"""Hugging Face: a directory or hub id with config.json and the weights of one of transformers' CLIP classes.

`_huggingface_config.py` reads the towers, `_huggingface_preprocess.py` and `_huggingface_tokenizer.py` what goes into
them; here they come together with the weights. q, k and v are separate in the files and joined when asked for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from clip_export.checkpoints import Checkpoint, Options, _hub
from clip_export.checkpoints._config import Section
from clip_export.checkpoints._files import base_name, find_weights, index_name, read_json, source
from clip_export.checkpoints._huggingface_config import (
    CONFIG,
    Architecture,
    architecture_of,
    end_id,
    image_section,
    image_spec,
    projection_dim,
    text_section,
    text_spec,
)
from clip_export.checkpoints._huggingface_preprocess import PREPROCESSOR, PROCESSOR, preprocess_spec
from clip_export.checkpoints._huggingface_tokenizer import TOKENIZER_FILES, tokenizer_spec
from clip_export.checkpoints._tensors import StoredTensor, read_tensors
from clip_export.checkpoints._weights import Recipe, bind, scalar
from clip_export.errors import CheckpointError, UnknownCheckpointError
from clip_export.spec import ModelSpec, Tower, weight_shapes

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
EXPECTS = f"a directory, or org/name on the hub, with {CONFIG} and {' or '.join(WEIGHTS)}, whole or in shards"

_SHARD = re.compile(r"^(.+)-\d{5}-of-\d{5}(\.[a-z]+)$")
_NO_WEIGHTS = ("adapter_", "optimizer", "scheduler", "training_args")  # what training leaves beside a model
_HALVES = ("model.fp16.safetensors", "pytorch_model.fp16.bin")  # diffusers' folders may have these alone
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_TOWER_KEYS: dict[Tower, tuple[str, ...]] = {
    "text": ("text_model.", "text_projection."),
    "image": ("vision_model.", "visual_projection."),
}


class _Files(NamedTuple):
    name: str
    directory: Path
    weights: list[Path]


def claims(checkpoint: str | Path) -> bool:
    """A directory with config.json, its weights file, or a hub id."""
    if isinstance(checkpoint, str):
        return _hub.is_id(checkpoint)
    if checkpoint.is_file():
        return checkpoint.name in _weight_names() and (checkpoint.parent / CONFIG).is_file()
    if not (checkpoint / CONFIG).is_file():
        return False
    # Beside an open_clip config, a config.json without weights of its own is a leftover.
    has_weights = any((checkpoint / name).exists() for name in _weight_names())
    return has_weights or not (checkpoint / _OPEN_CLIP_CONFIG).exists()


def read(checkpoint: str | Path, options: Options) -> Checkpoint:
    """Read what `claims` said yes to."""
    files = _locate(checkpoint)
    config = Section(read_json(files.directory / CONFIG), CONFIG)
    architecture_of(config, has_projection=True)  # a family that is not supported is named before its weights are
    _require_weights(files)
    stored = read_tensors(files.weights)
    architecture = architecture_of(config, has_projection=any("projection" in key for key in stored))
    spec, tokenizer_json, read_files = _spec(files.directory, config, architecture, stored, options)
    recipes = _recipes(spec, stored)
    used = {"logit_scale"} if spec.logit_scale is not None else set()
    unwanted = set(architecture.towers) - set(spec.towers)
    ignored = functools.partial(_is_passed_over, unwanted=unwanted)
    weights = bind(stored, recipes, weight_shapes(spec), used=used, ignored=ignored)
    return Checkpoint(
        spec=spec,
        weights=weights,
        tokenizer_json=tokenizer_json,
        source=source(
            "huggingface", files.name, files.directory, [files.directory / CONFIG, *files.weights, *read_files]
        ),
    )


def _weight_names() -> list[str]:
    return [name for weights in (*WEIGHTS, *_HALVES) for name in (weights, index_name(weights))]


def _locate(checkpoint: str | Path) -> _Files:
    if isinstance(checkpoint, str):
        small = [CONFIG, PREPROCESSOR, PROCESSOR, *TOKENIZER_FILES, _OPEN_CLIP_CONFIG]
        directory = _hub.download(checkpoint, small=small, weights=WEIGHTS)
        if not (directory / CONFIG).is_file():
            is_open_clip = (directory / _OPEN_CLIP_CONFIG).is_file()
            raise UnknownCheckpointError(
                f"{checkpoint} on the hub has no {CONFIG}",
                hint=f"it is open_clip's: hf-hub:{checkpoint}" if is_open_clip else "see `clip-export build --help`",
            )
        return _Files(checkpoint, directory, find_weights(directory, WEIGHTS))
    if checkpoint.is_file():
        named = next(name for name in (*WEIGHTS, *_HALVES) if checkpoint.name in (name, index_name(name)))
        weights = find_weights(checkpoint.parent, [named])
        return _Files(base_name(checkpoint), checkpoint.parent, weights)
    return _Files(base_name(checkpoint), checkpoint, find_weights(checkpoint, (*WEIGHTS, *_HALVES)))


def _require_weights(files: _Files) -> None:
    if files.weights:
        return
    names = sorted(path.name for path in files.directory.iterdir() if path.suffix in (".safetensors", ".bin"))
    others = [name for name in names if not name.startswith(_NO_WEIGHTS)]
    if shard := next(filter(_SHARD.search, others), None):
        index = index_name(_SHARD.sub(r"\1\2", shard))
        raise CheckpointError(
            f"{files.name}: {shard} is one of several, and {index} is not there", hint="fetch the index too"
        )
    if others:
        raise CheckpointError(
            f"{files.name}: expected weights called {' or '.join(WEIGHTS)}, found {', '.join(others[:3])}",
            hint="call the one that you mean model.safetensors, or pytorch_model.bin if torch.save wrote it",
        )
    raise CheckpointError(
        f"{files.name} has {CONFIG} but no weights, expected {' or '.join(WEIGHTS)}, whole or in shards",
        hint="a download without git-lfs or of the configs only leaves this",
    )


def _spec(
    directory: Path,
    config: Section,
    architecture: Architecture,
    stored: Mapping[str, StoredTensor],
    options: Options,
) -> tuple[ModelSpec, str | None, list[Path]]:
    """The spec, the tokenizer's JSON, and the files beside config.json that they were read from."""
    text = image = tokenizer = preprocess = tokenizer_json = None
    files: list[Path] = []
    wanted = _wanted(architecture, options)
    if "text" in wanted:
        section = text_section(config)
        text = text_spec(section, projection_dim(config, section, architecture), options)
        tokenizer, tokenizer_json, found = tokenizer_spec(directory, text, end_id(section), options)
        files += found
    if "image" in wanted:
        section = image_section(config)
        image = image_spec(section, projection_dim(config, section, architecture), options)
        preprocess, found = preprocess_spec(directory, image, options)
        files += found
    logit_scale = scalar(stored, "logit_scale") if len(architecture.towers) > 1 else None
    spec = ModelSpec(text=text, image=image, tokenizer=tokenizer, preprocess=preprocess, logit_scale=logit_scale)
    return spec, tokenizer_json, files


def _wanted(architecture: Architecture, options: Options) -> list[Tower]:
    missing = [tower for tower in options.towers or () if tower not in architecture.towers]
    if missing:
        raise CheckpointError(
            f"this checkpoint has no {' and no '.join(missing)} tower, only {', '.join(architecture.towers)}",
            hint=f"its class is {architecture.name}; a CLIPModel has both towers",
        )
    return [tower for tower in architecture.towers if options.wants(tower)]


def _is_passed_over(key: str, unwanted: Collection[Tower]) -> bool:
    """What carries no information here: position ids (0, 1, 2, …), and a tower that is not wanted.

    transformers before 4.31 stored position ids with the weights.
    """
    return key.endswith("embeddings.position_ids") or any(key.startswith(_TOWER_KEYS[tower]) for tower in unwanted)


def _recipes(spec: ModelSpec, stored: Mapping[str, StoredTensor]) -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {}
    if spec.text is not None:
        recipes |= text_recipes(_prefix("text_model.", stored), spec.text.transformer.layers)
        recipes["text.projection.weight"] = Recipe(("text_projection.weight",))
    if spec.image is not None:
        names = {
            "class_embedding": "embeddings.class_embedding",
            "patch_embedding.weight": "embeddings.patch_embedding.weight",
            "positional_embedding": "embeddings.position_embedding.weight",
            "pre_norm.weight": "pre_layrnorm.weight",  # spelt so in the files
            "pre_norm.bias": "pre_layrnorm.bias",
            "post_norm.weight": "post_layernorm.weight",
            "post_norm.bias": "post_layernorm.bias",
        }
        recipes |= _tower("image.", _prefix("vision_model.", stored), names, spec.image.transformer.layers)
        recipes["image.projection.weight"] = Recipe(("visual_projection.weight",))
    return recipes


def text_recipes(prefix: str, layers: int) -> dict[str, Recipe]:
    """Those of a text tower whose keys begin with `prefix`, without its projection."""
    names = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "final_norm.weight": "final_layer_norm.weight",
        "final_norm.bias": "final_layer_norm.bias",
    }
    return _tower("text.", prefix, names, layers)


def _prefix(prefix: str, stored: Mapping[str, StoredTensor]) -> str:
    """`prefix`, or nothing: transformers 5 leaves it out where the tower is the whole model."""
    bare = "embeddings.position_embedding.weight"
    return "" if bare in stored and f"{prefix}{bare}" not in stored else prefix


def _tower(tower: str, prefix: str, names: Mapping[str, str], layers: int) -> dict[str, Recipe]:
    recipes = {f"{tower}{name}": Recipe((f"{prefix}{key}",)) for name, key in names.items()}
    for i in range(layers):
        block = _block(f"{prefix}encoder.layers.{i}.")
        recipes |= {f"{tower}blocks.{i}.{name}": recipe for name, recipe in block.items()}
    return recipes


def _block(prefix: str) -> dict[str, Recipe]:
    names = {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attention.out": "self_attn.out_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    recipes = {
        f"{name}.{part}": Recipe((f"{prefix}{key}.{part}",))
        for name, key in names.items()
        for part in ("weight", "bias")
    }
    for part in ("weight", "bias"):
        recipes[f"attention.qkv.{part}"] = Recipe(tuple(f"{prefix}self_attn.{q}_proj.{part}" for q in "qkv"))
    return recipes
