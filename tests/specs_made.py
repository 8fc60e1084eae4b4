"""Tiny specs and canonical weights from a seed, for tests that need a tower and no checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from clip_export.spec import (
    Activation,
    ImageSpec,
    ModelSpec,
    PreprocessSpec,
    TextSpec,
    TokenizerSpec,
    TransformerSpec,
    weight_shapes,
)


def tiny_spec(*, activation: Activation = "quick_gelu", causal: bool = True, projected: bool = True) -> ModelSpec:
    """Two layers a tower, width 128, two heads of 64; 16 tokens, 32 pixels, patches of 8."""
    transformer = TransformerSpec(width=128, layers=2, heads=2, mlp_width=256, activation=activation)
    dim = 64 if projected else None
    return ModelSpec(
        text=TextSpec(transformer=transformer, vocab_size=64, context_length=16, embedding_dim=dim, causal=causal),
        image=ImageSpec(transformer=transformer, image_size=32, patch_size=8, embedding_dim=dim),
        tokenizer=TokenizerSpec(
            dialect="openai", context_length=16, start_id=62, end_id=63, pad_id=0, pooling="argmax", truncate=False
        ),
        preprocess=PreprocessSpec(
            dialect="openai",
            resize_mode="shortest",
            resize_size=32,
            crop_size=32,
            interpolation="bicubic",
            mean=(0.48, 0.46, 0.41),
            std=(0.27, 0.26, 0.28),
        ),
        logit_scale=4.6,
    )


def random_weights(spec: ModelSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    """Canonical weights of a sane scale: norms near 1, everything else small and nothing zero."""
    generator = torch.Generator().manual_seed(seed)

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            return 1 + 0.1 * noise
        fan_in = shape[-1] if len(shape) == 2 else 100
        return noise * (0.5 / fan_in**0.5)

    return {name: weight(name, shape) for name, shape in weight_shapes(spec).items()}


def replaced(weights: dict[str, torch.Tensor], fragment: str, value: Any) -> dict[str, torch.Tensor]:
    """`weights` with every tensor whose name holds `fragment` filled with `value`."""
    return {name: torch.full_like(w, value) if fragment in name else w for name, w in weights.items()}
