"""Publishing a bundle: built beside its target, made durable, then renamed. Nobody ever sees half of one.

    .NAME.lock               held (flock) by the one process that builds NAME; the kernel lets go when it dies
    .NAME.building-xxxxxxxx  the staging directory; what is found of these under the lock is left from a dead build
    .NAME.replaced-xxxxxxxx  the bundle that --force replaces, complete, for the moment between the two renames

A process may be killed anywhere: the next build of NAME removes what is left, and puts a replaced bundle back if the
new one did not arrive. Without fcntl (Windows) a byte of the lock file is locked with msvcrt instead, the lock file
stays behind, and directories are not fsynced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from clip_export.bundle import Bundle, hidden_beside, replace_refusal
from clip_export.errors import BundleBusyError, BundleError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["staged"]

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LOCK_HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}  # flock gives the first, msvcrt one of the others
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


@contextlib.contextmanager
def staged(target: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """A fresh directory beside `target`, which becomes `target` when the block ends; write_manifest comes last in it.

    If the block raises, the directory is removed and `target` stays as it was. Parents of `target` are made. A `target`
    that is a bundle is replaced only with `force`; one that is anything else than a bundle, an empty directory or
    nothing is never touched, nor is a symbolic link. Raises BundleBusyError at once if another process builds
    `target`, BundleError for what cannot be written, and what Bundle.open raises for an incomplete bundle.
    """
    target = _absolute(target)
    with _writing(target):
        if replace_refusal(target.parent) is None:
            raise BundleError(f"{target} lies inside the bundle {target.parent}", hint="choose another place with -o")
        target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        with _writing(target):
            _tidy(target)
            _check_target(target, force=force)
            staging = _beside(target, "building")
        try:
            with _writing(target):
                staging.mkdir()
            with _writing(target, inside=staging):
                yield staging
            _publish(staging, target, force=force)
        except BaseException:
            # What cannot be removed now is removed by the next build; the first error is the one to report.
            with contextlib.suppress(OSError):
                _tidy(target)
            raise
        with _writing(target):
            _tidy(target)


def _absolute(given: str | os.PathLike[str]) -> Path:
    text = os.fsdecode(given)
    if "\0" in text:
        raise BundleError(f"{text!r} cannot be the path of a bundle: it holds a NUL")
    path = Path(text)
    with _writing(path):
        # The last part is kept as it is, so that a symbolic link is seen as one.
        path = Path(os.path.realpath(path.parent)) / path.name if path.name != ".." else Path(os.path.realpath(path))
        here = Path.cwd()
    if path == here or path in here.parents:
        message = f"{path} is the current directory, or holds it"
        raise BundleError(message, hint="name a new directory for the bundle: -o engines/NAME")
    return path


def _check_target(target: Path, *, force: bool) -> None:
    if target.is_symlink():
        message = f"{target} is a symbolic link to {target.readlink()}"
        raise BundleError(message, hint="give the directory that it points to")
    if not target.exists():
        return
    if not target.is_dir():
        raise BundleError(f"{target} is a file", hint="choose another place with -o")
    if not any(target.iterdir()):
        return
    refusal = replace_refusal(target)
    if refusal is not None:
        message = f"{target} is not replaced: {refusal}"
        raise BundleError(message, hint="choose another place with -o, or clear this one yourself")
    if not force:
        raise BundleError(f"{target} already holds a bundle", hint="replace it with --force")


def _publish(staging: Path, target: Path, *, force: bool) -> None:
    Bundle.open(staging, check_files=False)
    with _writing(target):
        _fsync_tree(staging)
        _check_target(target, force=force)  # again: a build takes minutes, and the user may have put something there
        if target.exists():
            target.rename(_beside(target, "replaced"))
        staging.rename(target)
        _fsync(target.parent)


def _tidy(target: Path) -> None:
    """Under the lock: what `_publish` or a dead build has left beside `target` is put back, or removed."""
    for old in hidden_beside(target, "replaced"):
        if target.exists():
            # Removal takes time, and may be cut short: under this name it is not taken for a complete bundle.
            old.rename(_beside(target, "building"))
        else:
            old.rename(target)
    for staging in hidden_beside(target, "building"):
        shutil.rmtree(staging)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    path = target.with_name(f".{target.name}.lock")
    with _writing(target):
        descriptor = _acquire(path)
    if descriptor is None:
        raise BundleBusyError(f"another process is building {target}", hint="wait for it, or choose another place")
    try:
        yield
    finally:
        try:
            if sys.platform != "win32":  # there an open file cannot be removed, and a closed one may be another's
                with _writing(target):
                    path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _acquire(path: Path) -> int | None:
    """An open descriptor that holds the lock, or None if another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o666)
        try:
            _lock(descriptor)
            if _is_open_at(descriptor, path):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in _LOCK_HELD:
                return None
            raise
        os.close(descriptor)  # its last owner removed the file between our open and our lock: try the new one


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_open_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _fsync_tree(directory: Path) -> None:
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            _fsync(Path(parent) / name)
        _fsync(Path(parent))


def _fsync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _writing(target: Path, *, inside: Path | None = None) -> Iterator[None]:
    """An OSError becomes a BundleError; with `inside`, only a full disk, or one about a file in that directory."""
    try:
        yield
    except OSError as error:
        if inside is not None and error.errno not in _DISK_FULL and not _is_about(error, inside):
            raise
        place = f" ({error.filename})" if error.filename else ""
        hint = "free some space" if error.errno in _DISK_FULL else "check the permissions"
        message = f"cannot write {target}: {error.strerror or error}{place}"
        raise BundleError(message, hint=f"{hint}, or choose another place with -o") from error


def _is_about(error: OSError, directory: Path) -> bool:
    return isinstance(error.filename, (str, os.PathLike)) and Path(error.filename).is_relative_to(directory)
