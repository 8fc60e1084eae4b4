"""Every precision of a bundle, on the best that runs it here, against the model that it stands in for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from clip_export.against import Comparison, compare, open_reference, run_reference
from clip_export.bundle import Bundle
from clip_export.progress import Progress, silent
from clip_export.verification import find_runs, required_cosine


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What one engine, named by `title`, gives in `precision` against the reference."""

    title: str
    precision: str
    comparison: Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedBundle:
    """All engines of the bundle `name` against one reference; `notes` say what could not be run, and why."""

    name: str
    runs: tuple[Compared, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether ids and pixels are equal and every embedding keeps its contract, and anything was compared."""
        return bool(self.runs) and all(run.comparison.passed for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        runs = [{"engine": run.title, "precision": run.precision, **run.comparison.to_dict()} for run in self.runs]
        return {"name": self.name, "runs": runs, "notes": list(self.notes), "passed": self.passed}


def verify_against(
    path: str | os.PathLike[str],
    against: str,
    *,
    backend: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    progress: Progress = silent,
) -> ComparedBundle:
    """Compare every precision of the bundle at `path`, or the one asked for, with what `against` names.

    `against` is a checkpoint, transformers:DIRECTORY or open_clip:NAME, as against.py has it; inputs are the golden
    samples and the hostile ones. The reference is asked once and let go before an engine is opened.

    Raises CheckpointError for a checkpoint that is not this bundle's, MissingDependencyError for a library that is not
    here; BundleError and BackendError as `load` does.
    """
    bundle = Bundle.open(path)
    runs, notes = find_runs(bundle, backend, device, precision)
    expected = run_reference(open_reference(against, bundle), bundle, progress=progress)
    found = []
    for done, (title, name, open_encoder) in enumerate(runs):
        progress("compare", done, len(runs))
        with open_encoder() as encoder:
            comparison = compare(encoder, expected, precision=name, required=required_cosine(bundle, name))
        found.append(Compared(title=title, precision=name, comparison=comparison))
    progress("compare", len(runs), len(runs))
    return ComparedBundle(name=bundle.name, runs=tuple(found), notes=notes)
