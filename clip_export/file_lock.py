"""A lock of the kernel on a file: it is let go when its owner dies, however it dies. flock, or msvcrt on Windows."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["acquire"]

_HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}  # flock gives the first, msvcrt one of the others
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


def acquire(path: Path) -> int | None:
    """An open descriptor that holds the lock at `path`, or None if another has it. Closing it lets go."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o666)
        try:
            _lock(descriptor)
            if _is_open_at(descriptor, path):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in _HELD:
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
