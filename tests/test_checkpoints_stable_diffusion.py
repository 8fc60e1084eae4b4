"""Single files and pipelines of Stable Diffusion: the same text encoders as in the folder that they came from."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import diffusion_made
import numpy as np
import oracles
import pytest
import torch
from checkpoints_made import make_huggingface, make_open_clip, make_openai
from safetensors.torch import save_file

import clip_export
from clip_export.checkpoints import Options, read
from clip_export.errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    UnknownCheckpointError,
    UnsafeCheckpointError,
    UnsupportedModelError,
    WeightsError,
)
from clip_export.spec import ContextSpec

CONTEXT = Options(context=True)
PROMPT = "a photo of a (red:1.3) fox"


def encoders_of(family: str) -> list[Any]:
    pipe = diffusion_made.originals(family)[0]
    return [pipe.text_encoder, pipe.text_encoder_2] if family == "sdxl" else [pipe.text_encoder]


@pytest.mark.parametrize(("family", "suffix"), [("sd1", "safetensors"), ("sd2", "ckpt"), ("sdxl", "safetensors")])
def test_a_single_file_gives_the_context_of_its_folder(tmp_path: Path, family: str, suffix: str) -> None:
    path = diffusion_made.write_single_file(tmp_path / f"model.{suffix}", family, encoders_of(family))
    folder = diffusion_made.originals(family)[1]
    single = clip_export.reference(path, CONTEXT)
    for dialect in ("diffusers", "comfyui"):
        for clip_skip in (None, "diffusers:1"):
            arguments = {"negative": ["blurry"], "clip_skip": clip_skip, "dialect": dialect}
            expected = folder.context([PROMPT], **arguments)  # type: ignore[arg-type]
            found = single.context([PROMPT], **arguments)  # type: ignore[arg-type]
            assert np.array_equal(found.hidden_states, expected.hidden_states)
            assert np.array_equal(found.negative_hidden_states, expected.negative_hidden_states)
            if family == "sdxl":
                assert np.array_equal(found.pooled, expected.pooled)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_own_converters_read_these_files(family: str) -> None:
    """So the files have the layout that they claim, and not one of our own."""
    oracles.diffusers()
    from diffusers.loaders import single_file_utils as converters

    encoders = encoders_of(family)
    state = diffusion_made.single_file(family, encoders)
    pairs = []
    if family != "sd2":
        pairs.append((encoders[0], converters.convert_ldm_clip_checkpoint(dict(state))))
    if family != "sd1":
        prefix = "cond_stage_model.model." if family == "sd2" else "conditioner.embedders.1.model."
        # Which weights it leaves out, and how wide it takes the projection to be, are those of the originals' sizes.
        state.setdefault(f"{prefix}text_projection", torch.eye(encoders[-1].config.hidden_size))
        pairs.append((encoders[-1], converters.convert_open_clip_checkpoint(encoders[-1], state, prefix=prefix)))
    for model, converted in pairs:
        own = {key.removeprefix("text_model."): value for key, value in model.state_dict().items()}
        found = {key.removeprefix("text_model."): value for key, value in converted.items()}
        for key, value in own.items():
            if "position_ids" not in key:
                assert torch.equal(found[key], value), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    encoders = encoders_of("sdxl")
    path = diffusion_made.write_single_file(tmp_path / "model.safetensors", "sdxl", encoders, dtype)
    found = read(path, CONTEXT)
    assert found.second is not None
    for checkpoint, model in ((found, encoders[0]), (found.second, encoders[1])):
        expected = model.get_input_embeddings().weight.to(dtype)
        assert torch.equal(checkpoint.weights["text.token_embedding.weight"], expected)


def test_the_two_clips_of_stable_diffusion_3_are_read(tmp_path: Path) -> None:
    encoders = [diffusion_made.encoder(name, seed, projected=True) for seed, name in enumerate(("clip_l", "clip_g"))]
    path = diffusion_made.write_single_file(tmp_path / "sd3.safetensors", "sd3", encoders)
    clip = clip_export.reference(path, CONTEXT)
    found = clip.context(["a fox"])
    ids = [torch.from_numpy(one.tokenize(["a fox"])).long() for one in (clip, clip.second)]  # type: ignore[union-attr]
    with torch.no_grad():
        outputs = [model(tokens, output_hidden_states=True) for model, tokens in zip(encoders, ids, strict=True)]
    states = torch.cat([one.hidden_states[-2] for one in outputs], dim=2).numpy()
    pooled = torch.cat([one.text_embeds for one in outputs], dim=1).numpy()
    assert np.abs(found.hidden_states - states).max() < 1e-4
    assert found.pooled is not None and np.abs(found.pooled - pooled).max() < 1e-4
    assert (ids[0][0, -1], ids[1][0, -1]) == (49407, 0)


def test_a_refiner_has_the_second_encoder_alone(tmp_path: Path) -> None:
    model = encoders_of("sdxl")[1]
    path = tmp_path / "refiner.safetensors"
    save_file(
        {
            key: value.contiguous()
            for key, value in diffusion_made.openai_names("conditioner.embedders.0.model.", model).items()
        },
        path,
    )
    clip = clip_export.reference(path, CONTEXT)
    both = diffusion_made.originals("sdxl")[1].context(["a fox"])
    found = clip.context(["a fox"])
    assert np.array_equal(found.hidden_states, both.hidden_states[:, :, 128:])
    assert np.array_equal(found.pooled, both.pooled)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sd1", [ContextSpec(family="sd1")]),
        ("sd2", [ContextSpec(family="sd2", missing_blocks=1)]),
        (
            "sdxl",
            [
                ContextSpec(family="sdxl", second=True, zero_negative=True),
                ContextSpec(family="sdxl", zero_negative=True),
            ],
        ),
    ],
)
def test_a_pipelines_folder_says_what_family_it_is(family: str, expected: list[ContextSpec]) -> None:
    found = read(diffusion_made.folder_of(family), CONTEXT)
    parts = [found] if found.second is None else [found, found.second]
    assert [part.spec.context for part in parts] == expected
    assert {"model_index.json", "text_encoder/config.json"} <= found.source.sha256.keys()


def test_a_folder_with_half_weights_alone_is_read(tmp_path: Path) -> None:
    folder = shutil.copytree(diffusion_made.folder_of("sd1"), tmp_path / "pipeline")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("model.fp16.safetensors"))
    assert read(folder, CONTEXT).spec == read(diffusion_made.folder_of("sd1"), CONTEXT).spec


def test_shards_of_a_variant_are_read(tmp_path: Path) -> None:
    folder = shutil.copytree(diffusion_made.folder_of("sd1"), tmp_path / "pipeline")
    (folder / "text_encoder" / "model.safetensors").unlink()
    model = diffusion_made.originals("sd1")[0].text_encoder
    model.save_pretrained(folder / "text_encoder", variant="fp16", max_shard_size="5MB")
    index = folder / "text_encoder" / "model.safetensors.index.fp16.json"
    assert index.is_file()
    found = clip_export.reference(folder, CONTEXT).context([PROMPT])
    assert np.array_equal(found.hidden_states, diffusion_made.originals("sd1")[1].context([PROMPT]).hidden_states)
    assert read(index, CONTEXT).spec.context == ContextSpec(family="clip")


def test_a_variant_that_is_not_known_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(diffusion_made.folder_of("sd1"), tmp_path / "pipeline")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("model.non_ema.safetensors"))
    with pytest.raises(CheckpointError, match=r"expected weights called .*, found model.non_ema.safetensors") as caught:
        read(folder, CONTEXT)
    assert "call the one that you mean model.safetensors" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model-00001-of-00002.safetensors", "model.safetensors.index.json is not there"),
        ("model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json is not there"),
        ("adapter_model.safetensors", "has config.json but no weights"),
    ],
)
def test_a_shard_without_its_index_and_what_is_no_model_are_not_to_be_renamed(
    tmp_path: Path, name: str, message: str
) -> None:
    folder = shutil.copytree(diffusion_made.folder_of("sd1"), tmp_path / "pipeline")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name(name))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read(folder, CONTEXT)


def test_a_text_encoder_without_text_model_in_its_names_is_read(tmp_path: Path) -> None:
    """As some files of Stable Diffusion 1 have them."""
    state = diffusion_made.single_file("sd1", encoders_of("sd1"))
    path = tmp_path / "old.safetensors"
    save_file({key.replace("transformer.text_model.", "transformer."): value for key, value in state.items()}, path)
    found = clip_export.reference(path, CONTEXT).context([PROMPT])
    expected = diffusion_made.originals("sd1")[1].context([PROMPT])
    assert np.array_equal(found.hidden_states, expected.hidden_states)


def test_a_plain_clip_gives_the_context_of_stable_diffusion_1(tmp_path: Path) -> None:
    make_huggingface(tmp_path / "clip", preprocessor={})
    make_openai(tmp_path / "clip.pt")
    for path in (tmp_path / "clip", tmp_path / "clip.pt"):
        found = read(path, dataclasses.replace(CONTEXT, activation="quick_gelu"))
        assert found.spec.context == ContextSpec(family="clip")
    assert read("demo", CONTEXT).spec.context == ContextSpec(family="clip")


def test_a_plain_clip_is_tokenized_and_padded_as_stable_diffusion_1_is(tmp_path: Path) -> None:
    """Context has all positions: OpenAI's own padding, zeros, would make another one of most of them."""
    make_openai(tmp_path / "CLIP.pt")
    make_open_clip(tmp_path / "open_clip")
    for path, own in ((tmp_path / "CLIP.pt", "openai"), (tmp_path / "open_clip", "open_clip")):
        plain, found = read(path), read(path, CONTEXT)
        assert plain.spec.tokenizer is not None and (plain.spec.tokenizer.dialect, plain.spec.tokenizer.pad_id) == (
            own,
            0,
        )
        assert found.spec.tokenizer is not None and found.spec.towers == ("text",)
        assert (found.spec.tokenizer.dialect, found.spec.tokenizer.pad_id) == (
            "huggingface",
            found.spec.tokenizer.end_id,
        )
        stated = read(path, dataclasses.replace(CONTEXT, tokenizer_dialect="openai")).spec.tokenizer
        assert stated is not None and (stated.dialect, stated.pad_id) == ("openai", stated.end_id)


def test_a_plain_clip_with_gelu_need_not_say_how_pictures_are_normalized(tmp_path: Path) -> None:
    model = make_openai(tmp_path / "clip.pt")
    state = {key: value for key, value in model.state_dict().items() if "." in key or key == "logit_scale"}
    state |= {key: model.state_dict()[key] for key in ("positional_embedding", "text_projection")}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "CLIP.SAFETENSORS")
    gelu = dataclasses.replace(CONTEXT, activation="gelu")
    assert read(tmp_path / "CLIP.SAFETENSORS", gelu).spec.towers == ("text",)
    with pytest.raises(AmbiguousCheckpointError, match="picture statistics"):
        read(tmp_path / "CLIP.SAFETENSORS", Options(activation="gelu"))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_pipeline_without_tokenizers_is_padded_as_its_family_is(tmp_path: Path, family: str) -> None:
    folder = shutil.copytree(diffusion_made.folder_of(family), tmp_path / "pipeline")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / name, ignore_errors=True)
    with pytest.raises(AmbiguousCheckpointError, match="no tokenizer files") as caught:
        read(folder, CONTEXT)
    assert "padded as the model's family is" in str(caught.value.hint)
    expected = diffusion_made.originals(family)[1].context([PROMPT]).hidden_states
    for dialect in ("huggingface", "open_clip"):
        stated = dataclasses.replace(CONTEXT, tokenizer_dialect=dialect)
        assert np.array_equal(clip_export.reference(folder, stated).context([PROMPT]).hidden_states, expected)


# What trainers leave in their files


class ModelCheckpoint:
    """Stands for a class of pytorch_lightning, which Stable Diffusion 1's own file has as the key of a dict."""


def test_a_trainers_callbacks_in_a_ckpt_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = diffusion_made.single_file("sd1", encoders_of("sd1"))
    path = tmp_path / "sd-v1-4.ckpt"
    home = "pytorch_lightning.callbacks.model_checkpoint"
    monkeypatch.setattr(ModelCheckpoint, "__module__", home)
    for name in (home, home.rpartition(".")[0], home.partition(".")[0]):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[home].ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    torch.save({"callbacks": {ModelCheckpoint: {"best": 1.0}}, "state_dict": state}, path)
    monkeypatch.undo()
    assert read(path, CONTEXT).spec.context == ContextSpec(family="sd1")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must not run",)


def test_a_ckpt_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"cond_stage_model.transformer.x": torch.ones(2)}, "more": Harmful()}, path)
    with pytest.raises(UnsafeCheckpointError, match=r"found the global .*print"):
        read(path, CONTEXT)
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UnsafeCheckpointError, match=r"found the global .*print"):
        read(path, CONTEXT)
    assert "must not run" not in capsys.readouterr().out


# What has no text encoder


@pytest.mark.parametrize(
    ("keys", "holds"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight"], "a UNet"),
        (["down_blocks.0.attentions.0.norm.weight", "conv_in.weight"], "a UNet"),
        (["first_stage_model.decoder.conv_in.weight"], "a VAE"),
        (["encoder.down.0.block.0.norm1.weight", "decoder.mid.block_1.norm1.weight"], "a VAE"),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "a LoRA"),
        (["unet.down_blocks.0.attn.to_q.lora_A.weight"], "a LoRA"),
        (["emb_params"], "an embedding of textual inversion"),
        (["<toy>"], "an embedding of textual inversion"),
        (["control_model.input_hint_block.0.weight"], "a ControlNet"),
        (["model.diffusion_model.x.weight", "first_stage_model.encoder.x"], "a UNet and a VAE"),
        (["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight"], "a LoRA"),
        (["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"], "a LoRA"),
        (["conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.alpha"], "a LoRA"),
        (["embedder.model.visual.conv1.weight", "model.diffusion_model.x"], "a UNet"),
        (["something.else"], "nothing that is known here"),
    ],
)
def test_a_file_without_a_text_encoder_says_what_it_holds(tmp_path: Path, keys: list[str], holds: str) -> None:
    path = tmp_path / "file.safetensors"
    save_file({key: torch.ones(2, 2) for key in keys}, path)
    with pytest.raises(
        UnknownCheckpointError, match=f"file.safetensors has no text encoder; it holds {holds} "
    ) as caught:
        read(path, CONTEXT)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("text_model.embeddings.token_embedding.weight", "put config.json"),
        ("model.token_embedding.weight", "name the whole checkpoint"),
    ],
)
def test_a_text_encoder_by_itself_is_not_said_to_be_none(tmp_path: Path, key: str, remedy: str) -> None:
    path = tmp_path / "clip_l.safetensors"
    save_file({key: torch.ones(2, 2)}, path)
    with pytest.raises(UnknownCheckpointError, match=r"clip_l.safetensors holds a text encoder \(weight") as caught:
        read(path, CONTEXT)
    assert remedy in str(caught.value.hint)


def test_an_embedding_of_textual_inversion_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}}, tmp_path / "toy.pt")
    for options in (CONTEXT, Options()):
        with pytest.raises(UnknownCheckpointError, match=r"toy.pt is an embedding of textual inversion") as caught:
            read(tmp_path / "toy.pt", options)
        assert "--embedding" in str(caught.value.hint)


def test_a_model_with_one_of_stable_diffusion_3s_clips_is_not_said_to_be_damaged(tmp_path: Path) -> None:
    state = diffusion_made.single_file("sd1", encoders_of("sd1"))
    renamed = {key.replace("cond_stage_model.", "text_encoders.clip_l."): value for key, value in state.items()}
    save_file(renamed, tmp_path / "flux.safetensors")
    with pytest.raises(WeightsError, match=r"no weights under text_encoders.clip_g") as caught:
        read(tmp_path / "flux.safetensors", CONTEXT)
    assert "such as Flux" in str(caught.value.hint)


def test_a_text_encoder_in_8_bits_is_refused_by_that_name(tmp_path: Path) -> None:
    state = diffusion_made.single_file("sd1", encoders_of("sd1"))
    eighth = {
        key: value.to(torch.float8_e4m3fn) if value.is_floating_point() else value for key, value in state.items()
    }
    save_file(eighth, tmp_path / "model.safetensors")
    torch.save(eighth, tmp_path / "model.ckpt")
    for name in ("model.safetensors", "model.ckpt"):
        with pytest.raises(WeightsError, match="52 in 8 bits: cond_stage_model") as caught:
            read(tmp_path / name, CONTEXT)
        assert caught.value.hint == "take the checkpoint in fp16, bf16 or fp32"
    unet = {key: eighth[key] if "diffusion_model" in key else value for key, value in state.items()}
    save_file(unet, tmp_path / "unet.safetensors")
    assert read(tmp_path / "unet.safetensors", CONTEXT).spec.context == ContextSpec(family="sd1")


@pytest.mark.parametrize(("name", "other"), [("model.ckpt", ".safetensors"), ("model.safetensors", ".ckpt")])
@pytest.mark.filterwarnings("error")
def test_a_file_of_the_other_container_says_how_to_call_it(tmp_path: Path, name: str, other: str) -> None:
    path = diffusion_made.write_single_file(tmp_path / f"right{other}", "sd1", encoders_of("sd1")).rename(
        tmp_path / name
    )
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        read(path, CONTEXT)
    assert str(caught.value.hint).endswith(f"call it {other}")


def test_what_is_no_pickle_is_refused_without_advice_to_take_a_risk(tmp_path: Path) -> None:
    (tmp_path / "page.ckpt").write_bytes(b"<html>" * 100)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Unsupported operand 60\)"):
        read(tmp_path / "page.ckpt", CONTEXT)


def test_a_file_without_weights_says_so(tmp_path: Path) -> None:
    save_file({}, tmp_path / "file.safetensors")
    with pytest.raises(UnknownCheckpointError, match="has no text encoder; it holds no weights at all"):
        read(tmp_path / "file.safetensors", CONTEXT)


def test_an_image_encoder_of_unclip_beside_it_does_not_hide_the_text_encoder(tmp_path: Path) -> None:
    state = diffusion_made.single_file("sd2", encoders_of("sd2"))
    state |= {
        "embedder.model.visual.conv1.weight": torch.ones(4, 3, 14, 14),
        "embedder.model.logit_scale": torch.ones(1),
    }
    save_file(state, tmp_path / "unclip.SAFETENSORS")  # the suffix in either case
    found = read(tmp_path / "unclip.SAFETENSORS", CONTEXT)
    assert found.spec.context == ContextSpec(family="sd2")


@pytest.mark.parametrize("number", ["99999999999", "9999999", "9" * 5000, "90"])
@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_a_block_with_a_number_out_of_reach_is_refused_at_once(tmp_path: Path, layout: str, number: str) -> None:
    state = diffusion_made.single_file(layout, encoders_of(layout))
    prefix = {
        "sd1": "cond_stage_model.transformer.text_model.encoder.layers.",
        "sd2": "cond_stage_model.model.transformer.resblocks.",
    }[layout]
    save_file({**state, f"{prefix}{number}.x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"1 unexpected: block {number[:20]} under cond_stage_model"):
        read(tmp_path / "model.safetensors", CONTEXT)


def test_a_matrix_without_columns_is_misshapen(tmp_path: Path) -> None:
    state = diffusion_made.single_file("sd1", encoders_of("sd1"))
    key = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
    save_file({**state, key: torch.ones(77, 0)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"is \[77, 0\], expected 2 axes of at least 1"):
        read(tmp_path / "model.safetensors", CONTEXT)


def test_a_half_of_sdxls_encoders_is_not_enough(tmp_path: Path) -> None:
    state = diffusion_made.single_file("sdxl", encoders_of("sdxl"))
    path = tmp_path / "model.safetensors"
    save_file({key: value for key, value in state.items() if ".0.transformer." not in key}, path)
    with pytest.raises(WeightsError, match=r"laid out as sdxl, and has no weights under conditioner.embedders.0"):
        read(path, CONTEXT)


@pytest.mark.parametrize("key", ["final_layer_norm.bias", "encoder.layers.1.mlp.fc2.weight"])
def test_a_weight_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    state = diffusion_made.single_file("sd1", encoders_of("sd1"))
    del state[f"cond_stage_model.transformer.text_model.{key}"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=f"1 missing: cond_stage_model.*{key}"):
        read(tmp_path / "model.safetensors", CONTEXT)


def test_without_context_a_pipeline_and_a_single_file_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="whole diffusion pipeline") as caught:
        read(diffusion_made.folder_of("sd1"))
    assert "--context" in str(caught.value.hint)
    path = diffusion_made.write_single_file(tmp_path / "model.safetensors", "sd1", encoders_of("sd1"))
    with pytest.raises(UnknownCheckpointError, match="single file") as caught:
        read(path)
    assert "--context" in str(caught.value.hint)


def test_other_pipelines_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UnsupportedModelError, match="found a FluxPipeline"):
        read(tmp_path, CONTEXT)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected _class_name, the name of a pipeline, found None"):
        read(tmp_path, CONTEXT)


def test_an_image_tower_alone_gives_no_context(tmp_path: Path) -> None:
    make_huggingface(tmp_path / "image", kind="CLIPVisionModelWithProjection", preprocessor={})
    with pytest.raises(CheckpointError, match="no text tower, only image"):
        read(tmp_path / "image", CONTEXT)
