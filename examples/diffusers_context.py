"""A pipeline of diffusers without its text encoders: a bundle of clip-export makes the Context.

    clip-export build path/to/pipeline --context -o engines/sd
    python examples/diffusers_context.py engines/sd path/to/pipeline "a (red:1.2) fox" --dialect comfyui -o fox.png

The pipeline is any of Stable Diffusion 1, 2 or XL in diffusers' layout; it is loaded without text encoders and
tokenizers, so that they take no memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

import clip_export
from clip_export import Context

_ENCODERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def open_pipeline(directory: Path, **options: Any) -> DiffusionPipeline:
    """The pipeline without what encodes prompts."""
    index = DiffusionPipeline.load_config(directory)
    without = dict.fromkeys(name for name in _ENCODERS if name in index)
    return DiffusionPipeline.from_pretrained(directory, **without, **options)


def embeds(context: Context, pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """The Context as the keyword arguments of a pipeline."""
    arrays = {"prompt_embeds": context.hidden_states, "negative_prompt_embeds": context.negative_hidden_states}
    if isinstance(pipeline, StableDiffusionXLPipeline):
        arrays["pooled_prompt_embeds"] = context.pooled
        arrays["negative_pooled_prompt_embeds"] = context.negative_pooled
    unet = pipeline.unet
    return {
        name: torch.from_numpy(array).to(unet.device, unet.dtype) for name, array in arrays.items() if array is not None
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--negative", help="left out, it is what the pipeline makes of none: zeros in SDXL")
    parser.add_argument("--clip-skip")
    parser.add_argument("--dialect", default="diffusers")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", "-o", type=Path, default=Path("picture.png"))
    asked = parser.parse_args()
    with clip_export.load(asked.bundle) as clip:
        context = clip.context(
            [asked.prompt], negative=[asked.negative], clip_skip=asked.clip_skip, dialect=asked.dialect
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = open_pipeline(asked.pipeline).to(device)
    pipeline(**embeds(context, pipeline), num_inference_steps=asked.steps).images[0].save(asked.output)
    print(asked.output)


if __name__ == "__main__":
    main()
