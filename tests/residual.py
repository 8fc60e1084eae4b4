"""Residual channels that are far from zero for every input, in checkpoints that still do what they did.

Real CLIPs have such channels. A constant on some channels alone cannot make them: LayerNormalization takes the mean and
the variance of all channels together, and var(x + s) = var(x) + 2 cov(x, s) + var(s) is no fixed multiple of var(x), so
that no gain behind it undoes the change, unless s is the same on all channels. Two things are exact:

shift    the same constant on all channels, which is part of the mean and falls away
reflect  another basis. Before its gain a LayerNormalization commutes with every orthogonal matrix that leaves
         (1, ..., 1) alone, as the rotations of SliceGPT do for RMSNorm (Ashkboos et al. 2024, arXiv:2401.15024). One
         reflection turns what all inputs have in common, which other channels shared, onto one channel

A reflection has to reach whatever writes the residual stream. In an image tower that is a LayerNormalization, whose
output can only be reflected where its gains are all equal: those of an untrained tower are, those of the demo are not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracles
import torch
from pictures import PHOTOGRAPHS
from PIL import Image

from clip_export.prompts import prompts

State = dict[str, torch.Tensor]

TEXT, IMAGE = "text_model", "vision_model"
_PRE_NORM = f"{IMAGE}.pre_layrnorm"
_LAST_NORMS = {TEXT: ("final_layer_norm", "text_projection"), IMAGE: ("post_layernorm", "visual_projection")}
_READERS = {
    "layer_norm1": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "layer_norm2": ("mlp.fc1",),
}
_WRITERS = ("self_attn.out_proj", "mlp.fc2")
_SHIFT = 16.0


def shift(state: State) -> None:
    """Move every channel of the image tower's residual stream by the same.

    Not the text tower's, which begins with sums near 0.1: half would round those away before anything is in 8 bits.
    """
    state[f"{_PRE_NORM}.bias"] += _SHIFT


def reflectable(state: State) -> list[str]:
    """The towers of a checkpoint whose residual stream can be reflected: the text tower, the image tower if it may."""
    gains = state[f"{_PRE_NORM}.weight"]
    return [TEXT, IMAGE] if bool((gains == gains[0]).all()) else [TEXT]


def reflect(state: State, source: Path, tower: str, channel: int) -> None:
    """Turn what all inputs of `tower` share onto `channel`. `state` holds the weights of the checkpoint at `source`."""
    matrix = _reflection(_common_part(source, tower), channel)
    wide = {name: tensor.double() for name, tensor in state.items() if name.startswith(tower)}
    embeddings = f"{tower}.embeddings"
    for part in ("token_embedding.weight", "position_embedding.weight", "class_embedding"):
        _apply(wide, f"{embeddings}.{part}", lambda tensor: tensor @ matrix)
    _apply(wide, f"{embeddings}.patch_embedding.weight", lambda tensor: torch.einsum("ij,jchw->ichw", matrix, tensor))
    _apply(wide, f"{tower}.pre_layrnorm.bias", lambda tensor: matrix @ tensor)
    for layer in sorted({name.split(".self_attn")[0] for name in wide if ".self_attn" in name}):
        for writer in _WRITERS:
            for part in ("weight", "bias"):
                _apply(wide, f"{layer}.{writer}.{part}", lambda tensor: matrix @ tensor)
        for norm, readers in _READERS.items():
            _reflect_norm(wide, f"{layer}.{norm}", [f"{layer}.{reader}.weight" for reader in readers], matrix)
    norm, projection = _LAST_NORMS[tower]
    wide[f"{projection}.weight"] = state[f"{projection}.weight"].double()
    _reflect_norm(wide, f"{tower}.{norm}", [f"{projection}.weight"], matrix)
    state.update({name: tensor.float() for name, tensor in wide.items()})


def streams(source: Path, tower: str) -> list[torch.Tensor]:
    """The residual stream of `tower` by transformers, before each block and after all; float64 [rows, channels]."""
    transformers = oracles.transformers()
    model = transformers.CLIPModel.from_pretrained(source).float().eval()
    with torch.no_grad():
        if tower == TEXT:
            tokenizer = transformers.CLIPTokenizerFast.from_pretrained(source)
            ids = tokenizer(list(prompts())[:32], padding=True, return_tensors="pt").input_ids
            found = model.text_model(ids, output_hidden_states=True)
        else:
            size = model.config.vision_config.image_size
            found = model.vision_model(_photographs(size), output_hidden_states=True)
    return [states.double().flatten(0, -2) for states in found.hidden_states]


def _common_part(source: Path, tower: str) -> torch.Tensor:
    """The mean over inputs and blocks of what norms in `tower` read, each row at length 1; float64 [channels]."""
    rows = torch.cat(streams(source, tower))
    rows = rows - rows.mean(dim=1, keepdim=True)
    return (rows / rows.norm(dim=1, keepdim=True)).mean(dim=0)


def _photographs(size: int) -> torch.Tensor:
    """Float [n, 3, size, size] of about unit deviation."""
    made = []
    for path in PHOTOGRAPHS.values():
        with Image.open(path) as image:
            made.append(np.asarray(image.convert("RGB").resize((size, size)), np.float32))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2) / 64 - 2


def _reflection(common: torch.Tensor, channel: int) -> torch.Tensor:
    """The Householder matrix [n, n] that swaps `common` and `channel`, both without their mean, at length 1."""
    there = torch.zeros_like(common)
    there[channel] = 1
    there = there - there.mean()
    normal = common / common.norm() - there / there.norm()
    return torch.eye(len(common), dtype=common.dtype) - 2 * torch.outer(normal, normal) / normal.dot(normal)


def _reflect_norm(state: State, norm: str, readers: list[str], matrix: torch.Tensor) -> None:
    """The gain goes into what reads the norm: W (g x + b) = (W g M) (M x + M b / g), since M is its own inverse."""
    gain = state[f"{norm}.weight"]
    for reader in readers:
        state[reader] = state[reader] * gain @ matrix
    state[f"{norm}.bias"] = matrix @ (state[f"{norm}.bias"] / gain)
    state[f"{norm}.weight"] = torch.ones_like(gain)


def _apply(state: State, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    if name in state:
        state[name] = change(state[name])
