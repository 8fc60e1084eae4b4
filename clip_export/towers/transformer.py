"""The transformer that both towers are made of: pre-norm blocks, as in CLIP (Radford et al. 2021, section 2.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from clip_export.spec import Activation, TransformerSpec

Select = Callable[[Tensor], Tensor]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), OpenAI's approximation of GELU (Hendrycks and Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Attention(nn.Module):
    """Multi-head self-attention with q, k and v in one matrix.

    `forward` stops before the output projection `out`: the block applies it, after it may have selected a position.
    """

    def __init__(self, spec: TransformerSpec, *, causal: bool) -> None:
        super().__init__()
        self.heads = spec.heads
        self.causal = causal
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.out = nn.Linear(spec.width, spec.width)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """[batch, sequence, width] to the same shape. `visible`, bool [batch, 1, sequence, sequence], stands for the
        causal flag where some positions are hidden besides: true where a row's position sees a column's."""
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        # A flag, never a mask tensor: fused kernels skip the upper triangle, and it keeps the sequence axis dynamic.
        causal = self.causal and visible is None
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal)
        return mixed.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Two linear layers with the checkpoint's activation between them."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.width, spec.mlp_width)
        self.activation = ACTIVATIONS[spec.activation]()
        self.fc2 = nn.Linear(spec.mlp_width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, spec: TransformerSpec, *, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, eps=spec.layer_norm_eps)
        self.attention = Attention(spec, causal=causal)
        self.norm2 = nn.LayerNorm(spec.width, eps=spec.layer_norm_eps)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, select: Select | None = None, visible: Tensor | None = None) -> Tensor:
        """[batch, sequence, width] to the same shape, or to [batch, 1, width] of the position that `select` picks."""
        mixed = self.attention(self.norm1(x), visible)
        if select is not None:
            x, mixed = select(x), select(mixed)
        x = x + self.attention.out(mixed)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Transformer(nn.ModuleList):
    """The stack of blocks. Its children are the blocks, so that weights are named `blocks.0.…`."""

    def __init__(self, spec: TransformerSpec, *, causal: bool) -> None:
        super().__init__(Block(spec, causal=causal) for _ in range(spec.layers))

    def forward(self, x: Tensor, select: Select | None = None) -> Tensor:
        """Run all blocks on [batch, sequence, width].

        With `select`, the last block computes its output projection and its MLP for the selected position only and
        gives [batch, 1, width]: nothing after its attention mixes positions, so the numbers are the same and three
        quarters of that block's work is not done.
        """
        *body, last = self
        for block in body:
            x = block(x)
        return last(x, select)  # type: ignore[no-any-return]
