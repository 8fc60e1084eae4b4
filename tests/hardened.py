"""Checkpoints that do the same as another one and are hard on few bits: weights scaled here, unscaled there.

Each hardening is exact in real numbers (residual: but for the epsilon of LayerNormalization), so the fp32 tower gives
what it gave. They work on Hugging Face checkpoints of one safetensors file, and write fp32.

overflow   gamma and beta of norms times up to 1e5 on every fourth channel, the next linear layer divided by the same
underflow  gamma and beta of the first norms times 3000, values times 1e-4: the weights of the values are near 1e-9
residual   the whole residual stream times 2e5

Those are hard on half precision, this one on 8 bits:

outliers   a residual channel that is far from zero for every input, where that can be had exactly, or else all of them
           shifted by the same: see residual.py. Then every twentieth channel, two at least, of both norms and of the
           values times 10 to 100, what reads them divided by the same: half holds that, one 8-bit scale for all
           channels does not
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Literal

import residual
import torch
from safetensors.torch import load_file, save_file

Hardening = Literal["overflow", "underflow", "residual", "outliers"]
# Those that break a half precision graph.
HARDENINGS: tuple[Hardening, ...] = ("overflow", "underflow", "residual")

State = dict[str, torch.Tensor]

_FIRST = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def harden(source: Path, target: Path, hardening: Hardening) -> Path:
    """Copy the checkpoint at `source` to `target` with hardened weights; returns `target`."""
    shutil.copytree(source, target)
    state = load_file(target / "model.safetensors")
    hardened = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if hardening == "outliers":
        towers = residual.reflectable(hardened)
        for tower in towers:
            width = len(hardened[f"{tower}.encoder.layers.0.layer_norm1.weight"])
            residual.reflect(hardened, source, tower, _outlying(width)[-1])
        if residual.IMAGE not in towers:
            residual.shift(hardened)
    change = {"overflow": _overflow, "underflow": _underflow, "residual": _residual_layer, "outliers": _outliers}
    for layer in sorted({match[0] for name in state if (match := re.match(r".*encoder\.layers\.\d+", name))}):
        change[hardening](hardened, layer)
    if hardening == "residual":
        _residual_start(hardened)
    save_file({name: tensor.contiguous() for name, tensor in hardened.items()}, target / "model.safetensors")
    return target


def _overflow(state: State, layer: str) -> None:
    for norm, linears in (("layer_norm1", _FIRST), ("layer_norm2", ("mlp.fc1",))):
        scale = torch.ones_like(state[f"{layer}.{norm}.weight"])
        scale[::4] = torch.logspace(3, 5, len(scale[::4]))
        _scale_norm(state, f"{layer}.{norm}", [f"{layer}.{linear}" for linear in linears], scale)


def _underflow(state: State, layer: str) -> None:
    scale = torch.full_like(state[f"{layer}.layer_norm1.weight"], 3000.0)
    _scale_norm(state, f"{layer}.layer_norm1", [f"{layer}.{linear}" for linear in _FIRST], scale)
    for part in ("weight", "bias"):
        state[f"{layer}.self_attn.v_proj.{part}"] *= 1e-4
    state[f"{layer}.self_attn.out_proj.weight"] /= 1e-4


def _outliers(state: State, layer: str) -> None:
    scale = torch.ones_like(state[f"{layer}.layer_norm1.weight"])
    channels = _outlying(len(scale))
    scale[channels] = torch.logspace(1, 2, len(channels))
    for norm, linears in (("layer_norm1", _FIRST), ("layer_norm2", ("mlp.fc1",))):
        _scale_norm(state, f"{layer}.{norm}", [f"{layer}.{linear}" for linear in linears], scale)
    state[f"{layer}.self_attn.v_proj.weight"] *= scale[:, None]
    state[f"{layer}.self_attn.v_proj.bias"] *= scale
    state[f"{layer}.self_attn.out_proj.weight"] /= scale


def _outlying(width: int) -> list[int]:
    """The channels that are made large."""
    return list(range(3, width, width // max(2, width // 20)))


_RESIDUAL = 2e5


def _residual_layer(state: State, layer: str) -> None:
    for name in ("self_attn.out_proj", "mlp.fc2"):
        for part in ("weight", "bias"):
            state[f"{layer}.{name}.{part}"] *= _RESIDUAL


def _residual_start(state: State) -> None:
    starts = ("text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight")
    for name in (*starts, "vision_model.pre_layrnorm.weight", "vision_model.pre_layrnorm.bias"):
        state[name] *= _RESIDUAL


def _scale_norm(state: State, norm: str, linears: list[str], scale: torch.Tensor) -> None:
    """Channels of `norm` times `scale`, and the columns of what reads them divided by it."""
    for part in ("weight", "bias"):
        state[f"{norm}.{part}"] *= scale
    for linear in linears:
        state[f"{linear}.weight"] /= scale
