"""Kills an extension of a bundle at every single operation on the file system, as crashing.py does with a build.

    python crashing_extension.py DIRECTORY

Prints one line per crash: operation, and what was found afterwards: the old bundle, the extended one, or the old one
aside, where the next extension finds it.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import crashing
from bundles_made import with_plans

from clip_export.bundle import Bundle, hidden_beside
from clip_export.publish import extended

crashing.OPERATIONS |= {"os.link", "shutil.copyfile"}


def extend(target: Path, name: str = "", *, force: bool = True) -> None:
    """In the place of crashing.build, whose arguments it takes and does not need."""
    with extended(target) as (bundle, staging):
        with_plans(staging, known=bundle)


def what_is_there(target: Path) -> str:
    found = crashing.what_is_there(target)
    return "extended" if found == "old" and Bundle.open(target).manifest.plans else found


def main(directory: Path) -> None:
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # a kill loses no page of the cache
    crashing_build, crashing.build = crashing.build, extend
    n = 0
    while True:
        n += 1
        parent = directory / str(n)
        target = parent / "a-clip"
        crashing_build(target, "old", force=False)
        if not crashing.died(target, n, force=True):
            break
        found = what_is_there(target)
        print(f" {found}", flush=True)
        assert found in {"old", "extended", "old aside"}, found
        for aside in hidden_beside(target, "replaced"):
            assert Bundle.open(aside).name == "old", "what may be put back has to be complete"
        extend(target)
        assert len(Bundle.open(target).manifest.plans) == 2
        assert list(parent.iterdir()) == [target], list(parent.iterdir())
        shutil.rmtree(parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
