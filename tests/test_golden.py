"""Golden samples: that they survive a file, that hostile files are refused, and that they can tell things apart."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from bundles_made import golden
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load, save
from tokenizer_oracles import original

from clip_export.errors import BundleIntegrityError
from clip_export.golden import MAX_GOLDEN_BYTES, Golden, ImageGolden, TextGolden, golden_images, golden_texts
from clip_export.spec import Dialect

Tensors = dict[str, npt.NDArray[Any]]

PICTURE_SHA256 = "74c4e15a1af453ec4dbee227aafc6e4e3fe1da4c1ed4387232c167cff376bc0f"


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [Image.open(io.BytesIO(file)) for file in golden_images()]


def equal(one: Golden, other: Golden) -> bool:
    def arrays(sample: TextGolden | ImageGolden) -> list[npt.NDArray[Any]]:
        first = [sample.input_ids, sample.eot_index] if isinstance(sample, TextGolden) else [sample.pixels]
        return [*first, *(sample.outputs[name] for name in sorted(sample.outputs))]

    for a, b in ((one.text, other.text), (one.image, other.image)):
        if a is None or b is None:
            if a is not b:
                return False
            continue
        inputs = (a.texts, b.texts) if isinstance(a, TextGolden) else (a.files, b.files)  # type: ignore[union-attr]
        same = [x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True)]
        if inputs[0] != inputs[1] or not all(same):
            return False
    return True


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    golden(5).save(tmp_path / "g")
    assert equal(Golden.load(tmp_path / "g"), golden(5))


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    one = golden()
    assert one.text is not None
    many = {"pooled": one.text.outputs["embedding"] * 2, **one.text.outputs}
    for name, outputs in (("a", many), ("b", dict(reversed(many.items())))):
        text = dataclasses.replace(one.text, outputs=outputs, input_ids=np.asfortranarray(one.text.input_ids))
        dataclasses.replace(one, text=text).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert equal(Golden.load(tmp_path / "a"), Golden.load(tmp_path / "b"))


@pytest.mark.parametrize("missing", ["text", "image"])
def test_one_tower(tmp_path: Path, missing: str) -> None:
    one = dataclasses.replace(golden(), **{missing: None})
    one.save(tmp_path / "g")
    assert equal(Golden.load(tmp_path / "g"), one)


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=5))
def test_any_texts(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    n = len(texts)
    text = TextGolden(
        texts=tuple(texts),
        input_ids=np.zeros((n, 2), np.int32),
        eot_index=np.ones(n, np.int32),
        outputs={"embedding": np.ones((n, 1), np.float32)},
    )
    path = tmp_path_factory.getbasetemp() / "any_texts"
    Golden(text=text, image=None).save(path)
    loaded = Golden.load(path).text
    assert loaded is not None
    assert loaded.texts == tuple(texts)


def test_other_programs_can_read_it(tmp_path: Path) -> None:
    """The layout that docs/bundle-format.md promises, read with safetensors alone."""
    golden().save(tmp_path / "g")
    with safe_open(tmp_path / "g", framework="numpy") as file:
        assert sorted(file.keys()) == [
            "image.files.bytes", "image.files.offsets", "image.outputs.embedding", "image.pixels",
            "text.eot_index", "text.input_ids", "text.outputs.embedding", "text.texts.bytes", "text.texts.offsets",
        ]  # fmt: skip
        offsets = file.get_tensor("text.texts.offsets")
        data = file.get_tensor("text.texts.bytes")
    assert bytes(data[offsets[1] : offsets[2]]).decode() == "text 1 é"


# Files that nobody vouches for


def _set(name: str, value: Any) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: np.asarray(value)})


def _scale(name: str, value: Any) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name] * np.float32(value)})


def _remove(*names: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(name) for name in names] and None


OFFSETS = np.int64
IDS = np.int32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("text.texts.offsets", OFFSETS([0, 9, 5, 27])), r"text.texts.offsets: expected 0 up to 27, never falling"),
        (_set("text.texts.offsets", OFFSETS([0, 9, 18, 26])), r"text.texts.offsets: expected 0 up to 27"),
        (_set("text.texts.offsets", OFFSETS([0, 9, 18, 2**62])), r"text.texts.offsets: expected 0 up to 27"),
        (_set("text.texts.offsets", OFFSETS([-9, 9, 18, 27])), r"text.texts.offsets: expected 0 up to 27"),
        (_set("text.texts.offsets", OFFSETS([1, 9, 18, 27])), r"text.texts.offsets: expected 0 up to 27"),
        (_set("text.texts.offsets", OFFSETS([0, 8, 18, 27])), r"text.texts: not UTF-8"),
        (_set("text.texts.offsets", OFFSETS([])), r"text.texts: expected one row of each"),
        (_set("text.texts.offsets", OFFSETS([[0, 9], [18, 27]])), r"text.texts: expected one row of each"),
        (_set("text.texts.offsets", np.float64([0, 9, 18, 27])), r"text.texts.offsets: expected int64, found float64"),
        (_set("text.texts.offsets", OFFSETS([0, 27])), r"embedding: expected float32 \[1, any\], found .* \[3, 4\]"),
        (_remove("text.texts.bytes"), r"text.texts.bytes is missing"),
        (_remove("text.input_ids"), r"text.input_ids is missing"),
        (_remove("text.outputs.embedding"), r"text: holds no outputs"),
        (_remove("image.pixels"), r"image.pixels is missing"),
        (_set("text.input_ids", np.zeros((3, 8), np.int64)), r"text.input_ids: expected int32, found int64"),
        (_set("text.input_ids", IDS([1, 2, 3])), r"text.input_ids: expected int32 \[3, any\], found int32 \[3\]"),
        (_set("text.input_ids", np.zeros((3, 0), IDS)), r"text.input_ids: expected int32 \[3, any\]"),
        (_set("text.eot_index", IDS([0, 1])), r"text.eot_index: expected int32 \[3\], found int32 \[2\]"),
        (_set("text.eot_index", IDS([0, 1, 8])), r"text.eot_index: expected positions in 0..7"),
        (_set("text.eot_index", IDS([0, -1, 7])), r"text.eot_index: expected positions in 0..7"),
        (_scale("text.outputs.embedding", np.nan), r"text.outputs.embedding: holds NaN or infinity"),
        (_scale("image.outputs.embedding", np.inf), r"image.outputs.embedding: holds NaN or infinity"),
        (_set("text.outputs.embedding", np.ones(3, np.float32)), r"expected float32 \[3, any\], found float32 \[3\]"),
        (_set("text.outputs.embedding", np.ones((3, 4))), r"text.outputs.embedding: expected float32, found float64"),
        (_set("image.pixels", np.zeros((3, 3, 9, 8), np.uint8)), r"image.pixels: not square"),
        (_set("image.pixels", np.zeros((3, 8, 8, 3), np.uint8)), r"image.pixels: expected uint8 \[3, 3, any, any\]"),
        (_set("image.surprise", np.uint8([0])), r"unknown tensor 'image.surprise'"),
        (_set("sound.\x1b[31m", np.uint8([0])), r"unknown tensor 'sound.\\x1b\[31m'"),
    ],
)
def test_samples_that_do_not_hold_together(tmp_path: Path, change: Callable[[Tensors], None], words: str) -> None:
    golden().save(tmp_path / "golden.safetensors")
    tensors = load((tmp_path / "golden.safetensors").read_bytes())
    change(tensors)
    (tmp_path / "golden.safetensors").write_bytes(save(tensors))
    with pytest.raises(BundleIntegrityError, match=f"^golden.safetensors: .*{words}") as raised:
        Golden.load(tmp_path / "golden.safetensors")
    assert raised.value.hint


HEADER = b'{"x":{"dtype":"%s","shape":[%s],"data_offsets":[0,2]}}'


def _file(header: bytes, data: bytes = b"\0\0") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 100, "not a safetensors file"),
        (_file(b"{"), "not a safetensors file"),
        (_file(HEADER % (b"U8", b"3")), "not a safetensors file"),
        (_file(HEADER % (b"BF16", b"1")), "numpy has no dtype 'BF16'"),
        (_file(b"{}", b""), "holds no samples"),
        (_file(HEADER % (b"U8", b"2")), "unknown tensor 'x'"),
    ],
)
def test_what_is_no_golden_file(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "golden.safetensors").write_bytes(content)
    with pytest.raises(BundleIntegrityError, match=f"golden.safetensors.*{words}"):
        Golden.load(tmp_path / "golden.safetensors")


def test_a_missing_and_an_enormous_file(tmp_path: Path) -> None:
    with pytest.raises(BundleIntegrityError, match=r"golden.safetensors cannot be read: No such file"):
        Golden.load(tmp_path / "golden.safetensors")
    with (tmp_path / "golden.safetensors").open("wb") as file:
        file.truncate(MAX_GOLDEN_BYTES + 1)
    with pytest.raises(BundleIntegrityError, match="more than golden samples can need"):
        Golden.load(tmp_path / "golden.safetensors")


@given(data=st.data())
def test_damage_is_an_error_or_other_samples(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Nothing but BundleIntegrityError comes out of a damaged file; without the manifest's digest some load."""
    path = tmp_path_factory.getbasetemp() / "damaged"
    golden(1).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        Golden.load(path)
    except BundleIntegrityError as error:
        assert error.message.startswith("damaged")


# The samples themselves


def test_there_are_enough_texts() -> None:
    texts = golden_texts()
    assert len(texts) >= 16
    assert len(set(texts)) == len(texts)
    assert "" in texts
    assert "\n".join(texts).encode("utf-8")


@pytest.mark.parametrize(("one", "other"), list(combinations(("openai", "open_clip", "huggingface"), 2)))
def test_texts_tell_the_original_tokenizers_apart(one: Dialect, other: Dialect) -> None:
    texts = golden_texts()
    a, b = (original(dialect, 77)(texts) for dialect in (one, other))
    end = 49407
    # Padding differs anyway; only what comes up to the end of the text counts.
    differ = [list(x[: list(x).index(end)]) != list(y[: list(y).index(end)]) for x, y in zip(a, b, strict=True)]
    assert sum(differ) >= (1 if "huggingface" not in (one, other) else 6)


def test_most_texts_fit_a_context_of_77() -> None:
    ids = original("openai", 77)(golden_texts())
    assert (ids[:, -1] == 0).mean() > 0.9


def test_pictures_are_png_of_many_modes_and_sizes(images: list[Image.Image]) -> None:
    files = golden_images()
    assert len(files) >= 8
    assert sum(map(len, files)) < 1_500_000
    assert {image.format for image in images} == {"PNG"}
    assert {image.mode for image in images} == {"RGB", "L", "RGBA", "P", "LA", "1"}
    assert {image.size for image in images} >= {(1, 1), (640, 480), (224, 224)}
    assert any("transparency" in image.info for image in images)


def test_pictures_are_the_same_each_time_and_everywhere() -> None:
    assert golden_images() == golden_images()
    pixels = np.asarray(Image.open(io.BytesIO(golden_images()[0])))
    # Drawn in integers alone: no other processor or numpy draws a different picture.
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == PICTURE_SHA256


def test_pictures_have_structure(images: list[Image.Image]) -> None:
    """Neighbouring pixels are alike, as in photographs and unlike noise, and no picture is flat."""
    large = [image for image in images if min(image.size) > 30 and image.mode not in ("1", "P")]
    assert len(large) >= 8
    for image in large:
        grey = np.asarray(image.convert("L"), np.float64)
        assert grey.std() > 15
        assert np.corrcoef(grey[:, :-1].ravel(), grey[:, 1:].ravel())[0, 1] > 0.8


def test_pictures_differ_from_each_other(images: list[Image.Image]) -> None:
    small = [np.asarray(image.convert("RGBA").convert("RGB").resize((32, 32)), np.float64) for image in images]
    distances = [abs(a - b).mean() for a, b in combinations(small, 2)]
    assert min(distances) > 10


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_pictures_tell_the_order_of_conversion_apart(images: list[Image.Image], mode: str) -> None:
    for image in (image for image in images if image.mode == mode):
        first, last = image.convert("RGB").resize((224, 224), 3), image.resize((224, 224), 3).convert("RGB")
        assert abs(np.asarray(first, int) - np.asarray(last, int)).max() > 30
