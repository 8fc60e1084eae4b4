"""Publishing a bundle: built beside its target, made durable, then renamed. Nobody ever sees half of one.

    .NAME.lock               held (flock) by the one process that builds NAME; the kernel lets go when it dies
    .NAME.building-xxxxxxxx  the staging directory; what is found of these under the lock is left from a dead build
    .NAME.replaced-xxxxxxxx  the bundle that --force replaces, complete, for the moment between the two renames

A bundle is extended the same way: `extended` fills the staging directory with hard links to the files that are there,
so that nothing is copied and nothing is written into the bundle that others read.

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
from clip_export.bundle_files import is_runtime_cache, listing
from clip_export.errors import BundleBusyError, BundleError, BundleIntegrityError
from clip_export.file_lock import acquire
from clip_export.manifest import REBUILD, REPORT, SECOND, is_graph_file

__all__ = ["discard", "extended", "staged"]

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# No hard links on this file system, to a file of this owner, across this mount, or no more of them to this file.
_NO_LINK = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}
_ELSEWHERE = "choose another place with -o"
_COPY = "extend a copy of the bundle"


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
            raise BundleError(f"{target} lies inside the bundle {target.parent}", hint=_ELSEWHERE)
        target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        with _writing(target):
            _tidy(target)
            _check_target(target, force=force)
        with _swapped_in(target, force=force) as staging:
            yield staging


@contextlib.contextmanager
def extended(target: str | os.PathLike[str]) -> Iterator[tuple[Bundle, Path]]:
    """The bundle at `target`, checked, and a staging directory with all its files, which replaces it in the end.

    For adding to a bundle: every file but the manifest is there already, as a hard link (a copy where there are none;
    of report.json always, since that is rewritten, and of the weights beside a graph). So a file in it is never opened
    for writing: `discard` removes one that is to be made anew. write_manifest(staging, known=bundle) comes last in the
    block. If the block raises, `target` is as it was, to the byte. Who reads the bundle meanwhile keeps what they have
    open.

    Raises BundleBusyError if another process builds or extends `target`, what Bundle.open raises for a bundle that is
    none or is damaged, and BundleError for what cannot be written.
    """
    target = _absolute(target, hint="leave it first: cd ..")
    if not os.path.lexists(target) and not hidden_beside(target, "replaced"):
        Bundle.open(target)  # raises: there is nothing, and nowhere to put a lock perhaps
    with _locked(target, elsewhere=_COPY):
        with _writing(target, elsewhere=_COPY):
            _tidy(target)
            _check_no_link(target)
        bundle = Bundle.open(target)
        with _writing(target, elsewhere=_COPY):
            _check_target(target, force=True, elsewhere=_COPY)
        with _swapped_in(target, force=True, elsewhere=_COPY) as staging:
            with _writing(target, elsewhere=_COPY):
                _carry_over(bundle, staging)
                before = _stamps(bundle)
            yield bundle, staging
            with _writing(target, elsewhere=_COPY):
                _check_untouched(bundle, before)


def discard(staging: Path, name: str) -> None:
    """Remove the file or folder `name` from a staging directory; that it is not there is fine.

    Only names go: what a bundle shares with the staging directory stays whole in the bundle.
    """
    path = staging / name
    if staging not in path.parents or ".." in path.parts:
        raise BundleError(f"{name!r} is no file inside the bundle")
    with _writing(staging):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _swapped_in(target: Path, *, force: bool, elsewhere: str = _ELSEWHERE) -> Iterator[Path]:
    """Under the lock: a fresh directory that becomes `target` when the block ends, and is removed if it raises."""
    staging = _beside(target, "building")
    try:
        with _writing(target, elsewhere=elsewhere):
            staging.mkdir()
        with _writing(target, inside=staging, elsewhere=elsewhere):
            yield staging
        _publish(staging, target, force=force, elsewhere=elsewhere)
    except BaseException:
        # What cannot be removed now is removed by the next build; the first error is the one to report.
        with contextlib.suppress(OSError):
            _tidy(target)
        raise
    with _writing(target, elsewhere=elsewhere):
        _tidy(target)


def _carry_over(bundle: Bundle, staging: Path) -> None:
    """All listed files, and the caches that running plans have left beside themselves."""
    graphs = [graph.file for towers in bundle.manifest.variants.values() for graph in towers.values()]
    if (second := bundle.second) is not None:
        held = second.manifest.variants.values()
        graphs += [f"{SECOND}/{graph.file}" for towers in held for graph in towers.values()]
    for name in bundle.manifest.files:
        # ONNX's own libraries refuse weights that have a second hard link, as a way to smuggle in another's file.
        weights = any(is_graph_file(name, graph) and name != graph for graph in graphs)
        _link(bundle.path / name, staging / name, copy=weights or name == REPORT)
    for name in listing(bundle.path):
        cache = bundle.path / name
        if is_runtime_cache(name) and name.endswith(".cache") and not cache.is_symlink() and cache.is_file():
            with contextlib.suppress(FileNotFoundError):  # a plan that runs just now may replace it
                _link(cache, staging / name, copy=False)


def _stamps(bundle: Bundle) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of writing of every listed file."""
    status = {name: (bundle.path / name).lstat() for name in bundle.manifest.files}
    return {name: (found.st_ino, found.st_size, found.st_mtime_ns) for name, found in status.items()}


def _check_untouched(bundle: Bundle, before: dict[str, tuple[int, int, int]]) -> None:
    """Links are shared: whoever opened one for writing has changed the bundle, which its digests no longer describe."""
    changed = sorted(name for name, stamp in _stamps(bundle).items() if stamp != before[name])
    if changed:
        message = f"{', '.join(changed)} in {bundle.path} was written to while the bundle was extended"
        raise BundleIntegrityError(message, hint=REBUILD)


def _link(source: Path, destination: Path, *, copy: bool) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    if not copy:
        try:
            os.link(source, destination)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
        else:
            return
    shutil.copyfile(source, destination)


def _absolute(
    given: str | os.PathLike[str], *, hint: str = "name a new directory for the bundle: -o engines/NAME"
) -> Path:
    text = os.fsdecode(given)
    if "\0" in text:
        raise BundleError(f"{text!r} cannot be the path of a bundle: it holds a NUL")
    path = Path(text)
    with _writing(path):
        # The last part is kept as it is, so that a symbolic link is seen as one.
        path = Path(os.path.realpath(path.parent)) / path.name if path.name != ".." else Path(os.path.realpath(path))
        here = Path.cwd()
    if path == here or path in here.parents:
        raise BundleError(f"{path} is the current directory, or holds it", hint=hint)
    return path


def _check_no_link(target: Path) -> None:
    if target.is_symlink():
        message = f"{target} is a symbolic link to {target.readlink()}"
        raise BundleError(message, hint="give the directory that it points to")
    if target.is_mount():
        message = f"{target} is a mount point, which cannot be renamed into place"
        raise BundleError(message, hint="mount the directory above it instead, and let the bundle be one in it")


def _check_target(target: Path, *, force: bool, elsewhere: str = _ELSEWHERE) -> None:
    _check_no_link(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise BundleError(f"{target} is a file", hint=elsewhere)
    if not any(target.iterdir()):
        return
    refusal = replace_refusal(target)
    if refusal is not None:
        message = f"{target} is not replaced: {refusal}"
        raise BundleError(message, hint=f"{elsewhere}, or clear this one yourself")
    if not force:
        raise BundleError(f"{target} already holds a bundle", hint="replace it with --force")


def _publish(staging: Path, target: Path, *, force: bool, elsewhere: str) -> None:
    Bundle.open(staging, check_files=False)
    with _writing(target, elsewhere=elsewhere):
        _fsync_tree(staging)
        # Again: a build takes minutes, and the user may have put something there.
        _check_target(target, force=force, elsewhere=elsewhere)
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
def _locked(target: Path, *, elsewhere: str = _ELSEWHERE) -> Iterator[None]:
    path = target.with_name(f".{target.name}.lock")
    with _writing(target, elsewhere=elsewhere):
        descriptor = acquire(path)
    if descriptor is None:
        raise BundleBusyError(f"another process is building {target}", hint="wait for it, or choose another place")
    try:
        yield
    finally:
        try:
            if sys.platform != "win32":  # there an open file cannot be removed, and a closed one may be another's
                with _writing(target, elsewhere=elsewhere):
                    path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


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
def _writing(target: Path, *, inside: Path | None = None, elsewhere: str = _ELSEWHERE) -> Iterator[None]:
    """An OSError becomes a BundleError; with `inside`, only a full disk, or one about a file in that directory."""
    try:
        yield
    except OSError as error:
        if inside is not None and error.errno not in _DISK_FULL and not _is_about(error, inside):
            raise
        place = f" ({error.filename})" if error.filename else ""
        hint = "free some space" if error.errno in _DISK_FULL else "check the permissions"
        message = f"cannot write {target}: {error.strerror or error}{place}"
        raise BundleError(message, hint=f"{hint}, or {elsewhere}") from error


def _is_about(error: OSError, directory: Path) -> bool:
    return isinstance(error.filename, (str, os.PathLike)) and Path(error.filename).is_relative_to(directory)
