"""The cosine of rows, in which accuracy contracts are stated. In float64: the measure adds no rounding of its own.

A row that is zero or not finite has no cosine, and NaN says so: NaN >= anything is false, so whoever compares with `>=`
lets none pass. `min` of a Python list may drop a NaN, `np.min` does not.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Doubles", "cosines", "unit_rows"]

Floats: TypeAlias = npt.NDArray[np.floating]
Doubles: TypeAlias = npt.NDArray[np.float64]


def cosines(found: Floats, expected: Floats) -> Doubles:
    """Of each row of `found` [..., features] to that of `expected`, of the same shape: [rows], -1 to 1 or NaN.

    Rows are those of the last axis, whatever axes are before it. Raises ValueError for shapes that differ.
    """
    if found.shape != expected.shape:
        raise ValueError(f"cosines of shapes {list(found.shape)} and {list(expected.shape)}, expected the same")
    first, second = (unit_rows(array.reshape(-1, array.shape[-1])) for array in (found, expected))
    result: Doubles = np.einsum("nd,nd->n", first, second)
    return result


def unit_rows(rows: Floats) -> Doubles:
    """The rows of [n, features] at length 1; NaN throughout for one that is zero or not finite."""
    wide = np.array(rows, np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        wide /= np.sqrt(np.einsum("nd,nd->n", wide, wide))[:, None]
    wide[~np.isfinite(wide).all(axis=1)] = np.nan  # all of it: a sum of zeros would pass for a cosine
    return wide
