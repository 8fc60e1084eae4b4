"""What Hugging Face's processor and tokenizer files become, against what transformers makes of them."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import checkpoints_made as made
import numpy as np
import oracles
import pytest
import torch
from safetensors.torch import load_file, save_file

from clip_export import checkpoints
from clip_export.checkpoints import Options, _huggingface_preprocess
from clip_export.errors import AmbiguousCheckpointError, CheckpointError, UnsupportedModelError, WeightsError
from clip_export.spec import Dialect, PreprocessSpec, TokenizerSpec, Tower

PREPROCESSOR = "preprocessor_config.json"


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("image")
    made.make_huggingface(directory, kind="CLIPVisionModelWithProjection", layers=1, preprocessor={})
    return directory


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    made.make_huggingface(directory, kind="CLIPTextModel", layers=1, tokenizer=False)
    return directory


def linked(model: Path, directory: Path) -> Path:
    """The model's files as links, as the hub's cache has them, beside files of one's own."""
    for file in model.iterdir():
        (directory / file.name).symlink_to(file)
    return directory


def preprocess_of(
    model: Path, directory: Path, config: dict[str, Any], options: Options | None = None
) -> PreprocessSpec:
    linked(model, directory)
    (directory / PREPROCESSOR).write_text(json.dumps(config))
    spec = checkpoints.read(directory, options).spec.preprocess
    assert spec is not None
    return spec


def normalized_by_transformers(directory: Path, pixels: np.ndarray) -> np.ndarray:
    """What transformers feeds its model for uint8 [height, width, 3] pixels of the size that it takes."""
    processor = oracles.transformers().CLIPImageProcessor.from_pretrained(directory)
    return processor(images=[pixels], return_tensors="np")["pixel_values"][0]


def normalized_by_spec(spec: PreprocessSpec, pixels: np.ndarray) -> np.ndarray:
    return ((pixels / 255 - np.array(spec.mean)) / np.array(spec.std)).transpose(2, 0, 1)


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, int, int, str]]] = {
    "ints of the first releases": ({"size": 32, "crop_size": 32}, ("shortest", 32, 32, "bicubic")),
    "objects": (
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "resample": 2},
        ("shortest", 40, 32, "bilinear"),
    ),
    "squash, then crop": (
        {"size": {"height": 36, "width": 36}, "crop_size": 32, "resample": 1},
        ("squash", 36, 32, "lanczos"),
    ),
    "squash only": (
        {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 0},
        ("squash", 32, 32, "nearest"),
    ),
    "other statistics": (
        {"size": 32, "crop_size": 32, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2], "resample": 4},
        ("shortest", 32, 32, "box"),
    ),
    "no normalization": ({"size": 32, "crop_size": 32, "do_normalize": False}, ("shortest", 32, 32, "bicubic")),
    "no rescaling": ({"size": 32, "crop_size": 32, "do_rescale": False}, ("shortest", 32, 32, "bicubic")),
    "another factor": (
        {"size": 32, "crop_size": 32, "rescale_factor": 1 / 127.5, "resample": 5},
        ("shortest", 32, 32, "hamming"),
    ),
    "an old extractor": (
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32},
        ("shortest", 32, 32, "bicubic"),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_preprocessor_files(name: str, image_model: Path, tmp_path: Path) -> None:
    config, expected = CONFIGS[name]
    spec = preprocess_of(image_model, tmp_path, config)
    assert (spec.resize_mode, spec.resize_size, spec.crop_size, spec.interpolation) == expected
    assert spec.dialect == "huggingface"

    # Pixels of the size that comes out of resize and crop, so that only the statistics are left.
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (tmp_path / PREPROCESSOR).write_text(json.dumps(config | {"do_resize": False, "do_center_crop": False}))
    expected_values = normalized_by_transformers(tmp_path, pixels)
    np.testing.assert_allclose(normalized_by_spec(spec, pixels), expected_values, rtol=2e-6, atol=2e-6)


def test_statistics_as_written_keep_their_digits(image_model: Path, tmp_path: Path) -> None:
    config = {"size": 32, "crop_size": 32, "image_mean": [0.1, 0.2, 0.3], "rescale_factor": 0.00392156862745098}
    assert preprocess_of(image_model, tmp_path, config).mean == (0.1, 0.2, 0.3)


def test_the_table_of_defaults_is_transformers_own() -> None:
    processor = oracles.transformers().CLIPImageProcessor
    for key, value in _huggingface_preprocess.PREPROCESSOR_DEFAULTS.items():
        theirs = getattr(processor, key)
        if isinstance(value, float):
            assert math.isclose(theirs, value)
        else:
            assert (list(theirs) if isinstance(theirs, tuple) else theirs) == value


def test_processor_config_wins_over_the_older_file(image_model: Path, tmp_path: Path) -> None:
    linked(image_model, tmp_path)
    inner = {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32, "image_mean": [0.1, 0.1, 0.1]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    (tmp_path / PREPROCESSOR).write_text(json.dumps(inner | {"image_mean": [0.9, 0.9, 0.9]}))
    assert oracles.transformers().CLIPImageProcessor.from_pretrained(tmp_path).image_mean[0] == 0.1
    checkpoint = checkpoints.read(tmp_path)
    assert checkpoint.spec.preprocess is not None
    assert checkpoint.spec.preprocess.mean == (0.1, 0.1, 0.1)
    assert "processor_config.json" in checkpoint.source.sha256


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"do_resize": False}, UnsupportedModelError, "do_resize is False, expected pictures to be resized"),
        ({"do_center_crop": False}, UnsupportedModelError, "pictures would not come out square"),
        ({"do_pad": True}, UnsupportedModelError, "found the step do_pad"),
        ({"resample": 7}, UnsupportedModelError, "resample is 7, supported: 0 to 5"),
        ({"size": {"longest_edge": 32}}, UnsupportedModelError, "supported: shortest_edge, or height and width"),
        ({"size": {"height": 32, "width": 40}}, UnsupportedModelError, r"side is \[32, 40\], supported are squares"),
        ({"image_processor_type": "SiglipImageProcessor"}, UnsupportedModelError, "'SiglipImageProcessor', supported"),
        ({"crop_size": 28}, CheckpointError, "come out 28 pixels wide, the image tower takes 32"),
        ({"image_mean": [0.5, 0.5]}, CheckpointError, r"image_mean: expected three numbers, found \[0.5, 0.5\]"),
        ({"image_std": [0.5, 0, 0.5]}, CheckpointError, "std must be positive"),
        ({"rescale_factor": -1}, CheckpointError, "rescale_factor: expected a positive number, found -1"),
        ({"do_rescale": "yes"}, CheckpointError, "do_rescale: expected true or false, found 'yes'"),
    ],
)
def test_preprocessing_that_is_not_clips(
    config: dict[str, Any], error: type[CheckpointError], words: str, image_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        preprocess_of(image_model, tmp_path, {"size": 32, "crop_size": 32} | config)


def test_without_a_preprocessor_file_the_user_decides(image_model: Path) -> None:
    with pytest.raises(AmbiguousCheckpointError, match=r"no preprocessor_config.json in the checkpoint") as caught:
        checkpoints.read(image_model)
    assert caught.value.hint is not None and "--preprocess-dialect huggingface" in caught.value.hint
    spec = checkpoints.read(image_model, Options(preprocess_dialect="openai")).spec.preprocess
    assert spec is not None
    assert (spec.dialect, spec.resize_size, spec.crop_size, spec.interpolation) == ("openai", 32, 32, "bicubic")
    assert spec.mean == tuple(oracles.transformers().CLIPImageProcessor.image_mean)


def test_a_stated_dialect_keeps_the_files_constants(image_model: Path, tmp_path: Path) -> None:
    config = {"size": 36, "crop_size": 32, "image_mean": [0.5, 0.5, 0.5]}
    spec = preprocess_of(image_model, tmp_path, config, Options(preprocess_dialect="open_clip"))
    assert (spec.dialect, spec.resize_size, spec.mean) == ("open_clip", 36, (0.5, 0.5, 0.5))


def tokenizer_of(directory: Path, options: Options | None = None) -> TokenizerSpec:
    spec = checkpoints.read(directory, options).spec.tokenizer
    assert spec is not None
    return spec


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pad_token": "!"},
        {
            "pad_token": {
                "__type": "AddedToken",
                "content": "!",
                "lstrip": False,
                "normalized": True,
                "rstrip": False,
                "single_word": False,
            }
        },
    ],
)
def test_special_ids_are_transformers_own(config: dict[str, Any], old: bool, text_model: Path, tmp_path: Path) -> None:
    made.write_tokenizer(linked(text_model, tmp_path), made.SMALL_VOCAB_SIZE, old=old, **config)
    theirs = oracles.transformers().CLIPTokenizer.from_pretrained(tmp_path)
    ours = tokenizer_of(tmp_path)
    assert (ours.start_id, ours.end_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.pad_id == (0 if config else 599)
    assert (ours.dialect, ours.context_length, ours.truncate) == ("huggingface", 77, False)


@pytest.mark.parametrize("modern", [True, False])
def test_the_older_map_of_special_tokens(modern: bool, text_model: Path, tmp_path: Path) -> None:
    """SD 2's pad_token "!" is in special_tokens_map.json; a config with added_tokens_decoder makes it void."""
    config: dict[str, Any] = {"pad_token": "<|endoftext|>"}
    if modern:
        ends = {598: "<|startoftext|>", 599: "<|endoftext|>"}
        config["added_tokens_decoder"] = {str(i): {"content": word, "special": True} for i, word in ends.items()}
    made.write_tokenizer(linked(text_model, tmp_path), made.SMALL_VOCAB_SIZE, old=True, **config)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    theirs = oracles.transformers().CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer_of(tmp_path).pad_id == theirs.pad_token_id == (599 if modern else 0)


def test_pooling_follows_the_configs_end_id(tmp_path: Path) -> None:
    made.make_huggingface(tmp_path / "new", kind="CLIPTextModel", layers=1)
    assert tokenizer_of(tmp_path / "new").pooling == "first_end"
    made.make_huggingface(tmp_path / "legacy", kind="CLIPTextModel", layers=1, eos_token_id=2)
    assert tokenizer_of(tmp_path / "legacy").pooling == "argmax"
    assert tokenizer_of(tmp_path / "legacy").end_id == 599


def test_a_tokenizer_of_another_checkpoint(text_model: Path, tmp_path: Path) -> None:
    (tmp_path / "larger").mkdir()
    made.write_tokenizer(linked(text_model, tmp_path / "larger"), 700)
    with pytest.raises(CheckpointError, match="the tokenizer gives ids up to 699, the text tower embeds only 600"):
        checkpoints.read(tmp_path / "larger")
    (tmp_path / "smaller").mkdir()
    made.write_tokenizer(linked(text_model, tmp_path / "smaller"), 590)
    with pytest.raises(CheckpointError, match=r"ends texts with id 589, text_config.eos_token_id pools at id 599"):
        checkpoints.read(tmp_path / "smaller")
    (tmp_path / "other").mkdir()
    made.write_tokenizer(linked(text_model, tmp_path / "other"), 600, tokenizer_class="BertTokenizer")
    with pytest.raises(UnsupportedModelError, match="BertTokenizer"):
        checkpoints.read(tmp_path / "other")
    (tmp_path / "malformed").mkdir()
    made.write_tokenizer(linked(text_model, tmp_path / "malformed"), 600, pad_token=["!"])
    with pytest.raises(CheckpointError):
        checkpoints.read(tmp_path / "malformed")


@pytest.mark.parametrize("dialect", [None, "huggingface", "openai"])
def test_without_tokenizer_files_and_not_clips_vocabulary(dialect: Dialect | None, text_model: Path) -> None:
    with pytest.raises(AmbiguousCheckpointError, match="its text tower embeds 600 ids, not the 49408") as caught:
        checkpoints.read(text_model, Options(tokenizer_dialect=dialect))
    assert caught.value.hint is not None and "vocab.json and merges.txt" in caught.value.hint


@pytest.fixture(scope="module")
def clip_text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model with CLIP's own number of ids and no tokenizer files."""
    directory = tmp_path_factory.mktemp("clip_text")
    vocab_size = made.CLIP_VOCAB_SIZE
    made.make_huggingface(
        directory, kind="CLIPTextModel", layers=1, width=64, heads=1, vocab_size=vocab_size, tokenizer=False
    )
    return directory


def test_without_tokenizer_files_the_user_decides(clip_text_model: Path, tmp_path: Path) -> None:
    """SD 1 pads with the end token and SD 2 with 0, both with CLIP's vocabulary: its size does not tell them apart."""
    with pytest.raises(AmbiguousCheckpointError, match="what it pads texts with, are not known") as caught:
        checkpoints.read(clip_text_model)
    assert caught.value.hint is not None and "state --tokenizer-dialect" in caught.value.hint

    checkpoint = checkpoints.read(clip_text_model, Options(tokenizer_dialect="huggingface"))
    spec = checkpoint.spec.tokenizer
    assert spec is not None
    assert (spec.dialect, spec.start_id, spec.end_id, spec.pad_id) == ("huggingface", 49406, 49407, 49407)
    assert tokenizer_of(clip_text_model, Options(tokenizer_dialect="openai")).pad_id == 0

    made.write_tokenizer(linked(clip_text_model, tmp_path), made.CLIP_VOCAB_SIZE, old=True)
    assert checkpoint.tokenizer_json == checkpoints.read(tmp_path).tokenizer_json


@pytest.mark.parametrize("number", ["", "_2"])
def test_the_tokenizer_of_a_diffusers_pipeline_is_beside_its_text_encoder(
    number: str, text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SD 2's layout: text_encoder/ without tokenizer files, and tokenizer/ that pads with "!", id 0."""
    encoder, tokenizer = tmp_path / f"text_encoder{number}", tmp_path / f"tokenizer{number}"
    encoder.mkdir()
    tokenizer.mkdir()
    linked(text_model, encoder)
    made.write_tokenizer(tokenizer, made.SMALL_VOCAB_SIZE, old=True)
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))

    checkpoint = checkpoints.read(encoder)
    spec = checkpoint.spec.tokenizer
    assert spec is not None
    theirs = oracles.transformers().CLIPTokenizer.from_pretrained(tokenizer)
    assert (spec.start_id, spec.end_id, spec.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert spec.pad_id == 0

    names = {f"tokenizer{number}/{file.name}": file for file in tokenizer.iterdir()}
    assert set(checkpoint.source.sha256) == {"config.json", "model.safetensors", *names}
    for name, file in names.items():
        assert checkpoint.source.sha256[name] == hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.chdir(encoder)
    assert checkpoints.read(".").source == checkpoint.source
    assert checkpoints.read(Path("model.safetensors")).source.sha256 == checkpoint.source.sha256


def test_a_tokenizer_beside_another_directory_or_encoder_is_not_taken(text_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    made.write_tokenizer(tmp_path / "tokenizer", made.SMALL_VOCAB_SIZE)
    for name in ("my_model", "text_encoder_2", "text_encoder_old"):
        (tmp_path / name).mkdir()
        linked(text_model, tmp_path / name)
        with pytest.raises(AmbiguousCheckpointError, match="no tokenizer files in the checkpoint"):
            checkpoints.read(tmp_path / name)


def test_tokenizer_files_inside_the_checkpoint_win(text_model: Path, tmp_path: Path) -> None:
    encoder, tokenizer = tmp_path / "text_encoder", tmp_path / "tokenizer"
    encoder.mkdir()
    tokenizer.mkdir()
    made.write_tokenizer(tokenizer, made.SMALL_VOCAB_SIZE, pad_token="!")
    made.write_tokenizer(linked(text_model, encoder), made.SMALL_VOCAB_SIZE)
    assert tokenizer_of(encoder).pad_id == 599


@pytest.mark.parametrize("key", ["bos_token", "eos_token", "pad_token"])
def test_a_special_token_that_is_null(key: str, text_model: Path, tmp_path: Path) -> None:
    made.write_tokenizer(linked(text_model, tmp_path), made.SMALL_VOCAB_SIZE, old=True, **{key: None})
    with pytest.raises(CheckpointError, match=f"{key} is null, expected a token"):
        checkpoints.read(tmp_path)


@pytest.fixture(scope="module")
def bare_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP with neither processor nor tokenizer files."""
    directory = tmp_path_factory.mktemp("bare_clip")
    made.make_huggingface(directory, layers=1, tokenizer=False, preprocessor={})
    return directory


def test_what_serves_a_tower_that_is_not_wanted_need_not_be_known(bare_clip: Path, tmp_path: Path) -> None:
    made.write_tokenizer(linked(bare_clip, tmp_path), made.SMALL_VOCAB_SIZE)
    with pytest.raises(AmbiguousCheckpointError, match=PREPROCESSOR):
        checkpoints.read(tmp_path)
    text = checkpoints.read(tmp_path, Options(towers=("text",)))
    assert text.spec.towers == ("text",)
    image = checkpoints.read(bare_clip, Options(towers=("image",), preprocess_dialect="huggingface"))
    assert (image.spec.towers, image.tokenizer_json) == (("image",), None)
    assert set(image.source.sha256) == {"config.json", "model.safetensors"}

    both = checkpoints.read(tmp_path, Options(preprocess_dialect="huggingface", towers=("image", "text")))
    assert both.spec.towers == ("text", "image")
    assert text.spec == both.spec.select(["text"]) and image.spec == both.spec.select(["image"])
    assert set(text.weights) | set(image.weights) == set(both.weights)
    for tower in (text, image):
        made.assert_same_weights(tower, {name: both.weights[name].float() for name in tower.weights})


def test_weights_of_neither_tower_are_unexpected_whatever_is_wanted(bare_clip: Path, tmp_path: Path) -> None:
    linked(bare_clip, tmp_path)
    state = load_file(bare_clip / "model.safetensors") | {"adapter.weight": torch.ones(1)}
    (tmp_path / "model.safetensors").unlink()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r": 1 unexpected: adapter\.weight"):
        checkpoints.read(tmp_path, Options(towers=("image",), preprocess_dialect="huggingface"))


@pytest.mark.parametrize("towers", [("image",), ("text", "image")])
def test_a_wanted_tower_that_is_not_there(towers: tuple[Tower, ...], text_model: Path) -> None:
    with pytest.raises(CheckpointError, match="this checkpoint has no image tower, only text") as caught:
        checkpoints.read(text_model, Options(towers=towers))
    assert caught.value.hint == "its class is CLIPTextModel; a CLIPModel has both towers"


def test_a_stated_dialect_takes_clips_own_vocabulary(clip_text_model: Path, text_model: Path, tmp_path: Path) -> None:
    from clip_export.tokenizer import clip_tokenizer_json

    made.write_tokenizer(linked(clip_text_model, tmp_path), made.CLIP_VOCAB_SIZE, pad_token="!")
    checkpoint = checkpoints.read(tmp_path, Options(tokenizer_dialect="openai"))
    spec = checkpoint.spec.tokenizer
    assert spec is not None
    assert (spec.dialect, spec.end_id, spec.pad_id, spec.pooling) == ("openai", 49407, 0, "first_end")
    assert checkpoint.tokenizer_json == clip_tokenizer_json("openai")
    assert "tokenizer.json" not in checkpoint.source.sha256
    assert tokenizer_of(tmp_path, Options(tokenizer_dialect="open_clip")).truncate

    (tmp_path / "small").mkdir()
    made.write_tokenizer(linked(text_model, tmp_path / "small"), 600)
    with pytest.raises(CheckpointError, match="gives ids up to 49407, the text tower embeds only 600"):
        checkpoints.read(tmp_path / "small", Options(tokenizer_dialect="openai"))
