"""Pairs from tar files: what is read, and what is refused, with nothing written."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from clip_export import tar_samples
from clip_export.errors import InputError
from clip_export.tar_samples import read_tar

GOOD = {
    **{"a/1.jpg": b"one", "a/1.txt": b"a cat\n", "a/1.cls": b"cat\n"},
    **{"2.png": b"two", "2.cls": b"7", "2.json": b'{"caption": "a dog"}'},
}


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def failure(path: Path) -> str:
    with pytest.raises(InputError) as raised:
        list(read_tar(path))
    assert raised.value.hint
    assert str(path) in raised.value.message
    return raised.value.message


def test_samples_are_read_in_order_and_nothing_is_written(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", GOOD)
    assert list(read_tar(path)) == [("a/1.jpg", b"one", "a cat", "cat"), ("2.png", b"two", "a dog", "")]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("files", "message"),
    {
        "no pictures": ({"a.md": b""}, "has no pictures with captions"),
        "no caption": ({"1.jpg": b"x"}, "sample '1' has no caption, only '1.jpg'"),
        "no picture": ({"1.txt": b"x"}, "sample '1' has no picture, only '1.txt'"),
        "empty": ({"1.jpg": b"x", "1.txt": b" "}, "the caption of sample '1' is empty"),
        "two pictures": ({"1.jpg": b"x", "1.png": b"x"}, "sample '1' has both '1.jpg' and '1.png'"),
        "two places": ({"1.jpg": b"x", "1.txt": b"x", "2.jpg": b"x", "2.txt": b"x", "1.json": b""}, "in two places"),
        "latin": ({"1.jpg": b"x", "1.txt": b"caf\xe9"}, "'1.txt' is not UTF-8: byte 0xe9 at 3"),
        "not json": ({"1.jpg": b"x", "1.json": b"["}, "'1.json' is not JSON"),
        "absolute": ({"/etc/1.jpg": b"x"}, "'/etc/1.jpg' is outside the archive"),
        "upwards": ({"../1.jpg": b"x"}, "'../1.jpg' is outside the archive"),
    }.values(),
)
def test_what_is_no_pair_is_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    assert message in failure(pack(tmp_path / "x.tar", files))


def test_a_link_is_refused(tmp_path: Path) -> None:
    link = tarfile.TarInfo("1.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(link)
    assert "'1.jpg' is a link" in failure(tmp_path / "x.tar")


def test_a_member_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "x.tar", GOOD)
    monkeypatch.setattr(tar_samples, "_MOST_CAPTION", 3)
    assert "'a/1.txt' has 6 bytes, expected at most 3" in failure(path)


@pytest.mark.parametrize("end", [700, 1000, 1536, 1800, 2560])
def test_a_tar_that_is_cut_short(tmp_path: Path, end: int) -> None:
    path = pack(tmp_path / "x.tar", {"1.jpg": b"x" * 600, "1.txt": b"a cat"})
    path.write_bytes(path.read_bytes()[:end])
    assert failure(path)


def test_no_tar_at_all(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    assert "cannot be read as a tar file" in failure(tmp_path / "x.tar")
