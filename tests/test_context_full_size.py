"""Stable Diffusion's text encoders at their real sizes, with random weights: bundles against diffusers' pipelines."""

from __future__ import annotations

import gc
from pathlib import Path

import diffusion_made
import numpy as np
import pytest
import torch

import clip_export
from clip_export.cosine import cosines
from clip_export.simulation import simulated

PROMPTS = ["a photo of a red fox in the snow, golden hour, 35mm", "", "word " * 60]
NEGATIVES = ["blurry, low quality", "", "text, watermark"]
SKIPS = {"sd1": range(12), "sd2": range(23), "sdxl": range(11)}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_bundle_gives_what_the_pipeline_gives_at_every_clip_skip(tmp_path: Path, family: str) -> None:
    pipe = diffusion_made.pipeline(tmp_path, family, full=True)
    bundle = clip_export.build(diffusion_made.write_folder(pipe, tmp_path / family), tmp_path / "bundle", context=True)
    gc.collect()
    with clip_export.load(bundle, check_files=False) as clip:
        for skip in (None, *SKIPS[family]):
            with torch.no_grad():
                expected = pipe.encode_prompt(
                    PROMPTS,
                    device="cpu",
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=True,
                    negative_prompt=NEGATIVES,
                    clip_skip=skip,
                )
            spelling = None if skip is None else f"diffusers:{skip}"
            found = clip.context(PROMPTS, negative=NEGATIVES, clip_skip=spelling)
            arrays = (found.hidden_states, found.negative_hidden_states, found.pooled, found.negative_pooled)
            for array, tensor in zip(arrays, expected, strict=False):
                assert array is not None
                difference = float(np.abs(array - tensor.numpy()).max())
                print(family, skip, array.shape, difference)
                assert difference <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_half_graphs_keep_999_in_1000_of_every_token(tmp_path: Path, family: str) -> None:
    pipe = diffusion_made.pipeline(tmp_path, family, full=True)
    bundle = clip_export.build(diffusion_made.write_folder(pipe, tmp_path / family), tmp_path / "bundle", context=True)
    del pipe
    gc.collect()
    bundle = clip_export.extend(bundle, precision="fp16")
    with clip_export.load(bundle, check_files=False) as clip, simulated(bundle, "fp16") as half:
        for skip in ("last", "penultimate", "last-5")[family != "sd1" :]:
            expected = clip.context(PROMPTS, clip_skip=skip).hidden_states
            cosine = cosines(half.context(PROMPTS, clip_skip=skip).hidden_states, expected)
            print(family, skip, cosine.min())
            assert cosine.min() >= 0.999
