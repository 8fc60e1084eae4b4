"""Hugging Face checkpoints: every class and container, against what transformers holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints_made as made
import oracles
import pytest
import torch

from clip_export import checkpoints
from clip_export.checkpoints import Options, _huggingface_config
from clip_export.errors import CheckpointError, UnsupportedModelError, WeightsError
from clip_export.spec import weight_shapes

KINDS = [
    "CLIPModel",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
]


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
    path.write_text(json.dumps(values))


def edit_tower(directory: Path, key: str, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config[key] |= changes
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_spec_of_every_class(kind: str, tmp_path: Path) -> None:
    model = made.make_huggingface(tmp_path, kind=kind, seed=3, layers=3)
    checkpoint = checkpoints.read(tmp_path)

    made.assert_same_weights(checkpoint, made.canonical_huggingface(model))
    spec = checkpoint.spec
    assert {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()} == weight_shapes(spec)
    assert spec.towers == {"CLIPModel": ("text", "image")}.get(kind, ("text",) if "Text" in kind else ("image",))
    for tower in (spec.text, spec.image):
        if tower is not None:
            transformer = tower.transformer
            assert (transformer.width, transformer.layers, transformer.heads) == (128, 3, 2)
            assert (transformer.mlp_width, transformer.activation) == (256, "quick_gelu")
            assert tower.embedding_dim == (None if kind in ("CLIPTextModel", "CLIPVisionModel") else 64)
    if kind == "CLIPModel":
        assert spec.logit_scale == pytest.approx(model.logit_scale.item())
    else:
        assert spec.logit_scale is None
    assert (checkpoint.tokenizer_json is None) == (spec.text is None)


@pytest.mark.parametrize("weights", ["safetensors", "sharded", "bin", "sharded_bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_containers_and_dtypes(weights: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made.make_huggingface(tmp_path, weights=weights, dtype=dtype, layers=1)
    checkpoint = checkpoints.read(tmp_path)
    made.assert_same_weights(checkpoint, made.canonical_huggingface(model))
    assert {tensor.dtype for tensor in checkpoint.weights.values()} == {dtype}


def test_single_towers_in_the_layout_of_transformers_4(tmp_path: Path) -> None:
    """transformers 5 leaves the tower's prefix out where the tower is the whole model; 4 wrote it."""
    from safetensors.torch import load_file, save_file

    model = made.make_huggingface(tmp_path, kind="CLIPTextModel")
    bare = load_file(tmp_path / "model.safetensors")
    assert "embeddings.token_embedding.weight" in bare
    save_file({f"text_model.{name}": tensor for name, tensor in bare.items()}, tmp_path / "model.safetensors")
    made.assert_same_weights(checkpoints.read(tmp_path), made.canonical_huggingface(model))


def test_position_ids_of_old_files_are_passed_over(tmp_path: Path) -> None:
    model = made.make_huggingface(tmp_path, weights="bin")
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    made.assert_same_weights(checkpoints.read(tmp_path), made.canonical_huggingface(model))


def test_safetensors_win_over_a_pickle_beside_them(tmp_path: Path) -> None:
    made.make_huggingface(tmp_path, seed=1, weights="bin")
    model = made.make_huggingface(tmp_path, seed=2)
    checkpoint = checkpoints.read(tmp_path)
    made.assert_same_weights(checkpoint, made.canonical_huggingface(model))
    assert "pytorch_model.bin" not in checkpoint.source.sha256


def test_a_weights_file_is_read_with_the_config_beside_it(tmp_path: Path) -> None:
    made.make_huggingface(tmp_path, seed=2)
    model = made.make_huggingface(tmp_path, seed=1, weights="bin")
    checkpoint = checkpoints.read(tmp_path / "pytorch_model.bin")
    made.assert_same_weights(checkpoint, made.canonical_huggingface(model))
    assert checkpoint.source.name == "pytorch_model.bin"


def test_the_table_of_defaults_is_transformers_own() -> None:
    transformers = oracles.transformers()
    text, vision = transformers.CLIPTextConfig(), transformers.CLIPVisionConfig()
    assert {key: getattr(text, key) for key in _huggingface_config.TEXT_DEFAULTS} == _huggingface_config.TEXT_DEFAULTS
    assert {key: getattr(vision, key) for key in _huggingface_config.VISION_DEFAULTS} == (
        _huggingface_config.VISION_DEFAULTS
    )
    assert transformers.CLIPConfig().projection_dim == _huggingface_config.PROJECTION_DIM


def test_missing_keys_mean_transformers_defaults(tmp_path: Path) -> None:
    """A CLIPTextModel config that leaves out what is default, as older versions wrote it."""
    made.make_huggingface(tmp_path, kind="CLIPTextModel", width=512, heads=8, layers=1, context_length=77)
    edit_json(tmp_path / "config.json", hidden_size=None, num_attention_heads=None, max_position_embeddings=None)
    edit_json(tmp_path / "config.json", hidden_act=None, layer_norm_eps=None, intermediate_size=1024)
    text = checkpoints.read(tmp_path).spec.text
    assert text is not None
    assert (text.transformer.width, text.transformer.heads, text.context_length) == (512, 8, 77)
    assert (text.transformer.activation, text.transformer.layer_norm_eps) == ("quick_gelu", 1e-5)


@pytest.mark.parametrize("legacy", [{"hidden_act": "gelu"}, {"layer_norm_eps": 1e-6}])
def test_text_config_dict_wins_as_in_transformers(legacy: dict[str, Any], tmp_path: Path) -> None:
    made.make_huggingface(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = {key: config["text_config"][key] for key in _huggingface_config.TEXT_DEFAULTS}
    config["text_config_dict"] = whole | legacy
    config["text_config"] |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-3}
    (tmp_path / "config.json").write_text(json.dumps(config))

    expected = oracles.transformers().CLIPConfig.from_pretrained(tmp_path).text_config
    text = checkpoints.read(tmp_path).spec.text
    assert text is not None
    assert (text.transformer.activation, text.transformer.layer_norm_eps) == (
        expected.hidden_act,
        expected.layer_norm_eps,
    )
    assert (expected.hidden_act, expected.layer_norm_eps) != ("quick_gelu", 1e-3)


def test_text_config_dict_brings_its_defaults(tmp_path: Path) -> None:
    """What the older key leaves out is transformers' default, even where text_config says something else."""
    made.make_huggingface(tmp_path, eos_token_id=2)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = {key: config["text_config"][key] for key in _huggingface_config.TEXT_DEFAULTS}
    config["text_config_dict"] = {key: value for key, value in whole.items() if key != "eos_token_id"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert oracles.transformers().CLIPConfig.from_pretrained(tmp_path).text_config.eos_token_id == 49407
    with pytest.raises(CheckpointError, match=r"ends texts with id 599, text_config.eos_token_id pools at id 49407"):
        checkpoints.read(tmp_path)


def test_activations(tmp_path: Path) -> None:
    made.make_huggingface(tmp_path, activation="gelu")
    edit_tower(tmp_path, "vision_config", hidden_act="quick_gelu")
    spec = checkpoints.read(tmp_path).spec
    assert spec.text is not None and spec.image is not None
    assert (spec.text.transformer.activation, spec.image.transformer.activation) == ("gelu", "quick_gelu")
    stated = checkpoints.read(tmp_path, Options(activation="gelu")).spec
    assert stated.image is not None
    assert stated.image.transformer.activation == "gelu"

    edit_tower(tmp_path, "text_config", hidden_act="gelu_new")
    with pytest.raises(UnsupportedModelError, match="hidden_act is 'gelu_new', supported: quick_gelu, gelu"):
        checkpoints.read(tmp_path)


def test_an_architecture_that_is_not_named_follows_from_model_type_and_weights(tmp_path: Path) -> None:
    for kind in KINDS:
        directory = tmp_path / kind
        model = made.make_huggingface(directory, kind=kind)
        edit_json(directory / "config.json", architectures=None)
        made.assert_same_weights(checkpoints.read(directory), made.canonical_huggingface(model))


def test_a_text_model_may_carry_the_whole_models_config(tmp_path: Path) -> None:
    model = made.make_huggingface(tmp_path, kind="CLIPTextModelWithProjection")
    whole = oracles.transformers().CLIPConfig(text_config=model.config.to_dict()).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(whole | {"architectures": ["CLIPTextModelWithProjection"]}))
    made.assert_same_weights(checkpoints.read(tmp_path), made.canonical_huggingface(model))


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("siglip", "SiglipModel"),
        ("align", "AlignModel"),
        ("blip", "BlipModel"),
        ("chinese_clip", "ChineseCLIPModel"),
        ("clip", "CLIPForImageClassification"),
        ("bert", "BertModel"),
    ],
)
def test_other_families_are_named(model_type: str, architecture: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [architecture]}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    expected = (
        f"found model_type '{model_type}' with architecture '{architecture}'; supported: CLIPModel, CLIPTextModel"
    )
    with pytest.raises(UnsupportedModelError, match=expected):
        checkpoints.read(tmp_path)


def test_facts_that_are_not_supported(tmp_path: Path) -> None:
    made.make_huggingface(tmp_path)
    edit_tower(tmp_path, "vision_config", num_channels=4)
    with pytest.raises(UnsupportedModelError, match=r"vision_config: num_channels is 4, supported: 3"):
        checkpoints.read(tmp_path)
    edit_tower(tmp_path, "vision_config", num_channels=3, image_size=[32, 48])
    with pytest.raises(UnsupportedModelError, match=r"image_size is \[32, 48\], supported are squares"):
        checkpoints.read(tmp_path)
    edit_tower(tmp_path, "vision_config", image_size=32)
    edit_json(tmp_path / "config.json", quantization_config={"bits": 8})
    with pytest.raises(UnsupportedModelError, match="found quantization_config"):
        checkpoints.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 3}, "width 128 is not a multiple of 3 heads"),
        ({"num_attention_heads": "two"}, "text_config: num_attention_heads: expected a positive integer, found 'two'"),
        ({"hidden_size": 0}, "hidden_size: expected a positive integer, found 0"),
        ({"layer_norm_eps": None}, "text_config: missing key layer_norm_eps"),
    ],
)
def test_a_config_that_cannot_be(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    made.make_huggingface(tmp_path)
    edit_tower(tmp_path, "text_config", **changes)
    with pytest.raises(CheckpointError, match=words):
        checkpoints.read(tmp_path)


def test_weights_are_accounted_for_by_their_stored_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    made.make_huggingface(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    del state["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    state["vision_model.head.weight"] = torch.ones(2)
    state["visual_projection.weight"] = torch.ones(63, 128)
    state["text_model.final_layer_norm.bias"] = torch.ones(128, dtype=torch.int32)
    save_file(state, path)
    with pytest.raises(WeightsError) as caught:
        checkpoints.read(tmp_path)
    message = caught.value.message
    assert "1 missing: text_model.encoder.layers.1.self_attn.k_proj.bias" in message
    assert "1 unexpected: vision_model.head.weight" in message
    assert "1 misshapen: visual_projection.weight is [63, 128], not [64, 128]" in message
    assert "1 not floating point: text_model.final_layer_norm.bias is I32" in message


def test_long_lists_of_weights_are_capped(tmp_path: Path) -> None:
    made.make_huggingface(tmp_path, layers=1)
    edit_tower(tmp_path, "text_config", num_hidden_layers=3)
    with pytest.raises(WeightsError, match=r"32 missing: .* and 22 more") as caught:
        checkpoints.read(tmp_path)
    assert caught.value.message.count("text_model.") == 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinite_weights_are_found_when_read(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    made.make_huggingface(tmp_path, dtype=dtype, layers=1)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["text_model.encoder.layers.0.self_attn.v_proj.weight"][5, 7] = value
    save_file(state, path)
    checkpoint = checkpoints.read(tmp_path)
    assert checkpoint.weights["text.blocks.0.attention.qkv.bias"].isfinite().all()
    with pytest.raises(
        WeightsError, match=r"text_model.encoder.layers.0.self_attn.v_proj.weight holds NaN or infinite"
    ):
        checkpoint.weights["text.blocks.0.attention.qkv.weight"]


def test_weights_are_read_when_asked_for_and_not_kept(tmp_path: Path) -> None:
    made.make_huggingface(tmp_path)
    weights = checkpoints.read(tmp_path).weights
    first = weights["image.class_embedding"]
    first.zero_()
    assert weights["image.class_embedding"].abs().sum() > 0
    with pytest.raises(KeyError):
        weights["image.class_embeddings"]


def test_weights_of_another_dtype_than_floating_point_are_named(tmp_path: Path) -> None:
    made.make_huggingface(tmp_path, weights="bin")
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    state["visual_projection.weight"] = torch.ones(64, 128, dtype=torch.int8)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"1 not floating point: visual_projection.weight is int8"):
        checkpoints.read(tmp_path)
