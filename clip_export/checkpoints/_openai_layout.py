"""The names that OpenAI gave CLIP's weights, which open_clip kept.

Both store projections as [width, embedding_dim], to be multiplied from the right: the transpose of a torch Linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from clip_export.checkpoints._weights import Recipe
from clip_export.errors import UnsupportedModelError
from clip_export.spec import ModelSpec

_SUPPORTED = "supported are CLIP's ViT image tower and its text transformer"

# A part of a key, and the family that it gives away.
_FAMILIES = {
    "text_decoder.": "CoCa, a captioning model",
    "logit_bias": "SigLIP, trained with a sigmoid loss",
    "visual.trunk.": "an image tower from timm",
    "visual.attnpool.": "a ResNet image tower",
    "visual.layer1.": "a ResNet image tower",
    "visual.attn_pool.": "an image tower with attentional pooling",
    "text.transformer.embeddings.": "a text tower from Hugging Face",
    ".ls_1.gamma": "layer scale",
    "text_projection.bias": "a text projection with a bias",
}


def reject_other_families(keys: Iterable[str]) -> None:
    """Raise UnsupportedModelError, naming key and family, if the weights are of another family in the same layout."""
    for key in keys:
        for part, family in _FAMILIES.items():
            if part in key:
                raise UnsupportedModelError(f"found {family} (weight {key}); {_SUPPORTED}")


def recipes(spec: ModelSpec, *, prefix: str = "", text_prefix: str = "") -> dict[str, Recipe]:
    """Canonical name -> recipe. `prefix` stands before every key, `text_prefix` ("text.") before the text tower's."""
    found: dict[str, Recipe] = {}
    if spec.image is not None:
        found |= _image(f"{prefix}visual.", spec.image.transformer.layers)
    if spec.text is not None:
        found |= text_recipes(f"{prefix}{text_prefix}", spec.text.transformer.layers)
    return found


def _image(prefix: str, layers: int) -> dict[str, Recipe]:
    names = {
        "class_embedding": "class_embedding",
        "patch_embedding.weight": "conv1.weight",
        "positional_embedding": "positional_embedding",
        "pre_norm.weight": "ln_pre.weight",
        "pre_norm.bias": "ln_pre.bias",
        "post_norm.weight": "ln_post.weight",
        "post_norm.bias": "ln_post.bias",
        **_blocks(layers),
    }
    return _named("image.", prefix, names) | {"image.projection.weight": Recipe((f"{prefix}proj",), transposed=True)}


def text_recipes(prefix: str, layers: int) -> dict[str, Recipe]:
    """Those of a text tower alone."""
    names = {
        "token_embedding.weight": "token_embedding.weight",
        "positional_embedding": "positional_embedding",
        "final_norm.weight": "ln_final.weight",
        "final_norm.bias": "ln_final.bias",
        **_blocks(layers),
    }
    projection = Recipe((f"{prefix}text_projection",), transposed=True)
    return _named("text.", prefix, names) | {"text.projection.weight": projection}


def _blocks(layers: int) -> dict[str, str]:
    block = {
        "norm1.weight": "ln_1.weight",
        "norm1.bias": "ln_1.bias",
        "attention.qkv.weight": "attn.in_proj_weight",
        "attention.qkv.bias": "attn.in_proj_bias",
        "attention.out.weight": "attn.out_proj.weight",
        "attention.out.bias": "attn.out_proj.bias",
        "norm2.weight": "ln_2.weight",
        "norm2.bias": "ln_2.bias",
        "mlp.fc1.weight": "mlp.c_fc.weight",
        "mlp.fc1.bias": "mlp.c_fc.bias",
        "mlp.fc2.weight": "mlp.c_proj.weight",
        "mlp.fc2.bias": "mlp.c_proj.bias",
    }
    return {
        f"blocks.{i}.{name}": f"transformer.resblocks.{i}.{key}" for i in range(layers) for name, key in block.items()
    }


def _named(tower: str, prefix: str, names: Mapping[str, str]) -> dict[str, Recipe]:
    return {f"{tower}{name}": Recipe((f"{prefix}{key}",)) for name, key in names.items()}
