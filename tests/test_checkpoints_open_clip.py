"""open_clip checkpoints, against what open_clip itself makes of the same directory."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import checkpoints_made as made
import oracles
import pytest
import torch

from clip_export import checkpoints
from clip_export.checkpoints import Options
from clip_export.errors import CheckpointError, UnsupportedModelError, WeightsError
from clip_export.spec import weight_shapes

CONFIG = "open_clip_config.json"


def edit(directory: Path, section: str, **changes: Any) -> None:
    """Set keys in model_cfg, its vision_cfg or text_cfg, or preprocess_cfg."""
    config = json.loads((directory / CONFIG).read_text())
    target = config if section in config else config["model_cfg"]
    target[section] |= changes
    (directory / CONFIG).write_text(json.dumps(config))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for tests that change its config only."""
    directory = tmp_path_factory.mktemp("open_clip")
    made.make_open_clip(directory, layers=1, width=64)
    return directory


def copied(directory: Path, target: Path) -> Path:
    for file in directory.iterdir():
        if file.name == CONFIG:
            (target / file.name).write_bytes(file.read_bytes())
        else:
            (target / file.name).symlink_to(file)
    return target


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_weights_and_spec(custom_text: bool, weights: str, tmp_path: Path) -> None:
    model = made.make_open_clip(tmp_path, seed=5, custom_text=custom_text, weights=weights)
    checkpoint = checkpoints.read(tmp_path)
    made.assert_same_weights(checkpoint, made.canonical_openai(model))
    spec = checkpoint.spec
    assert {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()} == weight_shapes(spec)
    assert spec.text is not None and spec.image is not None and spec.tokenizer is not None
    assert spec.text.transformer.activation == spec.image.transformer.activation == "gelu"
    assert (spec.text.causal, spec.text.vocab_size, spec.image.image_size, spec.image.patch_size) == (
        True,
        49408,
        32,
        16,
    )
    tokenizer = spec.tokenizer
    assert (tokenizer.dialect, tokenizer.pad_id, tokenizer.pooling, tokenizer.truncate) == (
        "open_clip",
        0,
        "argmax",
        True,
    )
    assert spec.logit_scale == pytest.approx(model.logit_scale.item())
    assert checkpoint.source.format == "open_clip"


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clip_itself_reads_the_same(quick_gelu: bool, tmp_path: Path) -> None:
    """Open the directory with open_clip's own factory: weights, activation, heads and preprocessing agree."""
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
    vision = {"head_width": 32, "mlp_ratio": 2.7}
    made.make_open_clip(tmp_path, quick_gelu=quick_gelu, vision=vision, text={"heads": 4}, preprocess=preprocess)
    open_clip = oracles.open_clip()
    logging.disable(logging.WARNING)
    try:
        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    finally:
        logging.disable(logging.NOTSET)
    checkpoint = checkpoints.read(tmp_path)
    made.assert_same_weights(checkpoint, made.canonical_openai(model))
    spec = checkpoint.spec
    assert spec.text is not None and spec.image is not None and spec.preprocess is not None
    for ours, theirs in ((spec.text, model.transformer), (spec.image, model.visual.transformer)):
        block = theirs.resblocks[0]
        activation = "quick_gelu" if isinstance(block.mlp.gelu, open_clip.model.QuickGELU) else "gelu"
        assert (ours.transformer.heads, ours.transformer.activation) == (block.attn.num_heads, activation)
        assert ours.transformer.mlp_width == block.mlp.c_fc.out_features
        assert ours.transformer.layer_norm_eps == block.ln_1.eps
    resize, normalize = transform.transforms[0], transform.transforms[-1]
    assert (tuple(normalize.mean), tuple(normalize.std)) == (spec.preprocess.mean, spec.preprocess.std)
    assert resize.interpolation.value == spec.preprocess.interpolation == "bilinear"
    assert (tuple(resize.size), spec.preprocess.resize_mode, spec.preprocess.resize_size) == ((32, 32), "squash", 32)


def test_preprocessing_that_is_not_stated_is_open_clips_default(tmp_path: Path) -> None:
    made.make_open_clip(tmp_path, layers=1, width=64)
    spec = checkpoints.read(tmp_path).spec.preprocess
    defaults = oracles.open_clip().transform.PreprocessCfg()
    assert spec is not None
    assert (spec.mean, spec.std, spec.interpolation) == (defaults.mean, defaults.std, defaults.interpolation)
    assert (spec.resize_mode, spec.dialect, spec.crop_size) == (defaults.resize_mode, "open_clip", 32)


def test_the_table_of_defaults_is_open_clips_own() -> None:
    from clip_export.checkpoints import open_clip as reader

    model = oracles.open_clip().model
    for ours, theirs in (
        (reader._VISION_DEFAULTS, model.CLIPVisionCfg()),
        (reader._TEXT_DEFAULTS, model.CLIPTextCfg()),
    ):
        assert {key: getattr(theirs, key) for key in ours} == ours
    for fixed, theirs in ((reader._VISION_FIXED, model.CLIPVisionCfg()), (reader._TEXT_FIXED, model.CLIPTextCfg())):
        for key, values in fixed.items():
            assert getattr(theirs, key, None) in values, key


def test_every_key_of_open_clip_is_known() -> None:
    """A key of this version that the reader has not heard of would be refused in every checkpoint that writes it."""
    import dataclasses

    from clip_export.checkpoints import open_clip as reader

    model = oracles.open_clip().model
    vision = {field.name for field in dataclasses.fields(model.CLIPVisionCfg)}
    text = {field.name for field in dataclasses.fields(model.CLIPTextCfg)}
    assert vision <= reader._VISION_DEFAULTS.keys() | reader._VISION_FIXED.keys() | reader._VISION_INERT
    assert text <= reader._TEXT_DEFAULTS.keys() | reader._TEXT_FIXED.keys() | reader._TEXT_INERT


def test_every_vit_of_open_clips_own_configs_is_understood(small: Path, tmp_path: Path) -> None:
    """All of open_clip's built-in configs: the ViTs with its text transformer give a spec, others are named."""
    from clip_export.checkpoints import open_clip as reader

    open_clip = oracles.open_clip()
    supported, refused = [], {}
    for name in open_clip.list_models():
        config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
        (tmp_path / CONFIG).write_text(json.dumps(config))
        try:
            model, _ = reader._sections(tmp_path / CONFIG)
            image, text = reader._image(model, Options()), reader._text(model, Options())
        except UnsupportedModelError as error:
            refused[name] = error.message
            continue
        supported.append(name)
        assert image.embedding_dim == text.embedding_dim == config["model_cfg"]["embed_dim"]
    assert {"ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14"} <= set(supported)
    plain = [
        name
        for name in open_clip.list_models()
        if name.startswith("ViT-") and not any(word in name for word in ("SigLIP", "CLIPA", "worldwide", "alt"))
    ]
    assert set(plain) <= set(supported)
    assert "SigLIP" in refused["ViT-B-16-SigLIP"]
    assert "CoCa" in refused["coca_ViT-B-32"]
    assert "ResNet" in refused["RN50"]
    assert "timm" in refused["MobileCLIP-S1"]
    assert "text tower from Hugging Face" in refused["roberta-ViT-B-32"]
    assert "final_ln_after_pool is True" in refused["ViT-L-14-CLIPA"]
    assert "hf_tokenizer_name is 'facebook/xlm-v-base'" in refused["ViT-H-14-worldwide"]
    assert "ls_init_value is 0.0001" in refused["ViT-M-16-alt"]


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("vision_cfg", {"pool_type": "avg"}, "vision_cfg: pool_type is 'avg', supported: 'tok'"),
        ("vision_cfg", {"attentional_pool": True}, "attentional_pool is True, supported: False"),
        ("vision_cfg", {"act_kwargs": {"approximate": "tanh"}}, "act_kwargs is {'approximate': 'tanh'}"),
        ("vision_cfg", {"qk_norm": True}, "qk_norm is True"),
        ("vision_cfg", {"window_size": 7}, r"vision_cfg: unknown key window_size \(7\)"),
        ("vision_cfg", {"image_size": [32, 64]}, r"image_size is \[32, 64\], supported are squares"),
        ("vision_cfg", {"norm_kwargs": {"elementwise_affine": False}}, "unknown key elementwise_affine"),
        ("text_cfg", {"pool_type": "last"}, "text_cfg: pool_type is 'last', supported: 'argmax'"),
        ("text_cfg", {"proj_bias": True}, "proj_bias is True"),
        ("text_cfg", {"proj_type": "none"}, "proj_type is 'none'"),
        ("text_cfg", {"embed_cls": True}, "embed_cls is True"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "canonicalize"}}, "tokenizer_kwargs is {'clean': 'canonicalize'}"),
        ("text_cfg", {"rope": True}, "text_cfg: unknown key rope"),
        ("model_cfg", {"init_logit_bias": -10}, "found SigLIP"),
        ("model_cfg", {"multimodal_cfg": {}}, "found CoCa"),
        ("model_cfg", {"audio_cfg": {}}, "model_cfg: unknown key audio_cfg"),
        ("preprocess_cfg", {"resize_mode": "random"}, "resize_mode is 'random', supported: shortest, longest, squash"),
        ("preprocess_cfg", {"interpolation": "nearest"}, "interpolation is 'nearest', supported: bicubic, bilinear"),
        ("preprocess_cfg", {"gamma": 2}, "preprocess_cfg: unknown key gamma"),
        ("preprocess_cfg", {"mode": "L"}, "mode is 'L', supported: 'RGB'"),
    ],
)
def test_what_is_not_supported_is_named(
    section: str, changes: dict[str, Any], words: str, small: Path, tmp_path: Path
) -> None:
    edit(copied(small, tmp_path), section, **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        checkpoints.read(tmp_path)


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("vision_cfg", {"head_width": 48}, "width 64 is not a multiple of head_width 48"),
        ("vision_cfg", {"width": "64"}, "vision_cfg: width: expected a positive integer, found '64'"),
        ("text_cfg", {"heads": 5}, "width 64 is not a multiple of 5 heads"),
        ("text_cfg", {"vocab_size": 1000}, "gives ids up to 49407, the text tower embeds only 1000"),
        ("model_cfg", {"quick_gelu": "yes"}, "quick_gelu: expected true or false, found 'yes'"),
        ("model_cfg", {"embed_dim": None}, "model_cfg: missing key embed_dim"),
        ("model_cfg", {"text_cfg": [1]}, r"text_cfg: expected an object, found \[1\]"),
        ("preprocess_cfg", {"mean": [0.5]}, r"mean: expected three numbers, found \[0.5\]"),
    ],
)
def test_a_config_that_cannot_be(
    section: str, changes: dict[str, Any], words: str, small: Path, tmp_path: Path
) -> None:
    edit(copied(small, tmp_path), section, **changes)
    with pytest.raises(CheckpointError, match=words):
        checkpoints.read(tmp_path)


def test_what_changes_the_spec_and_no_weight(small: Path, tmp_path: Path) -> None:
    copied(small, tmp_path)
    edit(tmp_path, "text_cfg", no_causal_mask=True, norm_kwargs={"eps": 1e-6}, pad_id=1, output_tokens=True)
    edit(tmp_path, "vision_cfg", patch_dropout=0.5, timm_pool="avg", timm_model_name=None)
    edit(tmp_path, "preprocess_cfg", mean=0.5, size=224, fill_color=0, interpolation="random")
    edit(tmp_path, "model_cfg", init_logit_bias=None)
    spec = checkpoints.read(tmp_path, Options(activation="quick_gelu", tokenizer_dialect="openai")).spec
    assert (
        spec.text is not None and spec.image is not None and spec.tokenizer is not None and spec.preprocess is not None
    )
    assert (spec.text.causal, spec.text.transformer.layer_norm_eps) == (False, 1e-6)
    assert spec.image.transformer.layer_norm_eps == 1e-5
    assert spec.text.transformer.activation == spec.image.transformer.activation == "quick_gelu"
    assert (spec.tokenizer.dialect, spec.tokenizer.pad_id) == ("openai", 0)
    assert (spec.preprocess.mean, spec.preprocess.crop_size) == ((0.5, 0.5, 0.5), 32)
    assert spec.preprocess.interpolation == "bicubic"


def test_weights_of_another_family_are_named_even_if_the_config_is_not(small: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(small / "open_clip_model.safetensors")
    (tmp_path / CONFIG).write_bytes((small / CONFIG).read_bytes())
    for key, family in (("logit_bias", "SigLIP"), ("text_projection.bias", "a text projection with a bias")):
        save_file(state | {key: torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
        with pytest.raises(UnsupportedModelError, match=rf"found {family}.* \(weight {key}\)"):
            checkpoints.read(tmp_path)
    save_file(state | {"visual.head.weight": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(WeightsError, match=r"1 unexpected: visual.head.weight"):
        checkpoints.read(tmp_path)


def test_a_logit_scale_with_an_axis(small: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(small / "open_clip_model.safetensors")
    (tmp_path / CONFIG).write_bytes((small / CONFIG).read_bytes())
    save_file(state | {"logit_scale": torch.tensor([1.5])}, tmp_path / "open_clip_model.safetensors")
    assert checkpoints.read(tmp_path).spec.logit_scale == 1.5
    save_file(state | {"logit_scale": torch.ones(2)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(WeightsError, match=r"logit_scale is \[2\], expected a single number"):
        checkpoints.read(tmp_path)


def test_no_weights(small: Path, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes((small / CONFIG).read_bytes())
    with pytest.raises(CheckpointError, match=r"has open_clip_config.json but no weights, expected open_clip_model"):
        checkpoints.read(tmp_path)


def test_the_long_side_and_its_padding(tmp_path: Path) -> None:
    made.make_open_clip(tmp_path, layers=1, width=64, preprocess={"resize_mode": "longest", "fill_color": 127})
    spec = checkpoints.read(tmp_path).spec.preprocess
    assert spec is not None
    assert (spec.resize_mode, spec.fill) == ("longest", 127)
