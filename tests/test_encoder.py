"""A bundle's encoder against the original library, end to end: sentences and pictures in, embeddings out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import run

import checkpoints_made
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

import clip_export
from clip_export.encoder import Encoder
from clip_export.errors import BackendError, ImageError, InputError, TextError

TEXTS = [
    "a photo of an astronaut",
    "",
    "a red circle, two blue squares and a very small green triangle at the top of the picture " * 2,
    "eine Tasse Kaffee",
    "кот",
    "a",
    "coffee",
    "a diagram of a cat's eye & an ear",
]
CLOSE = 1e-5


@pytest.fixture(scope="module")
def clip(tiny_bundle: Path) -> Iterator[Encoder]:
    with clip_export.load(tiny_bundle, batch_size=4) as encoder:
        yield encoder


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in (data.astronaut(), data.coffee(), data.astronaut()[20:300, 50:210])]


@torch.inference_mode()
def test_equals_transformers_end_to_end(tiny_checkpoint: Path, clip: Encoder, photographs: list[Image.Image]) -> None:
    transformers = oracles.transformers()
    model = transformers.CLIPModel.from_pretrained(tiny_checkpoint).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_checkpoint)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tiny_checkpoint)
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    pixels = processor(photographs, return_tensors="pt")
    expected = model(**ids, **pixels)
    np.testing.assert_allclose(clip.encode_text(TEXTS, truncate=True), expected.text_embeds.numpy(), atol=CLOSE)
    np.testing.assert_allclose(clip.encode_image(photographs), expected.image_embeds.numpy(), atol=CLOSE)
    texts = [TEXTS[0], *TEXTS[3:]]
    rows = [0, *range(3, len(TEXTS))]
    scale = float(model.logit_scale.exp())
    np.testing.assert_allclose(
        clip.similarity(photographs, texts), expected.logits_per_image.numpy()[:, rows], atol=2 * scale * CLOSE
    )


def test_equals_the_reference(tiny_checkpoint: Path, clip: Encoder, photographs: list[Image.Image]) -> None:
    reference = clip_export.reference(tiny_checkpoint)
    np.testing.assert_allclose(
        clip.encode_text(TEXTS, truncate=True), reference.encode_text(TEXTS, truncate=True), atol=CLOSE
    )
    np.testing.assert_allclose(clip.encode_image(photographs), reference.encode_image(photographs), atol=CLOSE)


@settings(deadline=None, max_examples=25)
@given(texts=st.lists(st.sampled_from(TEXTS), max_size=9), batch_size=st.integers(1, 10))
def test_any_batch_composition_equals_single(tiny_bundle: Path, texts: list[str], batch_size: int) -> None:
    encoder = _shared(tiny_bundle)
    encoder.batch_size = batch_size
    single = {text: encoder.encode_text([text], truncate=True)[0] for text in set(texts)}
    found = encoder.encode_text(texts, truncate=True)
    assert found.shape == (len(texts), 64)
    for row, text in zip(found, texts, strict=True):
        np.testing.assert_allclose(row, single[text], atol=CLOSE)


_encoders: dict[Path, Encoder] = {}


def _shared(path: Path) -> Encoder:
    return _encoders.setdefault(path, clip_export.load(path))


def test_trimming_changes_nothing(tiny_bundle: Path, clip: Encoder) -> None:
    padded = clip_export.load(tiny_bundle)
    padded._trim = False
    lengths: list[int] = []
    run_text = clip._run["text"]
    assert run_text is not None

    def spy(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        lengths.append(feeds["input_ids"].shape[1])
        return dict(run_text(feeds))

    clip._run["text"] = spy
    try:
        found = clip.encode_text(TEXTS, truncate=True)
    finally:
        clip._run["text"] = run_text
    np.testing.assert_allclose(found, padded.encode_text(TEXTS, truncate=True), atol=CLOSE)
    assert lengths[0] < 10
    assert lengths[-1] > 40


def test_images_in_any_batch_equal_single(clip: Encoder, photographs: list[Image.Image]) -> None:
    single = np.concatenate([clip.encode_image([photograph]) for photograph in photographs])
    for order in itertools.permutations(range(3)):
        many = [photographs[i] for i in (*order, *order)]
        np.testing.assert_allclose(clip.encode_image(many), single[[*order, *order]], atol=CLOSE)


def test_kinds_of_image(tmp_path: Path, clip: Encoder) -> None:
    array = data.astronaut()
    Image.fromarray(array).save(tmp_path / "a.png")
    kinds = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").read_bytes(),
        Image.fromarray(array),
        array,
    ]
    found = clip.encode_image(kinds)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, found[:1].repeat(5, axis=0), atol=CLOSE)


def test_shapes_dtypes_and_normalization(clip: Encoder, photographs: list[Image.Image]) -> None:
    assert clip.tokenize(TEXTS[:2]).shape == (2, 77)
    assert clip.tokenize(TEXTS[:2]).dtype == np.int32
    pixels = clip.preprocess(photographs)
    assert pixels.shape == (3, 3, 32, 32)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(np.linalg.norm(clip.encode_text(TEXTS[:2]), axis=1), 1, atol=1e-6)
    raw = clip.encode_image(photographs, normalize=False)
    assert (abs(np.linalg.norm(raw, axis=1) - 1) > 1e-2).all()
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), clip.encode_pixels(pixels), atol=CLOSE)


def test_nothing_in_nothing_out(clip: Encoder) -> None:
    assert clip.encode_text([]).shape == (0, 64)
    assert clip.encode_image([]).shape == (0, 64)
    assert clip.similarity([], []).shape == (0, 0)
    assert clip.similarity([], ["a"]).shape == (0, 1)


def test_eight_threads_get_the_same_answers(clip: Encoder, photographs: list[Image.Image]) -> None:
    expected = clip.similarity(photographs, TEXTS[3:])
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: clip.similarity(photographs, TEXTS[3:]), range(24)))
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-4)


def test_errors_name_the_input(clip: Encoder, photographs: list[Image.Image]) -> None:
    with pytest.raises(TextError, match="text 1"):
        clip.encode_text(["a", "word " * 100], truncate=False)
    # the sixth image is in the second batch, and is still called the sixth
    with pytest.raises(ImageError, match=r"image 5: .*missing"):
        clip.encode_image([*photographs, photographs[0], photographs[1], "missing.jpg"])
    with pytest.raises(ImageError, match="expected a list of images"):
        clip.encode_image("a.jpg")
    with pytest.raises(ImageError, match=r"expected pixels uint8 \[n, 3, 32, 32\], found float32 \[1, 3, 32, 32\]"):
        clip.encode_pixels(np.zeros((1, 3, 32, 32), dtype=np.float32))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch size of at least 1, found 0"):
        clip_export.Encoder(clip.spec, batch_size=0)


def test_a_closed_encoder_says_so(tiny_bundle: Path) -> None:
    encoder = clip_export.load(tiny_bundle)
    encoder.close()
    with pytest.raises(BackendError, match="closed"):
        encoder.encode_text(["a"])


def test_one_tower_alone(tmp_path: Path) -> None:
    checkpoints_made.make_huggingface(tmp_path / "text", kind="CLIPTextModel")
    clip_export.build(tmp_path / "text", tmp_path / "bundle")
    with clip_export.load(tmp_path / "bundle") as encoder:
        assert encoder.towers == ("text",)
        outputs = encoder.text_outputs(["a red circle", "a"])
        assert outputs["hidden_states"].shape == (2, 77, 128)
        assert outputs["pooled"].shape == (2, 128)
        with pytest.raises(InputError, match="text graph gives pooled, hidden_states, and no embedding"):
            encoder.encode_text(["a"])
        with pytest.raises(InputError, match="this bundle has no image tower"):
            encoder.encode_image([data.astronaut()])
        with pytest.raises(InputError, match="no logit scale"):
            encoder.logit_factor  # noqa: B018
    transformers = oracles.transformers()
    model = transformers.CLIPTextModel.from_pretrained(tmp_path / "text").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "text")
    ids = tokenizer(["a red circle", "a"], padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = model(input_ids=ids).last_hidden_state.numpy()
    np.testing.assert_allclose(outputs["hidden_states"], expected, atol=1e-4)


def test_loading_and_encoding_never_import_torch(tiny_bundle: Path) -> None:
    program = f"""
import sys
import clip_export
clip = clip_export.load({str(tiny_bundle)!r})
clip.encode_text(["a red circle"])
clip_export.verify({str(tiny_bundle)!r})
heavy = {{"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "open_clip", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    found = run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
