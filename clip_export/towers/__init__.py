"""Spec and weights -> torch modules: the one definition of CLIP's maths in this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clip_export.errors import UnsupportedModelError
from clip_export.spec import ModelSpec, Tower
from clip_export.towers.image import ImageTower, fold_pixels
from clip_export.towers.text import ContextTower, TextTower

OUTPUTS = ("embedding", "pooled", "hidden_states")
CONTEXT_OUTPUTS = (*OUTPUTS, "raw_states")

__all__ = ["CONTEXT_OUTPUTS", "OUTPUTS", "ContextTower", "ImageTower", "TextTower", "check_outputs", "make_tower"]


def check_outputs(spec: ModelSpec, tower: Tower, outputs: Sequence[str] | None) -> tuple[str, ...]:
    """What `tower` is to return: `outputs` in canonical order, or what the model was made for where it is None.

    Raises UnsupportedModelError for an unknown output, and for an embedding of a tower that has no projection.
    """
    tower_spec = spec.text if tower == "text" else spec.image
    assert tower_spec is not None
    if tower == "text" and spec.context is not None:
        if outputs is not None:
            message = "a text tower that gives Context has all outputs, and some were asked for"
            raise UnsupportedModelError(message, hint="leave out --outputs, or --context")
        return CONTEXT_OUTPUTS if tower_spec.embedding_dim is not None else CONTEXT_OUTPUTS[1:]
    if outputs is None:
        return ("embedding",) if tower_spec.embedding_dim is not None else ("pooled", "hidden_states")
    unknown = sorted(set(outputs) - set(OUTPUTS))
    if unknown or not outputs:
        raise UnsupportedModelError(
            f"expected outputs among {', '.join(OUTPUTS)}, found {', '.join(unknown) or 'none'}",
        )
    if "embedding" in outputs and tower_spec.embedding_dim is None:
        raise UnsupportedModelError(
            f"the {tower} tower of this checkpoint has no projection, so it has no embedding",
            hint="ask for pooled or hidden_states: --outputs pooled,hidden_states",
        )
    return tuple(name for name in OUTPUTS if name in outputs)


def make_tower(spec: ModelSpec, tower: Tower, weights: Mapping[str, Tensor], outputs: Sequence[str]) -> nn.Module:
    """The `tower` of `spec` in float32, in eval mode, with its weights; `outputs` is what it returns.

    `weights` are canonical (`spec.weight_shapes`) and are read one at a time, so that no second copy is kept.
    """
    with torch.device("meta"):
        module: nn.Module
        if tower == "text":
            assert spec.text is not None
            module = (TextTower if spec.context is None else ContextTower)(spec.text, outputs)
        else:
            assert spec.image is not None
            module = ImageTower(spec.image, outputs)
    module.load_state_dict(_state(module, spec, tower, weights), assign=True)
    return module.requires_grad_(requires_grad=False).eval()


def _state(module: nn.Module, spec: ModelSpec, tower: Tower, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name in module.state_dict():
        if not name.startswith("patch_embedding."):
            state[name] = weights[f"{tower}.{name}"].float().contiguous()
    if tower == "image":
        assert spec.preprocess is not None
        kernel = weights["image.patch_embedding.weight"]
        state["patch_embedding.weight"], state["patch_embedding.bias"] = fold_pixels(kernel, spec.preprocess)
    return state
