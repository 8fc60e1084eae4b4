"""Every engine of a bundle that runs here, one at a time, through everything that was asked for."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from clip_export.benching.machine import describe
from clip_export.bundle import Bundle
from clip_export.errors import BackendError
from clip_export.manifest import SECOND
from clip_export.progress import Progress, silent
from clip_export.verification import Run, find_runs, lowered, missed, of_second
from clip_export.verifying.asked import Asked
from clip_export.verifying.results import EngineRun, Verification
from clip_export.verifying.work import Work

__all__ = ["verify"]


def verify(
    path: str | os.PathLike[str] | Bundle, asked: Asked | None = None, *, progress: Progress = silent, **more: Any
) -> Verification:
    """Let the bundle at `path` prove itself on this machine; `more` are fields of `Asked`.

        verify("engines/demo", precision="fp16", pairs="demo").passed

    Every precision that the bundle has, or the one asked for, is run by the best that works here, or by `backend` on
    `device`; a half or 8-bit precision that no GPU runs here is simulated on the CPU, and said to be. Golden samples
    are compared with the reference's outputs that the bundle carries; hostile inputs, batches and threads are tried;
    with `against` a checkpoint or a library is the reference, as against.py has it; `pairs` are ranked by reference and
    engine; vectors of `inputs` are compared with those of an `index`.

    What could not be measured is in the result, and so is a contract that is not kept. Raises BundleError and
    BackendError as `load` does, CheckpointError for a checkpoint that is not this bundle's, MissingDependencyError for
    a library that is not here, InputError for pairs or an index that cannot be used.
    """
    asked = dataclasses.replace(asked or Asked(), **more)
    bundle = path if isinstance(path, Bundle) else Bundle.open(path)
    found, second = _verify_one(bundle, asked, progress), bundle.second
    if second is None:
        return found
    own = dataclasses.replace(asked, against=None, pairs=None, index=None, inputs=None)  # asked of both together
    return _with_second(found, _verify_one(second, own, progress))


def _with_second(found: Verification, second: Verification) -> Verification:
    """One of a bundle and of that of its second text encoder, whose outputs and checks are named text_2/…."""
    runs = [
        dataclasses.replace(
            run,
            rows=tuple(of_second(run.rows)),
            checks=tuple(dataclasses.replace(check, name=f"{SECOND}/{check.name}") for check in run.checks),
        )
        for run in second.runs
    ]
    return dataclasses.replace(
        found,
        runs=(*found.runs, *runs),
        missed={
            name: (*found.missed.get(name, ()), *second.missed.get(name, ()))
            for name in {**found.missed, **second.missed}
        },
        unmeasured=tuple(dict.fromkeys((*found.unmeasured, *second.unmeasured))),
        notes=tuple(dict.fromkeys((*found.notes, *second.notes))),
    )


def _verify_one(bundle: Bundle, asked: Asked, progress: Progress) -> Verification:
    runs, notes, unmeasured = find_runs(bundle, asked.backend, asked.device, asked.precision)
    work = Work.prepare(bundle, asked, progress)
    found = list[EngineRun]()
    with work:
        for title, precision, open_encoder in runs:
            try:
                with open_encoder() as encoder:
                    found.append(work.run(encoder, title, precision))
            except BackendError as error:
                unmeasured = (*unmeasured, f"{precision} on {title} was not measured: {error.message}")
    precisions = _precisions(bundle, asked, runs)
    less = () if asked.min_cosine is not None else lowered(bundle, precisions)
    return Verification(
        name=bundle.name,
        reference=work.reference_name,
        runs=tuple(found),
        missed=missed(bundle, precisions),
        unmeasured=(*unmeasured, *work.unmeasured),
        notes=tuple(dict.fromkeys((*notes, *less, *work.notes, *_told(found)))),
        environment=_environment(asked.device),
    )


def _told(runs: Sequence[EngineRun]) -> Iterator[str]:
    """What is told of hostile inputs and not judged."""
    for run in runs:
        if run.comparison is not None:
            yield from run.comparison.notes
        for check in run.checks:
            if "min_cosine" in check.measured and "required" not in check.measured:
                yield f"{run.precision} {check.name}, told and not judged: {check.detail}"


def _precisions(bundle: Bundle, asked: Asked, runs: Sequence[Run]) -> list[str]:
    """Those to answer for, run here or not."""
    named = [asked.precision] if asked.precision is not None else list(bundle.manifest.variants)
    return list(dict.fromkeys([*(named if asked.backend is None else []), *(precision for _, precision, _ in runs)]))


def _environment(device: str | None) -> tuple[tuple[str, str], ...]:
    """What the figures depend on, for whoever reads them elsewhere."""
    machine = describe(device or "cpu")
    gpu = [("GPU", machine["gpu"].get("name", "a GPU"))] if machine["gpu"] is not None else []
    facts = [("machine", f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['system']}"), *gpu]
    versions = [("python", machine["python"]), *machine["versions"].items()]
    return (*facts, *versions, ("time", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())))
