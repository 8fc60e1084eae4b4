"""The examples for diffusers and ComfyUI, run: a whole pipeline on a Context of ours, and the nodes."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import diffusion_made
import numpy as np
import oracles
import pytest
import torch

import clip_export
from clip_export.encoder import Encoder

EXAMPLES = Path(__file__).parents[1] / "examples"


def imported(path: Path) -> types.ModuleType:
    oracles.diffusers()
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def clip() -> Encoder:
    return diffusion_made.originals("sd1")[1]


def whole_pipeline(folder: Path) -> Any:
    """A pipeline with a UNet and a VAE of the smallest sizes, whose text encoder is that of the tests."""
    diffusers = oracles.diffusers()
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=8,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    small = diffusion_made.originals("sd1")[0]
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=small.text_encoder,
        tokenizer=small.tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return pipe


def test_a_pipeline_draws_the_same_from_our_context_as_from_its_own_encoder(clip: Encoder, tmp_path: Path) -> None:
    example = imported(EXAMPLES / "diffusers_context.py")
    pipe = whole_pipeline(tmp_path / "pipeline")
    without = example.open_pipeline(tmp_path / "pipeline")
    assert without.text_encoder is None and without.tokenizer is None
    context = clip.context(["a red fox"], negative=["blurry"])
    options = {"num_inference_steps": 3, "output_type": "latent"}

    def drawn(pipeline: Any, **arguments: Any) -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        found: np.ndarray = pipeline(**arguments, **options, generator=generator).images.numpy()
        return found

    expected = drawn(pipe, prompt="a red fox", negative_prompt="blurry")
    found = drawn(without, **example.embeds(context, without))
    assert np.abs(found - expected).max() < 1e-3
    other = drawn(without, **example.embeds(clip.context(["a dog"], negative=["blurry"]), without))
    assert np.abs(other - expected).max() > 1e-3


def test_the_example_draws_what_the_pipeline_draws_where_no_negative_prompt_is_given(
    clip: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, and not an empty one: in SDXL the two are different."""
    example = imported(EXAMPLES / "diffusers_context.py")
    whole_pipeline(tmp_path / "pipeline")
    asked: list[Any] = []
    encode = clip.context

    def context(prompts: list[str], **arguments: Any) -> clip_export.Context:
        asked.append(arguments["negative"])
        return encode(prompts, **arguments)

    monkeypatch.setattr(clip, "context", context)
    monkeypatch.setattr(clip_export, "load", lambda bundle: clip)
    picture = tmp_path / "fox.png"
    arguments = ["bundle", str(tmp_path / "pipeline"), "a fox", "--steps", "1", "-o", str(picture)]
    monkeypatch.setattr(sys, "argv", ["diffusers_context.py", *arguments])
    example.main()
    assert asked == [[None]] and picture.is_file()


def test_comfyuis_nodes_give_conditioning(clip: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = imported(EXAMPLES / "comfyui_clip_export" / "__init__.py")
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    inputs = nodes.TextEncode.INPUT_TYPES()["required"]
    assert sorted(inputs["dialect"][0]) == clip_export.context.dialect_names()
    node = nodes.TextEncode()
    (((states, extra),),) = node.encode(clip, "a (red:1.3) fox", "comfyui", -2)
    expected = clip.context(["a (red:1.3) fox"], clip_skip="penultimate", dialect="comfyui")
    assert np.array_equal(states.numpy(), expected.hidden_states)
    assert np.array_equal(extra["pooled_output"].numpy(), expected.pooled)
    # Embeddings come from ComfyUI's own folder; those that are not named are not even read.
    torch.save({"x": torch.ones(128)}, tmp_path / "toy.pt")
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    torch.save({"x": torch.zeros(128)}, tmp_path / "sub" / "deep" / "other.pt")
    torch.save({"x": torch.zeros(128)}, tmp_path / "sub" / "toy.pt")
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    module = types.ModuleType("folder_paths")
    module.get_folder_paths = lambda kind: [str(tmp_path)] if kind == "embeddings" else []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", module)
    (((states, _),),) = node.encode(clip, "a embedding:toy fox", "comfyui", 0)
    expected = clip.context(["a embedding:toy fox"], dialect="comfyui", embeddings=[tmp_path / "toy.pt"])
    assert np.array_equal(states.numpy(), expected.hidden_states)
    zeros = clip.context(
        ["a embedding:x fox"], dialect="comfyui", embeddings={"x": tmp_path / "sub" / "toy.pt"}
    ).hidden_states
    assert not np.array_equal(zeros, expected.hidden_states)
    for name in ("sub/toy", "sub/toy.pt", "other", "deep/other", "sub/deep/other.pt"):
        (((states, _),),) = node.encode(clip, f"a embedding:{name} fox", "comfyui", 0)
        assert np.array_equal(states.numpy(), zeros), name
    (((states, _),),) = node.encode(clip, "a toy fox", "a1111", 0)
    expected = clip.context(["a toy fox"], dialect="a1111", embeddings=[tmp_path / "toy.pt"])
    assert np.array_equal(states.numpy(), expected.hidden_states)
