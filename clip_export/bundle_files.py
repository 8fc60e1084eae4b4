"""The files of a bundle, one by one: which there are, whether they are what the manifest says, reading and hashing.

A symbolic link is listed and never followed. What cannot be read is a BundleIntegrityError that names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from clip_export.errors import BundleIntegrityError
from clip_export.manifest import REBUILD, FileEntry

__all__ = [
    "check_sha256",
    "check_size",
    "few",
    "is_runtime_cache",
    "listing",
    "make_entry",
    "read",
    "reading",
]

# TensorRT-RTX keeps what it compiled for the GPU at hand beside a plan. It changes whenever the plan runs, so that no
# manifest can list it; nothing is lost with it. What follows the name is a copy that is still being written.
_RUNTIME_CACHE = re.compile(r"plans/[^/]+/\.runtime[^/]*")


def is_runtime_cache(name: str) -> bool:
    """Whether the path `name` inside a bundle is the cache that a running plan keeps beside itself."""
    return _RUNTIME_CACHE.fullmatch(name) is not None


def listing(directory: Path, *, hidden: bool = True) -> Iterator[str]:
    """Paths of everything below `directory` that is not a directory, with `/`; links are listed, never followed.

    `hidden=False` leaves out names that begin with a dot, which no bundle lists: .DS_Store, .git, .gitattributes.
    """
    for parent, folders, files in os.walk(directory, onerror=_raise):
        if not hidden:
            folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in files + links:
            if hidden or not name.startswith("."):
                yield (Path(parent) / name).relative_to(directory).as_posix()


def check_size(directory: Path, name: str, entry: FileEntry) -> None:
    """Raise BundleIntegrityError unless `name` is a regular file of the right size."""
    with reading(name):
        status = (directory / name).lstat()
    if not stat.S_ISREG(status.st_mode):
        raise BundleIntegrityError(f"{name} in {directory} is not a regular file", hint=REBUILD)
    if status.st_size != entry.size:
        what = "truncated" if status.st_size < entry.size else "changed"
        message = f"{name} in {directory} is {what}: expected {entry.size} bytes, found {status.st_size}"
        raise BundleIntegrityError(message, hint=REBUILD)


def check_sha256(directory: Path, name: str, entry: FileEntry) -> None:
    """Raise BundleIntegrityError unless the bytes of `name` are those that the manifest vouches for."""
    with reading(name):
        found = _sha256(directory / name)
    if found != entry.sha256:
        message = f"{name} in {directory} is changed: expected sha256 {entry.sha256}, found {found}"
        raise BundleIntegrityError(message, hint=REBUILD)


def make_entry(
    directory: Path, name: str, *, original: Path | None = None, known: FileEntry | None = None
) -> FileEntry:
    """The entry of one file. `known` is taken as it is where the file is a hard link to the one in `original`.

    So gigabytes that an extension did not touch are not hashed again; anything else is, whatever its name.
    """
    status = (directory / name).lstat()
    if not stat.S_ISREG(status.st_mode):
        raise BundleIntegrityError(f"{name!r} is not a regular file, and cannot be part of a bundle")
    if known is not None and original is not None and known.size == status.st_size:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(status, (original / name).lstat()):
                return known
    return FileEntry(sha256=_sha256(directory / name), size=status.st_size)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(directory: Path, name: str) -> bytes:
    """The bytes of one file. Raises BundleIntegrityError."""
    with reading(name):
        return (directory / name).read_bytes()


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """A file that cannot be read is a BundleIntegrityError that names it."""
    try:
        yield
    except OSError as error:
        raise BundleIntegrityError(f"{name} cannot be read: {error.strerror}", hint=REBUILD) from error


def _raise(error: OSError) -> NoReturn:
    raise error


def few(names: list[str]) -> str:
    """The first of many names, printable whatever bytes the disk holds."""
    shown = ", ".join(ascii(name)[1:-1] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
