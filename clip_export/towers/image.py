"""The image tower, a Vision Transformer: pixels to hidden states, a pooled state and an embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clip_export.spec import ImageSpec, PreprocessSpec
from clip_export.towers.transformer import Transformer


class ImageTower(nn.Module):
    """`outputs` names what `forward` returns, in that order: hidden_states, pooled, embedding."""

    def __init__(self, spec: ImageSpec, outputs: Sequence[str]) -> None:
        super().__init__()
        width = spec.transformer.width
        eps = spec.transformer.layer_norm_eps
        self.outputs = tuple(outputs)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        # The checkpoint's convolution has no bias; this one holds the mean and std of the pixels, see `fold_pixels`.
        self.patch_embedding = nn.Conv2d(3, width, spec.patch_size, stride=spec.patch_size)
        self.positional_embedding = nn.Parameter(torch.zeros(spec.tokens, width))
        self.pre_norm = nn.LayerNorm(width, eps=eps)
        self.blocks = Transformer(spec.transformer, causal=False)
        self.post_norm = nn.LayerNorm(width, eps=eps)
        if spec.embedding_dim is not None:
            self.projection = nn.Linear(width, spec.embedding_dim, bias=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Encode `pixels` uint8 [batch, 3, height, width], RGB, not normalized.

        Returns float32: hidden_states [batch, 1 + patches, width] of the last block, class token first, before any
        final LayerNorm; pooled [batch, width], the class token after it; embedding [batch, embedding_dim], not
        normalized.
        """
        patches = self.patch_embedding((pixels.float() - 128.0) / 128.0).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        states = self.pre_norm(torch.cat([class_token, patches], dim=1) + self.positional_embedding)
        results: dict[str, Tensor] = {}
        if "hidden_states" in self.outputs:
            results["hidden_states"] = self.blocks(states)
            pooled = self.post_norm(_class_token(results["hidden_states"]))
        else:
            pooled = self.post_norm(self.blocks(states, _class_token))
        results["pooled"] = pooled.squeeze(1)
        if "embedding" in self.outputs:
            results["embedding"] = self.projection(pooled).squeeze(1)
        return tuple(results[name] for name in self.outputs)


def _class_token(states: Tensor) -> Tensor:
    return states[:, :1]


def fold_pixels(weight: Tensor, spec: PreprocessSpec) -> tuple[Tensor, Tensor]:
    """The patch convolution on z = (pixel - 128) / 128 that equals `weight` on (pixel / 255 - mean) / std.

    With pixel = 128 z + 128, the second is z * (128 / 255) / std + (128 / 255 - mean) / std: the factor goes into the
    weights, the constant times the sum of each kernel into a bias. The convolution has no padding, so this is exact.
    z is exact in float16 and of unit range, which is kinder to half precision than pixels or normalized pixels.
    Returns (weight, bias), float32, computed in float64.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (spec.mean, spec.std))
    kernel = weight.double()
    bias = (kernel * ((128 / 255 - mean) / std)).sum(dim=(1, 2, 3))
    return (kernel * (128 / 255 / std)).float(), bias.float()
