"""Whether an input gives the same in every company: in its place, in any batch, beside other threads.

None of this needs a reference. Whoever encodes one query against an index of a million rows relies on it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from clip_export.asking import Check, Subject, few, same_cosines
from clip_export.bundle import Bundle
from clip_export.cosine import unit_rows
from clip_export.encoder import Encoder
from clip_export.spec import Tower

__all__ = ["AGREEMENT", "ROUNDS", "THREADS", "ask_composition", "ask_order", "ask_threads", "batch_sizes"]

# Least cosine of one input's embeddings in two batches, by precision. An engine chooses kernels by shape, so that sums
# are taken in another order and values on an edge are rounded to the other side. That is noise of the kind that a
# contract allows for, and a small part of it: a tenth of what 1 - cosine to the reference may be (verification.py).
AGREEMENT = {"fp32": 0.999999, "fp16": 0.99999, "fp16all": 0.9999, "bf16": 0.999}
AGREEMENT |= dict.fromkeys(("int8", "int8all", "int8cpu", "fp8", "auto", "autoall", "autofp8"), 0.999)

THREADS = 4
ROUNDS = 2  # of every thread over its inputs


def batch_sizes(encoder: Encoder, bundle: Bundle, tower: Tower, precision: str) -> tuple[int, ...]:
    """The batches that `encoder` is asked for: the min, opt and max of each profile of the plan that it runs.

    Graphs have no profiles: 2, and one more than the encoder gives at once, which is a full batch and one left over.
    """
    profiles = [
        profile
        for plan in bundle.manifest.plans
        if plan.tower == tower and plan.precision == precision
        if f"{plan.backend} {plan.version}, {plan.compute_capability}" in encoder.engine
        for profile in plan.profiles
    ]
    shapes = [shape for profile in profiles for span in profile.values() for shape in (span.min, span.opt, span.max)]
    return tuple(sorted({shape[0] for shape in shapes} or {2, encoder.batch_size + 1}))


def ask_order(subject: Subject) -> Check:
    """In one call each row is nearest to what its own input gives alone; equal ones may stand for each other."""
    there = range(len(subject.names))
    misplaced = []
    for rows in (there, there[::-1]):
        near = unit_rows(subject.run(rows)) @ unit_rows(subject.alone).T
        nearest, own = near.argmax(axis=1), near[np.arange(len(rows)), rows]
        kept = own >= near.max(axis=1) - (1 - subject.agreement)
        for place in np.flatnonzero(~kept):  # a row of NaN is not kept
            holds, belongs = subject.names[nearest[place]], subject.names[rows[place]]
            misplaced.append(f"row {place} holds {holds!r} where {belongs!r} belongs")
    return Check(
        name=f"{subject.tower}: order",
        passed=not misplaced,
        detail=few(misplaced) or "kept forwards and backwards",
        measured={"inputs": len(there), "misplaced": len(misplaced)},
    )


def ask_composition(subject: Subject) -> Check:
    """The same input alone, in a crowd, at its end, beside longer ones, and in the batches of every profile."""
    calls = list(_compositions(subject))
    worst, detail = 2.0, ""
    for title, rows in calls:
        same = same_cosines(subject.run(rows), subject.alone[rows])
        place = int(same.argmin())
        if same[place] < worst:
            worst = float(same[place])
            detail = f"{title}: row {place}, {subject.names[rows[place]]!r}, has cosine {worst:.7f} to itself alone"
    passed = worst >= subject.agreement
    sizes = ", ".join(map(str, subject.batches))
    return Check(
        name=f"{subject.tower}: batch composition",
        passed=passed,
        detail=f"in a crowd, at its end, in batches of {sizes}"
        if passed
        else f"{detail}, expected at least {subject.agreement}",
        measured={"min_cosine": worst, "required": subject.agreement, "calls": len(calls)},
    )


def _compositions(subject: Subject) -> Iterator[tuple[str, list[int]]]:
    """Title and rows of each call."""
    everyone = list(range(len(subject.names)))
    yield "all in one call", everyone
    yield "all in reverse", everyone[::-1]
    rows = _by_length(subject) if subject.tower == "text" else everyone
    for size in subject.batches:
        batch = list(itertools.islice(itertools.cycle(rows), size))
        yield f"batch of {size}", batch
        if subject.tower == "text" and size > 1:  # the short ones, padded to the length of the longest
            yield f"batch of {size}, the longest last", [*batch[:-1], rows[-1]]
            yield f"batch of {size}, the longest first", [rows[-1], *batch[:-1]]


def _by_length(subject: Subject) -> list[int]:
    """The rows of texts, those of the fewest tokens first."""
    assert subject.encoder.spec.tokenizer is not None
    ids = subject.encoder.tokenize(list(subject.inputs.values()), truncate=True)
    ends = (ids == subject.encoder.spec.tokenizer.end_id).argmax(axis=1)
    return [int(row) for row in ends.argsort(kind="stable")]


def ask_threads(subject: Subject) -> Check:
    """Several threads at once, each with inputs of its own, get what each input gives alone."""
    name = f"{subject.tower}: threads"
    count = min(THREADS, len(subject.names))
    start = threading.Barrier(count)

    def work(number: int) -> float:
        rows = list(range(number, len(subject.names), count))
        start.wait()
        return min(float(same_cosines(subject.run(rows), subject.alone[rows]).min()) for _ in range(ROUNDS))

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, number) for number in range(count)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:  # of any kind: a race ends in any of them
        detail = f"{len(errors)} of {count} raised, the first {type(errors[0]).__name__}: {errors[0]}"
        return Check(name=name, passed=False, detail=detail, measured={"threads": count})
    worst = min(future.result() for future in futures)
    passed = worst >= subject.agreement
    found = f"with {count} at once an input has cosine {worst:.7f} to itself alone"
    return Check(
        name=name,
        passed=passed,
        detail=f"{count} at once, {ROUNDS} rounds each" if passed else f"{found}, expected {subject.agreement}",
        measured={"min_cosine": worst, "required": subject.agreement, "threads": count},
    )
