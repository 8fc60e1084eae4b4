"""Zero-shot naming: which of the labels a picture is of, by the nearest of the labels' own embeddings.

A label's embedding is the mean of those of its prompts, each of length 1 (Radford et al. 2021, section 3.1.4,
arXiv:2103.00020). Pictures are counted, not pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_export.cosine import unit_rows
from clip_export.encoder import Floats

__all__ = ["TEMPLATES", "ZeroShot", "label_embeddings", "name_pictures", "zero_shot"]

# CLIP's general prompt, and the seven that its authors found to serve ImageNet best together (the repository
# openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb).
TEMPLATES = (
    "a photo of a {}.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShot:
    """Shares of `pictures`, 0 to 1, that reference and engine name right among `labels`, and name alike."""

    pictures: int
    labels: int
    reference: float
    engine: float
    agreement: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = ("pictures", "labels", "reference", "engine", "agreement")
        return {name: getattr(self, name) for name in names} | {"difference": self.engine - self.reference}


def label_embeddings(labels: Sequence[str], encode: Callable[[Sequence[str]], Floats]) -> Floats:
    """The embedding of each label, [labels, dim]: the mean over TEMPLATES, in float64; NaN where one is no vector."""
    prompts = [template.format(label) for label in labels for template in TEMPLATES]
    rows = unit_rows(encode(prompts)).reshape(len(labels), len(TEMPLATES), -1)
    return rows.mean(axis=1)  # type: ignore[no-any-return]


def name_pictures(images: Floats, labels: Floats) -> np.ndarray:
    """The number of the label nearest to each of `images` [n, dim], int64 [n]; -1 for one that is no vector."""
    near = unit_rows(images) @ unit_rows(labels).T
    named = np.nan_to_num(near, nan=-2.0).argmax(axis=1)
    return np.where(np.isfinite(near).all(axis=1), named, -1)


def zero_shot(expected: np.ndarray, found: np.ndarray, truth: Mapping[int, int], *, labels: int) -> ZeroShot:
    """Compare what a reference names, int64 [n], with what an engine does; `truth` is row -> number of its label."""
    rows = np.array(list(truth), np.int64)
    right = np.array(list(truth.values()), np.int64)
    return ZeroShot(
        pictures=len(rows),
        labels=labels,
        reference=float((expected[rows] == right).mean()),
        engine=float((found[rows] == right).mean()),
        agreement=float(((found[rows] == expected[rows]) & (found[rows] >= 0)).mean()),
    )
