"""How far two tensors are apart, and how far they may be: the one table of tolerances of `explain`."""

from __future__ import annotations

import numpy as np

from clip_export.cosine import cosines
from clip_export.explaining.explanation import Layer

__all__ = ["TOLERANCES", "measured", "relative_error", "rows"]

# The largest own error of a layer, relative to a position's vector, by precision. fp32 is the reference's own type in
# another order of sums; the others come from the digits of the type, several roundings deep in one stage. Towers of the
# demo that keep their contract stay below half of these (tests/test_explain.py); its text tower in 8 bits does not.
TOLERANCES = {"fp32": 2e-4, "fp16": 2e-2, "fp16all": 2e-2, "bf16": 0.15}
TOLERANCES |= dict.fromkeys(("int8", "int8all", "int8cpu", "auto", "autoall"), 0.25)
TOLERANCES |= dict.fromkeys(("fp8", "autofp8"), 0.4)

# A position whose vector is this much shorter than the longest is measured against this length: nothing reads it.
_SHORTEST = 1e-4


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of a row, the last axis, relative to the length of the expected row.

    NaN or infinite where `found` is. Raises ValueError for shapes that differ.
    """
    first, second = rows(found), rows(expected)
    lengths = np.linalg.norm(second, axis=1)
    floor = max(_SHORTEST * float(lengths.max(initial=0.0)), float(np.finfo(np.float32).tiny))
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.linalg.norm(first - second, axis=1) / np.maximum(lengths, floor)
    return float(errors.max(initial=0.0))


def measured(name: str, found: np.ndarray, own: np.ndarray, expected: np.ndarray, *, tolerance: float) -> Layer:
    """`found` and `own`, what the variant gives freely and from the reference's input, against `expected`."""
    with np.errstate(invalid="ignore", over="ignore"):
        max_abs = float(np.abs(rows(found) - rows(expected)).max(initial=0.0))
    return Layer(
        name=name,
        cosine=float(np.min(cosines(rows(found), rows(expected)))),
        max_abs=max_abs,
        error=relative_error(found, expected),
        own_error=relative_error(own, expected),
        tolerance=tolerance,
    )


def rows(array: np.ndarray) -> np.ndarray:
    """[rows, features] in float64. Four axes are what a convolution gives: channels are the second one."""
    wide = array.astype(np.float64)
    if wide.ndim == 4:
        wide = np.moveaxis(wide, 1, -1)
    return wide.reshape(-1, wide.shape[-1])
