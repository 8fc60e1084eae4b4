"""All of a benchmark: open who takes part, time them in turn on every batch, and say what kept the others away."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from clip_export.backends import open_engine
from clip_export.benching import end_to_end as stages
from clip_export.benching import machine
from clip_export.benching.batches import NATURAL, Batch, check, make_batches
from clip_export.benching.entrants import (
    Contestant,
    Engines,
    Entrant,
    Where,
    Work,
    as_numpy,
    entrants,
    has_cuda_torch,
    least_cosine,
    open_entrant,
    output_of,
    reason,
)
from clip_export.benching.fresh import RUNS, Opening, files_of, measure_opening
from clip_export.benching.limits import Ceiling, count_flop, cpu_ceiling, gpu_ceiling
from clip_export.benching.results import Result, Row
from clip_export.benching.timing import Repeats, Timing, event_clock, measure, ratio, wall_clock
from clip_export.bundle import Bundle
from clip_export.choice import FP32, GRAPHS
from clip_export.errors import ClipExportError
from clip_export.progress import Progress, silent

T = TypeVar("T")

BATCHES = (1, 8, 64)
COMPARED = 8  # rows of a batch that are held against the fp32 graphs
SAME = 0.9  # a cosine below it is no rounding, in whatever precision: it is another model
# What opening and running may raise: ours, and torch's, whose compiler raises RuntimeErrors of many kinds.
_FAILURES = (ClipExportError, RuntimeError, ImportError, OSError, MemoryError)


def bench(
    path: str | os.PathLike[str] | Bundle,
    *,
    backends: Sequence[str | None] = (None,),
    precisions: Sequence[str | None] = (None,),
    device: str | None = None,
    batches: Sequence[int] = BATCHES,
    lengths: Sequence[str] = (NATURAL,),
    compare: Sequence[str] = (),
    checkpoint: str | None = None,
    end_to_end: Path | None = None,
    repeats: Repeats | None = None,
    openings: int = RUNS,
    progress: Progress = silent,
) -> Result:
    """Measure the bundle at `path`, with every one of `backends` in every one of `precisions`, None as `load` takes it.

    `compare` is among torch, compile, transformers and onnxruntime; the first three take `checkpoint`, which the demo
    does not need. `lengths` are natural or numbers of tokens; `end_to_end` is a folder with pictures, and captions;
    `openings` are fresh processes for each contestant, 0 for none. Who cannot take part is in `left_out`, with the
    reason; where none of the bundle's engines can, nothing is measured. Raises InputError for what cannot be asked,
    BundleError for a bundle that is damaged.
    """
    check(batches, lengths)
    bundle = path if isinstance(path, Bundle) else Bundle.open(path)
    repeats = repeats or Repeats()
    every = list(make_batches(bundle, tuple(batches), tuple(lengths)))
    if end_to_end is not None:
        stages.inputs_of(end_to_end, bundle.spec.towers)  # before minutes of work, not after
    options = {"compare": compare, "checkpoint": checkpoint, "device": device, "most": max(batches)}
    asked = entrants(bundle, backends=backends, precisions=precisions, **options)  # type: ignore[arg-type]
    with ExitStack() as stack:
        run = _Run(bundle, repeats, progress)
        run.open(asked, stack)
        if run.contestants:
            run.expect(every)
            for batch in every:
                run.time(batch)
            run.open_afresh(openings)
            run.from_files(end_to_end, max(batches))
        return run.result(device)


@dataclass
class _Run:
    """The contestants, the bundle's first, and what was measured of them so far."""

    bundle: Bundle
    repeats: Repeats
    progress: Progress
    contestants: list[Contestant] = field(default_factory=list)
    opened: list[Entrant] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    ceilings: dict[str, Ceiling] = field(default_factory=dict)
    found_openings: list[Opening] = field(default_factory=list)
    found_stages: list[stages.EndToEnd] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    expected: dict[str, np.ndarray] = field(default_factory=dict)
    complete: bool = True  # whether all that was asked of the bundle itself was measured

    def open(self, asked: Sequence[Entrant], stack: ExitStack) -> None:
        """Open the bundle's engines, and the others on the device of the first of them; none if there is none."""
        for named in asked:
            own = named.kind == "bundle"
            if not own and not self.contestants:
                self.left_out[named.title] = "there is no engine of the bundle to compare with"
                continue
            entrant = named if own else dataclasses.replace(named, device=self.contestants[0].device)
            self.progress(f"open {entrant.title}", 0, 0)
            contestant = self.attempt(entrant.title, partial(open_entrant, entrant))
            if contestant is None:
                self.complete = self.complete and not own
                continue
            stack.callback(contestant.close)
            if any(other.name == contestant.name for other in self.contestants):
                self.notes.append(f"{entrant.title} is {contestant.name}, which takes part already")
                continue
            contract = self.bundle.manifest.contracts.get(contestant.precision)
            if own and contract is not None and not contract.kept:
                self.notes.append(f"{contestant.name} misses its accuracy contract: {'; '.join(contract.missed)}")
            self.contestants.append(contestant)
            self.opened.append(entrant)

    def attempt(self, name: str, work: Callable[[], T]) -> T | None:
        """What `work` gives; where it fails, None and a line in `left_out`."""
        try:
            return work()
        except _FAILURES as error:
            self.left_out[name] = reason(error)
            return None

    def expect(self, every: Sequence[Batch]) -> None:
        """What the fp32 graphs give for the first rows of each batch, on the CPU and untimed; nothing is opened after.

        One that is fast and wrong is seen by it, also where it is the bundle's own.
        """
        for tower in dict.fromkeys(batch.tower for batch in every):
            self.progress(f"the {tower} reference", 0, 0)
            batches = [batch for batch in every if batch.tower == tower]
            found = self.attempt(f"the fp32 reference of {tower}", partial(_reference, self.bundle, batches))
            self.expected |= {} if found is None else found

    @property
    def baseline(self) -> str | None:
        """Ratios are to torch as people run it, where it takes part, else to the first."""
        if not self.contestants:
            return None
        by_kind = {entrant.kind: one.name for entrant, one in zip(self.opened, self.contestants, strict=True)}
        return by_kind.get("torch") or by_kind.get("transformers") or self.contestants[0].name

    def time(self, batch: Batch) -> None:
        """Add the rows of one batch: from host to host, and where a GPU computes, on the device too."""
        flop = self.attempt("FLOPs", lambda: count_flop(self.bundle.graph_path(batch.tower, FP32), batch.axes))
        places: list[Where] = ["host"]
        if any(one.device != "cpu" for one in self.contestants):
            if has_cuda_torch():
                places.append("device")
            else:
                self.left_out["timing on the GPU"] = "CUDA events come with torch, and there is none here with CUDA"
        for where in places:
            self.progress(f"{batch.title}, batch {batch.size}, {where} to {where}", 0, 0)
            self._time(batch, where, flop)

    def _time(self, batch: Batch, where: Where, flop: int | None) -> None:
        works: dict[str, Work] = {}
        near: dict[str, float] = {}
        expected = self.expected.get(batch.key)
        for contestant in self.contestants:
            place = f"{contestant.name}: {batch.title}, batch {batch.size}, {where} to {where}"
            made = self.attempt(place, partial(_first, contestant, batch, where))
            if made is None:
                continue
            work, found = made
            if expected is None:  # no ONNX Runtime here, which left_out says
                expected = found[:COMPARED]
            cosine = least_cosine(found[:COMPARED], expected)
            if not cosine >= SAME:
                self.left_out[place] = f"it gives other embeddings, min cosine {cosine:.4f}: is it the same model?"
                continue
            works[contestant.name], near[contestant.name] = work, cosine
        seconds = measure(works, wall_clock if where == "host" else event_clock, self.repeats)
        base = seconds.get(self.baseline or "")
        for contestant in self.contestants:
            own = seconds.get(contestant.name)
            if own is None:
                continue
            alone = base is None or contestant.name == self.baseline
            self.rows.append(
                Row(
                    tower=batch.tower,
                    lengths=batch.lengths,
                    tokens=batch.length,
                    batch=batch.size,
                    where=where,
                    contestant=contestant.name,
                    precision=contestant.precision,
                    timing=Timing.of(own),
                    ratio=None if alone or base is None else ratio(base, own),
                    flop=flop,
                    ceiling=self.ceiling(contestant),
                    min_cosine=near[contestant.name],
                )
            )

    def ceiling(self, contestant: Contestant) -> float | None:
        """FLOP/s of the fastest product on its device in its precision, measured once."""
        device, precision = contestant.device, contestant.precision
        name = device if device == "cpu" else f"{device}, {FP32 if precision == FP32 else 'half'}"
        if name not in self.ceilings and f"the ceiling of {name}" not in self.left_out:
            self.progress(f"the fastest matrix product of {name}", 0, 0)
            measured = self.attempt(
                f"the ceiling of {name}",
                lambda: cpu_ceiling() if device == "cpu" else gpu_ceiling(device, precision),
            )
            if measured is not None:
                self.ceilings[name] = measured
        found = self.ceilings.get(name)
        return None if found is None else found.flop_per_second

    def open_afresh(self, runs: int) -> None:
        """Load time and memory of each; torch's compiler works when a shape first comes, and is left out here."""
        for entrant, contestant in zip(self.opened, self.contestants, strict=True):
            if runs == 0 or entrant.kind == "compile":
                continue
            self.progress(f"open {contestant.name} in a fresh process", 0, 0)
            place = f"load time of {contestant.name}"
            files = files_of(self.bundle, entrant)
            found = self.attempt(place, partial(measure_opening, entrant, files, runs=runs))
            if found is not None:
                self.found_openings.append(found)

    def from_files(self, folder: Path | None, batch: int) -> None:
        """Stage by stage from `folder`, through the first engine of the bundle."""
        first = self.contestants[0]
        if folder is None or not isinstance(first, Engines):
            return
        work = partial(stages.measure, self.bundle, first, folder, batch, progress=self.progress)
        found = self.attempt(f"from the files of {folder.name} on", work)
        self.found_stages += found or []
        self.complete = self.complete and found is not None

    def result(self, device: str | None) -> Result:
        """Everything so far."""
        devices = [one.device for one in self.contestants if one.device != "cpu"] or [device or "cpu"]
        own = {one.name for entrant, one in zip(self.opened, self.contestants, strict=True) if entrant.kind == "bundle"}
        return Result(
            bundle=self.bundle.name,
            measured=self.complete and own <= {row.contestant for row in self.rows} and bool(own),
            baseline=next((row.contestant for row in self.rows if row.contestant == self.baseline), None),
            machine=machine.describe(devices[0]),
            rows=tuple(self.rows),
            ceilings=dict(self.ceilings),
            openings=tuple(self.found_openings),
            end_to_end=tuple(self.found_stages),
            left_out=dict(self.left_out),
            notes=tuple(self.notes),
        )


def _reference(bundle: Bundle, batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """What the fp32 graph gives for the first COMPARED rows of each batch of one tower, by key."""
    engine = open_engine(GRAPHS, bundle.graph_path(batches[0].tower, FP32))
    try:
        return {
            batch.key: engine({name: array[:COMPARED] for name, array in batch.feeds.items()})[output_of(bundle, batch)]
            for batch in batches
        }
    finally:
        engine.close()


def _first(contestant: Contestant, batch: Batch, where: Where) -> tuple[Work, np.ndarray]:
    """The work, and what it gives the first time."""
    work = contestant.work(batch, where)
    return work, as_numpy(work())
