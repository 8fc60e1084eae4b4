"""What `verify` found, and the same as JSON. `KEYS` documents every key of it; a list is written `rows[]`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from clip_export.against import Comparison
from clip_export.asking import Check
from clip_export.encoder import Floats
from clip_export.index_safety import IndexSafety
from clip_export.json_text import json_text
from clip_export.output_file import staged_file, writing
from clip_export.spec import Tower
from clip_export.verification import Row
from clip_export.verifying.ranks import Retrieval

__all__ = ["KEYS", "SCHEMA_VERSION", "EngineRun", "Verdict", "Verification", "write_json"]

SCHEMA_VERSION = 1

Verdict = Literal["passed", "failed", "not measured"]

_ROW = {
    "tower": "text or image",
    "output": "embedding, pooled or hidden_states",
    "precision": "of the graph or plan",
    "engine": "what ran it",
    "samples": "inputs that were compared",
    "min_cosine": "to the reference, of the worst input (hidden_states: of the worst token); null if it is no number",
    "p1_cosine": "the 1st percentile",
    "mean_cosine": "the mean",
    "max_abs": "the largest difference of a value, of embeddings of length 1",
    "required_cosine": "the least that min_cosine may be",
    "passed": "whether it is",
}
_RECALL = "the mean over pairs, 0 to 1, by k and then image_to_text and text_to_image"
KEYS: dict[str, str] = {
    "schema_version": "of this layout: 1",
    "name": "of the bundle",
    "verdict": "passed, failed, or not measured",
    "passed": "whether the verdict is passed",
    "sentences": "why the verdict is what it is, in words",
    "reference": "what the engines were compared with",
    "runs[].engine": "what ran",
    "runs[].precision": "in which precision",
    "runs[].passed": "whether all that was judged of it is as it has to be",
    **{f"runs[].rows[].{key}": f"golden samples: {text}" for key, text in _ROW.items()},
    "runs[].checks[].name": "of a check that needs no reference, or only the fp32 graphs",
    "runs[].checks[].passed": "whether it went as it has to",
    "runs[].checks[].detail": "what was asked, or what is wrong",
    "runs[].checks[].measured": "its figures, by name",
    "runs[].comparison.reference": "the checkpoint, or the library",
    "runs[].comparison.version": "of the library",
    "runs[].comparison.passed": "whether ids and pixels are equal and every row passed",
    "runs[].comparison.notes": "what to know of the comparison",
    "runs[].comparison.stages[].name": "ids or pixels",
    "runs[].comparison.stages[].inputs": "how many were compared",
    "runs[].comparison.stages[].differing": "how many of them differ in any value",
    "runs[].comparison.stages[].first": "the first that differs: input, position, found, expected; null without one",
    "runs[].comparison.stages[].passed": "whether none differs",
    **{f"runs[].comparison.rows[].{key}": f"golden and hostile inputs: {text}" for key, text in _ROW.items()},
    "runs[].comparison.rows[].furthest": "the name of the input with the smallest cosine",
    "runs[].retrieval.source": "the pairs, in words",
    "runs[].retrieval.pairs": "how many",
    "runs[].retrieval.pictures": "of so many different pictures",
    "runs[].retrieval.captions": "and so many different captions",
    "runs[].retrieval.recall": f"R@k of reference, engine and the difference: {_RECALL}",
    "runs[].retrieval.loss": "the symmetric contrastive loss of reference, engine and the difference",
    "runs[].retrieval.agreement": "the share of pairs for which both find the same first, in both directions",
    "runs[].retrieval.flips": "the largest rank flips: direction, ranks, and the pairs by number, picture and caption",
    "runs[].retrieval.zero_shot": "shares of pictures named right by reference and engine; null without labels",
    "runs[].retrieval.recall_drop": "points by which R@1 falls, in both directions",
    "runs[].retrieval.allowed_recall_drop": "points by which it may, at least what one picture or caption makes",
    "runs[].retrieval.passed": "whether it falls by no more",
    "runs[].retrieval.is_reference": "whether the engine is the reference itself",
    "runs[].index": "may new vectors be mixed with those of an index: verdict, missed, figures and their limits",
    "missed": "what precisions that were published below their contract missed when they were built",
    "unmeasured": "what was asked for and could not be measured, with the reason",
    "notes": "what else a reader should know",
    "environment": "pairs of name and value: machine, versions, time",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRun:
    """All that was asked of one engine, which is called `title`; what was not asked for is empty or None.

    `embeddings` are those of the golden samples, float32 [samples, dim], by tower.
    """

    title: str
    precision: str
    rows: tuple[Row, ...]
    checks: tuple[Check, ...] = ()
    comparison: Comparison | None = None
    retrieval: Retrieval | None = None
    index: IndexSafety | None = None
    embeddings: Mapping[Tower, Floats] = field(default_factory=dict, repr=False, compare=False)

    @property
    def failures(self) -> tuple[str, ...]:
        """What is not as it has to be, a sentence for each."""
        found = [
            f"{row.tower} {row.output} is below its contract: min cosine {row.min_cosine:.7f}, "
            f"required {row.required_cosine:.7g}"
            for row in self.rows
            if not row.passed
        ]
        found += [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]
        if self.comparison is not None:
            found += self.comparison.failures
        if self.retrieval is not None and not self.retrieval.passed:
            found += _drops(self.retrieval)
        if self.index is not None and not self.index.safe:
            found.append(self.index.verdict)
        return tuple(found)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as KEYS has it."""
        return {
            "engine": self.title,
            "precision": self.precision,
            "passed": self.passed,
            "rows": [row.to_dict() for row in self.rows],
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
            "retrieval": None if self.retrieval is None else self.retrieval.to_dict(),
            "index": None if self.index is None else self.index.to_dict(),
        }


def _drops(found: Retrieval) -> Iterator[str]:
    both = (
        ("image to text", found.found_by_images, found.drop.image_to_text, found.allowed.image_to_text),
        ("text to image", found.found_by_texts, found.drop.text_to_image, found.allowed.text_to_image),
    )
    for direction, passed, drop, allowed in both:
        if not passed:
            pairs = f"{found.ranks.pairs:,} {found.source}"
            yield f"R@1 {direction} falls by {drop:.2f} points on {pairs}, allowed are {allowed:.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What `verify` found.

    `missed` is precision -> what of its contract it missed when it was built, in the words of the manifest: those that
    were published below it. Held-out inputs are not in a bundle, so golden samples alone cannot clear them.
    `unmeasured` are things asked for that could not be measured here, each with its reason; `notes` is what else to
    know. Token ids and pixels of golden samples are compared when the bundle is loaded: a difference is an error.
    """

    name: str
    reference: str
    runs: tuple[EngineRun, ...]
    missed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unmeasured: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """Golden samples on every engine."""
        return tuple(row for run in self.runs for row in run.rows)

    @property
    def verdict(self) -> Verdict:
        """Failed where anything that was measured is not as it has to be; not measured where anything could not be."""
        if self.missed or not all(run.passed for run in self.runs):
            return "failed"
        return "passed" if self.runs and not self.unmeasured else "not measured"

    @property
    def passed(self) -> bool:
        """Whether everything that was asked for was measured and is as it has to be."""
        return self.verdict == "passed"

    @property
    def sentences(self) -> tuple[str, ...]:
        """Why the verdict is what it is."""
        failed = [f"{run.precision} on {run.title}: {words}" for run in self.runs for words in run.failures]
        failed += [
            f"{name} was published below its contract: {'; '.join(words)}" for name, words in self.missed.items()
        ]
        if failed or self.unmeasured:
            return (*failed, *self.unmeasured)
        engines = "one engine keep" if len(self.runs) == 1 else f"{len(self.runs)} engines keep"
        what = [f"{len(self.rows)} outputs of {engines} the contract of their precision"]
        checks = sum(len(run.checks) for run in self.runs)
        what += [f"{checks} checks of hostile inputs, batches and threads passed"] * bool(checks)
        what += ["ids and pixels equal the original's"] * any(run.comparison is not None for run in self.runs)
        ranked = [run.retrieval for run in self.runs if run.retrieval is not None]
        if ranked:
            alone = all(retrieval.same for retrieval in ranked)
            what.append("pairs were ranked by the reference itself" if alone else "pairs find each other as before")
        what += ["vectors may be mixed with those of the index"] * any(run.index is not None for run in self.runs)
        return (f"{'; '.join(what)}.",)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as KEYS has it; numbers may be NaN."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "verdict": self.verdict,
            "passed": self.passed,
            "sentences": list(self.sentences),
            "reference": self.reference,
            "runs": [run.to_dict() for run in self.runs],
            "missed": {precision: list(words) for precision, words in self.missed.items()},
            "unmeasured": list(self.unmeasured),
            "notes": list(self.notes),
            "environment": [list(pair) for pair in self.environment],
        }


def write_json(found: Verification, path: str | os.PathLike[str]) -> None:
    """Write `found` to `path`, whole or not at all. A number that is not finite is null. Raises OutputError."""
    with staged_file(path) as file, writing(path):
        file.write(f"{json_text(found.to_dict())}\n".encode("ascii"))
