"""Checkpoints with seeded random weights, written by the libraries that own the formats.

Each maker writes one and returns the library's own model, in evaluation mode and float32, to compare with. All weights
are random, biases and norms too, so that a weight in the wrong place shows.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import oracles
import torch
from safetensors.torch import save_file

CLIP_VOCAB_SIZE = 49408
SMALL_VOCAB_SIZE = 600  # 512 byte symbols, 86 merges, start and end


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fill every weight with seeded normal values of a size that keeps activations of order 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "logit_scale" in name:
                weight.fill_(2.5 + 0.1 * (seed % 10))
                continue
            fan_in = weight[0].numel() if weight.dim() > 1 and "embedding" not in name else 1
            scale = 0.1 if fan_in == 1 else 1 / math.sqrt(fan_in)
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
            if weight.dim() == 1 and ("norm" in name or "ln_" in name or "layrnorm" in name) and "weight" in name:
                weight.add_(1)
    return model.eval()


@functools.cache
def merges() -> tuple[tuple[str, str], ...]:
    """CLIP's 48,894 merges, from open_clip's own tokenizer."""
    return tuple(oracles.open_clip().tokenizer.SimpleTokenizer().bpe_ranks)


def vocabulary(vocab_size: int) -> dict[str, int]:
    """The first part of CLIP's vocabulary, with start and end as the last two ids; all of it for 49408."""
    tokenizer = oracles.open_clip().tokenizer
    letters = list(tokenizer.bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["".join(pair) for pair in merges()[: vocab_size - 514]]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


def write_tokenizer(directory: Path, vocab_size: int, *, old: bool = False, **config: Any) -> None:
    """Tokenizer files: vocab.json and merges.txt where `old`, else tokenizer.json. `config` goes into the config."""
    pairs = merges()[: vocab_size - 514]
    if old:
        (directory / "vocab.json").write_text(json.dumps(vocabulary(vocab_size)), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
        (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    else:
        maker = oracles.transformers().CLIPTokenizer
        maker(vocab=vocabulary(vocab_size), merges=list(pairs), model_max_length=77).save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    before = json.loads(path.read_text()) if path.is_file() else {"tokenizer_class": "CLIPTokenizer"}
    path.write_text(json.dumps(before | config), encoding="utf-8")


def make_huggingface(
    directory: Path,
    *,
    kind: str = "CLIPModel",
    seed: int = 0,
    layers: int = 2,
    width: int = 128,
    heads: int = 2,
    embedding_dim: int = 64,
    image_size: int = 32,
    patch_size: int = 16,
    vocab_size: int = SMALL_VOCAB_SIZE,
    context_length: int = 77,
    activation: str = "quick_gelu",
    eos_token_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    weights: str = "safetensors",
    tokenizer: bool = True,
    preprocessor: dict[str, Any] | None = None,
) -> Any:
    """A checkpoint of transformers' class `kind`, with tokenizer and preprocessor files.

    `weights` is safetensors, sharded, bin, sharded_bin or none. `preprocessor` overrides CLIPImageProcessor's config,
    {} writes no such file. The tokenizer is the start of CLIP's vocabulary and spells any text.
    `eos_token_id` is the config's, 2 for a legacy one; the tokenizer's end token is always the last id.
    """
    transformers = oracles.transformers()
    directory.mkdir(parents=True, exist_ok=True)
    shared = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": embedding_dim,
        "hidden_act": activation,
    }
    text = shared | {
        "vocab_size": vocab_size,
        "max_position_embeddings": context_length,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1 if eos_token_id is None else eos_token_id,
    }
    vision = shared | {"image_size": image_size, "patch_size": patch_size}
    if kind == "CLIPModel":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=embedding_dim)
    else:
        config = transformers.CLIPTextConfig(**text) if "Text" in kind else transformers.CLIPVisionConfig(**vision)
    model = randomize(getattr(transformers, kind)(config), seed).to(dtype)
    _save_huggingface(model, directory, weights)
    if tokenizer and "Vision" not in kind:
        write_tokenizer(directory, vocab_size)
    if "Text" not in kind and preprocessor != {}:
        shape = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
        transformers.CLIPImageProcessor(**shape | (preprocessor or {})).save_pretrained(directory)
    return model.float()


def _save_huggingface(model: Any, directory: Path, weights: str) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if weights == "safetensors":
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    elif weights == "bin":
        torch.save(state, directory / "pytorch_model.bin")
    elif weights in ("sharded", "sharded_bin"):
        stem, suffix = ("model", "safetensors") if weights == "sharded" else ("pytorch_model", "bin")
        _save_shards(state, directory, stem, suffix)


def _save_shards(state: dict[str, torch.Tensor], directory: Path, stem: str, suffix: str) -> None:
    """Three shards and the index that names them."""
    names = sorted(state)
    weight_map = {name: f"{stem}-{i % 3 + 1:05}-of-00003.{suffix}" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        part = {name: state[name] for name in names if weight_map[name] == shard}
        save_file(part, directory / shard) if suffix == "safetensors" else torch.save(part, directory / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def make_open_clip(
    directory: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    width: int = 128,
    embedding_dim: int = 64,
    image_size: int = 32,
    patch_size: int = 16,
    quick_gelu: bool = False,
    custom_text: bool = False,
    weights: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    preprocess: dict[str, Any] | None = None,
) -> Any:
    """An open_clip checkpoint; `vision`, `text`, `model` and `preprocess` add to the sections of its config.

    `weights` is safetensors, bin or none. The text tower has CLIP's 49408 ids: open_clip has no smaller tokenizer.
    """
    open_clip = oracles.open_clip()
    directory.mkdir(parents=True, exist_ok=True)
    shared = {"layers": layers, "width": width}
    vision_cfg = {**shared, "head_width": 64, "patch_size": patch_size, "image_size": image_size, **(vision or {})}
    text_cfg = {**shared, "heads": width // 64, "context_length": 77, "vocab_size": CLIP_VOCAB_SIZE, **(text or {})}
    model_cfg = {"embed_dim": embedding_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg, **(model or {})}
    model_cfg |= {"quick_gelu": True} if quick_gelu else {}
    maker = open_clip.model.CustomTextCLIP if custom_text else open_clip.model.CLIP
    made = randomize(maker(**model_cfg), seed).to(dtype)
    model_cfg |= {"custom_text": True} if custom_text else {}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess or {}}
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    state = {name: tensor.contiguous() for name, tensor in made.state_dict().items()}
    if weights == "safetensors":
        save_file(state, directory / "open_clip_model.safetensors")
    elif weights == "bin":
        torch.save(state, directory / "open_clip_pytorch_model.bin")
    return made.float()


def make_openai(
    path: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    width: int = 128,
    embedding_dim: int = 64,
    image_size: int = 32,
    patch_size: int = 16,
    context_length: int = 77,
    torchscript: bool = True,
    half: bool = True,
    facts: bool = True,
) -> Any:
    """An OpenAI .pt: the TorchScript archive as OpenAI made theirs, or the plain state dict.

    `half` converts as OpenAI's convert_weights does; `facts` adds the three integer buffers that OpenAI's archives
    carry. Returns OpenAI's model with the stored values in float32.
    """
    oracles.openai_clip()
    from clip.model import CLIP, convert_weights

    heads = width // 64
    made = CLIP(
        embedding_dim, image_size, layers, width, patch_size, context_length, CLIP_VOCAB_SIZE, width, heads, layers
    )
    randomize(made, seed)
    if half:
        convert_weights(made)
    plain = copy.deepcopy(made).float()
    if facts:
        for name, value in zip(
            ("input_resolution", "context_length", "vocab_size"),
            (image_size, context_length, CLIP_VOCAB_SIZE),
            strict=True,
        ):
            vars(made).pop(name, None)
            made.register_buffer(name, torch.tensor(value))
    if torchscript:
        _save_torchscript(made, path, image_size, context_length)
    else:
        torch.save(made.state_dict(), path)
    return plain


def _save_torchscript(model: Any, path: Path, image_size: int, context_length: int) -> None:
    pictures = torch.zeros(1, 3, image_size, image_size)
    texts = torch.zeros(1, context_length, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of its own deprecation and of Python branches
        torch.jit.trace(model, (pictures, texts), check_trace=False).save(str(path))


def canonical_huggingface(model: Any) -> dict[str, torch.Tensor]:
    """The weights that a model of transformers holds, under canonical names, found by its modules."""
    found: dict[str, torch.Tensor] = {}
    text = getattr(model, "text_model", model if hasattr(model, "final_layer_norm") else None)
    image = getattr(model, "vision_model", model if hasattr(model, "post_layernorm") else None)
    if text is not None:
        found["text.token_embedding.weight"] = text.embeddings.token_embedding.weight
        found["text.positional_embedding"] = text.embeddings.position_embedding.weight
        found |= _pair("text.final_norm", text.final_layer_norm) | _huggingface_blocks("text", text)
    if image is not None:
        found["image.class_embedding"] = image.embeddings.class_embedding
        found["image.patch_embedding.weight"] = image.embeddings.patch_embedding.weight
        found["image.positional_embedding"] = image.embeddings.position_embedding.weight
        found |= _pair("image.pre_norm", image.pre_layrnorm) | _pair("image.post_norm", image.post_layernorm)
        found |= _huggingface_blocks("image", image)
    for tower, name in (("text", "text_projection"), ("image", "visual_projection")):
        if hasattr(model, name):
            found[f"{tower}.projection.weight"] = getattr(model, name).weight
    return {name: tensor.detach() for name, tensor in found.items()}


def _huggingface_blocks(tower: str, model: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(model.encoder.layers):
        block, attention = f"{tower}.blocks.{i}", layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        found[f"{block}.attention.qkv.weight"] = torch.cat([part.weight for part in parts])
        found[f"{block}.attention.qkv.bias"] = torch.cat([part.bias for part in parts])
        found |= _pair(f"{block}.attention.out", attention.out_proj)
        found |= _pair(f"{block}.norm1", layer.layer_norm1) | _pair(f"{block}.norm2", layer.layer_norm2)
        found |= _pair(f"{block}.mlp.fc1", layer.mlp.fc1) | _pair(f"{block}.mlp.fc2", layer.mlp.fc2)
    return found


def canonical_openai(model: Any) -> dict[str, torch.Tensor]:
    """The same for a model of OpenAI's clip or of open_clip."""
    text, image = getattr(model, "text", model), model.visual
    found = {
        "text.token_embedding.weight": text.token_embedding.weight,
        "text.positional_embedding": text.positional_embedding,
        "text.projection.weight": text.text_projection.T,
        "image.class_embedding": image.class_embedding,
        "image.patch_embedding.weight": image.conv1.weight,
        "image.positional_embedding": image.positional_embedding,
        "image.projection.weight": image.proj.T,
        **_pair("text.final_norm", text.ln_final),
        **_pair("image.pre_norm", image.ln_pre),
        **_pair("image.post_norm", image.ln_post),
    }
    for tower, transformer in (("text", text.transformer), ("image", image.transformer)):
        for i, layer in enumerate(transformer.resblocks):
            block = f"{tower}.blocks.{i}"
            found[f"{block}.attention.qkv.weight"] = layer.attn.in_proj_weight
            found[f"{block}.attention.qkv.bias"] = layer.attn.in_proj_bias
            found |= _pair(f"{block}.attention.out", layer.attn.out_proj)
            found |= _pair(f"{block}.norm1", layer.ln_1) | _pair(f"{block}.norm2", layer.ln_2)
            found |= _pair(f"{block}.mlp.fc1", layer.mlp.c_fc) | _pair(f"{block}.mlp.fc2", layer.mlp.c_proj)
    return {name: tensor.detach() for name, tensor in found.items()}


def _pair(name: str, module: Any) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


def assert_same_weights(checkpoint: Any, expected: dict[str, torch.Tensor]) -> None:
    """The checkpoint's weights are `expected`, name by name and bit by bit, and no others."""
    assert set(checkpoint.weights) == set(expected)
    for name, tensor in checkpoint.weights.items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=0, atol=0, msg=name)
