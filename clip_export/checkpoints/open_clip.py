"""open_clip: a directory or `hf-hub:` id with open_clip_config.json and open_clip's weights.

The config is open_clip's own `model_cfg` (open_clip/model.py, CLIPVisionCfg and CLIPTextCfg, whose defaults are
repeated here) and `preprocess_cfg`. Keys that select another architecture have to hold the value that switches it off;
a key that is not known here is an error: what it changes is not known either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from clip_export.checkpoints import Checkpoint, Options, _hub
from clip_export.checkpoints._clip import MEAN, STD, clip_tokenizer
from clip_export.checkpoints._config import Section
from clip_export.checkpoints._files import INDEX, base_name, find_weights, read_json, source
from clip_export.checkpoints._openai_layout import recipes, reject_other_families
from clip_export.checkpoints._tensors import read_tensors
from clip_export.checkpoints._weights import bind, scalar
from clip_export.errors import CheckpointError, UnsupportedModelError
from clip_export.spec import (
    Activation,
    Dialect,
    ImageSpec,
    Interpolation,
    ModelSpec,
    PreprocessSpec,
    ResizeMode,
    TextSpec,
    TransformerSpec,
    weight_shapes,
)

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
EXPECTS = f"a directory, or hf-hub:org/name, with {CONFIG} and {' or '.join(WEIGHTS)}"

_PREFIX = "hf-hub:"
_DIALECT: dict[bool, Dialect] = {False: "open_clip", True: "huggingface"}  # by whether Context is wanted: as its tools

# Keys with the only value that is supported; a missing key means the first. None, {} and "" mean "off" in all of them.
_CUSTOM_ATTENTION: dict[str, tuple[Any, ...]] = {
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
    "ls_init_value": (None,),
    "final_ln_after_pool": (False,),
    "act_kwargs": (None, {}),
}
_VISION_FIXED: dict[str, tuple[Any, ...]] = _CUSTOM_ATTENTION | {
    "timm_model_name": (None, ""),
    "attentional_pool": (False,),
    "no_ln_pre": (False,),
    "pool_type": ("tok",),
}
_TEXT_FIXED: dict[str, tuple[Any, ...]] = _CUSTOM_ATTENTION | {
    "hf_model_name": (None, ""),
    "hf_tokenizer_name": (None, ""),
    "tokenizer_mode": (None,),
    "tokenizer_kwargs": (None, {}, {"clean": "lower"}),
    "embed_cls": (False,),
    "pool_type": ("argmax",),
    "proj_type": ("linear",),
    "proj_bias": (False,),
}
_VISION_DEFAULTS = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "norm_kwargs": None,
}
_TEXT_DEFAULTS = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "no_causal_mask": False,
    "norm_kwargs": None,
}
# Without effect on embeddings while the keys above are off. sin_cos_2d positions are stored like learned ones.
_VISION_INERT = {"patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads", "pos_embed_type"}
_VISION_INERT |= {f"timm_{name}" for name in ("model_pretrained", "pool", "proj", "proj_bias", "drop", "drop_path")}
_TEXT_INERT = {"output_tokens", "pad_id", "eos_id", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"}
_MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}
# init_logit_bias is here for its null: with a value it makes a SigLIP, refused by _reject_families.
_MODEL_INERT = {"cast_dtype", "init_logit_bias", "init_logit_scale", "nonscalar_logit_scale", "output_dict"}
_PREPROCESS_KEYS = {"mean", "std", "interpolation", "resize_mode", "size", "mode", "fill_color"}


class _Files(NamedTuple):
    name: str
    config: Path
    weights: list[Path]


def claims(checkpoint: str | Path) -> bool:
    """A directory with an open_clip config, its weights file, or an hf-hub: id."""
    if isinstance(checkpoint, str):
        return checkpoint.startswith(_PREFIX) and _hub.is_id(checkpoint.removeprefix(_PREFIX))
    if checkpoint.is_file():
        return checkpoint.name in _weight_names() and (checkpoint.parent / CONFIG).is_file()
    if not (checkpoint / CONFIG).is_file():
        return False
    # Beside a config.json without weights of its own, the directory is still the other format's.
    return any((checkpoint / name).exists() for name in _weight_names()) or not (checkpoint / "config.json").exists()


def read(checkpoint: str | Path, options: Options) -> Checkpoint:
    """Read what `claims` said yes to."""
    files = _locate(checkpoint)
    stored = read_tensors(files.weights)
    model, preprocess = _sections(files.config)
    reject_other_families(stored)
    text, image = _text(model, options), _image(model, options)
    tokenizer, tokenizer_json = clip_tokenizer(text, options.tokenizer_dialect or _DIALECT[options.context], "argmax")
    spec = ModelSpec(
        text=text,
        image=image,
        tokenizer=tokenizer,
        preprocess=_preprocess(preprocess, image, options),
        logit_scale=scalar(stored, "logit_scale"),
    )
    # open_clip loads either form into either class, so that custom_text in the config does not decide.
    text_prefix = "text." if any(key.startswith("text.") for key in stored) else ""
    weights = bind(stored, recipes(spec, text_prefix=text_prefix), weight_shapes(spec), used={"logit_scale"})
    return Checkpoint(
        spec=spec,
        weights=weights,
        tokenizer_json=tokenizer_json,
        source=source("open_clip", files.name, files.config.parent, [files.config, *files.weights]),
    )


def _weight_names() -> list[str]:
    return [name + suffix for name in WEIGHTS for suffix in ("", INDEX)]


def _locate(checkpoint: str | Path) -> _Files:
    if isinstance(checkpoint, str):
        name = checkpoint.removeprefix(_PREFIX)
        directory = _hub.download(name, small=[CONFIG], weights=WEIGHTS)
        if not (directory / CONFIG).is_file():
            raise CheckpointError(
                f"{name} on the hub has no {CONFIG}",
                hint=f"without {_PREFIX} it is read in Hugging Face's layout: {name}",
            )
    elif checkpoint.is_file():
        whole = checkpoint.name.removesuffix(INDEX)
        weights = find_weights(checkpoint.parent, [whole])
        return _Files(base_name(checkpoint), checkpoint.parent / CONFIG, weights)
    else:
        name, directory = base_name(checkpoint), checkpoint
    weights = find_weights(directory, WEIGHTS)
    if not weights:
        raise CheckpointError(f"{name} has {CONFIG} but no weights, expected {' or '.join(WEIGHTS)}")
    return _Files(name, directory / CONFIG, weights)


def _sections(path: Path) -> tuple[Section, Section]:
    """`model_cfg` and `preprocess_cfg`, after refusing what changes the model in a way that is not supported."""
    config = Section(read_json(path), CONFIG)
    config.reject_unknown({"model_cfg", "preprocess_cfg"})
    model = config.section("model_cfg")
    _reject_families(model)
    model.reject_unknown(_MODEL_KEYS | _MODEL_INERT)
    preprocess = config.section("preprocess_cfg", default={})
    preprocess.reject_unknown(_PREPROCESS_KEYS)
    return model, preprocess


def _reject_families(model: Section) -> None:
    """Name the families that open_clip also trains, before their keys are complained about one by one."""
    values = model.values
    vision, text = values.get("vision_cfg"), values.get("text_cfg")
    vision, text = vision if isinstance(vision, Mapping) else {}, text if isinstance(text, Mapping) else {}
    families = {
        "SigLIP, trained with a sigmoid loss (init_logit_bias)": values.get("init_logit_bias") is not None,
        "CoCa, a captioning model (multimodal_cfg)": "multimodal_cfg" in values,
        f"an image tower from timm (timm_model_name {vision.get('timm_model_name')!r})": vision.get("timm_model_name"),
        f"a ResNet image tower (layers {vision.get('layers')!r})": isinstance(vision.get("layers"), list),
        f"a text tower from Hugging Face (hf_model_name {text.get('hf_model_name')!r})": text.get("hf_model_name"),
    }
    for family, found in families.items():
        if found:
            raise UnsupportedModelError(
                f"{CONFIG}: found {family}; supported are CLIP's ViT image tower and open_clip's own text transformer"
            )


def _activation(model: Section, options: Options) -> Activation:
    return options.activation or ("quick_gelu" if model.boolean("quick_gelu", default=False) else "gelu")


def _image(model: Section, options: Options) -> ImageSpec:
    vision = model.section("vision_cfg").with_defaults(_VISION_DEFAULTS)
    vision.require_values(_VISION_FIXED)
    vision.reject_unknown(_VISION_DEFAULTS.keys() | _VISION_FIXED.keys() | _VISION_INERT)
    width, head_width = vision.integer("width"), vision.integer("head_width")
    if width % max(head_width, 1):
        raise CheckpointError(f"{vision.where}: width {width} is not a multiple of head_width {head_width}")
    return ImageSpec(
        transformer=_transformer(vision, width // head_width, _activation(model, options)),
        image_size=vision.square("image_size"),
        patch_size=vision.square("patch_size"),
        embedding_dim=model.integer("embed_dim"),
    )


def _text(model: Section, options: Options) -> TextSpec:
    text = model.section("text_cfg").with_defaults(_TEXT_DEFAULTS)
    text.require_values(_TEXT_FIXED)
    text.reject_unknown(_TEXT_DEFAULTS.keys() | _TEXT_FIXED.keys() | _TEXT_INERT)
    return TextSpec(
        transformer=_transformer(text, text.integer("heads"), _activation(model, options)),
        vocab_size=text.integer("vocab_size"),
        context_length=text.integer("context_length"),
        embedding_dim=model.integer("embed_dim"),
        causal=not text.boolean("no_causal_mask"),
    )


def _transformer(tower: Section, heads: int, activation: Activation) -> TransformerSpec:
    norm = tower.section("norm_kwargs", default={})
    norm.reject_unknown({"eps"})
    return TransformerSpec(
        width=tower.integer("width"),
        layers=tower.integer("layers"),
        heads=heads,
        mlp_width=int(tower.integer("width") * tower.number("mlp_ratio")),  # rounded down, as open_clip does
        activation=activation,
        layer_norm_eps=norm.number("eps", default=1e-5),
    )


def _preprocess(section: Section, image: ImageSpec, options: Options) -> PreprocessSpec:
    """open_clip/transform.py, image_transform: a missing value is CLIP's own, `size` is always the image tower's."""
    modes: dict[str, ResizeMode] = {"shortest": "shortest", "longest": "longest", "squash": "squash"}
    # "random" concerns training; at inference open_clip takes bicubic.
    filters: dict[str, Interpolation] = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}
    section.require_values({"mode": ("RGB",)})
    return PreprocessSpec(
        dialect=options.preprocess_dialect or "open_clip",
        resize_mode=modes[section.choice("resize_mode", modes, default="shortest")],
        resize_size=image.image_size,
        crop_size=image.image_size,
        interpolation=filters[section.choice("interpolation", filters, default="bicubic")],
        mean=section.triple("mean", default=MEAN),
        std=section.triple("std", default=STD),
        fill=int(section.number("fill_color", default=0)),
    )
