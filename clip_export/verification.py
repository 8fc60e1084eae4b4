"""The accuracy contract, and the proof that a bundle keeps it: golden samples through tokenizer, pixels and engine.

Runs without torch: the reference's float32 outputs are in the bundle. `CONTRACTS` is the one table of thresholds.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_export import backends
from clip_export.bundle import Bundle
from clip_export.encoder import Encoder, Floats
from clip_export.errors import BundleIntegrityError
from clip_export.golden import ImageGolden, TextGolden
from clip_export.manifest import REBUILD
from clip_export.progress import Progress, silent
from clip_export.runtime import load
from clip_export.spec import Tower

# Least cosine to the reference in float32, by precision.
CONTRACTS = {"fp32": 0.99999}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One output of one tower against the reference.

    `samples` golden inputs; cosines over them (hidden_states: over every token of each); `max_abs` is the largest
    difference of an output value, of the normalized embedding for `embedding`.
    """

    tower: Tower
    output: str
    precision: str
    samples: int
    min_cosine: float
    mean_cosine: float
    max_abs: float
    required_cosine: float

    @property
    def passed(self) -> bool:
        """Whether the contract is kept. A cosine that is not a number keeps none."""
        return self.min_cosine >= self.required_cosine


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What `verify` found. Token ids and pixels are compared when the bundle is loaded: a difference is an error."""

    name: str
    backend: str
    device: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every row keeps the contract."""
        return all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [{**dataclasses.asdict(row), "passed": row.passed} for row in self.rows]
        return {**dataclasses.asdict(self), "rows": rows, "passed": self.passed}


def verify(
    path: str | os.PathLike[str] | Bundle,
    *,
    backend: str | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Verification:
    """Replay the golden samples of the bundle at `path` and compare with the reference's outputs.

    Raises BundleError, BackendError as `load` does; a contract that is not kept is in the result, not an error.
    """
    bundle = path if isinstance(path, Bundle) else Bundle.open(path)
    chosen = backends.choose(backend)
    golden = bundle.golden()
    rows: list[Row] = []
    with load(bundle, backend=chosen, device=device) as encoder:
        samples = [sample for sample in (golden.text, golden.image) if sample is not None]
        for done, sample in enumerate(samples):
            progress("verify", done, len(samples))
            rows += _compare(encoder, sample)
        progress("verify", len(samples), len(samples))
    return Verification(name=bundle.name, backend=chosen, device=device, rows=tuple(rows))


def _compare(encoder: Encoder, golden: TextGolden | ImageGolden) -> list[Row]:
    if isinstance(golden, TextGolden):
        tower: Tower = "text"
        found = encoder.text_outputs(golden.texts, truncate=True)
    else:
        tower = "image"
        found = encoder.image_outputs(golden.files)
    return [compare(tower, name, found[name], expected) for name, expected in golden.outputs.items()]


def compare(tower: Tower, output: str, found: Floats, expected: Floats, *, precision: str = "fp32") -> Row:
    """`found` against `expected`, float32 [samples, ..., features]; another shape raises BundleIntegrityError."""
    if found.shape != expected.shape:
        message = f"{tower} {output}: the engine gives {list(found.shape)}, the golden samples {list(expected.shape)}"
        raise BundleIntegrityError(message, hint=REBUILD)
    first, second = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (found, expected))
    lengths = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in (first, second)]
    with np.errstate(invalid="ignore", divide="ignore"):  # a zero or infinite row has no cosine: NaN fails
        cosine = (first / lengths[0] * (second / lengths[1])).sum(axis=1)
        if output == "embedding":
            first, second = first / lengths[0], second / lengths[1]
    return Row(
        tower=tower,
        output=output,
        precision=precision,
        samples=len(expected),
        min_cosine=float(cosine.min()),
        mean_cosine=float(cosine.mean()),
        max_abs=float(np.abs(first - second).max()),
        required_cosine=CONTRACTS[precision],
    )
