"""What a report says, before it is set as HTML: plain data, so that whoever measures need not know how it is shown.

A string may hold anything: captions come from users, and engines name themselves. Numbers may be NaN, and are shown so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from clip_export.images import ImageInput

__all__ = [
    "Check",
    "CheckGroup",
    "Environment",
    "Figure",
    "IndexSafety",
    "Item",
    "MeasuredRow",
    "RankFlip",
    "ReportContents",
    "Retrieval",
    "Similarities",
    "Verdict",
]

Floats: TypeAlias = npt.NDArray[np.floating]
Verdict: TypeAlias = Literal["passed", "failed", "not measured"]
Environment: TypeAlias = Sequence[tuple[str, str]]  # ("onnxruntime", "1.23.2"), ("machine", "...")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredRow:
    """One output of one tower on one engine against the reference.

    `cosines` are those behind the figures, float [n], for the histogram: of every sample, or of every token of each;
    empty where there is nothing to draw. `max_abs` is the largest difference of an output value.
    """

    tower: str
    output: str
    precision: str
    engine: str
    samples: int
    min_cosine: float
    p1_cosine: float
    mean_cosine: float
    max_abs: float
    required_cosine: float
    passed: bool
    cosines: Floats = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Item:
    """One text or one image. `text` is the text itself, or what the image is called."""

    text: str = ""
    image: ImageInput | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Similarities:
    """Every image against every text, float [images, texts], by the reference and by what `engine` names.

    At most MAX_SHOWN of each are drawn, and the report says how many there are.
    """

    engine: str
    images: Sequence[Item]
    texts: Sequence[str]
    reference: Floats
    found: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number of the reference and of the engine; None where only one of them has it.

    Shares, 0 to 1, are shown in percent and their difference in points; other numbers (a loss) as they are. `passed`
    is None for what is told and not judged.
    """

    name: str
    reference: float | None
    found: float | None
    share: bool = True
    passed: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankFlip:
    """A query whose right answer changed its place. Ranks count from 1; the firsts are what came first in each."""

    query: Item
    right: Item
    reference_rank: int
    found_rank: int
    reference_first: Item
    found_first: Item


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Retrieval:
    """How pairs find each other: recall both ways, loss, agreement, zero-shot, and the largest flips, worst first."""

    engine: str
    pairs: int
    figures: Sequence[Figure]
    flips: Sequence[RankFlip] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was tried; `passed` is None where it could not be."""

    name: str
    passed: bool | None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckGroup:
    """Checks under one heading: stage by stage, hostile inputs."""

    title: str
    checks: Sequence[Check]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSafety:
    """Whether vectors of this engine may be mixed with those of an existing index."""

    engine: str
    verdict: Verdict
    sentence: str
    figures: Sequence[Figure] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReportContents:
    """All of a report, in the order in which it is shown. What is empty is left out.

    `name` is the bundle's, `sentences` say why the verdict is what it is, `unmeasured` what could not be measured and
    why, `notes` what else there is to know.
    The time is whatever `environment` says, so that equal contents give equal files.
    """

    name: str
    verdict: Verdict
    sentences: Sequence[str]
    rows: Sequence[MeasuredRow] = ()
    checks: Sequence[CheckGroup] = ()
    similarities: Sequence[Similarities] = ()
    retrievals: Sequence[Retrieval] = ()
    indexes: Sequence[IndexSafety] = ()
    unmeasured: Sequence[str] = ()
    notes: Sequence[str] = ()
    environment: Environment = ()
    command: str = ""
