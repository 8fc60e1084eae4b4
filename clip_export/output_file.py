"""Writing one file whole or not at all: beside its place under a hidden name, then renamed over it.

What was there before stays until the new file is complete, and goes then, as with `numpy.save`. A failure of the disk
is an OutputError that names the file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from clip_export.errors import OutputError

_HINTS = {
    errno.EEXIST: "there is a file of that name: choose another",
    errno.EACCES: "choose another directory with -o, or change the permissions of this one",
    errno.EDQUOT: "free some of your quota, or write to another disk",
    errno.EFBIG: "write fewer rows, or to another file system",
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EPERM: "choose another directory, or change the permissions of this one",
    errno.EROFS: "this file system is read-only: choose another directory",
}


@contextmanager
def staged_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file, open for writing, that becomes `path` when the block ends without an error.

    A link at `path` keeps pointing where it points. Raises OutputError where `path` cannot be written; wrap writes in
    `writing(path)` to have theirs told apart from other failures of the block.
    """
    target = Path(os.path.realpath(path))
    _check_place(target)
    # Its own name and no mkstemp: two processes do not meet, and the file has the permissions that any other would.
    staging = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    with writing(path):
        file = staging.open("xb")
    try:
        yield file
        with writing(path):
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with nothing behind it
            file.close()
            staging.replace(target)
    finally:
        with contextlib.suppress(OSError):
            file.close()  # after a failure: what is still buffered has no place, and goes with the file
        staging.unlink(missing_ok=True)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError inside the block becomes an OutputError that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{os.fsdecode(path)} cannot be written: {reason(error)}", hint=hint_for(error)) from error


def check_place(path: str | os.PathLike[str]) -> None:
    """Raise OutputError where `staged_file` could not write `path`: before minutes of work, not after."""
    target = Path(os.path.realpath(path))
    _check_place(target)
    probe = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    with writing(path):
        probe.touch()
        probe.unlink()


def reason(error: OSError) -> str:
    """What the system says, in lower case: no space left on device."""
    text = error.strerror or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]


def hint_for(error: OSError) -> str | None:
    """What to do about an error of the file system that is not a bug; None where nothing is known to help."""
    return _HINTS.get(error.errno or 0)


def _check_place(target: Path) -> None:
    for parent in target.parents:
        if (parent / "manifest.json").is_file() and (parent / "golden.safetensors").is_file():
            message = f"{target} lies inside the bundle {parent}, which holds nothing but what its manifest lists"
            raise OutputError(message, hint="choose a place outside the bundle")
    if target.is_dir():
        raise OutputError(f"{target} is a directory, expected the name of a file", hint="add a file name to it")
    if target.exists() and not target.is_file():
        raise OutputError(
            f"{target} is no regular file, and would be replaced by one", hint="write to a file: -o OUT, beside it"
        )
    if not target.parent.is_dir():
        raise OutputError(f"there is no directory {target.parent}", hint=f"create it first: mkdir -p {target.parent}")
