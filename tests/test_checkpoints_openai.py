"""OpenAI's .pt files: TorchScript archives and plain state dicts, against OpenAI's own loader."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import checkpoints_made as made
import oracles
import pytest
import torch

from clip_export import checkpoints
from clip_export.checkpoints import Options
from clip_export.checkpoints._torchscript import is_archive, read_archive
from clip_export.errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    UnknownCheckpointError,
    UnsafeCheckpointError,
    UnsupportedModelError,
    WeightsError,
)
from clip_export.spec import weight_shapes

QUICK = Options(activation="quick_gelu")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openai") / "ViT.pt"
    made.make_openai(path, seed=4, width=64, layers=1)
    return path


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """A plain state dict, without OpenAI's buffers."""
    path = tmp_path_factory.mktemp("state") / "ViT.pt"
    made.make_openai(path, seed=4, width=64, layers=1, torchscript=False, facts=False, half=False)
    return torch.load(path, weights_only=True)


def saved(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("half", [True, False])
def test_torchscript_archives(half: bool, tmp_path: Path) -> None:
    model = made.make_openai(tmp_path / "ViT.pt", seed=7, layers=3, embedding_dim=32, context_length=20, half=half)
    checkpoint = checkpoints.read(tmp_path / "ViT.pt")
    made.assert_same_weights(checkpoint, made.canonical_openai(model))
    spec = checkpoint.spec
    assert {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()} == weight_shapes(spec)
    assert (
        spec.text is not None and spec.image is not None and spec.tokenizer is not None and spec.preprocess is not None
    )
    for transformer in (spec.text.transformer, spec.image.transformer):
        assert (transformer.width, transformer.layers, transformer.heads, transformer.mlp_width) == (128, 3, 2, 512)
        assert transformer.activation == "quick_gelu"
    assert (spec.text.context_length, spec.text.vocab_size, spec.text.embedding_dim) == (20, 49408, 32)
    assert (spec.image.image_size, spec.image.patch_size, spec.image.embedding_dim) == (32, 16, 32)
    tokenizer, preprocess = spec.tokenizer, spec.preprocess
    assert (tokenizer.dialect, tokenizer.pad_id, tokenizer.pooling, tokenizer.truncate) == (
        "openai",
        0,
        "argmax",
        False,
    )
    assert (preprocess.dialect, preprocess.resize_size, preprocess.interpolation) == ("openai", 32, "bicubic")
    assert spec.logit_scale == pytest.approx(model.logit_scale.item())
    dtypes = {name: tensor.dtype for name, tensor in checkpoint.weights.items()}
    assert dtypes["text.blocks.0.mlp.fc1.weight"] == (torch.float16 if half else torch.float32)
    assert dtypes["text.final_norm.weight"] == torch.float32
    assert checkpoint.source.format == "openai" and checkpoint.source.name == "ViT.pt"


def test_openais_own_loader_builds_the_same(archive: Path) -> None:
    """clip.load on the same archive: build_model derives what the reader derives."""
    clip = oracles.openai_clip()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's deprecation
        model, transform = clip.load(str(archive), device="cpu")
    checkpoint = checkpoints.read(archive)
    made.assert_same_weights(checkpoint, made.canonical_openai(model))
    spec = checkpoint.spec
    assert spec.text is not None and spec.image is not None and spec.preprocess is not None
    assert spec.text.transformer.heads == model.transformer.resblocks[0].attn.num_heads
    assert spec.image.transformer.heads == model.visual.transformer.resblocks[0].attn.num_heads
    assert spec.image.image_size == model.visual.input_resolution
    resize, normalize = transform.transforms[0], transform.transforms[-1]
    assert (tuple(normalize.mean), tuple(normalize.std)) == (spec.preprocess.mean, spec.preprocess.std)
    assert (resize.size, resize.interpolation.value) == (spec.preprocess.resize_size, spec.preprocess.interpolation)


def test_torch_jits_own_reader_finds_the_same_tensors(archive: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's deprecation
        expected = torch.jit.load(str(archive)).state_dict()
    found = read_archive(archive).tensors
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        loaded = tensor.load()
        assert (tuple(loaded.shape), loaded.dtype) == (tensor.shape, expected[name].dtype)
        assert torch.equal(loaded, expected[name])


class _Marker(torch.nn.Module):
    """Runs an operation while torch.jit.load builds it: no pickle, only TorchScript."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.path = path
        self.training = False

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return (self.weight, self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.weight = state[0]
        self.path = state[1]
        self.training = state[2]
        torch.save(torch.ones(1), self.path)

    def forward(self) -> torch.Tensor:
        return self.weight


def test_code_in_an_archive_never_runs(tmp_path: Path) -> None:
    """torch.jit.load runs __setstate__; the reader does not, and says that the archive is no CLIP."""
    target = tmp_path / "written"
    path = tmp_path / "hostile.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's deprecation
        torch.jit.script(_Marker(str(target))).save(str(path))
        torch.jit.load(str(path))
    assert target.exists(), "the archive does what it is made for"
    target.unlink()
    with pytest.raises(CheckpointError):
        checkpoints.read(path)
    assert not target.exists()


def test_a_pickle_in_an_archive_that_calls_something_is_refused(archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    hostile = b"cos\nsystem\n(S'touch " + str(target).encode() + b"'\ntR."
    path = _with_member(archive, tmp_path / "hostile.pt", "data.pkl", lambda _: hostile)
    with pytest.raises(UnsafeCheckpointError, match=r"hostile.pt: expected tensors only, found the global os.system"):
        checkpoints.read(path)
    assert not target.exists()


def _with_member(archive: Path, path: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of a zip with one member changed."""
    with zipfile.ZipFile(archive) as before, zipfile.ZipFile(path, "w") as after:
        for item in before.namelist():
            data = before.read(item)
            after.writestr(item, change(data) if item.endswith(f"/{name}") else data)
    return path


def _doubling(depth: int) -> bytes:
    """A pickle of a module that holds the next one twice, `depth` levels down: 2 ** depth dotted names."""
    levels = [b"c__torch__\nM\n)\x81}b"]  # class, (), NEWOBJ, {}, BUILD
    for level in range(depth):
        key = bytes([level])
        inner = b"q" + key + b"0"  # keep the module in the memo, off the stack
        levels.append(inner + b"c__torch__\nM\n)\x81}(U\x01ah" + key + b"U\x01bh" + key + b"ub")
    return b"".join(levels) + b"."


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"", "cannot be read"),
        (b"N.", "expected a module, found NoneType"),
        (b"garbage", "cannot be read"),
        (b"c__torch__.M\nM\n)\x81q\x00}U\x01mh\x00sb.", "cannot be read"),  # a module inside itself
        (b"ctorch._utils\n_rebuild_tensor_v2\n(I1\ntR.", "cannot be read"),  # a tensor without a storage
        (b"(U\x07storagectorch\nHalfStorage\nU\x010U\x03cpuI4\ntQ.", "expected a module, found _Storage"),
        (b"Nr\xff\xff\xff\x00.", "unexpected opcode LONG_BINPUT"),  # a memo of 2 ** 24 entries
        (b"\x8c\x01a.", "unexpected opcode SHORT_BINUNICODE"),  # of protocol 4
        (_doubling(60), "more than 100000 modules and tensors"),
    ],
)
def test_pickles_that_are_no_module(pickled: bytes, words: str, archive: Path, tmp_path: Path) -> None:
    path = _with_member(archive, tmp_path / "damaged.pt", "data.pkl", lambda _: pickled)
    with pytest.raises(CheckpointError, match=words):
        checkpoints.read(path)


def test_an_archive_with_a_damaged_tensor(archive: Path, tmp_path: Path) -> None:
    """A storage that is too short, and one whose bytes have changed: the zip's checksum tells."""
    path = _with_member(archive, tmp_path / "short.pt", "0", lambda data: data[:-4])
    with pytest.raises(CheckpointError, match=r"data/0 has \d+ bytes"):
        list(checkpoints.read(path).weights.values())
    path = tmp_path / "changed.pt"
    shutil.copy(archive, path)
    with zipfile.ZipFile(path) as zipped:
        member = max(zipped.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[member.header_offset + member.file_size // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        list(checkpoints.read(path).weights.values())


def test_the_activation_of_an_archive_is_its_modules_class(tmp_path: Path) -> None:
    """An archive of the same architecture with GELU: not OpenAI's, and seen from the classes it names."""
    oracles.openai_clip()
    from clip import model as clip_model

    original = clip_model.QuickGELU
    clip_model.QuickGELU = torch.nn.GELU
    try:
        made.make_openai(tmp_path / "gelu.pt", width=64, layers=1, half=False)
    finally:
        clip_model.QuickGELU = original
    with pytest.raises(AmbiguousCheckpointError, match="GELU weights were trained with different picture statistics"):
        checkpoints.read(tmp_path / "gelu.pt")
    spec = checkpoints.read(tmp_path / "gelu.pt", Options(preprocess_dialect="open_clip")).spec
    assert spec.image is not None and spec.preprocess is not None
    assert (spec.image.transformer.activation, spec.preprocess.dialect) == ("gelu", "open_clip")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_plain_state_dicts_need_the_activation(suffix: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = saved(state, tmp_path / f"ViT{suffix}")
    with pytest.raises(AmbiguousCheckpointError, match="do not say whether the model uses QuickGELU or GELU") as caught:
        checkpoints.read(path)
    assert caught.value.hint is not None and "--activation quick_gelu" in caught.value.hint
    checkpoint = checkpoints.read(path, QUICK)
    assert torch.equal(checkpoint.weights["image.projection.weight"], state["visual.proj"].T)
    with pytest.raises(AmbiguousCheckpointError, match="picture statistics"):
        checkpoints.read(path, Options(activation="gelu"))
    spec = checkpoints.read(path, Options(activation="gelu", preprocess_dialect="openai")).spec
    assert spec.text is not None
    assert spec.text.transformer.activation == "gelu"


def test_openais_buffers_tell_the_activation(tmp_path: Path) -> None:
    model = made.make_openai(tmp_path / "ViT.pt", width=64, layers=1, torchscript=False)
    checkpoint = checkpoints.read(tmp_path / "ViT.pt")
    made.assert_same_weights(checkpoint, made.canonical_openai(model))
    assert checkpoint.spec.text is not None
    assert checkpoint.spec.text.transformer.activation == "quick_gelu"


@pytest.mark.parametrize("name", ["input_resolution", "context_length", "vocab_size"])
def test_openais_buffers_are_checked(name: str, tmp_path: Path) -> None:
    made.make_openai(tmp_path / "ViT.pt", width=64, layers=1, torchscript=False)
    state = torch.load(tmp_path / "ViT.pt", weights_only=True)
    saved(state | {name: torch.tensor(5)}, tmp_path / "ViT.pt")
    with pytest.raises(CheckpointError, match=rf"the buffer {name} says 5, the shapes of the weights say \d+"):
        checkpoints.read(tmp_path / "ViT.pt")


def test_wrapped_prefixed_and_text_forms(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """What trainers write: under "state_dict", with "module." before the keys, the text tower under "text."."""
    expected = checkpoints.read(saved(state, tmp_path / "plain.pt"), QUICK).weights
    text = ("transformer.", "token_embedding.", "ln_final.", "positional_embedding", "text_projection")
    custom = {f"text.{key}" if key.startswith(text) else key: tensor for key, tensor in state.items()}
    for name, content in {
        "wrapped": {"epoch": 3, "state_dict": state, "optimizer": {}},
        "prefixed": {f"module.{key}": tensor for key, tensor in state.items()},
        "custom": custom,
        "both": {"state_dict": {f"module.{key}": tensor for key, tensor in custom.items()}},
    }.items():
        weights = checkpoints.read(saved(content, tmp_path / f"{name}.pt"), QUICK).weights
        assert all(torch.equal(weights[key], expected[key]) for key in expected), name


def test_safetensors_in_openais_names(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "ViT.safetensors")
    with pytest.raises(AmbiguousCheckpointError, match="QuickGELU or GELU"):
        checkpoints.read(tmp_path / "ViT.safetensors")
    weights = checkpoints.read(tmp_path / "ViT.safetensors", QUICK).weights
    assert torch.equal(weights["text.token_embedding.weight"], state["token_embedding.weight"])


def test_files_of_torch_before_1_6(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    weights = checkpoints.read(tmp_path / "old.pt", QUICK).weights
    assert torch.equal(weights["image.class_embedding"], state["visual.class_embedding"])


def test_keys_are_listed_with_their_prefix(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    changed = {f"module.{key}": tensor for key, tensor in state.items()}
    del changed["module.visual.ln_pre.bias"]
    changed["module.visual.extra"] = torch.ones(1)
    with pytest.raises(WeightsError, match=r"1 missing: module.visual.ln_pre.bias; 1 unexpected: module.visual.extra"):
        checkpoints.read(saved(changed, tmp_path / "ViT.pt"), QUICK)


@pytest.mark.parametrize("key", ["positional_embedding", "visual.conv1.weight", "visual.proj", "text_projection"])
def test_what_the_architecture_is_derived_from(key: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"1 missing: {key}"):
        checkpoints.read(saved({k: t for k, t in state.items() if k != key}, tmp_path / "less.pt"), QUICK)
    with pytest.raises(WeightsError, match=rf"1 misshapen: {key} is \[3\], expected \d axes"):
        checkpoints.read(saved(state | {key: torch.ones(3)}, tmp_path / "other.pt"), QUICK)


def test_positions_that_are_no_square(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = saved(state | {"visual.positional_embedding": torch.ones(7, 64)}, tmp_path / "ViT.pt")
    with pytest.raises(UnsupportedModelError, match="has 7 positions, expected a square of patches and a class token"):
        checkpoints.read(path, QUICK)


def test_towers_wider_than_openais_need_their_config(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """H/14 has 16 heads of 80 values: 20 heads of 64 would load without an error, and be wrong."""
    path = saved(state | {"visual.conv1.weight": torch.ones(1280, 3, 16, 16)}, tmp_path / "H.pt")
    with pytest.raises(AmbiguousCheckpointError, match="1280 wide: OpenAI's widest is 1024") as caught:
        checkpoints.read(path, QUICK)
    assert caught.value.hint is not None and "open_clip_config.json" in caught.value.hint


def test_resnets_are_named(tmp_path: Path) -> None:
    oracles.openai_clip()
    from clip.model import CLIP

    model = CLIP(64, 64, (1, 1, 1, 1), 16, None, 77, 100, 64, 1, 1)  # type: ignore[arg-type]
    path = saved(model.state_dict(), tmp_path / "RN50.pt")
    with pytest.raises(
        UnsupportedModelError, match=r"found a ResNet image tower \(weight visual\.\S+\); supported are"
    ):
        checkpoints.read(path, QUICK)


@pytest.mark.parametrize(
    ("key", "words", "hint"),
    [
        (
            "text_model.embeddings.token_embedding.weight",
            "the names are Hugging Face's",
            "put its config.json beside it",
        ),
        ("cond_stage_model.transformer.text_model.x", "Stable Diffusion's single file", "--context"),
        ("conditioner.embedders.1.model.ln_final.bias", "Stable Diffusion XL's single file", "--context"),
        ("fc.weight", "expected OpenAI's names, such as visual.conv1.weight and logit_scale; found fc.weight", ""),
    ],
)
def test_other_layouts_are_named(key: str, words: str, hint: str, tmp_path: Path) -> None:
    import re

    with pytest.raises(UnknownCheckpointError, match=words) as caught:
        checkpoints.read(saved({key: torch.ones(2)}, tmp_path / "model.pt"))
    assert re.search(hint, caught.value.hint or "")


def test_the_zip_of_torch_save_is_no_archive(archive: Path, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert is_archive(archive)
    assert not is_archive(saved(state, tmp_path / "ViT.pt"))
    (tmp_path / "text.pt").write_text("no zip")
    assert not is_archive(tmp_path / "text.pt")


def test_an_option_overrides_and_a_config_beside_is_left_alone(archive: Path, tmp_path: Path) -> None:
    shutil.copy(archive, tmp_path / "ViT.pt")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    options = Options(activation="gelu", preprocess_dialect="openai", tokenizer_dialect="huggingface")
    spec = checkpoints.read(tmp_path / "ViT.pt", options).spec
    assert spec.text is not None and spec.tokenizer is not None
    assert (spec.text.transformer.activation, spec.tokenizer.dialect, spec.tokenizer.pad_id) == (
        "gelu",
        "huggingface",
        49407,
    )
