"""Kills a build at every single operation on the file system, one after the other, and checks what is left each time.

    python crashing.py DIRECTORY new|replace|recover

Run by test_publish.py in a process of its own, because it forks. Python's audit events are the operations: the hook is
called before each, so the n-th child dies with n-1 of them done. Prints one line per crash: operation and what was
found afterwards.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from bundles_made import fill

from clip_export.bundle import Bundle, hidden_beside
from clip_export.errors import BundleNotFoundError
from clip_export.publish import staged

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"}
OPERATIONS |= {"fcntl.flock", "os.truncate"}


def build(target: Path, name: str, *, force: bool) -> None:
    with staged(target, force=force) as staging:
        fill(staging, name)


def build_and_die(target: Path, n: int, *, force: bool) -> None:
    """Build, and be killed at the n-th operation; the operation goes to standard output first."""
    done = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        done += event in OPERATIONS
        if event in OPERATIONS and done == n:
            os.write(1, event.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    build(target, "new", force=force)


def died(target: Path, n: int, *, force: bool) -> bool:
    child = os.fork()
    if child == 0:
        try:
            build_and_die(target, n, force=force)
        except BaseException as error:  # noqa: BLE001  whatever it is, the child must not run on as a second parent
            print(f"child failed: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0, "the build failed instead of being killed"
    return False


def what_is_there(target: Path) -> str:
    """The name of the bundle at `target`, `nothing`, or `old aside` if the error says where the old one is."""
    try:
        bundle = Bundle.open(target)
    except BundleNotFoundError as error:
        if "the bundle that was there is " not in error.message:
            assert "does not exist" in error.message, error
            return "nothing"
        aside = Bundle.open(error.message.rpartition(" is ")[2])
        assert aside.name == "old"
        return "old aside"
    assert bundle.graph_path("text").read_bytes() == b"graph of " + bundle.name.encode()
    return bundle.name


def leave_as_killed_between_the_renames(target: Path) -> None:
    target.rename(target.with_name(f".{target.name}.replaced-0123abcd"))
    staging = target.with_name(f".{target.name}.building-0123abcd")
    staging.mkdir()
    fill(staging, "lost")
    target.with_name(f".{target.name}.lock").touch()


def main(directory: Path, mode: str) -> None:
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # a kill loses no page of the cache; it saves a minute
    n = 0
    while True:
        n += 1
        parent = directory / str(n)
        target = parent / "a-clip"
        if mode != "new":
            build(target, "old", force=False)
        if mode == "recover":
            leave_as_killed_between_the_renames(target)
        if not died(target, n, force=mode != "new"):
            break
        found = what_is_there(target)
        print(f" {found}", flush=True)
        assert found in ({"nothing", "new"} if mode == "new" else {"old", "new", "old aside"}), found
        for aside in hidden_beside(target, "replaced"):
            assert Bundle.open(aside).name == "old", "what may be put back has to be complete"
        build(target, "next", force=True)
        assert Bundle.open(target).name == "next"
        assert list(parent.iterdir()) == [target], list(parent.iterdir())
        shutil.rmtree(parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
