"""Where pairs come from that are ranked: a folder with captions, a WebDataset, or the demo; pictures stay on the disk.

    for chunk in decoded(open_pairs("photos"), preprocessor.attempt, skip_errors=True, report=failures.append):
        encode_pixels(chunk.pixels), chunk.captions

A source gives each picture with its captions, so that a picture with five is decoded and encoded once. What is not a
pair is an error before anything is encoded, as far as it can be known then; a picture that cannot be decoded is named,
and is an error or is left out with its captions.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from clip_export.errors import ImageError, InputError
from clip_export.pairs import find_pairs
from clip_export.tar_samples import PICTURE_SUFFIXES, read_tar

__all__ = ["DEMO", "Chunk", "Failure", "FolderPairs", "PairSource", "Sample", "TarPairs", "decoded", "open_pairs"]

Pixels: TypeAlias = npt.NDArray[np.uint8]
Attempt: TypeAlias = Callable[[Sequence[bytes]], Sequence[Pixels | ImageError]]

DEMO = "demo"
_DEMO_PAIRS = Path(__file__).parent / "demo" / "pairs.tar"  # drawn by examples/demo_pairs.py
_CHUNK = 32  # pictures that are held at once
_SHARDS = re.compile(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", re.DOTALL)
_MOST_SHARDS = 10_000
_MAKE = (
    "give a folder with captions.csv or captions.jsonl, whose lines name a file and its caption, or a WebDataset: a "
    ".tar file with 000001.jpg, 000001.txt and on"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture, as the bytes of its file, with its captions. `name` is what the source calls it.

    `label` says what it is of; empty where the source does not.
    """

    name: str
    data: bytes
    captions: tuple[str, ...]
    label: str = ""

    @property
    def picture(self) -> str:
        """What pictures are told by: the sha256 of the file. A copy under another name is the same picture."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, slots=True)
class Failure:
    """A picture that cannot be decoded: its name, the number of pairs that go with it, and why."""

    name: str
    pairs: int
    message: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Pictures that were decoded, uint8 [n, 3, height, width], and for each its sample."""

    samples: tuple[Sample, ...]
    pixels: Pixels


class PairSource(Protocol):
    """Pairs that can be gone through several times; `description` says in words what they are."""

    @property
    def description(self) -> str:
        """For example "pairs of photos"."""
        ...

    def __iter__(self) -> Iterator[Sample]:
        """The samples, read as they are asked for. Raises InputError for what is no pair."""
        ...


@dataclass(frozen=True)
class FolderPairs:
    """The pairs of a folder, each file with all of its captions, in the order in which files are first named."""

    folder: Path
    captions: dict[Path, tuple[str, ...]]
    labels: Mapping[Path, str]

    @property
    def description(self) -> str:
        """See `PairSource`."""
        return f"pairs of {self.folder.name}"

    def __iter__(self) -> Iterator[Sample]:
        for file, captions in self.captions.items():
            try:
                data = file.read_bytes()
            except OSError as error:
                raise InputError(f"{file} cannot be read: {error.strerror}", hint="check the file") from error
            yield Sample(file.relative_to(self.folder).as_posix(), data, captions, self.labels.get(file, ""))


@dataclass(frozen=True)
class TarPairs:
    """The pairs of a WebDataset, shard after shard; see `tar_samples`. `name` is what messages call it."""

    paths: tuple[Path, ...]
    name: str

    @property
    def description(self) -> str:
        """See `PairSource`."""
        return f"pairs of {self.name}"

    def __iter__(self) -> Iterator[Sample]:
        for path in self.paths:
            for name, data, caption, label in read_tar(path):
                # Keys are told apart within a shard alone: shards that were made side by side may all begin at 0.
                yield Sample(name if len(self.paths) == 1 else f"{path.name}: {name}", data, (caption,), label)


def open_pairs(source: str | os.PathLike[str], *, skip_errors: bool = False) -> PairSource:
    """The pairs of a folder, of a .tar file, of shards such as train-{000..017}.tar, or of the word "demo".

    The demo's are scenes that its checkpoint never saw; a folder of that name is written ./demo. The captions of a
    folder are read here, everything else later. Raises InputError for what is none of these, for a folder without
    captions or with malformed ones, for a shard that is missing and for a compressed archive; and, unless
    `skip_errors`, for pictures in a folder that have no caption.
    """
    name = os.fspath(source)
    path = Path(source)
    if name == DEMO:
        return TarPairs((_tar(_DEMO_PAIRS),), "the demo scenes")
    if path.is_dir():
        return _folder_pairs(path, skip_errors=skip_errors)
    if not path.exists() and (shards := _SHARDS.fullmatch(name)):
        return TarPairs(tuple(map(_tar, _shards(name, shards))), path.name)
    return TarPairs((_tar(path),), path.name)


def _shards(name: str, pattern: re.Match[str]) -> Iterator[Path]:
    """The files of a pattern with a range of numbers, as wide as the first is written."""
    before, first, last, after = pattern.groups()
    count = int(last) - int(first) + 1
    if not 1 <= count <= _MOST_SHARDS:
        hint = "write the first and the last number: train-{000..017}.tar"
        raise InputError(f"{name} means {max(count, 0)} files, expected 1 to {_MOST_SHARDS}", hint=hint)
    for number in range(int(first), int(last) + 1):
        yield Path(f"{before}{number:0{len(first)}}{after}")


def _tar(path: Path) -> Path:
    """`path`, if it is a .tar file by its name."""
    if not path.is_file():
        raise InputError(f"there are no pairs at {path}: no such file or folder", hint=_MAKE)
    if path.suffix.lower() != ".tar":
        packed = ".tar" in path.suffixes or path.suffix.lower() == ".tgz"
        unpack = "unpack it (gunzip FILE.tar.gz): a plain .tar is read from front to back" if packed else _MAKE
        raise InputError(f"{path} is neither a folder nor a .tar file", hint=unpack)
    return path


def decoded(
    source: PairSource, attempt: Attempt, *, skip_errors: bool, report: Callable[[Failure], None]
) -> Iterator[Chunk]:
    """The pictures of `source` in chunks, decoded by `attempt` (that of a `Preprocessor`).

    One that cannot be is reported. Without `skip_errors` the rest is only looked through for others, no more chunks
    come, and at the end InputError counts them; with it they are left out, and InputError is raised where none is left.
    """
    failed, first, total, left = 0, "", 0, 0
    samples = iter(source)
    while chunk := tuple(itertools.islice(samples, _CHUNK)):
        outcomes = attempt([sample.data for sample in chunk])
        good: list[tuple[Sample, Pixels]] = []
        for sample, outcome in zip(chunk, outcomes, strict=True):
            if isinstance(outcome, ImageError):
                failure = _failure(sample, outcome)
                failed, first = failed + 1, first or f"{failure.name}: {failure.message}"
                report(failure)
            else:
                good.append((sample, outcome))
        total, left = total + len(chunk), left + len(good)
        if good and (skip_errors or not failed):
            yield Chunk(tuple(sample for sample, _ in good), np.stack([pixels for _, pixels in good]))
    if failed and not (skip_errors and left):
        hint = "repair them, or leave them out, with their captions: --skip-errors (skip_errors=True)"
        message = f"{failed} of {total} pictures cannot be decoded; the first, {first}"
        raise InputError(message, hint=hint if left else "check the pictures")


def _failure(sample: Sample, error: ImageError) -> Failure:
    # The cause is the same error without the place in its chunk, which means nothing here.
    cause = error.__cause__ if isinstance(error.__cause__, ImageError) else error
    return Failure(sample.name, len(sample.captions), cause.message)


def _folder_pairs(folder: Path, *, skip_errors: bool) -> FolderPairs:
    pairs = find_pairs(folder)
    if pairs is None:
        pictures = sum(1 for _ in _pictures(folder))
        found = f"{pictures} pictures and no captions" if pictures else "neither pictures nor captions"
        raise InputError(f"{folder} has {found}: expected captions.csv or captions.jsonl", hint=_MAKE)
    captions: dict[Path, tuple[str, ...]] = {}
    for file, caption in zip(pairs.files, pairs.captions, strict=True):
        captions[file] = (*captions.get(file, ()), caption)
    left = [] if skip_errors else sorted(file for file in _pictures(folder) if file not in captions)
    if left:
        raise InputError(
            f"{folder}: {len(left)} pictures have no caption, expected one for each; "
            f"the first, {_named(left[0], folder)}",
            hint="add them to the captions file, or leave them out: --skip-errors (skip_errors=True)",
        )
    return FolderPairs(folder, captions, pairs.labels)


def _pictures(folder: Path) -> Iterator[Path]:
    """The files in `folder`, and below it, that are pictures by their names. Hidden ones are none."""
    for file in folder.rglob("*"):
        if file.suffix.lower() in PICTURE_SUFFIXES and not file.name.startswith(".") and file.is_file():
            yield file


def _named(file: Path, folder: Path) -> str:
    return repr(file.relative_to(folder).as_posix())
