"""Hugging Face's config.json -> the towers' specs."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clip_export.checkpoints import Options
from clip_export.checkpoints._config import Section
from clip_export.errors import UnsupportedModelError
from clip_export.spec import Activation, ImageSpec, TextSpec, Tower, TransformerSpec

CONFIG = "config.json"

# What a missing key means: the defaults of transformers' CLIPTextConfig, CLIPVisionConfig and CLIPConfig, as far as
# they change embeddings. A test holds them against transformers.
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
PROJECTION_DIM = 512

_LEGACY_END_ID = 2  # configs written before July 2023 have it; transformers then pools at argmax(ids)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A class of transformers: its towers, and whether they end in a projection."""

    name: str
    towers: tuple[Tower, ...]
    projected: bool


_ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("CLIPModel", ("text", "image"), True),
        Architecture("CLIPTextModel", ("text",), False),
        Architecture("CLIPTextModelWithProjection", ("text",), True),
        Architecture("CLIPVisionModel", ("image",), False),
        Architecture("CLIPVisionModelWithProjection", ("image",), True),
    )
}
# The class of a config that does not name one: transformers' own for the model type, with a projection if stored.
_BY_MODEL_TYPE = {
    ("clip", True): "CLIPModel",
    ("clip", False): "CLIPModel",
    ("clip_text_model", False): "CLIPTextModel",
    ("clip_text_model", True): "CLIPTextModelWithProjection",
    ("clip_vision_model", False): "CLIPVisionModel",
    ("clip_vision_model", True): "CLIPVisionModelWithProjection",
}


def architecture_of(config: Section, *, has_projection: bool) -> Architecture:
    """The class that `config` describes. Raises UnsupportedModelError, naming what was found, for any other."""
    model_type = config.values.get("model_type")
    named = config.values.get("architectures")
    name = named[0] if isinstance(named, list) and named else _BY_MODEL_TYPE.get((str(model_type), has_projection))
    known_type = model_type is None or (str(model_type), True) in _BY_MODEL_TYPE
    if name not in _ARCHITECTURES or not known_type:
        raise UnsupportedModelError(
            f"{config.where}: found model_type {model_type!r} with architecture {name!r}; "
            f"supported: {', '.join(_ARCHITECTURES)}"
        )
    if config.values.get("quantization_config") is not None:
        raise UnsupportedModelError(f"{config.where}: found quantization_config, supported are floating point weights")
    return _ARCHITECTURES[name]


def text_section(config: Section) -> Section:
    """The text tower's config with its defaults: the whole file, or text_config of a CLIPModel's."""
    return _tower_section(config, "text_config", TEXT_DEFAULTS)


def image_section(config: Section) -> Section:
    """The image tower's config with its defaults: the whole file, or vision_config of a CLIPModel's."""
    return _tower_section(config, "vision_config", VISION_DEFAULTS)


def _tower_section(config: Section, key: str, defaults: Mapping[str, Any]) -> Section:
    if config.values.get("model_type") not in (None, "clip") and key not in config.values:
        return config.with_defaults(defaults)
    nested = config.section(key, default={}).with_defaults(defaults)
    legacy = f"{key}_dict"
    if config.values.get(legacy) is None:
        return nested
    # As in transformers' CLIPConfig: the older key wins, and so do the defaults of what it leaves out.
    return Section({**nested.values, **defaults, **config.section(legacy).values}, nested.where)


def projection_dim(config: Section, tower: Section, architecture: Architecture) -> int | None:
    """The width of embeddings: the model's if it has both towers, else the tower's; None without projection."""
    if not architecture.projected:
        return None
    if len(architecture.towers) > 1:
        return config.integer("projection_dim", default=PROJECTION_DIM)
    return tower.integer("projection_dim")


def text_spec(text: Section, embedding_dim: int | None, options: Options) -> TextSpec:
    """The text tower that a config section describes."""
    return TextSpec(
        transformer=_transformer(text, options),
        vocab_size=text.integer("vocab_size"),
        context_length=text.integer("max_position_embeddings"),
        embedding_dim=embedding_dim,
    )


def image_spec(image: Section, embedding_dim: int | None, options: Options) -> ImageSpec:
    """The image tower that a config section describes."""
    image.require_values({"num_channels": (3,)})
    return ImageSpec(
        transformer=_transformer(image, options),
        image_size=image.square("image_size"),
        patch_size=image.square("patch_size"),
        embedding_dim=embedding_dim,
    )


def end_id(text: Section) -> int | None:
    """The id at whose first occurrence transformers pools; None where it pools at argmax(ids)."""
    value = text.integer("eos_token_id")
    return None if value == _LEGACY_END_ID else value


def _transformer(tower: Section, options: Options) -> TransformerSpec:
    stated = options.activation or tower.choice("hidden_act", typing.get_args(Activation))
    return TransformerSpec(
        width=tower.integer("hidden_size"),
        layers=tower.integer("num_hidden_layers"),
        heads=tower.integer("num_attention_heads"),
        mlp_width=tower.integer("intermediate_size"),
        activation="quick_gelu" if stated == "quick_gelu" else "gelu",
        layer_norm_eps=tower.number("layer_norm_eps"),
    )
