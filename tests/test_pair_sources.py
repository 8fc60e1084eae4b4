"""Where pairs come from: a folder, a tar file, shards, the demo; and what becomes of pictures that do not decode."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from demo_pairs import demo_pairs
from test_tar_samples import pack

from clip_export.errors import ImageError, InputError
from clip_export.images import open_image
from clip_export.pair_sources import Failure, decoded, open_pairs


def attempt(pictures: object) -> list[np.ndarray | ImageError]:
    """What a preprocessor gives, of bytes that begin with ok."""
    pixels = np.zeros((3, 2, 2), np.uint8)
    return [pixels if data[:2] == b"ok" else ImageError("damaged") for data in pictures]  # type: ignore[attr-defined]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"ok" + name.encode())
    lines = [{"file": "a.png", "caption": "x"}, {"file": "b.png", "caption": "y"}, {"file": "a.png", "caption": "z"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def failure(source: str | Path) -> str:
    with pytest.raises(InputError) as raised:
        open_pairs(source)
    assert raised.value.hint
    return raised.value.message


def test_a_folder_gives_each_picture_once_with_all_its_captions(folder: Path) -> None:
    source = open_pairs(folder)
    found = [(sample.name, sample.captions) for sample in source]
    assert found == [("a.png", ("x", "z")), ("b.png", ("y",))]
    assert source.description.startswith("pairs of ")


def test_a_picture_without_a_caption_is_named_or_left_out(folder: Path) -> None:
    (folder / "c.png").touch()
    assert "1 pictures have no caption, expected one for each; the first, 'c.png'" in failure(folder)
    assert len(list(open_pairs(folder, skip_errors=True))) == 2


def test_a_folder_without_captions(folder: Path) -> None:
    (folder / "captions.jsonl").unlink()
    assert "2 pictures and no captions" in failure(folder)


def test_what_is_no_source(tmp_path: Path) -> None:
    assert "no such file or folder" in failure(tmp_path / "none")
    (tmp_path / "x.tar.gz").touch()
    assert "neither a folder nor a .tar file" in failure(tmp_path / "x.tar.gz")


def test_shards_are_read_one_after_another_and_a_missing_one_is_named(tmp_path: Path) -> None:
    for number in ("08", "09", "10"):
        pack(tmp_path / f"s-{number}.tar", {"0.jpg": b"ok", "0.txt": number.encode()})
    assert [sample.captions for sample in open_pairs(f"{tmp_path}/s-{{08..10}}.tar")] == [("08",), ("09",), ("10",)]
    assert "s-11.tar" in failure(f"{tmp_path}/s-{{08..11}}.tar")
    assert "means 0 files" in failure(f"{tmp_path}/s-{{9..8}}.tar")


def test_the_demo_is_what_its_script_says_and_distinct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)  # the word is not the folder
    samples = list(open_pairs("demo"))
    assert [sample.captions for sample in samples] == [(caption,) for _, caption in demo_pairs()]
    assert len({sample.captions for sample in samples}) == len({sample.picture for sample in samples}) == len(samples)
    assert {open_image(sample.data).size for sample in samples} == {(128, 128)}


def test_a_picture_that_does_not_decode_is_named_and_can_be_left_out(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"no")
    reported: list[Failure] = []
    with pytest.raises(InputError, match=r"1 of 2 pictures cannot be decoded; the first, a.png: damaged"):
        list(decoded(open_pairs(folder), attempt, skip_errors=False, report=reported.append))
    (chunk,) = decoded(open_pairs(folder), attempt, skip_errors=True, report=reported.append)
    assert [sample.name for sample in chunk.samples] == ["b.png"]
    assert chunk.pixels.shape == (1, 3, 2, 2)
    assert reported == [Failure("a.png", 2, "damaged")] * 2
