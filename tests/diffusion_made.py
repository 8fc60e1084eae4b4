"""Text encoders of diffusion models with seeded random weights, in pipelines of diffusers and in single files.

The single files have the names that diffusers' converters read (loaders/single_file_utils.py): what is written here is
the inverse of those, and `test_checkpoints_stable_diffusion.py` sends each file through them.
"""

from __future__ import annotations

import functools
import json
import tempfile
import types
from pathlib import Path
from typing import Any

import oracles
import torch
from checkpoints_made import CLIP_VOCAB_SIZE, randomize, write_tokenizer
from safetensors.torch import save_file

import clip_export
from clip_export.checkpoints import Options
from clip_export.encoder import Encoder

# width, layers, heads, activation, with a projection: as in the originals, and as small as tests need them.
FULL = {
    "clip_l": (768, 12, 12, "quick_gelu", False),
    "clip_h": (1024, 23, 16, "gelu", False),
    "clip_g": (1280, 32, 20, "gelu", True),
}
SMALL = {
    "clip_l": (128, 3, 2, "quick_gelu", False),
    "clip_h": (128, 3, 2, "gelu", False),
    "clip_g": (192, 3, 3, "gelu", True),
}
ENCODERS = {"sd1": ("clip_l",), "sd2": ("clip_h",), "sdxl": ("clip_l", "clip_g"), "sd3": ("clip_l", "clip_g")}


def encoder(name: str, seed: int = 0, *, full: bool = False, projected: bool | None = None, dtype: Any = None) -> Any:
    """A text encoder of transformers, with every weight random."""
    transformers = oracles.transformers()
    width, layers, heads, activation, own = (FULL if full else SMALL)[name]
    with_projection = own if projected is None else projected
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        projection_dim=width,
        vocab_size=CLIP_VOCAB_SIZE,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=2,  # what the configs of Stable Diffusion have: pooled at argmax
    )
    kind = transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel
    model = randomize(kind(config), seed).to(dtype or torch.float32)
    if not hasattr(model, "text_model"):
        # transformers 5 has no such module in CLIPTextModel any more; the pipelines of diffusers 0.42 and compel 2.5 go
        # through it for the final LayerNorm of an earlier layer, and fail without it. Nothing else is put there.
        object.__setattr__(model, "text_model", types.SimpleNamespace(final_layer_norm=model.final_layer_norm))
    return model


@functools.cache
def _tokenizer_files(root: Path, pad_token: str) -> Path:
    folder = root / f"tokenizer-{'end' if pad_token != '!' else 'zero'}"
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, CLIP_VOCAB_SIZE, pad_token=pad_token, model_max_length=77)
    return folder


def tokenizer(root: Path, name: str) -> Any:
    """The tokenizer that stands before encoder `name`: CLIP-L pads with the end token, OpenCLIP's with 0."""
    pad_token = "<|endoftext|>" if name == "clip_l" else "!"
    return oracles.transformers().CLIPTokenizer.from_pretrained(_tokenizer_files(root, pad_token))


def pipeline(root: Path, family: str, *, full: bool = False, dtype: Any = None) -> Any:
    """A pipeline of diffusers that has nothing but what encodes prompts."""
    diffusers = oracles.diffusers()
    names = ENCODERS[family]
    encoders = [
        encoder(name, seed, full=full, dtype=dtype, projected=True if family == "sd3" else None)
        for seed, name in enumerate(names)
    ]
    tokenizers = [tokenizer(root, name) for name in names]
    nothing = {"vae": None, "unet": None, "scheduler": None, "feature_extractor": None}
    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            **nothing,
        )
    return diffusers.StableDiffusionPipeline(
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        safety_checker=None,
        requires_safety_checker=False,
        **nothing,
    )


@functools.cache
def _root() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    folder = tempfile.TemporaryDirectory(prefix="clip-export-tests-")
    return folder, Path(folder.name)


@functools.cache
def originals(family: str) -> tuple[Any, Encoder]:
    """A small pipeline, and our reference of the folder that it was saved to; made once, so nobody may change it."""
    _, root = _root()
    pipe = pipeline(root, family)
    folder = write_folder(pipe, root / family)
    return pipe, clip_export.reference(folder, Options(context=True))


def folder_of(family: str) -> Path:
    """Where that pipeline was saved."""
    originals(family)
    return _root()[1] / family


def write_folder(pipe: Any, directory: Path) -> Path:
    """The pipeline as diffusers saves it, without what it does not have."""
    directory.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"_class_name": type(pipe).__name__, "_diffusers_version": "0.42.1"}
    if hasattr(pipe.config, "force_zeros_for_empty_prompt"):
        index["force_zeros_for_empty_prompt"] = pipe.config.force_zeros_for_empty_prompt
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        part = getattr(pipe, name, None)
        if part is not None:
            part.save_pretrained(directory / name)
            index[name] = ["transformers", type(part).__name__]
    (directory / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return directory


def single_file(family: str, encoders: list[Any]) -> dict[str, torch.Tensor]:
    """The state dict of a whole model of `family`: its text encoders, and a few weights of the rest of it."""
    state = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3),
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(4, 4, 3, 3),
        "first_stage_model.decoder.conv_in.weight": torch.ones(4, 4, 3, 3),
        "betas": torch.ones(1000),
    }
    if family == "sd1":
        state |= _named("cond_stage_model.transformer.text_model.", encoders[0])
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    elif family == "sd2":
        state |= openai_names("cond_stage_model.model.", encoders[0], extra_block=True)
    elif family == "sdxl":
        state |= _named("conditioner.embedders.0.transformer.text_model.", encoders[0])
        state |= openai_names("conditioner.embedders.1.model.", encoders[1])
    elif family == "sd3":
        for name, model in zip(("clip_l", "clip_g"), encoders, strict=True):
            prefix = f"text_encoders.{name}.transformer."
            state |= _named(f"{prefix}text_model.", model)
            state[f"{prefix}text_projection.weight"] = model.state_dict()["text_projection.weight"]
    return {key: tensor.contiguous().clone() for key, tensor in state.items()}


def _named(prefix: str, model: Any) -> dict[str, torch.Tensor]:
    """Hugging Face's names, as they were before transformers 5: with text_model in front."""
    return {
        prefix + key.removeprefix("text_model."): value
        for key, value in model.state_dict().items()
        if "text_projection" not in key and "position_ids" not in key
    }


def openai_names(prefix: str, model: Any, *, extra_block: bool = False) -> dict[str, torch.Tensor]:
    """OpenAI's names, with q, k and v in one matrix; `extra_block`: the last block of 24 that diffusers leaves out."""
    state = {key.removeprefix("text_model."): value for key, value in model.state_dict().items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
    }
    layers = model.config.num_hidden_layers
    for i in range(layers):
        block = f"encoder.layers.{i}."
        found |= _block(
            f"transformer.resblocks.{i}.", {k.removeprefix(block): v for k, v in state.items() if block in k}
        )
    if extra_block:
        last = f"transformer.resblocks.{layers - 1}."
        twin = {
            key.replace(last, f"transformer.resblocks.{layers}."): value * 1.1
            for key, value in found.items()
            if last in key
        }
        found |= twin
    projection = state.get("text_projection.weight")
    width = model.config.hidden_size
    found["text_projection"] = torch.eye(width) if projection is None else projection.t()
    return {prefix + key: value for key, value in found.items()}


def _block(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    found = {
        f"{prefix}{new}.{part}": state[f"{old}.{part}"] for old, new in names.items() for part in ("weight", "bias")
    }
    for part in ("weight", "bias"):
        packed = torch.cat([state[f"self_attn.{letter}_proj.{part}"] for letter in "qkv"])
        found[f"{prefix}attn.in_proj_{part}"] = packed
    return found


def write_single_file(path: Path, family: str, encoders: list[Any], dtype: torch.dtype = torch.float32) -> Path:
    """A .safetensors, or a .ckpt as trainers write it, with everything floating in `dtype`."""
    state = {key: t.to(dtype) if t.is_floating_point() else t for key, t in single_file(family, encoders).items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "global_step": 470000}, path)
    return path
