"""What opening takes, measured in a process of its own: time from nothing to the first embedding, and memory.

    cold    a new process; the system was asked to drop the files from its cache, which it may refuse
    warm    once more in the same process, with libraries imported and files in the cache

`main` is what that process runs: it is given an Entrant as JSON, and prints an Opening.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clip_export.benching.batches import NATURAL, make_batches
from clip_export.benching.entrants import Entrant, open_entrant, reason
from clip_export.benching.memory import device_bytes, peak_bytes, resident_bytes
from clip_export.bundle import Bundle
from clip_export.choice import GPU
from clip_export.errors import BackendError, ClipExportError

RUNS = 3
_LIMIT_S = 600.0
# As this process finds its modules, and nothing from the current directory: a checkout need not be installed.
_BOOTSTRAP = "import sys; sys.path[:] = sys.argv[2:]; from clip_export.benching.fresh import main; main(sys.argv[1])"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """Medians over fresh processes of one contestant, in seconds and bytes; None where the system does not tell.

    `cold` is from the start of the process to the first embedding of each tower, of which `opening` went into opening
    it, imports of its libraries included; `warm` is opening it again. `opened_bytes` are held after opening, and
    `peak_bytes` were held at most, by `batch` inputs a tower at once; `device_bytes` were taken of a GPU, by all.
    """

    contestant: str
    cold: float
    opening: float
    warm: float
    batch: int
    opened_bytes: int | None
    peak_bytes: int | None
    device_bytes: int | None


def measure_opening(entrant: Entrant, files: Iterable[Path], *, runs: int = RUNS) -> Opening:
    """Open `entrant`, which reads `files`, in `runs` fresh processes. Raises BackendError where one fails."""
    files = list(files)
    found: list[Opening] = []
    for _ in range(runs):
        drop_from_cache(files)
        found.append(_run(entrant))
    return Opening(
        contestant=found[0].contestant,
        cold=statistics.median(run.cold for run in found),
        opening=statistics.median(run.opening for run in found),
        warm=statistics.median(run.warm for run in found),
        batch=entrant.most,
        opened_bytes=_median(run.opened_bytes for run in found),
        peak_bytes=_median(run.peak_bytes for run in found),
        device_bytes=_median(run.device_bytes for run in found),
    )


def files_of(bundle: Bundle, entrant: Entrant) -> list[Path]:
    """What opening `entrant` reads, as far as it is known: a checkpoint's files, or all of the bundle."""
    if entrant.kind in ("bundle", "onnxruntime"):
        return [bundle.path / name for name in bundle.manifest.files]
    place = Path(entrant.checkpoint or "")
    if place.is_dir():
        return [path for path in place.iterdir() if path.is_file()]
    return [place] if place.is_file() else []


def drop_from_cache(files: Iterable[Path]) -> None:
    """Ask the system to forget what it holds of `files`; they are whole on disk, so nothing is lost."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _median(sizes: Iterable[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return round(statistics.median(known)) if known else None


def _run(entrant: Entrant) -> Opening:
    given = json.dumps({"started": time.time(), "entrant": dataclasses.asdict(entrant)})
    command = [sys.executable, "-P", "-c", _BOOTSTRAP, given, *sys.path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_LIMIT_S)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["it said nothing"])[-1]
        message = f"{entrant.title} cannot be opened in a process of its own: {last}"
        raise BackendError(message, hint="see what clip-export verify says") from error
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"{entrant.title} was not open after {_LIMIT_S:.0f} s in a process of its own") from error
    return Opening(**json.loads(done.stdout.splitlines()[-1]))


def _measure(entrant: Entrant, started: float) -> Opening:
    """In the fresh process, which began at `started` (time.time of whoever started it)."""
    taken, start = device_bytes(entrant.device or GPU), time.perf_counter()
    contestant = open_entrant(entrant)
    opening, opened = time.perf_counter() - start, resident_bytes()
    start = time.perf_counter()
    bundle = Bundle.open(entrant.bundle, check_files=False)
    single = list(make_batches(bundle, (1,), (NATURAL,)))
    own = time.perf_counter() - start  # what this benchmark takes to have an input, and no application does
    for batch in single:
        contestant.work(batch, "host")()
    cold = time.time() - started - own
    for batch in make_batches(bundle, (entrant.most,), (NATURAL,)):
        contestant.work(batch, "host")()
    peak, after = peak_bytes(), device_bytes(contestant.device)
    contestant.close()
    start = time.perf_counter()
    open_entrant(entrant).close()
    warm = time.perf_counter() - start
    return Opening(
        contestant=contestant.name,
        cold=cold,
        opening=opening,
        warm=warm,
        batch=entrant.most,
        opened_bytes=opened,
        peak_bytes=peak,
        device_bytes=None if after is None else after - (taken or 0),
    )


def main(given: str) -> None:
    """What the fresh process does: read what to open, print what was found as JSON; exit with a line where it fails."""
    request = json.loads(given)
    try:
        found = _measure(Entrant(**request["entrant"]), request["started"])
    except ClipExportError as error:
        sys.exit(reason(error))  # one line on stderr, which whoever started this repeats
    print(json.dumps(dataclasses.asdict(found)))
