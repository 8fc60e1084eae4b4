"""What is found at a path: dispatch, provenance, damaged files, pickles that would run code, and the hub."""

from __future__ import annotations

import ast
import errno
import hashlib
import importlib
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints_made as made
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from clip_export import checkpoints
from clip_export.checkpoints import Options, _hub, demo
from clip_export.errors import (
    AmbiguousCheckpointError,
    CheckpointError,
    MissingDependencyError,
    UnknownCheckpointError,
    UnsafeCheckpointError,
    WeightsError,
)


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("huggingface") / "tiny-clip"
    made.make_huggingface(directory, layers=1, width=64, heads=1)
    return directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    made.make_huggingface(directory, layers=1, width=64, heads=1, weights="sharded")
    return directory


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("open_clip")
    made.make_open_clip(directory, layers=1, width=64)
    return directory


def linked(source: Path, target: Path, *, without: str | None = None) -> Path:
    """The files as relative links into another directory: what a hub cache looks like."""
    for file in source.iterdir():
        if file.name != without:
            (target / file.name).symlink_to(os.path.relpath(file, target))
    return target


def test_the_registry_is_the_package() -> None:
    assert checkpoints.formats() == ["demo", "huggingface", "open_clip", "openai", "stable_diffusion"]
    for name in checkpoints.formats():
        module = importlib.import_module(f"clip_export.checkpoints.{name}")
        assert callable(module.claims) and callable(module.read) and isinstance(module.EXPECTS, str)


def test_importing_the_readers_loads_no_heavy_library() -> None:
    code = (
        "import sys, importlib, clip_export.checkpoints as c\n"
        "[importlib.import_module(f'{c.__name__}.{name}') for name in c.formats()]\n"
        "print([m for m in ('torch', 'safetensors', 'transformers', 'huggingface_hub', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == []


def test_provenance_names_every_file_and_no_path(huggingface: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoints.read(huggingface).source
    assert (source.format, source.name) == ("huggingface", "tiny-clip")
    assert set(source.sha256) == {file.name for file in huggingface.iterdir()}
    for name, digest in source.sha256.items():
        assert digest == hashlib.sha256((huggingface / name).read_bytes()).hexdigest()
    monkeypatch.chdir(huggingface)
    assert checkpoints.read(".").source == source
    assert checkpoints.read(str(huggingface)).source == source


def test_links_of_a_hub_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    assert checkpoints.read(linked(sharded, tmp_path)).source.sha256 == checkpoints.read(sharded).source.sha256


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "a/b/nowhere", "models/nowhere.pt", "", "gpt2 medium"])
def test_no_such_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "":
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UnknownCheckpointError) as caught:
        checkpoints.read(name)
    for format_name in checkpoints.formats():
        assert f"  {format_name}: " in caught.value.message


def test_a_path_object_is_never_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownCheckpointError, match="'org/name' is no file or directory here"):
        checkpoints.read(Path("org/name"))


def test_directories_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UnknownCheckpointError, match=r"it is empty; expected one of") as caught:
        checkpoints.read(tmp_path)
    assert caught.value.hint is not None and "name the directory that holds config and weights" in caught.value.hint
    for i in range(12):
        (tmp_path / f"photo{i:02}.jpg").touch()
    with pytest.raises(UnknownCheckpointError, match=r"found photo00.jpg, .* and 2 more; expected one of"):
        checkpoints.read(tmp_path)
    with pytest.raises(UnknownCheckpointError, match=r"photo00.jpg is not a checkpoint that is known here") as caught:
        checkpoints.read(tmp_path / "photo00.jpg")
    assert caught.value.hint is not None and "name the weights file" in caught.value.hint


def test_two_formats_in_one_directory(huggingface: Path, open_clip: Path, tmp_path: Path) -> None:
    """LAION's repositories hold both; the weights file tells which one is meant."""
    linked(open_clip, linked(huggingface, tmp_path))
    with pytest.raises(
        AmbiguousCheckpointError, match="more than one checkpoint, expected one: huggingface, open_clip"
    ):
        checkpoints.read(tmp_path)
    assert checkpoints.read(tmp_path / "model.safetensors").source.format == "huggingface"
    assert checkpoints.read(tmp_path / "open_clip_model.safetensors").source.format == "open_clip"
    (tmp_path / "model.safetensors").unlink()
    assert checkpoints.read(tmp_path).source.format == "open_clip"


def test_both_configs_and_huggingfaces_weights(huggingface: Path, open_clip: Path, tmp_path: Path) -> None:
    linked(open_clip, linked(huggingface, tmp_path), without="open_clip_model.safetensors")
    assert checkpoints.read(tmp_path).source.format == "huggingface"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "config.json: expected JSON, found"),
        (b"[1]", "config.json: expected a JSON object, found list"),
        (b"\xff\xfe", "config.json: expected JSON, found"),
        (b"[" * 100_000, "config.json: expected JSON, found"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "config.json is a git-lfs pointer"),
    ],
)
def test_a_config_that_is_no_json_object(content: bytes, words: str, huggingface: Path, tmp_path: Path) -> None:
    linked(huggingface, tmp_path, without="config.json")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        checkpoints.read(tmp_path)


def test_a_config_without_weights(huggingface: Path, tmp_path: Path) -> None:
    linked(huggingface, tmp_path, without="model.safetensors")
    with pytest.raises(CheckpointError, match=r"has config.json but no weights, expected model.safetensors or"):
        checkpoints.read(tmp_path)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "cut in the header": lambda data: data[:100],
    "empty": lambda data: b"",
    "header changed": lambda data: data[:8] + b"x" + data[9:],
    "length changed": lambda data: b"\xff" * 8 + data[8:],
    "noise": lambda data: bytes(range(256)) * 64,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_safetensors(how: str, huggingface: Path, tmp_path: Path) -> None:
    linked(huggingface, tmp_path, without="model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(DAMAGE[how]((huggingface / "model.safetensors").read_bytes()))
    with pytest.raises(CheckpointError, match=r"model.safetensors: expected a safetensors file, found one that cannot"):
        checkpoints.read(tmp_path)


@pytest.mark.parametrize("how", [*(name for name in DAMAGE if "changed" not in name), "text"])
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles(how: str, zipped: bool, tmp_path: Path) -> None:
    made.make_huggingface(tmp_path, layers=1, width=64, heads=1, weights="bin")
    path = tmp_path / "pytorch_model.bin"
    if not zipped:
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    path.write_bytes(b"not a checkpoint" if how == "text" else DAMAGE[how](path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: expected a file that torch.save wrote") as caught:
        checkpoints.read(tmp_path)
    assert caught.value.hint is not None and "fetch it again" in caught.value.hint


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Some bytes of a file changed, dropped or added, each at a place relative to its length."""
    places = draw(
        st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=4)
    )

    def apply(data: bytes) -> bytes:
        for place, new, dropped in places:
            start = int(place * len(data))
            data = data[:start] + new + data[start + dropped :]
        return data

    return apply


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small module in each container that holds a pickle."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    directory = tmp_path_factory.mktemp("little")
    paths = {name: directory / f"{name}.pt" for name in ("archive", "zip", "old")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's deprecation
        torch.jit.trace(module, torch.zeros(1, 3)).save(str(paths["archive"]))
    torch.save(module.state_dict(), paths["zip"])
    torch.save(module.state_dict(), paths["old"], _use_new_zipfile_serialization=False)
    return paths


@pytest.mark.filterwarnings("ignore")  # torch's and numpy's about what they find in the noise
@pytest.mark.parametrize("container", ["archive", "zip", "old"])
@given(change=damage())
@settings(max_examples=60, deadline=None)
def test_any_damage_to_a_pickle_is_a_checkpoint_error(
    container: str, change: Callable[[bytes], bytes], little: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever happens to the bytes: the tensors are read, or it is a CheckpointError."""
    from clip_export.checkpoints import _tensors, _torchscript

    path = tmp_path_factory.mktemp("damaged") / "model.pt"
    if container == "old":
        path.write_bytes(change(little[container].read_bytes()))
    else:
        with zipfile.ZipFile(little[container]) as before, zipfile.ZipFile(path, "w") as after:
            for name in before.namelist():
                data = before.read(name)
                after.writestr(name, change(data) if name.endswith("data.pkl") else data)
    try:
        archive = container == "archive"
        tensors = _torchscript.read_archive(path).tensors if archive else _tensors.read_state_dict(path)
        for tensor in tensors.values():
            tensor.load()
    except CheckpointError as error:
        assert "model.pt" in error.message


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointers(name: str, huggingface: Path, tmp_path: Path) -> None:
    linked(huggingface, tmp_path, without="model.safetensors")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 605157884\n")
    with pytest.raises(CheckpointError, match=rf"{name} is a git-lfs pointer of 73 bytes") as caught:
        checkpoints.read(tmp_path)
    assert caught.value.hint is not None and "git lfs pull" in caught.value.hint


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    """Weights are read when asked for: a file that is replaced meanwhile is an error, not another model."""
    made.make_huggingface(tmp_path, layers=1, width=64, heads=1)
    weights = checkpoints.read(tmp_path).weights
    save_file({"text_model.final_layer_norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"final_layer_norm.weight has changed while it was read: \[3\], not \[64\]"
    ):
        weights["text.final_norm.weight"]
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors: expected a safetensors file"):
        weights["text.final_norm.weight"]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        weights["text.final_norm.weight"]


def test_missing_shards_are_named(sharded: Path, tmp_path: Path) -> None:
    linked(sharded, tmp_path, without="model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"names 3 shards, missing here: model-00002-of-00003.safetensors"):
        checkpoints.read(tmp_path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "expected weight_map, an object"),
        ({"weight_map": {"a": 1}}, "expected weight_map, an object"),
        ({"weight_map": {"a": "../model.safetensors"}}, r"expected shards beside it, found the path '\.\./model"),
        ({"weight_map": {"a": "/etc/passwd"}}, "expected shards beside it, found the path '/etc/passwd'"),
    ],
)
def test_an_index_that_is_malformed(index: dict[str, Any], words: str, sharded: Path, tmp_path: Path) -> None:
    linked(sharded, tmp_path, without="model.safetensors.index.json")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        checkpoints.read(tmp_path)


def test_a_weight_in_two_shards(sharded: Path, tmp_path: Path) -> None:
    linked(sharded, tmp_path, without="model-00002-of-00003.safetensors")
    (tmp_path / "model-00002-of-00003.safetensors").symlink_to(sharded / "model-00001-of-00003.safetensors")
    with pytest.raises(WeightsError, match=r"model-00002-of-00003.safetensors repeats a weight of another shard: "):
        checkpoints.read(tmp_path)


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


class Evaluate(Touch):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


def torch_zip(content: object, path: Path) -> None:
    torch.save(content, path)


def torch_old(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare(protocol: int) -> Callable[[object, Path], None]:
    def write(content: object, path: Path) -> None:
        path.write_bytes(pickle.dumps(content, protocol=protocol))

    return write


WRITERS = {"zip": torch_zip, "old": torch_old, "pickle 2": bare(2), "pickle 4": bare(4), "pickle 5": bare(5)}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("hostile", "named"), [(Touch, r"(posix|nt|os)\.system"), (Evaluate, r"(builtins\.)?eval")])
def test_a_pickle_that_would_run_code_is_refused(
    writer: str, hostile: type[Touch], named: str, huggingface: Path, tmp_path: Path
) -> None:
    target = tmp_path / "ran"
    linked(huggingface, tmp_path, without="model.safetensors")
    for path in (tmp_path / "pytorch_model.bin", tmp_path / "model.pt"):
        WRITERS[writer]({"logit_scale": hostile(target)}, path)
        words = rf"{path.name}: expected tensors only, found the global {named}"
        with pytest.raises(UnsafeCheckpointError, match=words):
            checkpoints.read(tmp_path if path.suffix == ".bin" else path)
        assert not target.exists()
    with (tmp_path / "model.pt").open("rb") as file:
        start = file.read(2)
    if start != b"PK" and "pickle" in writer:
        pickle.loads((tmp_path / "model.pt").read_bytes())
        assert target.exists(), "the pickle does what it is made for"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "expected a state dict, found list"),
        ({}, "expected a state dict of names to tensors, found an empty one"),
        ({"epoch": 3, "model": {}}, "found 'epoch': int, 'model': dict"),
    ],
)
def test_pickles_that_are_no_state_dict(content: object, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=words):
        checkpoints.read(tmp_path / "model.pt")


def test_a_whole_module_in_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"found the global torch.nn.modules.linear.Linear"):
        checkpoints.read(tmp_path / "model.pt")


def test_names_that_no_file_can_have() -> None:
    with pytest.raises(CheckpointError):
        checkpoints.read("a\0b")
    with pytest.raises(CheckpointError):
        checkpoints.read("x" * 100_000)
    with pytest.raises(CheckpointError, match="home directory"):
        checkpoints.read("~nobody-has-this-name/clip")


def test_missing_packages_name_the_extra(huggingface: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    with pytest.raises(MissingDependencyError, match="needs torch, not installed here") as caught:
        checkpoints.read(huggingface)
    assert caught.value.hint == "pip install 'clip-export[export]'"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai/clip-vit-base-patch32", True),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", True),
        ("org/name.v2", True),
        ("org/model.pt", False),
        ("./org/name", False),
        ("org/name/more", False),
        ("name", False),
        ("/org/name", False),
        ("org/../name", False),
    ],
)
def test_what_is_written_like_a_hub_id(name: str, expected: bool) -> None:
    assert _hub.is_id(name) == expected


@pytest.fixture
def hub(huggingface: Path, open_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A hub of three repositories behind snapshot_download: the network is the one thing that is not there."""
    import fnmatch

    import huggingface_hub

    contents = {"org/hf": [huggingface], "org/oc": [open_clip], "org/both": [huggingface, open_clip]}
    asked: list[list[str]] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str], etag_timeout: float) -> str:
        if name not in contents:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such thing\nsecond line")
        asked.append(allow_patterns)
        # main moves on with every question that does not name a commit
        commit = revision or hashlib.sha1(str(len(asked)).encode()).hexdigest()
        target = tmp_path / name / "snapshots" / commit
        target.mkdir(parents=True, exist_ok=True)
        for file in (file for directory in contents[name] for file in directory.iterdir()):
            wanted = any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns)
            if wanted and not (target / file.name).exists():
                (target / file.name).symlink_to(file)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_hub_ids_choose_the_format(hub: list[list[str]], huggingface: Path, open_clip: Path) -> None:
    source = checkpoints.read("org/hf").source
    assert (source.format, source.name) == ("huggingface", "org/hf")
    assert source.sha256 == checkpoints.read(huggingface).source.sha256
    source = checkpoints.read("hf-hub:org/oc").source
    assert (source.format, source.name) == ("open_clip", "org/oc")
    assert source.sha256 == checkpoints.read(open_clip).source.sha256
    assert checkpoints.read("org/both").source.format == "huggingface"
    assert checkpoints.read("hf-hub:org/both").source.format == "open_clip"
    assert not any("*" in patterns or "*.bin" in patterns for patterns in hub)


def test_the_hub_is_not_asked_for_a_pickle_where_safetensors_are(hub: list[list[str]]) -> None:
    checkpoints.read("org/hf")
    assert not any("pytorch_model.bin" in patterns for patterns in hub)


def test_all_files_are_of_the_commit_that_was_found_first(
    hub: list[list[str]], huggingface: Path, tmp_path: Path
) -> None:
    checkpoint = checkpoints.read("org/hf")
    assert len(hub) > 1
    (snapshot,) = (tmp_path / "org" / "hf" / "snapshots").iterdir()
    assert {file.name for file in snapshot.iterdir()} == {file.name for file in huggingface.iterdir()}
    assert checkpoint.source.name == "org/hf"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_network(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def snapshot_download(*args: object, **options: object) -> str:
        raise OSError(code, os.strerror(code), str(tmp_path / "blob"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.read("org/hf")
    stored = "org/hf cannot be stored in the Hugging Face Hub's cache"
    assert caught.value.message == f"{stored}: {os.strerror(code)} ({tmp_path / 'blob'})"
    assert caught.value.hint is not None and "HF_HOME" in caught.value.hint and "network" not in caught.value.hint


def test_a_repository_of_the_other_format(hub: list[list[str]]) -> None:
    with pytest.raises(UnknownCheckpointError, match=r"org/oc on the hub has no config.json") as caught:
        checkpoints.read("org/oc")
    assert caught.value.hint == "it is open_clip's: hf-hub:org/oc"
    with pytest.raises(CheckpointError, match=r"org/hf on the hub has no open_clip_config.json"):
        checkpoints.read("hf-hub:org/hf")


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_hub_failures_are_one_sentence(prefix: str, hub: list[list[str]]) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoints.read(f"{prefix}org/nowhere")
    assert caught.value.message == (
        "org/nowhere is no local path, and the Hugging Face Hub did not give it: LocalEntryNotFoundError, no such thing"
    )
    assert caught.value.hint is not None
    assert "hf download org/nowhere --local-dir DIRECTORY" in caught.value.hint


def test_the_real_client_offline(tmp_path: Path) -> None:
    """huggingface_hub itself, told to stay offline with an empty cache, in a process of its own."""
    code = (
        "from clip_export import checkpoints, errors\n"
        "try:\n    checkpoints.read('openai/clip-vit-base-patch32')\n"
        "except errors.CheckpointError as error:\n    print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    assert done.stdout.startswith("openai/clip-vit-base-patch32 is no local path, and the Hugging Face Hub did not")
    assert "hint: check the name and the network" in done.stdout


def test_a_missing_demo_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_directory", lambda: tmp_path)
    with pytest.raises(CheckpointError, match="the demo checkpoint is missing from this install"):
        checkpoints.read("demo")


def test_the_demo_is_a_checkpoint_like_any_other(
    huggingface: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from a directory that is called demo: the word means the package's, ./demo the directory."""
    monkeypatch.setattr(demo, "_directory", lambda: huggingface)
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    checkpoint = checkpoints.read("demo", Options(activation="gelu"))
    assert (checkpoint.source.format, checkpoint.source.name) == ("demo", "demo")
    assert checkpoint.spec.text is not None
    assert checkpoint.spec.text.transformer.activation == "gelu"
    with pytest.raises(UnknownCheckpointError, match="it is empty"):
        checkpoints.read("./demo")
