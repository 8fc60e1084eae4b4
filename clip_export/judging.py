"""How far an engine's outputs are from the fp32 graph's: by cosine, by what retrieval finds, and by recall on pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from clip_export import backends
from clip_export.cosine import cosines
from clip_export.feeds import BATCH, Feeds, Samples, golden_feeds
from clip_export.pairs import spread
from clip_export.precision.search import Score
from clip_export.retrieval import Recall, top1_agreement

Outputs: TypeAlias = Sequence[dict[str, np.ndarray]]  # of the batches, one after another

EMBEDDING = "embedding"
SEARCHED_WITH = 32  # held-out inputs that a search looks at; the contract is measured on all of them


def run_graph(path: Path, feeds: Sequence[Feeds]) -> list[dict[str, np.ndarray]]:
    """The outputs of the graph at `path` on the CPU, batch by batch."""
    engine = backends.open_engine("onnxruntime", path)
    try:
        return [engine(batch) for batch in feeds]
    finally:
        engine.close()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the fp32 graph of a tower gives for its golden samples and then for the held-out inputs, batch by batch."""

    feeds: tuple[Feeds, ...]
    outputs: tuple[dict[str, np.ndarray], ...]
    golden: int  # of the batches
    rows: np.ndarray  # which of all held-out inputs these are, int64 [n]

    @classmethod
    def of(cls, samples: Samples) -> Reference:
        """Run the fp32 graph of `samples`' tower."""
        golden = list(golden_feeds(samples.bundle, samples.tower))
        feeds = (*golden, *samples.judges)
        outputs = run_graph(samples.bundle.graph_path(samples.tower), feeds)
        held_out = sum(map(_size, samples.judges))
        return cls(feeds=feeds, outputs=tuple(outputs), golden=len(golden), rows=np.arange(held_out))

    def embeddings(self, outputs: Outputs | None = None) -> np.ndarray | None:
        """Those of the held-out inputs, float32 [n, dim]: the reference's, or those in `outputs`."""
        batches = list(self.outputs if outputs is None else outputs)[self.golden :]
        if not batches or EMBEDDING not in batches[0]:
            return None
        return np.concatenate([batch[EMBEDDING] for batch in batches])

    def spread(self, held_out: int) -> Reference:
        """With about `held_out` of the held-out inputs, in whole batches that are spread evenly over all of them."""
        count = len(self.feeds) - self.golden
        kept = [*range(self.golden), *(self.golden + spread(count, -(-held_out // BATCH)))]
        return dataclasses.replace(
            self,
            feeds=tuple(self.feeds[batch] for batch in kept),
            outputs=tuple(self.outputs[batch] for batch in kept),
            rows=np.concatenate([self.rows[:0], *(self._rows_of(batch) for batch in kept[self.golden :])]),
        )

    def _rows_of(self, batch: int) -> np.ndarray:
        """The places of a batch among the held-out inputs."""
        starts = np.cumsum([0, *(_size(feeds) for feeds in self.feeds[self.golden :])])
        first, last = starts[batch - self.golden], starts[batch - self.golden + 1]
        return self.rows[first:last]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Scores outputs of one tower against `reference`.

    `others` are reference embeddings of the other tower, among which the nearest is looked for; of this one where there
    is no other. `drop` gives by how many points R@1 on pairs falls with this tower's embeddings of the reference's
    held-out inputs, None where there are no pairs.
    """

    reference: Reference
    others: np.ndarray | None = None
    drop: Callable[[np.ndarray], float] | None = None

    def score(self, outputs: Outputs) -> Score:
        """The score of `outputs`, those of the reference's inputs in their order."""
        all_ = np.concatenate(
            [
                # Not NaN: a Score is compared, and written as JSON.
                np.nan_to_num(cosines(found[name], expected[name]), nan=-1.0)
                for found, expected in zip(outputs, self.reference.outputs, strict=True)
                for name in expected
            ]
        )
        agreement, drop = 1.0, None
        found, expected = self.reference.embeddings(outputs), self.reference.embeddings()
        if found is not None and expected is not None:
            agreement = top1_agreement(found, expected, expected if self.others is None else self.others)
            if self.drop is not None:
                drop = self.drop(found)
        return Score(cosine=float(all_.min()), mean_cosine=float(all_.mean()), agreement=agreement, recall_drop=drop)


def recall_drop(found: Recall, expected: Recall) -> float:
    """How much R@1 falls from `expected` to `found`, in points, in the direction in which it falls more."""
    there = expected.image_to_text - found.image_to_text
    back = expected.text_to_image - found.text_to_image
    return round(100 * max(there, back), 6)


def _size(feeds: Feeds) -> int:
    return len(next(iter(feeds.values())))
