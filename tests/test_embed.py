"""embed: rows against the encoder and against transformers, and that no failure leaves half a file or goes unnamed."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import oracles
import pictures
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import clip_export
from clip_export.embed import Failure, embed_images, embed_texts
from clip_export.embedding_file import embedding_file, rows_path
from clip_export.encoder import Encoder
from clip_export.errors import ImageError, InputError, MissingDependencyError, OutputError, TextError
from clip_export.inputs import count_lines, find_images, image_suffixes, read_lines
from clip_export.output_file import staged_file

LONG = "a very long caption " * 100
PHOTOGRAPHS = [pictures.PHOTOGRAPHS[name] for name in ("chelsea", "coffee", "camera", "china", "flower")]


@pytest.fixture(scope="module")
def encoder(tiny_bundle: Path) -> Iterator[Encoder]:
    with clip_export.load(tiny_bundle, batch_size=4, threads=1) as opened:
        yield opened


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A photograph that was cut short."""
    path = tmp_path / "damaged.jpg"
    path.write_bytes(pictures.PHOTOGRAPHS["rocket"].read_bytes()[:20_000])
    return path


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows_path(path).read_text(encoding="utf-8").splitlines()]


# What is written


def test_texts_are_those_of_transformers(encoder: Encoder, tiny_checkpoint: Path, tmp_path: Path) -> None:
    texts = [text for text in corpus.sentences()[:: len(corpus.sentences()) // 180] if len(text) < 60]
    output = tmp_path / "texts.npy"
    transformers = oracles.transformers()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_checkpoint)
    model = transformers.CLIPModel.from_pretrained(tiny_checkpoint).eval()
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        pooled = model.text_model(**ids).pooler_output
        expected = torch.nn.functional.normalize(model.text_projection(pooled)).numpy()

    result = embed_texts(encoder, iter(texts), output, truncate=True)

    found = np.load(output)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert (result.rows, result.dim, result.skipped) == (*found.shape, 0)
    assert len(texts) > 64  # more than one chunk
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert rows_of(output) == [{"index": i, "input": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".NPY"])
def test_images_keep_their_order(encoder: Encoder, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"images{suffix}"
    embed_images(encoder, PHOTOGRAPHS, output)
    expected = encoder.encode_image(PHOTOGRAPHS)
    if suffix == ".parquet":
        table = pq.read_table(output)
        found = np.stack(table["embedding"].to_numpy())
        assert table["input"].to_pylist() == [str(path) for path in PHOTOGRAPHS]
        assert table["index"].to_pylist() == list(range(len(PHOTOGRAPHS)))
        assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[64]"
    else:
        found = np.load(output)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3  # so that an order could be wrong


def test_not_normalized(encoder: Encoder, tmp_path: Path) -> None:
    embed_images(encoder, PHOTOGRAPHS[:2], tmp_path / "a.npy", normalize=False)
    embed_texts(encoder, ["a cat", ""], tmp_path / "b.npy", normalize=False)
    np.testing.assert_allclose(
        np.load(tmp_path / "a.npy"), encoder.encode_image(PHOTOGRAPHS[:2], normalize=False), rtol=1e-5, atol=1e-5
    )
    lengths = np.linalg.norm(np.load(tmp_path / "b.npy"), axis=1)
    assert np.abs(lengths - 1).min() > 1e-3


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), dim=st.integers(1, 9), parquet=st.booleans())
def test_any_chunks_make_one_array(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], dim: int, parquet: bool
) -> None:
    path = tmp_path_factory.mktemp("chunks") / ("a.parquet" if parquet else "a.npy")
    expected = np.random.default_rng(0).normal(size=(sum(sizes), dim)).astype(np.float32)
    with embedding_file(path) as writer:
        for end, size in zip(np.cumsum(sizes), sizes, strict=True):
            writer.write([(i, f"row {i}") for i in range(end - size, end)], expected[end - size : end])
    found = np.stack(pq.read_table(path)["embedding"].to_numpy()) if parquet else np.load(path)
    np.testing.assert_array_equal(found, expected)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    chunk = np.ones((100, 2048), np.float32)
    tracemalloc.start()
    try:
        with embedding_file(tmp_path / "a.npy") as writer:
            for first in range(0, 5_000, 100):
                writer.write([(first + i, "name") for i in range(100)], chunk)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.load(tmp_path / "a.npy", mmap_mode="r").shape == (5_000, 2048)  # 41 MB
    assert peak < 2 * 2**20


def test_undecodable_file_names_are_written(encoder: Encoder, tmp_path: Path) -> None:
    odd = Path(f"{tmp_path}/caf\udce9.jpg")  # the byte 0xe9 alone, as latin-1 disks have it
    odd.write_bytes(PHOTOGRAPHS[3].read_bytes())
    embed_images(encoder, [odd], tmp_path / "a.npy")
    embed_images(encoder, [odd], tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.npy")[0]["input"] == str(odd)
    assert pq.read_table(tmp_path / "a.parquet")["input"][0].as_py().endswith("caf\\udce9.jpg")


# What fails


@pytest.mark.parametrize("output", ["a.npy", "a.parquet"])
def test_a_failure_is_reported_and_nothing_is_written(
    encoder: Encoder, tmp_path: Path, damaged: Path, output: str
) -> None:
    (tmp_path / output).write_bytes(b"from before")
    failures: list[Failure] = []
    inputs = [PHOTOGRAPHS[0], damaged, *PHOTOGRAPHS, tmp_path / "none.png"]
    with pytest.raises(InputError) as caught:
        embed_images(encoder, inputs, tmp_path / output, report=failures.append)
    assert [failure.index for failure in failures] == [1, 7]
    assert failures[0].message.startswith(f"'{damaged}' cannot be decoded: ")
    assert failures[1].message == f"'{tmp_path}/none.png': there is no such file"
    assert "2 of 8 images cannot be encoded, and nothing was written; the first: image 1: " in caught.value.message
    assert "--skip-errors" in str(caught.value.hint)
    assert names_in(tmp_path) == {"damaged.jpg", output}
    assert (tmp_path / output).read_bytes() == b"from before"


def test_the_engine_rests_after_a_failure(
    encoder: Encoder, tmp_path: Path, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    real = encoder.encode_pixels

    def counted(pixels: np.ndarray, **options: Any) -> np.ndarray:
        encoded.append(len(pixels))
        return real(pixels, **options)

    monkeypatch.setattr(encoder, "encode_pixels", counted)
    inputs = [*PHOTOGRAPHS[:4], damaged, *PHOTOGRAPHS]
    with pytest.raises(InputError, match="1 of 10 images"):
        embed_images(encoder, inputs, tmp_path / "a.npy")
    assert encoded == [4]
    embed_images(encoder, inputs, tmp_path / "a.npy", skip_errors=True)
    assert encoded == [4, 4, 3, 2]


@pytest.mark.parametrize("output", ["a.npy", "a.parquet"])
def test_failures_are_left_out(encoder: Encoder, tmp_path: Path, damaged: Path, output: str) -> None:
    path = tmp_path / output
    inputs = [damaged, *PHOTOGRAPHS, damaged]
    result = embed_images(encoder, inputs, path, skip_errors=True)
    assert (result.rows, result.skipped) == (5, 2)
    if output == "a.npy":
        assert [row["index"] for row in rows_of(path)] == [1, 2, 3, 4, 5]
        np.testing.assert_allclose(np.load(path), encoder.encode_image(PHOTOGRAPHS), atol=1e-6)
    else:
        assert pq.read_table(path)["index"].to_pylist() == [1, 2, 3, 4, 5]


def test_texts_that_fail(encoder: Encoder, tmp_path: Path) -> None:
    lines = read_lines(io.BytesIO(b"a cat\n\xff\n" + LONG.encode() + b"\n\na dog"))
    failures: list[Failure] = []
    result = embed_texts(encoder, lines, tmp_path / "a.npy", skip_errors=True, truncate=False, report=failures.append)
    assert failures[0].message == "not UTF-8: byte 0xff at position 0"
    assert [failure.index for failure in failures] == [1, 2]
    assert "77" in failures[1].message
    assert result.rows == 3
    assert [row["input"] for row in rows_of(tmp_path / "a.npy")] == ["a cat", "", "a dog"]
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), encoder.encode_text(["a cat", "", "a dog"]), atol=1e-5)


def test_a_long_text_is_cut_when_asked(encoder: Encoder, tmp_path: Path) -> None:
    embed_texts(encoder, [LONG], tmp_path / "a.npy", truncate=True)
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), encoder.encode_text([LONG], truncate=True), atol=1e-6)


@pytest.mark.parametrize("skip_errors", [False, True])
def test_nothing_that_can_be_encoded(encoder: Encoder, tmp_path: Path, damaged: Path, skip_errors: bool) -> None:
    with pytest.raises(InputError, match=r"(none|1) of 1 images can(not)? be encoded, and nothing was written"):
        embed_images(encoder, [damaged], tmp_path / "a.npy", skip_errors=skip_errors)
    with pytest.raises(InputError, match="there are no texts to encode"):
        embed_texts(encoder, [], tmp_path / "a.parquet", skip_errors=skip_errors)
    with pytest.raises(InputError, match="there are no images to encode"):
        embed_images(encoder, [], tmp_path / "a.npy", skip_errors=skip_errors)
    assert names_in(tmp_path) == {"damaged.jpg"}


def test_an_encoder_without_the_tower(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image tower"):
        embed_images(Encoder(encoder.spec.select(["text"])), PHOTOGRAPHS, tmp_path / "a.npy")
    with pytest.raises(InputError, match="no text tower"):
        embed_texts(Encoder(encoder.spec.select(["image"])), ["a cat"], tmp_path / "a.npy")
    assert not names_in(tmp_path)


def test_texts_for_an_encoder_of_images_fail_once(encoder: Encoder, tmp_path: Path) -> None:
    images_only = Encoder(encoder.spec.select(["image"]))
    failures: list[Failure] = []
    with pytest.raises(InputError, match="no text tower"):
        embed_texts(images_only, ["a"] * 1000, tmp_path / "o.npy", report=failures.append)
    assert failures == []


def test_an_output_inside_a_bundle_is_refused(encoder: Encoder, tiny_bundle: Path) -> None:
    """It would make the bundle one that cannot be opened."""
    with pytest.raises(OutputError, match="lies inside the bundle"):
        embed_texts(encoder, ["a"], tiny_bundle / "o.npy")
    clip_export.Bundle.open(tiny_bundle)


def test_rows_that_cannot_be_written_leave_the_array_as_it_was(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "o.npy"
    embed_texts(encoder, ["a"], output)
    before = output.read_bytes()
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().name.startswith(".o.rows"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"o.rows.jsonl cannot be written: no space left"):
        embed_texts(encoder, ["b", "c"], output)
    assert output.read_bytes() == before
    assert names_in(tmp_path) == {"o.npy", "o.rows.jsonl"}


def test_what_is_no_text_is_a_failure_in_its_place(encoder: Encoder, tmp_path: Path) -> None:
    failures: list[Failure] = []
    texts: list[Any] = ["a", None, "b"]
    result = embed_texts(encoder, texts, tmp_path / "o.npy", skip_errors=True, report=failures.append)
    assert (result.rows, [failure.index for failure in failures]) == (2, [1])


def test_an_interruption_leaves_nothing(encoder: Encoder, tmp_path: Path) -> None:
    def interrupt(_step: str, done: int, total: int) -> None:
        assert total == 5
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_images(encoder, PHOTOGRAPHS, tmp_path / "a.npy", progress=interrupt)
    assert not names_in(tmp_path)


def test_progress_counts_inputs(encoder: Encoder, tmp_path: Path, damaged: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    images = [*PHOTOGRAPHS, damaged]
    embed_images(encoder, images, tmp_path / "a.npy", skip_errors=True, progress=lambda *call: calls.append(call))
    assert calls == [("images", 0, 6), ("images", 4, 6), ("images", 6, 6)]


# Where it is written


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("a.csv", "the suffix '.csv' means no format that is known"),
        ("a", "the suffix '' means no format that is known"),
        ("none/a.npy", "there is no directory .*none"),
        ("directory.npy", "is a directory, expected the name of a file"),
    ],
)
def test_outputs_that_cannot_be(encoder: Encoder, tmp_path: Path, output: str, message: str) -> None:
    (tmp_path / "directory.npy").mkdir()
    with pytest.raises(OutputError, match=message) as caught:
        embed_texts(encoder, ["a cat"], tmp_path / output)
    assert caught.value.hint
    assert names_in(tmp_path) == {"directory.npy"}


def test_a_link_keeps_pointing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "a.npy").symlink_to(tmp_path / "there" / "b.npy")
    with embedding_file(tmp_path / "a.npy") as writer:
        writer.write([(0, "x")], np.ones((1, 2), np.float32))
    assert (tmp_path / "a.npy").is_symlink()
    assert np.load(tmp_path / "there" / "b.npy").shape == (1, 2)


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    with embedding_file(tmp_path / "a.npy") as writer:
        writer.write([(0, "x")], np.ones((1, 2), np.float32))
    (tmp_path / "usual").touch()
    assert (tmp_path / "a.npy").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match="needs pyarrow") as caught, embedding_file(tmp_path / "a.parquet"):
        pass
    assert caught.value.hint == "pip install 'clip-export[parquet]', or name the output OUT.npy"
    assert not names_in(tmp_path)


# What is read


@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])), min_size=1))
def test_lines_are_texts(texts: list[str]) -> None:
    texts = [text.removesuffix("\r") for text in texts]
    texts[0] = texts[0].removeprefix("\ufeff")
    for ending, bom in (("\n", b""), ("\r\n", b"\xef\xbb\xbf")):
        data = bom + "".join(text + ending for text in texts).encode()
        assert list(read_lines(io.BytesIO(data))) == texts


def test_an_end_of_line_at_the_end_is_no_text(tmp_path: Path) -> None:
    assert list(read_lines(io.BytesIO(b"a\n\nb"))) == ["a", "", "b"]
    assert list(read_lines(io.BytesIO(b"a\n\nb\n"))) == ["a", "", "b"]
    assert list(read_lines(io.BytesIO(b"\n"))) == [""]
    assert list(read_lines(io.BytesIO(b""))) == []
    assert list(read_lines(io.BytesIO("a\u2028b\x0cc\x85d\re".encode()))) == ["a\u2028b\x0cc\x85d\re"]


def test_a_line_that_is_not_utf8_is_an_error_in_its_place() -> None:
    first, second, third = read_lines(io.BytesIO(b"a\ncaf\xe9\nb"))
    assert (first, third) == ("a", "b")
    assert isinstance(second, TextError)
    assert second.message == "not UTF-8: byte 0xe9 at position 3"
    assert "iconv" in str(second.hint)


@given(st.binary(max_size=60) | st.text("a\n\r").map(str.encode))
def test_lines_are_counted(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(data)
    assert count_lines(path) == len(list(read_lines(io.BytesIO(data))))


def test_a_directory_gives_its_images_sorted(tmp_path: Path) -> None:
    for name in (
        "b.png",
        "a.JPG",
        "sub/deep/c.webp",
        ".hidden.png",
        ".git/d.png",
        "notes.txt",
        "sub/Makefile",
        "e.pdf",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_images(["first.xyz", tmp_path, tmp_path / "notes.txt"])
    inside = [str(path.relative_to(tmp_path)) for path in found.files[1:-1]]
    assert inside == ["a.JPG", "b.png", "sub/deep/c.webp"]
    assert (found.files[0], found.files[-1]) == (Path("first.xyz"), tmp_path / "notes.txt")
    assert found.left_out == {".txt": 1, "": 1, ".pdf": 1}


@pytest.mark.parametrize(("name", "words"), [("notes.txt", "only 1 other file"), (None, "no file at all")])
def test_a_directory_without_images(tmp_path: Path, name: str | None, words: str) -> None:
    if name is not None:
        (tmp_path / name).touch()
    with pytest.raises(ImageError, match=f"expected image files in .*, found {words}"):
        find_images([tmp_path])


@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in Pillow:DeprecationWarning")
def test_suffixes_are_of_formats_that_open(tmp_path: Path) -> None:
    """Each is one that Pillow can write and then read back, or a name of such a format."""
    assert {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm"} <= image_suffixes()
    formats = {Image.registered_extensions()[suffix] for suffix in image_suffixes()}
    for format_ in sorted(formats & Image.SAVE.keys()):
        buffer = io.BytesIO()
        mode = {"BLP": "P", "MSP": "1", "PALM": "L", "XBM": "1"}.get(format_, "RGB")
        Image.new(mode, (64, 64)).save(buffer, format_)
        with Image.open(io.BytesIO(buffer.getvalue())) as image:
            image.load()


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    """As root, a rename would put a file in the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(OutputError, match=r"pipe\.npy is no regular file"), staged_file(tmp_path / "pipe.npy"):
        pass
    assert (tmp_path / "pipe.npy").is_fifo()
