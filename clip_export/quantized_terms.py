"""What a precision of 8 bits is held to: cosines, and R@1 of pairs; and what is said where that is missed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from clip_export.choice import CPU_INT8
from clip_export.errors import ContractError
from clip_export.feeds import Data
from clip_export.judging import Judge, Outputs, Reference, recall_drop
from clip_export.precision.search import Score
from clip_export.quantization import QUANTIZED, SEARCHED, Quantization
from clip_export.quantized_report import QuantizedTower
from clip_export.retrieval import Recall, recall_at
from clip_export.spec import Tower
from clip_export.verification import CONTRACTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the towers of a `precision` have to keep, by what was asked for and the inputs that there are."""

    precision: str
    options: Quantization
    data: Data
    references: Mapping[Tower, Reference]

    @property
    def min_cosine(self) -> float:
        """The least that is published."""
        asked = self.options.min_cosine
        return CONTRACTS[self.precision] if asked is None else asked

    def keeps(self, score: Score) -> bool:
        """Whether a tower with this score may be published."""
        most = self.options.max_recall_drop
        recalls = most is None or (score.recall_drop is not None and score.recall_drop <= most)
        return score.cosine >= self.min_cosine and recalls

    def judge(self, tower: Tower, reference: Reference, made: Mapping[Tower, Outputs]) -> Judge:
        """Judges `tower` on the inputs of `reference`; R@1 beside the other tower as it was `made`, or else in fp32."""
        other = next((name for name in self.references if name != tower), None)
        exact = None if other is None else self.references[other].embeddings()
        own = reference.embeddings()
        if other is None or exact is None or own is None or not self.data.paired:
            return Judge(reference=reference, others=exact)
        beside = self.references[other].embeddings(made[other]) if other in made else exact
        assert beside is not None
        rows, partner = reference.rows, other
        expected = self._recall({tower: own, other: exact[rows]}, rows)

        def drop(found: np.ndarray) -> float:
            return recall_drop(self._recall({tower: found, partner: beside[rows]}, rows), expected)

        return Judge(reference=reference, others=exact, drop=drop)

    def _recall(self, embeddings: Mapping[Tower, np.ndarray], rows: np.ndarray) -> Recall:
        """R@1 of held-out pairs, those in `rows`."""
        names = {tower: self.data.held_out(tower) for tower in self.data.towers}
        captions, pictures = ([names[tower][row] for row in rows] for tower in ("text", "image"))
        return recall_at(embeddings["image"], embeddings["text"], 1, labels=captions, pictures=pictures)

    def pairs(self, outputs: Mapping[Tower, Outputs]) -> dict[str, Any] | None:
        """R@1 of the pairs in fp32 and with both towers quantized, in percent; None where there are no pairs."""
        found = {tower: self.references[tower].embeddings(batches) for tower, batches in outputs.items()}
        expected = {tower: self.references[tower].embeddings() for tower in outputs}
        known = [array for array in (*found.values(), *expected.values()) if array is not None]
        if not self.data.paired or len(known) < 4:
            return None
        rows = np.arange(len(known[0]))
        quantized, reference = (self._recall(cast("dict[Tower, np.ndarray]", each), rows) for each in (found, expected))
        return {
            "count": len(rows),
            "smallest_step": 100 / len(rows),  # in points: R@1 cannot fall by less
            "recall_at_1": {"fp32": dataclasses.asdict(reference), "quantized": dataclasses.asdict(quantized)},
            "recall_drop": recall_drop(quantized, reference),
        }

    def missed(self, scores: Mapping[Tower, Score], pairs: Mapping[str, Any] | None) -> Iterator[str]:
        """What of the contract is not kept, in words."""
        for tower, score in scores.items():
            if not score.cosine >= self.min_cosine:
                found = _below(score.cosine, self.min_cosine)
                yield f"min cosine of the {tower} tower is {found}, required is {self.min_cosine:.7g}"
        most = self.options.max_recall_drop
        if most is not None and (pairs is None or not pairs["recall_drop"] <= most):
            found = "is not known" if pairs is None else f"is {pairs['recall_drop']:.2f} points"
            yield f"the drop of R@1 {found}, allowed are {most:.7g} points"

    def refusal(self, missed: Sequence[str], towers: Mapping[Tower, QuantizedTower], report: Path) -> ContractError:
        """The error for what was `missed`: the layers to blame, the file of the `report`, and what to do instead."""
        worst = [f"{tower} {words}" for tower, made in towers.items() for words in made.worst]
        blamed = f"; worst layers: {', '.join(worst)}" if worst else ""
        for tower, made in towers.items():
            alone = made.found.unquantized
            if alone is not None and not alone.cosine >= self.min_cosine:
                cosine = _below(alone.cosine, self.min_cosine)
                blamed += f"; with nothing quantized the fp16 {tower} tower is at {cosine}"
            elif alone is not None and not self.keeps(alone):
                blamed += f"; with nothing quantized the fp16 {tower} tower loses {alone.recall_drop:.2f} points of R@1"
        searched = self.precision in (*SEARCHED, CPU_INT8)
        search_instead = "autofp8" if QUANTIZED.get(self.precision) == "fp8" else "auto"
        instead = f"--precision {search_instead} leaves the worst layers in fp16"
        if searched or self.options.precision_map is not None:
            instead = "ask for less with --min-cosine"
        hint = f"{instead}; more --calibration inputs may help; --allow-below-contract publishes it marked as such"
        if not any(made.found.mix for made in towers.values()):
            hint = (
                "--precision fp16 is what is left; or ask for less with --min-cosine, or give another --precision-map"
            )
        return ContractError(
            f"{self.precision} misses its contract: {'; '.join(missed)}{blamed}. Nothing is published; the report is "
            f"{report}",
            hint=hint,
        )


def _below(cosine: float, required: float) -> str:
    """A cosine that is less than is required, with as many digits as it takes to see that."""
    text = f"{cosine:.7f}"
    return text if float(text) < float(f"{required:.7g}") else repr(cosine)
