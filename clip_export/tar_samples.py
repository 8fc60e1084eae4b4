"""Pictures with their captions from a WebDataset: a .tar file, read from front to back, and nothing written anywhere.

The files of a sample stand one after another and share a key, their name up to the first dot:

    000001.jpg   000001.txt     the picture; its caption, in UTF-8
    000002.png   000002.json    the picture; {"caption": "..."}, where there is no .txt
    000003.png   000003.txt   000003.cls    what the picture is of, in a word or two, for zero-shot accuracy

A .cls that is a number, as in data sets whose names are elsewhere, says nothing here. Others of the key (.npy) are
passed over, and so are directories and names that begin with two underscores, as WebDataset has it. One sample is held
in memory at a time. A tar file is not to be trusted: what stands in its headers
is checked before it is acted on, and no name in it becomes a path.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from clip_export.errors import InputError

__all__ = ["PICTURE_SUFFIXES", "TarSample", "read_tar"]

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_CAPTION_SUFFIXES = (".txt", ".json")
_LABEL_SUFFIX = ".cls"
_SUFFIXES = (*PICTURE_SUFFIXES, *_CAPTION_SUFFIXES, _LABEL_SUFFIX)
_MOST_PICTURE = 256 * 2**20  # bytes; Pillow's limit on pixels is 179 million, 34 MB as a JPEG of middling quality
_MOST_CAPTION = 2**20
_DAMAGED = "it is damaged or cut short: fetch or make it again"
_LAYOUT = "name a picture and its caption alike, one after the other: 000001.jpg and 000001.txt"


class TarSample(NamedTuple):
    """One picture, as the bytes of its file, and its caption. `name` is that of the picture in the archive.

    `label` says what it is of; empty where the archive does not.
    """

    name: str
    data: bytes
    caption: str
    label: str = ""


class _Part(NamedTuple):
    name: str
    suffix: str
    data: bytes


def read_tar(path: Path) -> Iterator[TarSample]:
    """The samples of the .tar file at `path`, in its order.

    Raises InputError, with the archive and the member, for what is no tar file, or is damaged or cut short; for a link,
    a device, a name that leads out of the archive and a member that is too large; and for a sample that lacks its
    picture or its caption, has two of one, or comes in two places.
    """
    seen: set[str] = set()
    key, parts = "", dict[str, _Part]()
    for member, part in _parts(path):
        if member != key:
            if key:
                yield _sample(path, key, parts)
            if member in seen:
                raise InputError(f"{path}: the files of sample {member!r} are in two places", hint=_LAYOUT)
            seen.add(member)
            key, parts = member, {}
        kind = "picture" if part.suffix in PICTURE_SUFFIXES else part.suffix
        if kind in parts:
            raise InputError(
                f"{path}: sample {key!r} has both {parts[kind].name!r} and {part.name!r}",
                hint="keep one picture and one caption for each key",
            )
        parts[kind] = part
    if not key:
        raise InputError(f"{path} has no pictures with captions", hint=_LAYOUT)
    yield _sample(path, key, parts)


def _sample(path: Path, key: str, parts: dict[str, _Part]) -> TarSample:
    picture, text, fields = (parts.get(kind) for kind in ("picture", *_CAPTION_SUFFIXES))
    caption = _caption(path, text) if text else _json_caption(path, fields) if fields else None
    if picture is None or caption is None:
        lacking = "caption" if picture else "picture"
        found = ", ".join(repr(part.name) for part in parts.values())
        raise InputError(f"{path}: sample {key!r} has no {lacking}, only {found}", hint=_LAYOUT)
    if not caption.strip():
        raise InputError(f"{path}: the caption of sample {key!r} is empty", hint="write one, or leave the sample out")
    label = parts.get(_LABEL_SUFFIX)
    return TarSample(picture.name, picture.data, caption, _label(path, label) if label else "")


def _caption(path: Path, part: _Part) -> str:
    try:
        return part.data.removeprefix(b"\xef\xbb\xbf").decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        message = f"{path}: {part.name!r} is not UTF-8: byte 0x{part.data[error.start]:02x} at {error.start}"
        raise InputError(message, hint="convert captions to UTF-8 before they are packed") from error


def _label(path: Path, part: _Part) -> str:
    label = _caption(path, part).strip()
    return "" if label.isdecimal() else label


def _json_caption(path: Path, part: _Part) -> str:
    try:
        fields = json.loads(_caption(path, part))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {part.name!r} is not JSON: {error}", hint='write {"caption": "..."}') from error
    caption = fields.get("caption") if isinstance(fields, dict) else None
    if not isinstance(caption, str):
        raise InputError(
            f'{path}: expected an object with the string "caption" in {part.name!r}', hint='write {"caption": "..."}'
        )
    return caption


def _parts(path: Path) -> Iterator[tuple[str, _Part]]:
    """(key, part) of the pictures and captions in the archive."""
    with _opened(path) as file:
        for archive, member in _members(path, file):
            name = PurePosixPath(member.name)
            stem, dot, extension = name.name.partition(".")
            # WebDataset's extension is all after the first dot: of 1.seg.png it is seg.png, which is not the picture.
            suffix = f"{dot}{extension}".lower()
            if member.isdir() or name.name.startswith("__") or suffix not in _SUFFIXES:
                continue
            _check_member(path, member, suffix)
            yield str(name.parent / stem), _Part(member.name, suffix, _data(path, archive, member))


def _members(path: Path, file: BinaryIO) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    guarded = _Guarded(file)
    try:
        archive = tarfile.open(fileobj=guarded, mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
        while (member := archive.next()) is not None:
            archive.members = []  # it would keep them all: 1 KB each
            if member.size < 0:
                raise InputError(f"{path}: {member.name!r} says that it has {member.size} bytes", hint=_DAMAGED)
            yield archive, member
    # What tarfile raises on headers that are none: its own errors, and those of the numbers and texts in them.
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, OSError) as error:
        hint = "unpack it, if it is compressed (gunzip FILE.tar.gz); if not, " + _DAMAGED
        raise InputError(f"{path} cannot be read as a tar file: {error}", hint=hint) from error
    # tarfile takes a header that is none for the end.
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise InputError(f"{path} ends without the mark of its end, after {archive.offset} bytes", hint=_DAMAGED)


def _check_member(path: Path, member: tarfile.TarInfo, suffix: str) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise InputError(f"{path}: {member.name!r} is outside the archive", hint="pack it with relative names")
    if not member.isreg() or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "no regular file"
        raise InputError(f"{path}: {member.name!r} is {kind}", hint="pack the file itself: tar --dereference")
    most = _MOST_PICTURE if suffix in PICTURE_SUFFIXES else _MOST_CAPTION
    if member.size > most:
        raise InputError(
            f"{path}: {member.name!r} has {member.size} bytes, expected at most {most}", hint="leave the sample out"
        )


def _data(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # since it is a regular file
    try:
        return file.read()
    except (tarfile.TarError, OSError) as error:  # all of it is read, or this is raised
        message = f"{path}: {member.name!r} cannot be read, expected {member.size} bytes: {error}"
        raise InputError(message, hint=_DAMAGED) from error


class _Guarded:
    """A file of which no more than a picture is read at once, whatever a header asks for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_PICTURE:
            raise tarfile.ReadError(f"a header asks for {size} bytes at once")
        return self._file.read(size)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{os.fspath(path)} cannot be read: {error.strerror}", hint="check the path") from error
