"""What a chip could do: the arithmetic of a tower, and the fastest matrix product that this machine gives torch."""

from __future__ import annotations

import time

import torch

from clip_export.spec import ImageSpec, ModelSpec, TextSpec, Tower, TransformerSpec


def tower_flop(spec: ModelSpec, tower: Tower, length: int | None = None) -> int:
    """Floating-point operations for one input, two to each multiply-add; `length` in tokens, the context by default.

    Of a transformer with T tokens, width w, MLP width m and L layers, multiply-adds are

        L * (T * (4 w² + 2 w m) + 2 T² w)

    for q, k, v and the output projection, both MLP matrices, and QKᵀ with its product with V; causal attention is
    counted in full, as in the literature. To that come the patch convolution, (T - 1) * w * 3 p², and the projection of
    one token. Norms, activations and softmax are left out: they are limited by memory, not by arithmetic.
    """
    if tower == "text":
        text = spec.text
        assert isinstance(text, TextSpec)
        products = _blocks(text.transformer, length or text.context_length)
        return 2 * (products + text.transformer.width * (text.embedding_dim or 0))
    image = spec.image
    assert isinstance(image, ImageSpec)
    width = image.transformer.width
    patches = (image.tokens - 1) * width * 3 * image.patch_size**2
    return 2 * (_blocks(image.transformer, image.tokens) + patches + width * (image.embedding_dim or 0))


def _blocks(transformer: TransformerSpec, tokens: int) -> int:
    width, mlp = transformer.width, transformer.mlp_width
    return transformer.layers * (tokens * (4 * width**2 + 2 * width * mlp) + 2 * tokens**2 * width)


def ceiling(device: str, dtype: torch.dtype, sizes: tuple[int, ...], *, seconds: float) -> float:
    """FLOP/s of the fastest square matrix product among `sizes`, each repeated for about `seconds`.

    This, and no datasheet, is what a chip gives under its own power limit: percentages are of it.
    """
    return max(_product_rate(device, dtype, size, seconds) for size in sizes)


def _product_rate(device: str, dtype: torch.dtype, size: int, seconds: float) -> float:
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(first)
    wait = torch.cuda.synchronize if device.startswith("cuda") else _nothing
    rates = []
    deadline = time.perf_counter() + seconds
    while not rates or time.perf_counter() < deadline:
        wait()
        start = time.perf_counter()
        for _ in range(10):
            torch.matmul(first, second, out=out)
        wait()
        rates.append(10 * 2 * size**3 / (time.perf_counter() - start))
    return max(rates)


def _nothing() -> None:
    """There is nothing to wait for on a CPU."""
