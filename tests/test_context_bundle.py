"""What a bundle built with --context holds and gives: graphs, a second encoder, halves, files, the command."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bundles_made
import diffusion_made
import numpy as np
import onnx
import pytest
import torch
from checkpoints_made import make_huggingface
from safetensors.numpy import load_file
from safetensors.torch import save_file
from typer.testing import CliRunner

import clip_export
from clip_export.bundle import Bundle
from clip_export.checkpoints import Options
from clip_export.commands import app
from clip_export.commands.context import Dialect
from clip_export.context import _torch_file, dialect_names, read_embeddings
from clip_export.context.inversion import for_encoder
from clip_export.context.layers import Layer, find_layer
from clip_export.context_inputs import CONTEXT_INPUTS
from clip_export.cosine import cosines
from clip_export.encoder import Encoder
from clip_export.errors import BundleIntegrityError, InputError, UnsupportedModelError
from clip_export.manifest import manifest_bytes, parse_manifest
from clip_export.simulation import simulated
from clip_export.spec import ContextSpec

PROMPTS = ["a photo of a (red:1.3) fox", ""]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return clip_export.build("demo", tmp_path_factory.mktemp("context") / "demo", context=True)


@pytest.fixture(scope="module")
def clip(demo: Bundle) -> Iterator[Encoder]:
    """The demo's bundle, opened once."""
    with clip_export.load(demo) as found:
        yield found


@pytest.fixture(scope="module")
def half_demo(demo: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return clip_export.extend(shutil.copytree(demo.path, tmp_path_factory.mktemp("half") / "demo"), precision="fp16")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return clip_export.build(
        diffusion_made.folder_of("sdxl"), tmp_path_factory.mktemp("context") / "sdxl", context=True
    )


def test_the_demo_gives_a_context_and_the_embeddings_that_it_gives_without(clip: Encoder) -> None:
    found = clip.context(["a red circle", "two black squares"])
    embeddings = clip.encode_text(["a red circle", "two black squares and a long way after"])
    assert found.hidden_states.shape == (2, 77, 64) and found.hidden_states.dtype == np.float32
    assert found.pooled is None and found.negative_hidden_states is None
    expected = clip_export.reference("demo").encode_text(["a red circle", "two black squares and a long way after"])
    assert np.abs(embeddings - expected).max() < 1e-5


def test_the_graph_takes_a_layer_a_mask_and_vectors(demo: Bundle) -> None:
    graph = demo.graph("text")
    assert graph.inputs == CONTEXT_INPUTS
    assert graph.outputs == ("embedding", "pooled", "hidden_states", "raw_states")
    model = onnx.load(demo.graph_path("text")).graph
    assert [value.name for value in model.input] == list(CONTEXT_INPUTS)
    assert [node.op_type for node in model.node].count("Attention") == 4


@pytest.mark.parametrize("name", ["layer", "attention_mask", "inputs_embeds"])
def test_every_input_of_the_graph_matters_as_it_does_in_torch(clip: Encoder, name: str) -> None:
    """Against the torch tower, and against the same feeds without it."""
    reference = clip_export.reference("demo", Options(context=True))
    feeds = feeds_of(reference)
    changed = dict(feeds)
    rng = np.random.default_rng(0)
    if name == "layer":
        changed[name] = np.array([3, 1], np.int32)
    elif name == "attention_mask":
        changed[name] = feeds[name].copy()
        changed[name][:, 2:4] = 0
    else:
        changed["input_ids"] = feeds["input_ids"].copy()
        changed["input_ids"][:, 2] = -1
        changed[name] = 0.1 * rng.standard_normal(feeds[name].shape, dtype=np.float32)
    found, plain = clip.run_rows(changed), clip.run_rows(feeds)
    expected = reference.run_rows(changed)
    for output, array in expected.items():
        scale = np.abs(array).max()
        assert np.abs(found[output] - array).max() / scale < 1e-5, output
    assert np.abs(found["hidden_states"] - plain["hidden_states"]).max() > 0.01


def feeds_of(encoder: Encoder) -> dict[str, np.ndarray]:
    ids = encoder.tokenize(["a red circle over a square", "two black squares"])
    return {
        "input_ids": ids,
        "eot_index": np.array([7, 4], np.int32),
        "layer": np.zeros(2, np.int32),
        "attention_mask": np.ones(ids.shape, np.int32),
        "inputs_embeds": np.zeros((*ids.shape, 64), np.float32),
    }


def test_hidden_positions_are_those_that_transformers_hides(demo: Bundle) -> None:
    """The mask is compel's way of weighting below 1, and compel hands it to transformers' model."""
    pipe, clip = diffusion_made.originals("sd1")
    ids = clip.tokenize(["a red fox in the snow"])
    mask = np.ones(ids.shape, np.int32)
    mask[0, 2:4] = 0
    feeds = feeds_of(clip_export.reference("demo", Options(context=True)))
    feeds = {name: array[:1] for name, array in feeds.items()}
    feeds |= {"input_ids": ids, "attention_mask": mask, "inputs_embeds": np.zeros((1, 77, 128), np.float32)}
    with torch.no_grad():
        expected = pipe.text_encoder(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state.numpy()
    assert np.abs(clip.run_rows(feeds)["hidden_states"] - expected).max() < 1e-4


# Two encoders


def test_a_model_with_two_encoders_is_a_bundle_in_a_bundle(sdxl: Bundle) -> None:
    assert sdxl.spec.context == ContextSpec(family="sdxl", second=True, zero_negative=True)
    assert sdxl.second is not None
    assert sdxl.second.spec.context == ContextSpec(family="sdxl", zero_negative=True)
    assert "text_2/manifest.json" in sdxl.manifest.files and "text_2/text.onnx" in sdxl.manifest.files
    rows = clip_export.verify(sdxl).rows
    assert {row.output for row in rows} >= {"hidden_states", "text_2/hidden_states", "text_2/embedding"}


def test_its_graphs_give_what_diffusers_pipeline_gives(sdxl: Bundle) -> None:
    pipe, _ = diffusion_made.originals("sdxl")
    with torch.no_grad():
        expected = pipe.encode_prompt(PROMPTS, device="cpu", negative_prompt=["blurry", ""])
    with clip_export.load(sdxl) as clip:
        found = clip.context(PROMPTS, negative=["blurry", ""])
    arrays = (found.hidden_states, found.negative_hidden_states, found.pooled, found.negative_pooled)
    for array, tensor in zip(arrays, expected, strict=True):
        assert array is not None and np.abs(array - tensor.numpy()).max() <= 1e-4


def test_a_damaged_second_encoder_is_noticed(sdxl: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(sdxl.path, tmp_path / "copy")
    path = copy / "text_2" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(BundleIntegrityError, match=r"text_2/tokenizer.json"):
        clip_export.load(copy)


def test_half_graphs_keep_999_in_1000_of_every_token(clip: Encoder, half_demo: Bundle) -> None:
    with simulated(half_demo, "fp16") as half:
        expected, found = (one.context(PROMPTS, negative=["ugly", "x"], dialect="comfyui") for one in (clip, half))
    for name in ("hidden_states", "negative_hidden_states", "pooled"):
        assert cosines(getattr(found, name), getattr(expected, name)).min() >= 0.999, name
        assert not np.array_equal(getattr(found, name), getattr(expected, name))  # it is a simulation


@pytest.mark.slow
def test_half_graphs_of_both_encoders_keep_999_in_1000_of_every_token(sdxl: Bundle, tmp_path: Path) -> None:
    bundle = clip_export.extend(shutil.copytree(sdxl.path, tmp_path / "half"), precision="fp16")
    assert bundle.second is not None and "fp16" in bundle.second.manifest.variants
    with clip_export.load(bundle) as clip, simulated(bundle, "fp16") as half:
        for dialect in dialect_names():
            expected = clip.context(PROMPTS, negative=["ugly (hands)0.5", "x"], dialect=dialect)
            found = half.context(PROMPTS, negative=["ugly (hands)0.5", "x"], dialect=dialect)
            for name in ("hidden_states", "negative_hidden_states", "pooled"):
                cosine = cosines(getattr(found, name), getattr(expected, name))
                assert cosine.min() >= 0.999, (dialect, name)
                assert not np.array_equal(getattr(found, name), getattr(expected, name))  # it is a simulation
    assert clip_export.verify(bundle, precision="fp16").passed


def test_8_bits_of_both_encoders_leave_what_they_keep_beside_the_bundle(sdxl: Bundle, tmp_path: Path) -> None:
    """Not inside it, which is where the second one's bundle is."""
    path = Path(shutil.copytree(sdxl.path, tmp_path / "sdxl"))
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"a photo of {number} foxes\n" for number in range(12)), encoding="utf-8")
    asked = ["build", path, "--precision", "int8cpu", "--calibration-texts", texts, "--calibration-method", "minmax"]
    asked += ["--min-cosine", "0.99999", "--allow-slower"]
    before = sorted(path.rglob("*"))
    missed = CliRunner().invoke(app, list(map(str, asked)))
    report = tmp_path / "sdxl.text_2.int8cpu.report.json"
    assert missed.exit_code == 1 and f"the report is {report}" in missed.stderr
    assert json.loads(report.read_bytes())["missed"]
    assert (sorted(path.rglob("*")), list(tmp_path.glob(".sdxl.building-*"))) == (before, [])
    assert list((tmp_path / ".sdxl.text_2.calibration").iterdir())

    (tmp_path / "sdxl.int8cpu.report.json").mkdir()  # the first encoder fails when the second one is done
    assert CliRunner().invoke(app, [*map(str, asked), "--allow-below-contract"]).exit_code == 1
    assert report.exists()  # nothing was published
    (tmp_path / "sdxl.int8cpu.report.json").rmdir()

    done = CliRunner().invoke(app, [*map(str, asked), "--allow-below-contract"])
    assert done.exit_code == 0, done.output
    assert "int8cpu misses its contract: min cosine" in done.stderr
    assert "int8cpu text_2 misses its contract: min cosine" in done.stderr
    assert not report.exists()
    new = {file.relative_to(path).as_posix() for file in set(path.rglob("*")) - set(before)}
    files = {"int8cpu.map.json", "text.int8cpu.onnx"}
    assert new == files | {f"text_2/{name}" for name in files}
    with pytest.warns(UserWarning, match="misses its accuracy contract") as caught:
        clip_export.load(path, precision="int8cpu").close()
    assert [str(warning.message).split(" misses")[0] for warning in caught] == [
        f"int8cpu of {path}",
        f"int8cpu of {path / 'text_2'}",
    ]


def test_plans_for_a_gpu_are_built_from_the_half_graph(half_demo: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    copy = shutil.copytree(half_demo.path, tmp_path / "plans")
    options = clip_export.PlanOptions(batches=(1,), lengths=(77,))
    bundle = clip_export.extend(copy, precision="fp16", engine="tensorrt-rtx", gpus=["sm_89"], options=options)
    (plan,) = bundle.manifest.plans
    assert set(plan.profiles[0]) == set(CONTEXT_INPUTS)
    assert plan.profiles[0]["inputs_embeds"].max == (2, 77, 64)
    assert plan.options["attention"] == "primitive"  # no compiler has a fused kernel for a mask of its own


# The manifest


def test_manifests_of_schema_3_are_still_read() -> None:
    """They have no spec.context, and those of schema 4 have to have it."""
    path = Path(__file__).parent / "manifests"
    old = [json.loads(file.read_text()) for file in sorted(path.glob("*.json"))]
    assert any(plain["schema_version"] < 4 for plain in old)
    manifest = bundles_made_manifest()
    assert parse_manifest(manifest_bytes(manifest)) == dataclasses.replace(manifest, schema_version=4)
    text = manifest_bytes(manifest).decode()
    assert '"context": null' in text


def bundles_made_manifest() -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return bundles_made.fill(Path(folder))


# Layers


@pytest.mark.parametrize(
    ("spelling", "family", "layer"),
    [
        (None, "sd1", Layer(0, True)),
        (None, "sd2", Layer(1, True)),
        (None, "sdxl", Layer(1, False)),
        ("last", "sdxl", Layer(0, False)),
        ("penultimate", "sd1", Layer(1, True)),
        ("Last-3", "sd1", Layer(3, True)),
        ("comfyui:-1", "sdxl", Layer(0, False)),
        ("comfyui:-2", "sd2", Layer(1, True)),
        ("diffusers:0", "sd1", Layer(0, True)),
        ("diffusers:1", "sdxl", Layer(2, False)),
        ("diffusers:1", "sd2", Layer(2, True)),
        ("a1111:2", "sd1", Layer(1, True)),
        ("compel:penultimate_hidden_states_non_normalized", "sd1", Layer(1, False)),
    ],
)
def test_one_layer_has_many_spellings(spelling: str | None, family: Any, layer: Layer) -> None:
    assert find_layer(spelling, family) == layer


@pytest.mark.parametrize(
    "value",
    [
        *(2, -2, "2", "-2", "last-", "comfyui:2", "diffusers:-1", "a1111:0", "compel:x", "sd:1", "diffusers:x"),
        *("comfyui:-1_0", "a1111:\u0661", "last-\u0661", "comfyui:-\u0661", f"a1111:{'1' * 5000}"),
    ],
)
def test_what_names_no_layer_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="clip_skip") as caught:
        find_layer(value, "sd1")
    assert caught.value.hint


def test_clip_skip_beyond_the_layers_is_refused(clip: Encoder) -> None:
    assert clip.context(["a"], clip_skip="last-4").clip_skip == "last-4"
    with pytest.raises(InputError, match="clip_skip last-5 is beyond the 4 layers of the text encoder"):
        clip.context(["a"], clip_skip="last-5")
    with pytest.raises(InputError, match="beyond the 4 layers"):
        clip.context(["a"], clip_skip="comfyui:-6")


def test_the_last_block_of_stable_diffusion_2_is_not_in_diffusers_folder() -> None:
    _, clip = diffusion_made.originals("sd2")
    with pytest.raises(InputError, match="a block that this checkpoint does not have") as caught:
        clip.context(["a"], clip_skip="last")
    assert caught.value.hint == "penultimate is what the model was trained with"


# Other bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "a fox"}, "expected a list of prompts, found str"),
        ({"prompts": []}, "expected prompts, found none"),
        ({"prompts": ["a", 1]}, "prompts 1 is not a str but int"),
        ({"prompts": [None]}, "prompts 0 is not a str but NoneType"),
        ({"prompts": ["a", "\ud800"]}, "prompts 1 cannot be encoded: .*surrogates"),
        ({"prompts": ["a"], "negative": ["\ud800"]}, "negative prompts 0 cannot be encoded"),
        ({"prompts": ["a"], "embeddings": "toy.pt"}, "expected a list of embeddings .*, found 'toy.pt'"),
        ({"prompts": ["a"], "embeddings": Path("toy.pt")}, "expected a list of embeddings .*, found 'toy.pt'"),
        ({"prompts": ["a", "b"], "negative": ["c"]}, "expected a negative prompt for each of 2 prompts, found 1"),
        ({"prompts": ["a"], "dialect": "midjourney"}, "there is no dialect 'midjourney' of prompts"),
        ({"prompts": ["(a)+ .blend("], "dialect": "compel", "negative": ["()"]}, "finds no text"),
        ({"prompts": ["a.swap(b)"], "dialect": "compel"}, "changes attention maps, not the Context"),
        ({"prompts": ['("a", "b").blend(1)'], "dialect": "compel"}, "expected a weight for each of 2 prompts"),
        ({"prompts": ["withLora(x)"], "dialect": "compel"}, "asks for a LoRA"),
    ],
)
def test_bad_input_is_refused_in_words(clip: Encoder, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        clip.context(arguments.pop("prompts"), **arguments)
    assert caught.value.hint


def test_a_bundle_without_context_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gives embeddings, and no Context") as caught:
        clip_export.reference("demo").context(["a"])
    assert "--context" in str(caught.value.hint)


def test_outputs_and_towers_are_settled_by_context(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="has all outputs"):
        clip_export.build("demo", tmp_path / "a", context=True, outputs=("pooled",))
    with pytest.raises(InputError, match="an image tower was asked for"):
        clip_export.build("demo", tmp_path / "b", context=True, towers=("image",))
    assert not list(tmp_path.iterdir())


# Files of textual inversion


def save_embedding(path: Path, tensors: Mapping[str, torch.Tensor] | object) -> Path:
    if path.suffix.lower() == ".safetensors":
        save_file(dict(tensors), path)  # type: ignore[call-overload]
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.bin", "raw.pt"])
def test_every_kind_of_file_gives_the_same_vectors(
    clip: Encoder, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    vectors = (0.1 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    forms: dict[str, object] = {
        "a.safetensors": {"emb_params": vectors},
        "a.pt": {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors.requires_grad_()}, "step": 99},
        "a.bin": {"<word>": torch.nn.Parameter(vectors)},
        "raw.pt": {"<word>": vectors.t().contiguous().t()},  # not laid out in order
    }
    path = save_embedding(tmp_path / name, forms[name])
    found = clip.context(["a embedding:it b"], dialect="comfyui", embeddings={"it": path})
    feeds = feeds_of(clip)
    feeds = {key: array[:1] for key, array in feeds.items()}
    ids = clip.tokenize(["a x y b"])
    feeds["input_ids"] = np.where(np.isin(np.arange(77), [2, 3]), -1, ids).astype(np.int32)
    feeds["eot_index"] = np.array([5], np.int32)
    feeds["inputs_embeds"][0, 2:4] = vectors.detach().float().numpy()
    expected = clip.run_rows(feeds)["hidden_states"]
    assert np.array_equal(found.hidden_states, expected)


def test_sdxls_embeddings_have_vectors_for_both_encoders(sdxl: Bundle, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = {
        "clip_l": 0.1 * torch.randn(2, 128, generator=generator),
        "clip_g": 0.1 * torch.randn(2, 192, generator=generator),
    }
    path = save_embedding(tmp_path / "toy.safetensors", parts)
    with clip_export.load(sdxl) as clip:
        plain = clip.context(["a x fox"], dialect="comfyui").hidden_states
        found = clip.context(["a embedding:toy fox"], dialect="comfyui", embeddings=[path]).hidden_states
        assert all(np.abs(found[:, 2:, cut] - plain[:, 2:, cut]).max() > 0.01 for cut in (slice(128), slice(128, None)))
        wrong = save_embedding(tmp_path / "one.safetensors", {"emb_params": torch.ones(2, 128)})
        with pytest.raises(InputError, match="the embedding 'one' is for one text encoder, and this model has 2"):
            clip.context(["a"], embeddings=[wrong])


def test_two_embeddings_of_one_stem_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    first = save_embedding(tmp_path / "toy.pt", {"x": torch.ones(2, 64)})
    for place in ("toy.safetensors", "b/toy.pt"):
        second = save_embedding(tmp_path / place, {"x": torch.zeros(2, 64)})
        with pytest.raises(InputError, match=r"two embeddings are called 'toy': .*toy.pt and .*toy") as caught:
            read_embeddings([first, second])
        assert caught.value.hint
        assert read_embeddings({"a": first, "b": second}).keys() == {"a", "b"}
    assert read_embeddings([first, first]).keys() == {"toy"}


def test_the_refiner_takes_the_vectors_for_bigg() -> None:
    parts = {"clip_l": np.zeros((1, 128), np.float32), "clip_g": np.ones((1, 192), np.float32)}
    sizes = {"encoders": 1, "first_id": 49408, "room": 75}
    refiner = for_encoder({"toy": parts}, 0, family="sdxl_refiner", width=192, **sizes)
    assert refiner["toy"][0].values[0] == 1
    assert for_encoder({"toy": parts}, 0, family="sd1", width=128, **sizes)["toy"][0].values[0] == 0


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("name", "held", "message"),
    [
        ("a.pt", {"x": torch.ones(2, 32)}, "the embedding 'a' is 32 wide, the text encoder 64"),
        ("a.pt", {"x": torch.ones(90, 64)}, "has 90 vectors, and 75 fit into a context"),
        ("a.pt", {"x": torch.ones(2, 64) / 0}, "holds NaN or infinity"),
        ("a.pt", {"x": torch.ones(2, 3, 64)}, r"expected vectors \[n, width\], found \[2, 3, 64\]"),
        ("a.pt", [torch.ones(2, 64)], "expected an embedding of textual inversion.*found list"),
        ("a.pt", {"x": torch.ones(64), "y": torch.ones(64)}, "expected an embedding of textual inversion.*found x, y"),
        ("a.pt", {"x": Harmful()}, "found .*print, which reading the file would call; it was not read"),
        ("a.safetensors", {"lora_up": torch.ones(2, 64), "lora_down": torch.ones(2, 64)}, "expected an embedding"),
        ("a.safetensors", {"x.lora_up.weight": torch.ones(2, 64)}, "expected an embedding.*found x.lora_up.weight"),
        ("A.SAFETENSORS", {"x.lora_A.weight": torch.ones(2, 64)}, "expected an embedding.*found x.lora_A.weight"),
        ("a.pt", {"x.alpha": torch.ones(64)}, "expected an embedding.*found x.alpha"),
        ("a.safetensors", {"x": torch.ones(2, 64).int()}, "expected floating point vectors, found I32"),
    ],
)
def test_files_that_are_no_embedding_of_this_model_are_refused(
    clip: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, name: str, held: object, message: str
) -> None:
    path = save_embedding(tmp_path / name, held)
    with pytest.raises(InputError, match=message) as caught:
        clip.context(["a"], embeddings=[path])
    assert caught.value.hint
    assert "must not run" not in capsys.readouterr().out


def test_an_embedding_has_a_name_and_is_a_file(tmp_path: Path) -> None:
    path = save_embedding(tmp_path / "A.SAFETENSORS", {"x": torch.ones(2, 64)})  # the suffix in either case
    assert read_embeddings([path])["A"][""].shape == (2, 64)
    for name in ("", " "):
        with pytest.raises(InputError, match=r"A.SAFETENSORS has no name"):
            read_embeddings({name: path})
    with pytest.raises(InputError, match=f"{tmp_path.name} is no file"):
        read_embeddings([tmp_path])


# Pickles of torch.save, written opcode by opcode

STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x04tQ"  # of 4 numbers
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor_of(storage: bytes, offset: int, size: int, stride: int) -> bytes:
    number = b"J" + size.to_bytes(4, "little") + b"\x85"
    return REBUILD + b"(" + storage + bytes([75, offset]) + number + bytes([75, stride]) + b"\x85tR"


def write_pickle(path: Path, value: bytes) -> Path:
    """An archive of torch.save with 4 numbers, and a dict of "x" to what the opcodes `value` make."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}X\x01\0\0\0x" + value + b"s.")
        archive.writestr("a/data/0", np.arange(4, dtype=np.float32).tobytes())
    return path


def test_the_pickles_of_these_tests_are_those_of_torch(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "a.pt", tensor_of(STORAGE, 1, 3, 1))
    assert np.array_equal(read_embeddings([path])["a"][""], [[1, 2, 3]])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (tensor_of(STORAGE, 0, 300_000_000, 0), r"a tensor of \[300000000\] has more elements than its 4 numbers"),
        (tensor_of(STORAGE, 2, 3, 1), r"a tensor of \[3\] does not lie in its 4 numbers"),
        (tensor_of(tensor_of(STORAGE, 3, 4, 0), 0, 4, 1), "a tensor is made of another tensor"),
        (b"]r" + (200_000_000).to_bytes(4, "little"), "is no file of torch.save: its pickle counts to 200000000"),
        (b"]p200000000\n", "is no file of torch.save: its pickle counts to 200000000"),
        (b"\x8e" + (2**31).to_bytes(8, "little"), "cannot be read as a file of torch.save"),
        (b"\x96" + (2**31).to_bytes(8, "little"), "cannot be read as a file of torch.save"),
        (b"X" + (2**21).to_bytes(4, "little") + b"a" * 2**21, "holds too much besides vectors"),
        (REBUILD + b"}X\x0c\0\0\0__defaults__K\x01\x85sb", "cannot be read as a file of torch.save"),
        (REBUILD + b"N}X\x0c\0\0\0__defaults__K\x01\x85s\x86b", "cannot be read as a file of torch.save"),
        (b"ctorch._utils\n_rebuild_parameter\n}X\x01\0\0\0yK\x01sb", "cannot be read as a file of torch.save"),
    ],
)
def test_pickles_take_no_more_than_the_file_is_long_and_change_nothing(
    tmp_path: Path, value: bytes, message: str
) -> None:
    path = write_pickle(tmp_path / "a.pt", value)
    before = peak_megabytes()
    with pytest.raises(InputError, match=message):
        read_embeddings([path])
    assert peak_megabytes() - before < 200
    assert not any(hasattr(made, "__dict__") for made in (_torch_file._Tensor(), _torch_file._Parameter()))


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_damaged_files_are_refused(clip: Encoder, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        clip.context(["a"], embeddings=[tmp_path / name])
    path = save_embedding(tmp_path / name, {"x": torch.ones(2, 64)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=name):
        clip.context(["a"], embeddings=[path])


# The file and the command


def test_the_file_holds_what_a_pipeline_takes(sdxl: Bundle, tmp_path: Path) -> None:
    with clip_export.load(sdxl) as clip:
        made = clip.context(["a fox"], negative=["blurry"])
    made.save(tmp_path / "context.safetensors")
    found = load_file(tmp_path / "context.safetensors")
    assert np.array_equal(found["prompt_embeds"], made.hidden_states)
    assert np.array_equal(found["negative_pooled_prompt_embeds"], made.negative_pooled)
    assert set(found) == {
        "prompt_embeds",
        "pooled_prompt_embeds",
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
    }


def test_chunks_are_counted_in_contexts_of_the_models_own_length(tmp_path: Path) -> None:
    make_huggingface(tmp_path / "clip", preprocessor={}, context_length=20)
    clip = clip_export.reference(tmp_path / "clip", Options(context=True))
    made = clip.context(["a " * 30], dialect="comfyui")
    assert made.hidden_states.shape[1] == 40 and made.chunks == 2


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_a_file_and_prints_shapes(demo: Bundle, clip: Encoder, tmp_path: Path) -> None:
    output = tmp_path / "context.safetensors"
    found = run(
        *("context", demo.path, "a (red:1.2) fox", "--negative", "blurry", "--clip-skip", "penultimate"),
        *("--dialect", "comfyui", "-o", output),
    )
    assert found.exit_code == 0, found.output
    assert "prompt_embeds" in found.stdout and "float32 [1, 77, 64]" in found.stdout
    expected = clip.context(["a (red:1.2) fox"], negative=["blurry"], clip_skip="penultimate", dialect="comfyui")
    assert np.array_equal(load_file(output)["negative_prompt_embeds"], expected.negative_hidden_states)


def test_the_command_takes_several_prompts_and_one_negative(demo: Bundle) -> None:
    found = run("context", demo.path, "a fox", "a dog", "--negative", "blurry", "--json")
    assert json.loads(found.stdout)["shapes"] == {"prompt_embeds": [2, 77, 64], "negative_prompt_embeds": [2, 77, 64]}
    found = run("context", demo.path, "a fox", "--clip-skip", "2")
    assert found.exit_code == 1 and "clip_skip '2' names no layer" in found.output and "hint:" in found.output


@pytest.mark.parametrize(
    ("dialect", "said"), [("diffusers", True), ("compel", True), ("a1111", False), ("comfyui", False)]
)
def test_the_command_says_that_two_dialects_take_weights_for_text(demo: Bundle, dialect: str, said: bool) -> None:
    note = f"note: (blur:1.3) is text to the dialect {dialect}"
    found = run("context", demo.path, "a (red) fox", "--negative", "(blur:1.3)", "--dialect", dialect)
    assert found.exit_code == 0 and (note in found.stderr) == said
    assert "note" not in run("context", demo.path, "a (red) fox: 1.3", "--dialect", dialect).stderr


@pytest.mark.parametrize("name", ["context.pt", "context"])
def test_a_context_is_written_as_safetensors_and_as_nothing_else(demo: Bundle, tmp_path: Path, name: str) -> None:
    found = run("context", demo.path, "a fox", "-o", tmp_path / name)
    assert found.exit_code == 1 and "a Context is written as .safetensors, found the suffix" in found.stderr
    assert f"hint: name it {tmp_path / 'context'}.safetensors" in found.stderr
    assert not found.stdout and not list(tmp_path.iterdir())
    assert run("context", demo.path, "a fox", "-o", tmp_path / "A.SAFETENSORS").exit_code == 0


def test_the_command_takes_a_precision(demo: Bundle) -> None:
    assert run("context", demo.path, "a fox", "--precision", "fp32").exit_code == 0
    found = run("context", demo.path, "a fox", "--precision", "fp16")
    assert found.exit_code == 1 and "fp16" in found.output and "hint:" in found.output


def test_the_command_names_every_dialect() -> None:
    assert sorted(Dialect.__args__) == dialect_names()  # type: ignore[attr-defined]
