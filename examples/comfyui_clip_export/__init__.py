"""Nodes for ComfyUI: CLIP Text Encode by a bundle of clip-export, on whatever it was built for.

Copy this folder into ComfyUI's custom_nodes, `pip install clip-export` with a backend into ComfyUI's environment, and
build a bundle: clip-export build sd15.safetensors --context. In a graph, "Load clip-export bundle" takes its path, and
"CLIP Text Encode (clip-export)" stands where CLIP Text Encode does. Prompts of other dialects are read as their tools
read them; embeddings are found in ComfyUI's own folder of them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

import clip_export
from clip_export.encoder import Encoder

_DIALECTS = ("comfyui", "a1111", "compel", "diffusers")
_SUFFIXES = (".safetensors", ".pt", ".bin")


@functools.lru_cache(maxsize=2)
def _load(path: str, backend: str) -> Encoder:
    """An encoder stays open: a graph is run again and again."""
    return clip_export.load(path, backend=backend or None)


def _embeddings() -> dict[str, Path]:
    """The files of textual inversion in ComfyUI's folders, by each name that it finds them under; none without it.

    Of folder/sub/toy.pt these are sub/toy.pt, sub/toy, toy.pt and toy: it looks in folders in folders too.
    """
    try:
        from folder_paths import get_folder_paths
    except ImportError:
        return {}
    folders = [Path(folder) for folder in get_folder_paths("embeddings")]
    named: dict[str, Path] = {}
    for folder in folders:
        files = [file for file in folder.rglob("*") if file.suffix in _SUFFIXES] if folder.is_dir() else []
        for file in sorted(files, key=lambda file: (len(file.parts), _SUFFIXES.index(file.suffix), file)):
            parts = file.relative_to(folder).parts
            for start in range(len(parts)):
                name = "/".join(parts[start:])
                named.setdefault(name, file)
                named.setdefault(name.removesuffix(file.suffix), file)
    return named


class LoadBundle:
    """Opens a bundle that was built with --context."""

    RETURN_TYPES = ("CLIP_EXPORT",)
    FUNCTION = "load"
    CATEGORY = "clip-export"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (ComfyUI's name)
        return {
            "required": {"bundle": ("STRING", {"default": "engines/sd15"})},
            "optional": {"backend": (["", "tensorrt", "tensorrt-rtx", "onnxruntime"],)},
        }

    def load(self, bundle: str, backend: str = "") -> tuple[Encoder]:
        return (_load(bundle, backend),)


class TextEncode:
    """Encodes a prompt: CONDITIONING, as CLIP Text Encode gives it."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "clip-export"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (ComfyUI's name)
        return {
            "required": {
                "encoder": ("CLIP_EXPORT",),
                "text": ("STRING", {"multiline": True, "dynamicPrompts": True}),
                "dialect": (list(_DIALECTS),),
                "stop_at_clip_layer": ("INT", {"default": 0, "min": -24, "max": 0, "step": 1}),
            }
        }

    def encode(self, encoder: Encoder, text: str, dialect: str, stop_at_clip_layer: int) -> tuple[list[Any]]:
        """`stop_at_clip_layer` counts as CLIP Set Last Layer does; 0 is the model's own."""
        context = encoder.context(
            [text],
            clip_skip=f"comfyui:{stop_at_clip_layer}" if stop_at_clip_layer else None,
            dialect=dialect,
            embeddings=_named_in(text, dialect),
        )
        pooled = None if context.pooled is None else torch.from_numpy(context.pooled)
        return ([[torch.from_numpy(context.hidden_states), {"pooled_output": pooled}]],)


def _named_in(text: str, dialect: str) -> dict[str, Path]:
    """Only those whose names occur: the others may be of other models. Paths are names to ComfyUI alone."""
    if dialect == "comfyui":
        return {name: file for name, file in _embeddings().items() if f"embedding:{name}" in text}
    lowered = text.lower()
    return {name: file for name, file in _embeddings().items() if name == file.stem and name.lower() in lowered}


NODE_CLASS_MAPPINGS = {"ClipExportLoadBundle": LoadBundle, "ClipExportTextEncode": TextEncode}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ClipExportLoadBundle": "Load clip-export bundle",
    "ClipExportTextEncode": "CLIP Text Encode (clip-export)",
}
