"""Inputs of the GPU benchmark: a checkpoint with random weights, written without transformers, and batches for it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile

import numpy as np
import torch
from random_checkpoint import ARCHITECTURES, DEMO
from safetensors.torch import save_file

from clip_export.spec import Tower

# As in random_checkpoint.ARCHITECTURES: text (width, layers, heads), image (width, layers, heads, size, patch), dim.
SIZES = ARCHITECTURES | {"tiny": ((128, 2, 2), (128, 2, 2, 32, 16), 64)}
VOCABULARY = 49408
CONTEXT = 77
SHORT = 16  # tokens: what a caption has, roughly


@dataclass(frozen=True)
class Case:
    """One batch for one tower: `inputs` as its graph takes them; `title` is the same for all batch sizes."""

    tower: Tower
    title: str
    batch: int
    length: int | None
    inputs: dict[str, np.ndarray]


def cases(image_size: int, batches: tuple[int, ...]) -> list[Case]:
    """Random pixels, and random tokens at full length and at that of a caption, for each batch size."""
    rng = np.random.default_rng(0)
    made = []
    for batch in batches:
        pixels = rng.integers(0, 256, (batch, 3, image_size, image_size), dtype=np.uint8)
        made.append(Case("image", "image", batch, None, {"pixels": pixels}))
    for length in (CONTEXT, SHORT):
        for batch in batches:
            ids = rng.integers(0, VOCABULARY - 2, (batch, length), dtype=np.int32)
            ids[:, 0], ids[:, -1] = VOCABULARY - 2, VOCABULARY - 1
            end = np.full(batch, length - 1, dtype=np.int32)
            made.append(Case("text", f"text, {length} tokens", batch, length, {"input_ids": ids, "eot_index": end}))
    return made


def write_checkpoint(name: str, directory: Path, *, seed: int = 0) -> None:
    """A Hugging Face checkpoint of the architecture `name`, with weights that keep activations of order 1."""
    directory.mkdir(parents=True, exist_ok=True)
    (text_width, text_layers, text_heads), (width, layers, heads, size, patch), dim = SIZES[name]
    ends = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1}
    text = _config(text_width, text_layers, text_heads, dim) | ends
    text |= {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    vision = _config(width, layers, heads, dim) | {"image_size": size, "patch_size": patch}
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": dim}
    _write_json(directory / "config.json", config | {"text_config": text, "vision_config": vision})
    shape = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    switches = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    processor = {"image_processor_type": "CLIPImageProcessor", "resample": 3, "image_mean": mean, "image_std": std}
    _write_json(directory / "preprocessor_config.json", processor | switches | shape)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        copyfile(DEMO / file, directory / file)
    shapes = _text_shapes(text_width, text_layers, dim) | _vision_shapes(width, layers, size, patch, dim)
    save_file(_weights(shapes, seed), directory / "model.safetensors", metadata={"format": "pt"})


def _config(width: int, layers: int, heads: int, dim: int) -> dict[str, object]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": dim}
    return sizes | {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": "quick_gelu"}


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _text_shapes(width: int, layers: int, dim: int) -> dict[str, tuple[int, ...]]:
    embeddings = "text_model.embeddings"
    return {
        f"{embeddings}.token_embedding.weight": (VOCABULARY, width),
        f"{embeddings}.position_embedding.weight": (CONTEXT, width),
        **_block_shapes("text_model.encoder.layers", width, layers),
        **_affine("text_model.final_layer_norm", (width,)),
        "text_projection.weight": (dim, width),
        "logit_scale": (),
    }


def _vision_shapes(width: int, layers: int, size: int, patch: int, dim: int) -> dict[str, tuple[int, ...]]:
    embeddings = "vision_model.embeddings"
    return {
        f"{embeddings}.class_embedding": (width,),
        f"{embeddings}.patch_embedding.weight": (width, 3, patch, patch),
        f"{embeddings}.position_embedding.weight": ((size // patch) ** 2 + 1, width),
        **_affine("vision_model.pre_layrnorm", (width,)),  # spelt so in the files
        **_block_shapes("vision_model.encoder.layers", width, layers),
        **_affine("vision_model.post_layernorm", (width,)),
        "visual_projection.weight": (dim, width),
    }


def _block_shapes(prefix: str, width: int, layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for block in (f"{prefix}.{index}" for index in range(layers)):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _affine(f"{block}.self_attn.{name}", (width, width))
        shapes |= _affine(f"{block}.mlp.fc1", (4 * width, width)) | _affine(f"{block}.mlp.fc2", (width, 4 * width))
        shapes |= _affine(f"{block}.layer_norm1", (width,)) | _affine(f"{block}.layer_norm2", (width,))
    return shapes


def _affine(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name == "logit_scale":
            return torch.tensor(math.log(100))
        noise = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            return 1 + 0.1 * noise
        fan_in = math.prod(shape[1:]) if len(shape) > 1 and "_embedding.weight" not in name else 100
        return noise / math.sqrt(fan_in)

    return {name: weight(name, shape) for name, shape in shapes.items()}
