"""From what stands on a command line to inputs: the lines of a text file, the image files of a directory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from clip_export.errors import ImageError, TextError

# Formats that Pillow names but cannot decode by itself, and PostScript, which would run Ghostscript.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_UTF8_HINT = "convert the file to UTF-8, for instance: iconv -f latin1 -t utf-8 FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundImages:
    """The image files behind some paths, sorted within each directory; `left_out` counts others by their suffix."""

    files: tuple[Path, ...]
    left_out: dict[str, int]


def read_lines(file: BinaryIO) -> Iterator[str | TextError]:
    r"""The lines of a UTF-8 file as texts, one each: without their `\n` or `\r\n`, an empty line an empty text.

    So row i is line i + 1 of the file, whatever is in it. A byte-order mark at the start is dropped. A line that is
    not UTF-8 is given as a TextError.
    """
    for number, line in enumerate(file, start=1):
        data = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        data = data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\n") else data
        try:
            yield data.decode("utf-8")
        except UnicodeDecodeError as error:
            bad = data[error.start : error.start + 1].hex()
            message = f"not UTF-8: byte 0x{bad} at position {error.start}"
            yield TextError(message, hint=_UTF8_HINT)


def count_lines(path: str | os.PathLike[str]) -> int:
    """How many lines `read_lines` gives for the file at `path`; 0 for a pipe, which can be read only once."""
    if not Path(path).is_file():
        return 0
    count, last = 0, b"\n"
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def find_images(paths: Iterable[str | os.PathLike[str]]) -> FoundImages:
    """The files named, in their order, and for a directory the image files in it and below it, sorted by path.

    In a directory a file is an image by its suffix (those that Pillow decodes); hidden files and directories, and
    links to directories, are passed over. A file that is named is taken whatever it is called. Raises ImageError for
    a directory that holds no image, or that cannot be read.
    """
    files: list[Path] = []
    left_out: dict[str, int] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(_visible_files(path))
        images = [file for file in inside if file.suffix.lower() in image_suffixes()]
        for file in inside:
            if file.suffix.lower() not in image_suffixes():
                left_out[file.suffix.lower()] = left_out.get(file.suffix.lower(), 0) + 1
        if not images:
            what = f"only {len(inside)} other file{'s' * (len(inside) > 1)}" if inside else "no file at all"
            raise ImageError(f"expected image files in {path}, found {what}", hint="check the path")
        files += images
    return FoundImages(files=tuple(files), left_out=left_out)


def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of the image formats that Pillow decodes here."""
    known = Image.registered_extensions()
    return frozenset(s for s, format_ in known.items() if format_ in Image.OPEN and format_ not in _NOT_DECODED)


def _visible_files(directory: Path) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise ImageError(f"{error.filename} cannot be read: {error.strerror}", hint="change its permissions") from error

    for parent, folders, names in os.walk(directory, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent) / name for name in names if not name.startswith("."))
