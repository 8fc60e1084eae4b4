"""clip-skip: which layer's hidden states are taken, and whether the final LayerNorm is applied to them.

Layers are counted from the end of the family's own encoder: 0 is its last block. Our spelling says just that: `last`,
`penultimate`, `last-2`. The tools count in other ways, so that their numbers are taken under their names alone:

| | means |
|---|---|
| comfyui:-2 | CLIPSetLastLayer; -1 is the last block (comfy/sd1_clip.py, set_clip_options) |
| diffusers:1 | clip_skip; blocks skipped, from the last in SD 1, from the penultimate in SD 2 and XL (encode_prompt) |
| a1111:2 | CLIP_stop_at_last_layers; 1 is the last block, and only SD 1 heeds it (modules/sd_hijack_clip.py) |
| compel:NAME | a ReturnedEmbeddingsType, in lower case (compel/embeddings_provider.py) |
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

from clip_export.errors import InputError
from clip_export.spec import Family

__all__ = ["Layer", "default_layer", "find_layer"]

# The layer that each family was trained with, and whether with the final LayerNorm.
_FAMILIES: dict[Family, tuple[int, bool]] = {
    "clip": (0, True),
    "sd1": (0, True),
    "sd2": (1, True),
    "sdxl": (1, False),
    "sdxl_refiner": (1, False),
    "sd3": (1, False),
}
_COMPEL = {
    "last_hidden_states_normalized": (0, True),
    "penultimate_hidden_states_normalized": (1, True),
    "penultimate_hidden_states_non_normalized": (1, False),
}
_OURS = re.compile(r"last(?:-([0-9]{1,3}))?|(penultimate)")
_THEIRS = re.compile(r"(comfyui|diffusers|a1111|compel)[:=](.+)")
_WHOLE = re.compile(r"[+-]?[0-9]{1,3}")
_SPELLING = "write last, penultimate or last-2; or a tool's own number with its name: comfyui:-2, diffusers:1, a1111:2"


@dataclass(frozen=True, slots=True)
class Layer:
    """`depth` blocks before the end of the family's encoder; `normalized`: after the final LayerNorm."""

    depth: int
    normalized: bool

    @property
    def name(self) -> str:
        """In our spelling."""
        return {0: "last", 1: "penultimate"}.get(self.depth, f"last-{self.depth}")


def default_layer(family: Family) -> Layer:
    """What the family was trained with."""
    return Layer(*_FAMILIES[family])


def find_layer(clip_skip: object, family: Family) -> Layer:
    """The layer that `clip_skip` names, None the family's own. Raises InputError for what names none."""
    own = default_layer(family)
    if clip_skip is None:
        return own
    if not isinstance(clip_skip, str):
        message = f"clip_skip {clip_skip!r} is another layer to each tool"
        raise InputError(message, hint=_SPELLING)
    spelling = clip_skip.strip().lower()
    if ours := _OURS.fullmatch(spelling):
        return Layer(1 if ours[2] else int(ours[1] or 0), own.normalized)
    if theirs := _THEIRS.fullmatch(spelling):
        return _theirs(theirs[1], theirs[2], own, clip_skip)
    raise InputError(f"clip_skip {clip_skip!r} names no layer", hint=_SPELLING)


def _theirs(tool: str, value: str, own: Layer, spelling: str) -> Layer:
    if tool == "compel":
        if value not in _COMPEL:
            raise InputError(f"clip_skip {spelling!r} names no layer", hint=f"one of: {', '.join(_COMPEL)}")
        depth, normalized = _COMPEL[value]
        # diffusers' encoder of Stable Diffusion 2 ends where the family's own layer is, and compel counts from there.
        return Layer(depth + (1 if own == Layer(1, True) else 0), normalized)
    number = _number(value, spelling)
    if tool == "comfyui":
        _require(number < 0, spelling, "ComfyUI counts -1, -2, … from the last block")
        return Layer(-number - 1, own.normalized)
    if tool == "diffusers":
        _require(number >= 0, spelling, "diffusers counts the blocks that are skipped: 0, 1, 2, …")
        return Layer(own.depth + number, own.normalized)
    _require(number >= 1, spelling, "AUTOMATIC1111 counts 1, 2, 3, … from the last block")
    if own.depth != 0:
        warnings.warn(
            f"AUTOMATIC1111 takes clip skip for Stable Diffusion 1 alone; {spelling} changes nothing", stacklevel=6
        )
        return own
    return Layer(number - 1, own.normalized)


def _number(value: str, spelling: str) -> int:
    if not _WHOLE.fullmatch(value):
        raise InputError(f"clip_skip {spelling!r}: {value!r} is not a whole number of a layer", hint=_SPELLING)
    return int(value)


def _require(condition: bool, spelling: str, rule: str) -> None:
    if not condition:
        raise InputError(f"clip_skip {spelling!r} names no layer: {rule}", hint=_SPELLING)
