"""Our towers against transformers, open_clip and OpenAI's clip, at the real architectures, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from checkpoints_made import make_huggingface, make_open_clip, make_openai, randomize, write_tokenizer

from clip_export.checkpoints import Checkpoint, Options, read
from clip_export.graph.proof import run_tower
from clip_export.spec import Tower
from clip_export.towers import make_tower

EMBEDDING = 1e-5  # largest difference of normalized embeddings
HIDDEN_STATES = 1e-4

# name: text (width, layers, heads), image (width, layers, heads, size, patch), embedding_dim
ARCHITECTURES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int, int, int], int]] = {
    "ViT-B/32": ((512, 12, 8), (768, 12, 12, 224, 32), 512),
    "ViT-B/16": ((512, 12, 8), (768, 12, 12, 224, 16), 512),
    "ViT-L/14": ((768, 12, 12), (1024, 24, 16, 224, 14), 768),
    "ViT-L/14-336": ((768, 12, 12), (1024, 24, 16, 336, 14), 768),
}
CASES = [
    *((name, "text") for name in ("ViT-B/32", "ViT-L/14")),  # B/16 and L/14-336 have the same text towers
    *((name, "image") for name in ARCHITECTURES),
]


def text_feeds(context_length: int = 77, batch: int = 3) -> dict[str, np.ndarray]:
    """Texts of several lengths, ended by 49407 and padded with it, as transformers' tokenizer pads."""
    rng = np.random.default_rng(0)
    input_ids = rng.integers(1, 49000, (batch, context_length), dtype=np.int32)
    eot_index = np.linspace(4, context_length - 1, batch).astype(np.int32)
    input_ids[:, 0] = 49406
    input_ids[np.arange(context_length) >= eot_index[:, None]] = 49407
    return {"input_ids": input_ids, "eot_index": eot_index}


def image_feeds(size: int, batch: int = 2) -> dict[str, np.ndarray]:
    return {"pixels": np.random.default_rng(0).integers(0, 256, (batch, 3, size, size), dtype=np.uint8)}


def normalized_pixels(checkpoint: Checkpoint, pixels: np.ndarray) -> torch.Tensor:
    """What the original's preprocessing hands to its tower: (pixel / 255 - mean) / std."""
    assert checkpoint.spec.preprocess is not None
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (checkpoint.spec.preprocess.mean, checkpoint.spec.preprocess.std)
    )
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


def ours(checkpoint: Checkpoint, tower: Tower, feeds: dict[str, np.ndarray], *outputs: str) -> dict[str, np.ndarray]:
    module = make_tower(checkpoint.spec, tower, checkpoint.weights, outputs)
    return run_tower(module, outputs, feeds)


def largest_difference(found: np.ndarray, expected: torch.Tensor, *, normalize: bool) -> float:
    wanted = expected.detach().double().numpy()
    given = found.astype(np.float64)
    assert given.shape == wanted.shape
    assert np.abs(wanted).max() > 1e-3
    if normalize:
        wanted, given = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (wanted, given))
    return float(np.abs(given - wanted).max())


def save_one_tower(directory: Path, name: str, tower: str) -> Any:
    """One tower of `name` in Hugging Face's layout, with its projection. Returns transformers' model."""
    transformers = oracles.transformers()
    (text_width, text_layers, text_heads), (width, layers, heads, size, patch), dim = ARCHITECTURES[name]
    common = {"projection_dim": dim, "hidden_act": "quick_gelu"}
    if tower == "text":
        config = transformers.CLIPTextConfig(
            hidden_size=text_width,
            intermediate_size=4 * text_width,
            num_hidden_layers=text_layers,
            num_attention_heads=text_heads,
            eos_token_id=49407,
            bos_token_id=49406,
            **common,
        )
        with torch.device("meta"):
            model = transformers.CLIPTextModelWithProjection(config)
        write_tokenizer(directory, 49408)
    else:
        config = transformers.CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=size,
            patch_size=patch,
            **common,
        )
        with torch.device("meta"):
            model = transformers.CLIPVisionModelWithProjection(config)
        shape = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        transformers.CLIPImageProcessor(**shape).save_pretrained(directory)
    model.to_empty(device="cpu")  # transformers' own initialization takes longer than the comparison
    for key, buffer in model.named_buffers():
        assert key.endswith("position_ids")
        buffer.copy_(torch.arange(buffer.shape[-1]))
    randomize(model, seed=1)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(("name", "tower"), CASES)
@torch.inference_mode()
def test_tower_equals_transformers(tmp_path: Path, name: str, tower: Tower) -> None:
    model = save_one_tower(tmp_path, name, tower)
    checkpoint = read(tmp_path)
    if tower == "text":
        feeds = text_feeds()
        expected = model(input_ids=torch.from_numpy(feeds["input_ids"]).long())
        embedding = expected.text_embeds
    else:
        feeds = image_feeds(ARCHITECTURES[name][1][3])
        expected = model(pixel_values=normalized_pixels(checkpoint, feeds["pixels"]))
        embedding = expected.image_embeds
    found = ours(checkpoint, tower, feeds, "embedding", "hidden_states")
    assert largest_difference(found["embedding"], embedding, normalize=True) <= EMBEDDING
    assert largest_difference(found["hidden_states"], expected.last_hidden_state, normalize=False) <= HIDDEN_STATES


@torch.inference_mode()
def test_both_towers_of_open_clip_h14(tmp_path: Path) -> None:
    """ViT-H/14's widths and head size of 80, four layers deep."""
    vision = {"width": 1280, "head_width": 80, "patch_size": 14, "image_size": 224}
    text = {"width": 1024, "heads": 16}
    model = make_open_clip(tmp_path, layers=4, embedding_dim=1024, image_size=224, vision=vision, text=text)
    checkpoint = read(tmp_path)
    feeds = text_feeds()
    feeds["input_ids"][np.arange(77) > feeds["eot_index"][:, None]] = 0
    expected = model.encode_text(torch.from_numpy(feeds["input_ids"]).long())
    assert (
        largest_difference(ours(checkpoint, "text", feeds, "embedding")["embedding"], expected, normalize=True)
        <= EMBEDDING
    )
    feeds = image_feeds(224)
    expected = model.encode_image(normalized_pixels(checkpoint, feeds["pixels"]))
    found = ours(checkpoint, "image", feeds, "embedding")["embedding"]
    assert largest_difference(found, expected, normalize=True) <= EMBEDDING


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@torch.inference_mode()
def test_small_open_clip(tmp_path: Path, causal: bool, custom_text: bool) -> None:
    text = {} if causal else {"no_causal_mask": True}
    model = make_open_clip(tmp_path, custom_text=custom_text, quick_gelu=True, text=text)
    checkpoint = read(tmp_path)
    assert checkpoint.spec.text is not None
    assert checkpoint.spec.text.causal is causal
    feeds = text_feeds()
    feeds["input_ids"][np.arange(77) > feeds["eot_index"][:, None]] = 0
    expected = model.encode_text(torch.from_numpy(feeds["input_ids"]).long())
    assert (
        largest_difference(ours(checkpoint, "text", feeds, "embedding")["embedding"], expected, normalize=True)
        <= EMBEDDING
    )


@pytest.mark.parametrize("torchscript", [True, False])
@torch.inference_mode()
def test_openai(tmp_path: Path, torchscript: bool) -> None:
    model = make_openai(tmp_path / "clip.pt", torchscript=torchscript)
    checkpoint = read(tmp_path / "clip.pt", Options(activation=None if torchscript else "quick_gelu"))
    feeds = text_feeds()
    feeds["input_ids"][np.arange(77) > feeds["eot_index"][:, None]] = 0
    expected = model.encode_text(torch.from_numpy(feeds["input_ids"]).long())
    assert (
        largest_difference(ours(checkpoint, "text", feeds, "embedding")["embedding"], expected, normalize=True)
        <= EMBEDDING
    )
    feeds = image_feeds(32)
    expected = model.encode_image(normalized_pixels(checkpoint, feeds["pixels"]))
    found = ours(checkpoint, "image", feeds, "embedding")["embedding"]
    assert largest_difference(found, expected, normalize=True) <= EMBEDDING


@torch.inference_mode()
def test_the_other_activation_is_seen(tmp_path: Path) -> None:
    """The check above can fail: QuickGELU in place of GELU is far outside it."""
    model = make_huggingface(tmp_path, activation="gelu", vocab_size=49408)
    feeds = text_feeds()
    wrong = ours(read(tmp_path, Options(activation="quick_gelu")), "text", feeds, "embedding")
    right = ours(read(tmp_path), "text", feeds, "embedding")
    pooled = model.text_model(input_ids=torch.from_numpy(feeds["input_ids"]).long()).pooler_output
    expected = model.text_projection(pooled)
    assert largest_difference(right["embedding"], expected, normalize=True) <= EMBEDDING
    assert largest_difference(wrong["embedding"], expected, normalize=True) > 100 * EMBEDDING
