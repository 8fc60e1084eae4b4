"""A bundle in C++ against the same bundle in Python: embeddings, errors, threads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_char_p, c_float, c_size_t, c_void_p
from pathlib import Path

import bundles_made
import numpy as np
import pytest
from cpp_made import BUILD, Cpp, CppClip, CppError, build

import clip_export
from clip_export.bundle import Bundle
from clip_export.errors import BundleError, BundleSchemaError
from clip_export.spec import ContextSpec, Family

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import random_checkpoint

TEXTS = ["a red circle", "two black squares on a white ground", "", "it&#39;s a “café”", "ΟΔΟΣ", "three " * 20]
LEAST_COSINE = 0.99999


@pytest.fixture(scope="module")
def cpp() -> Cpp:
    return Cpp(build())


@pytest.fixture(scope="module", params=("openvino", "onnxruntime"))
def clip(request: pytest.FixtureRequest, cpp: Cpp, demo_bundle: Path) -> CppClip:
    if request.param not in cpp.backends:
        lines = (BUILD / "configured.txt").read_text(encoding="utf-8").split("\n")
        pytest.skip(next((line for line in lines if f"backend {request.param}" in line), "it is not compiled in"))
    return cpp.open(demo_bundle, backend=request.param)


def _images(count: int) -> list[np.ndarray]:
    draw = np.random.default_rng(5)
    sizes = draw.integers(10, 200, (count, 2))
    return [draw.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


def _least_cosine(one: np.ndarray, other: np.ndarray) -> float:
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / norms).min())


def test_embeddings_are_those_of_python(clip: CppClip, demo_bundle: Path) -> None:
    with clip_export.load(demo_bundle, backend="onnxruntime") as python:
        assert _least_cosine(clip.encode_text(TEXTS), python.encode_text(TEXTS)) >= LEAST_COSINE
        images = _images(40)  # more than a batch
        assert _least_cosine(clip.encode_images(images), python.encode_image(images)) >= LEAST_COSINE
        raw = clip.encode_text(TEXTS, normalize=False)
        assert np.allclose(raw, python.encode_text(TEXTS, normalize=False), atol=1e-4)
        pixels = python.preprocess(images)
        assert np.allclose(clip.encode_pixels(pixels), python.encode_pixels(pixels), atol=1e-5)
    assert np.allclose(np.linalg.norm(clip.encode_text(TEXTS), axis=1), 1, atol=1e-6)


def test_golden_samples(clip: CppClip, demo_bundle: Path) -> None:
    """The bundle's own proof: token ids are compared when it is opened, outputs here."""
    golden = Bundle.open(demo_bundle).golden()
    assert golden.text is not None and golden.image is not None
    found = clip.encode_text(list(golden.text.texts), normalize=False)
    assert _least_cosine(found, golden.text.outputs["embedding"]) >= LEAST_COSINE
    found = clip.encode_pixels(golden.image.pixels, normalize=False)
    assert _least_cosine(found, golden.image.outputs["embedding"]) >= LEAST_COSINE


def test_threads_share_a_clip(clip: CppClip) -> None:
    expected = clip.encode_text(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: clip.encode_text(TEXTS), range(24)):
            assert np.allclose(found, expected, atol=1e-6)


def test_no_inputs(clip: CppClip) -> None:
    assert clip.encode_text([]).shape == (0, 128)
    assert clip.encode_images([]).shape == (0, 128)


def test_a_bad_input_is_named(clip: CppClip) -> None:
    with pytest.raises(CppError, match=r"image 1: a uint8 array \[0, 3, 3\] has 0 pixels"):
        clip.encode_images([np.zeros((3, 3, 3), np.uint8), np.zeros((0, 3, 3), np.uint8)])
    with pytest.raises(CppError, match="text 1 has 92 tokens with start and end, the context holds 77"):
        clip.encode_text(["fine", "cat " * 90])


def test_the_example_embeds_files(demo_bundle: Path, cpp: Cpp) -> None:
    if not cpp.backends:
        pytest.skip("no backend is compiled in")
    picture = Path(__file__).parents[1] / "examples" / "pictures" / "1-one-red-circle.png"
    command = [cpp.folder / "clip_embed", demo_bundle, "--text", "a red circle", "--image", picture]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    text, image = (np.array([json.loads(line)["embedding"]]) for line in done.stdout.splitlines())
    with clip_export.load(demo_bundle) as python:
        assert _least_cosine(text, python.encode_text(["a red circle"])) >= LEAST_COSINE
        assert _least_cosine(image, python.encode_image([picture])) >= LEAST_COSINE


def test_bundles_that_are_refused_say_what_python_says(cpp: Cpp, tmp_path: Path) -> None:
    def changed(name: str, data: bytes) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        bundles_made.fill(folder)
        bundles_made.put(folder / name, data)
        return folder

    folders = [
        tmp_path / "nothing",
        changed("report.json", b"{}{}"),
        changed("stranger.txt", b"x"),
        changed("manifest.json", b"[]"),
        changed("manifest.json", b'{"schema_version": 9}'),
        changed("manifest.json", b'{"schema_version": 5}'),
        changed("manifest.json", b'{"schema_version": NaN}'),
        changed("manifest.json", b'{"schema_version": -Infinity}'),
        changed("manifest.json", b'{"schema_version": 1e999}'),
        changed("manifest.json", b'{"schema_version": ' + b"9" * 400 + b"}"),
        changed("manifest.json", b'{"it\'s": 1, "it\'s": 2}'),
    ]
    for folder in folders:
        with pytest.raises(BundleError) as expected:
            Bundle.open(folder)
        with pytest.raises(CppError) as raised:
            cpp.open(folder)
        assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize(
    "data", [b'{"a": "\xff"}', b'{"a": "\\ud800"}', b"[" * 3000, b"{", b"[1,]", b'{"a": 1} x', b""]
)
def test_what_is_no_json_is_said_in_our_words(cpp: Cpp, tmp_path: Path, data: bytes) -> None:
    """Python's parser and this one count differently; neither one's own words reach the reader of a C++ program."""
    bundles_made.fill(tmp_path)
    bundles_made.put(tmp_path / "manifest.json", data)
    with pytest.raises(BundleSchemaError):
        Bundle.open(tmp_path)
    with pytest.raises(CppError, match=r"manifest\.json is not valid JSON: ") as raised:
        cpp.open(tmp_path)
    assert raised.value.code == 12
    assert "exception" not in str(raised.value)


@pytest.mark.parametrize("family", ["clip", "sdxl"])
def test_bundles_of_context_are_refused(cpp: Cpp, tmp_path: Path, family: Family) -> None:
    """Their text graphs take other inputs: one sentence says so, and what to do instead."""
    context = ContextSpec(family=family)
    bundles_made.fill(tmp_path, spec=dataclasses.replace(bundles_made.SPEC, context=context))
    assert Bundle.open(tmp_path).spec.context == context
    with pytest.raises(CppError, match=r"is a bundle of Context, which .*\nhint: use it from Python") as raised:
        cpp.open(tmp_path)
    assert raised.value.code == 10


def test_a_second_encoder_has_to_be_listed(cpp: Cpp, tmp_path: Path) -> None:
    """As Python has it, in Python's words."""
    bundles_made.fill(tmp_path)
    spec = bundles_made.plain(tmp_path)["spec"]
    spec["context"] = {"family": "sdxl", "missing_blocks": 0, "second": True, "zero_negative": True}
    bundles_made.rewrite(tmp_path, spec=spec)
    with pytest.raises(BundleError, match=r"text_2/manifest.json.* should be listed and is not") as expected:
        Bundle.open(tmp_path)
    with pytest.raises(CppError) as raised:
        cpp.open(tmp_path)
    assert str(raised.value) == str(expected.value)


def test_a_tower_that_is_not_there(cpp: Cpp, image_bundle: Path) -> None:
    if not cpp.backends:
        pytest.skip("no backend is compiled in")
    clip = cpp.open(image_bundle)
    assert clip.text_dim == 0
    with pytest.raises(CppError, match="this bundle has no text tower\nhint: build it again with --towers text"):
        clip.encode_text(["a"])


def test_backends_and_devices_that_are_none(cpp: Cpp, demo_bundle: Path) -> None:
    with pytest.raises(CppError, match="there is no backend 'magic'"):
        cpp.open(demo_bundle, backend="magic")
    absent = [name for name in ("tensorrt", "tensorrt-rtx", "onnxruntime", "openvino") if name not in cpp.backends]
    for name in absent:
        with pytest.raises(CppError, match=f"backend {name} is not compiled in") as raised:
            cpp.open(demo_bundle, backend=name)
        assert raised.value.code == 40
    if cpp.backends:
        with pytest.raises(CppError, match="expected device cpu or cuda:N, found 'gpu'"):
            cpp.open(demo_bundle, device="gpu", backend=next(b for b in cpp.backends if "tensor" not in b))


def test_golden_texts_that_come_out_otherwise(cpp: Cpp, demo_bundle: Path, tmp_path: Path) -> None:
    """A tokenizer that disagrees with the build is an error when the bundle is opened, not a wrong embedding."""
    copy = tmp_path / "bundle"
    shutil.copytree(demo_bundle, copy)
    golden, samples = (copy / "golden.safetensors").read_bytes(), Bundle.open(copy).golden().text
    assert samples is not None
    text = next(text for text in samples.texts if len(text) > 8 and text.isascii()).encode()
    (copy / "golden.safetensors").write_bytes(golden.replace(text, b"zz" + text[2:]))
    with pytest.raises(CppError, match=r"golden.safetensors in .* is changed"):
        cpp.open(copy)
    if cpp.backends:
        manifest = bundles_made.plain(copy)

        manifest["files"]["golden.safetensors"]["sha256"] = hashlib.sha256(
            (copy / "golden.safetensors").read_bytes()
        ).hexdigest()
        bundles_made.rewrite(copy, files=manifest["files"])
        with pytest.raises(CppError, match="other token ids than the build"):
            cpp.open(copy)


def _copy_with(demo: Path, folder: Path, *keys: str, value: object) -> Path:
    """The demo with one more value of its manifest changed, and a right digest."""
    if not folder.exists():
        shutil.copytree(demo, folder)
    plain = bundles_made.plain(folder)
    place = plain
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    bundles_made.rewrite(folder, **plain)
    return folder


def test_no_path_is_this_directory(cpp: Cpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle") as expected:
        Bundle.open("")
    with pytest.raises(CppError) as raised:
        cpp.call("open", b"", None, byref(c_void_p()))
    assert (raised.value.code, str(raised.value)) == (11, str(expected.value))


def test_sizes_that_the_golden_samples_do_not_have(cpp: Cpp, demo_bundle: Path, tmp_path: Path) -> None:
    """Room for a batch of such pictures would be 900 GB: it is refused when the bundle is opened, as in Python."""
    if not cpp.backends:
        pytest.skip("no backend is compiled in")
    _copy_with(demo_bundle, tmp_path / "crop", "spec", "image", "image_size", value=100_000)
    _copy_with(demo_bundle, tmp_path / "crop", "spec", "preprocess", "crop_size", value=100_000)
    _copy_with(demo_bundle, tmp_path / "length", "spec", "text", "context_length", value=78)
    _copy_with(demo_bundle, tmp_path / "length", "spec", "tokenizer", "context_length", value=78)
    _copy_with(demo_bundle, tmp_path / "names", "variants", "fp32", "text", "outputs", value=["pooled"])
    for name, words in (("crop", "100000"), ("length", "78"), ("names", "text outputs are embedding, not those")):
        with pytest.raises(BundleError, match=words) as expected:
            Bundle.open(tmp_path / name).golden()
        with pytest.raises(CppError) as raised:
            cpp.open(tmp_path / name)
        assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_engines_of_another_width(clip: CppClip, cpp: Cpp, demo_bundle: Path, tmp_path: Path, tower: str) -> None:
    """C callers make room by `embedding_dim`, so that it is compared with the engine's before any is asked for."""
    copy = _copy_with(demo_bundle, tmp_path / "bundle", "spec", tower, "embedding_dim", value=64)
    backend = clip.engine.split(",")[0]
    with pytest.raises(
        CppError, match=rf"the {tower} engine gives embedding \[-1, 128\], the manifest says \[-1, 64\]"
    ):
        cpp.open(copy, backend=backend)


def test_memory_that_there_is_not(clip: CppClip, cpp: Cpp) -> None:
    """An exception of the standard library is a code and a sentence too."""
    texts, lengths = (c_char_p * 1)(b"a"), (c_size_t * 1)(1 << 60)
    with pytest.raises(CppError, match="there is not enough memory for that") as raised:
        cpp.call("encode_text", clip._handle, texts, lengths, c_size_t(1), 1, -1, byref(c_float()))
    assert raised.value.code == 1


def test_the_example_says_what_it_cannot_read(demo_bundle: Path, cpp: Cpp, tmp_path: Path) -> None:
    if not cpp.backends:
        pytest.skip("no backend is compiled in")
    command = [cpp.folder / "clip_embed", demo_bundle, "--image", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"error: '{tmp_path}' is a directory, expected an image file\n\nhint: pass the files in it\n" in done.stderr


@pytest.mark.slow
def test_random_weights_at_the_size_of_vit_b_32(cpp: Cpp, tmp_path: Path) -> None:
    random_checkpoint.make("vit-b-32", tmp_path / "checkpoint")
    clip_export.build(tmp_path / "checkpoint", tmp_path / "bundle")
    images = _images(6)
    with clip_export.load(tmp_path / "bundle", backend="onnxruntime") as python:
        texts, pictures = python.encode_text(TEXTS), python.encode_image(images)
    for backend in cpp.backends:
        if not backend.startswith("tensorrt"):
            clip = cpp.open(tmp_path / "bundle", backend=backend)
            assert _least_cosine(clip.encode_text(TEXTS), texts) >= LEAST_COSINE
            assert _least_cosine(clip.encode_images(images), pictures) >= LEAST_COSINE
