"""The originals' own preprocessing up to normalization, on PIL: OpenAI's clip, open_clip, torchvision, transformers."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import oracles
from PIL import Image

from clip_export.spec import Dialect, PreprocessSpec

Pixels = npt.NDArray[np.uint8]
DIALECTS: tuple[Dialect, ...] = ("openai", "open_clip", "huggingface")
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
# What the originals raise where they cannot take an image; ours is an ImageError then.
ORIGINAL_ERRORS = (ValueError, OSError, TypeError, IndexError, MemoryError)


def make_spec(dialect: Dialect = "openai", size: int = 224, **changes: object) -> PreprocessSpec:
    spec = PreprocessSpec(
        dialect=dialect,
        resize_mode="shortest",
        resize_size=size,
        crop_size=size,
        interpolation="bicubic",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


@functools.cache
def original(spec: PreprocessSpec) -> Callable[[Image.Image], Pixels]:
    """The original's own pipeline up to normalization, as a function of a PIL image."""
    if spec.dialect == "huggingface":
        return _transformers_pil(spec)
    as_published = spec.resize_size == spec.crop_size
    if spec.dialect == "openai" and as_published and spec.interpolation == "bicubic" and spec.resize_mode == "shortest":
        steps = oracles.openai_clip().clip._transform(spec.crop_size).transforms[:-1]
    elif spec.dialect == "open_clip" and as_published and spec.interpolation in ("bicubic", "bilinear"):
        steps = (
            oracles.open_clip()
            .image_transform(
                spec.crop_size,
                is_train=False,
                resize_mode=spec.resize_mode,
                interpolation=spec.interpolation,
                fill_color=spec.fill,
            )
            .transforms[:-1]
        )
    else:  # sizes and filters that neither offers, from the parts that both are made of
        transforms = oracles.torchvision().transforms
        resize = spec.resize_size if spec.resize_mode == "shortest" else (spec.resize_size, spec.resize_size)
        mode = transforms.InterpolationMode(spec.interpolation)
        rgb = oracles.openai_clip().clip._convert_image_to_rgb
        steps = [transforms.Resize(resize, mode), transforms.CenterCrop(spec.crop_size), rgb, transforms.ToTensor()]

    def pixels(image: Image.Image) -> Pixels:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
            for step in steps:
                image = step(image)
        return (image * 255).round().byte().numpy()  # type: ignore[operator]

    return pixels


def _transformers_pil(spec: PreprocessSpec) -> Callable[[Image.Image], Pixels]:
    oracles.transformers()
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = spec.resize_size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side} if spec.resize_mode == "shortest" else {"height": side, "width": side},
        crop_size={"height": spec.crop_size, "width": spec.crop_size},
        resample=FILTERS[spec.interpolation],
        do_rescale=False,
        do_normalize=False,
    )
    return lambda image: processor(images=image, return_tensors="np")["pixel_values"][0]
