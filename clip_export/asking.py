"""What a check asks and answers: one tower of an opened encoder with named inputs, and a sentence with figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_export.cosine import cosines
from clip_export.encoder import Encoder, Floats
from clip_export.spec import Tower

__all__ = ["Check", "Subject", "few", "same_cosines"]

_SHOWN = 3  # inputs that one sentence names


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question and its answer. `detail` says what was asked, or what is wrong; `measured` has its figures."""

    name: str
    passed: bool
    detail: str
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One tower of `encoder` with the inputs it is asked about, by name.

    `output` is what stands for an embedding: "embedding" at length 1, or another output laid flat. `agreement` is the
    least cosine of one input's rows in two batches, `batches` are the sizes to ask for, and `alone` is what each input
    gives by itself, float32 [n, features], once that is known.
    """

    encoder: Encoder
    tower: Tower
    output: str
    inputs: Mapping[str, Any]
    agreement: float
    batches: tuple[int, ...]
    alone: Floats = field(default_factory=lambda: np.empty((0, 0), np.float32))

    @property
    def names(self) -> list[str]:
        """Of the inputs, in their order."""
        return list(self.inputs)

    def run(self, rows: Iterable[int], encoder: Encoder | None = None) -> Floats:
        """What inputs number `rows` give in one call, in that order: float32 [rows, features].

        `encoder` is another than the subject's own, with the same outputs.
        """
        items = list(self.inputs.values())
        return self._vectors(encoder or self.encoder, [items[row] for row in rows])

    def _vectors(self, encoder: Encoder, items: Sequence[Any]) -> Floats:
        text = self.tower == "text"
        if self.output == "embedding":
            return encoder.encode_text(items, truncate=True) if text else encoder.encode_image(items)
        outputs = encoder.text_outputs(items, truncate=True) if text else encoder.image_outputs(items)
        return outputs[self.output].reshape(len(items), -1)


def few(sentences: Sequence[str]) -> str:
    """The first of `sentences` and how many more there are."""
    more = f"; and {len(sentences) - _SHOWN} more" if len(sentences) > _SHOWN else ""
    return "; ".join(sentences[:_SHOWN]) + more


def same_cosines(found: Floats, expected: Floats) -> npt.NDArray[np.float64]:
    """The cosine of each row to its own in `expected`; -1 where there is none, so that the smallest is the worst."""
    return np.nan_to_num(cosines(found, expected), nan=-1.0)
